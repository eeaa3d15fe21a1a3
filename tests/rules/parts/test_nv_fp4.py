"""NVFP4 as torchao leaves it, by a global scale and without one: one op, which computes what the graph does, bit for
bit. torchao's own code is run in `tests/integrations/test_torchao.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fuseplan
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.ops import lay_out
from fuseplan.providers import provider_of
from fuseplan.rules.families import BUILT_IN_RULES, ComposedRule
from fuseplan.rules.parts.nv_fp4 import NvFp4, per_token_nv_fp4_quant
from tests.helpers import all_reduce, llama, quickly_traced, randn
from tests.planner.test_rotary import Counted
from tests.rules.parts.microscaling import WIDTH, bits, check_fused, e2m1, inputs, packed

FP8, GROUP, LEAST = torch.float8_e4m3fn, 16, 2.0**-6
W = 1 + randn(WIDTH, seed=9) / 10
ROWS = randn(5, 1, dtype=torch.float32, seed=3).abs()
CONFIG = fuseplan.PassConfig(policy="ordered(allreduce_rms_quant, norm_quant, act_quant)")
by_either = pytest.mark.parametrize("whole", [None, 0.02])


def quantised(
    x: Tensor, whole: Tensor | None = None, *, least: float = LEAST, size: int = GROUP, limit: float = 6.0,
    convert: Callable[[Tensor], Tensor] = e2m1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(codes, scales) as torchao's `nvfp4_quantize` computes them."""
    groups = x.float().reshape(*x.shape[:-1], -1, size)
    wanted = groups.abs().amax(-1) / limit
    if whole is None:
        scale = wanted.clamp(least, 448.0).to(FP8)
        factor = 1.0 / scale.float()
    else:
        scale = (wanted / whole).clamp(least, 448.0).to(FP8)
        factor = (1.0 / whole) / scale.float()
    return packed(convert((groups * factor.unsqueeze(-1)).clamp(-limit, limit).view(x.shape))), scale


def runnable(graph: fx.Graph) -> fx.GraphModule:
    """With anything for the constants that it names and doesn't read."""
    return fx.GraphModule({str(node.target): torch.tensor(0) for node in graph.find_nodes(op="get_attr")}, graph)


@by_either
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_an_op(whole: float | None, dynamic: bool) -> None:
    def function(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return quantised(llama(x, None, W)[0], None if whole is None else scale)

    graph = canonicalize(quickly_traced(function, randn(5, WIDTH), torch.tensor(1.0), dynamic=dynamic))
    assert graph.recognized() == {f"per_token_nv_fp4_quant[{WIDTH}]": 1, f"rms_norm[{WIDTH}]": 1}
    (node,) = graph.calls(per_token_nv_fp4_quant.overload)
    assert (node.args[1], *node.args[3:]) == (GROUP, LEAST, "rows")
    assert isinstance(node.args[2], fx.Node) is (whole is not None)
    assert not graph.refusals


@by_either
@pytest.mark.parametrize("least", [LEAST, 0.001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_what_the_graph_does(whole: float | None, least: float, dtype: torch.dtype) -> None:
    given = [randn(6, WIDTH).to(dtype), *([torch.tensor(whole)] if whole is not None else [])]
    graph = quickly_traced(partial(quantised, least=least), *given)
    raised = canonicalize(graph)
    assert len(raised.dialect_nodes) == 1
    ours, theirs = runnable(raised.graph), runnable(graph)
    for kind, value in inputs().items():
        most = torch.finfo(dtype).max
        x = value.clamp(-most, most).to(dtype) if dtype is torch.float16 else value.to(dtype)
        for got, wanted in zip(ours(x, *given[1:]), theirs(x, *given[1:]), strict=True):
            assert got.dtype is wanted.dtype
            assert torch.equal(bits(got), bits(wanted)), kind


def to_blocked(scale: Tensor, *, flat: bool = False) -> Tensor:
    """As torchao's, compiled; flat, as it is itself, or as its callers view it."""
    rows, groups = scale.shape
    down, along = (rows + 127) // 128, (groups + 3) // 4
    padded = torch.zeros((128 * down, 4 * along), dtype=scale.dtype)
    padded[:rows, :groups] = scale
    tiles = padded.view(down, 128, along, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4).transpose(1, 2)
    blocked = tiles.reshape(-1, 32, 16).flatten()
    return blocked if flat else blocked.view(32 * down, 16 * along)


@pytest.mark.parametrize(
    ("rows", "width", "dynamic"),
    [
        pytest.param(*each, dynamic, marks=[pytest.mark.nightly] * (dynamic and each not in ((5, 144), (128, 128))))
        for each in ((5, 192), (5, 144), (128, 128), (256, 144), (300, 64), (1, 80))
        for dynamic in (False, True)
    ],
)
def test_scales_in_tiles_are_the_ops_own(rows: int, width: int, dynamic: bool) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantised(x)
        return codes, to_blocked(scale)

    given = randn(rows, width)
    graph = quickly_traced(function, given, dynamic=dynamic)
    raised = canonicalize(graph)
    (node,) = raised.calls(per_token_nv_fp4_quant.overload)
    assert node.args[-1] == "swizzled"
    assert not raised.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    sizes = [rows] * (len(graph.find_nodes(op="placeholder")) - 1)
    for got, wanted in zip(runnable(raised.graph)(*sizes, given), function(given), strict=True):
        assert torch.equal(bits(got), bits(wanted))


def in_other_tiles(scale: Tensor) -> Tensor:
    """Of 64 rows."""
    padded = torch.zeros((64, 8), dtype=scale.dtype)
    padded[:5] = scale
    return padded.view(1, 64, 2, 4).permute(0, 2, 1, 3).reshape(-1, 2, 32, 4).transpose(1, 2).reshape(32, 16)


def down_first(scale: Tensor) -> Tensor:
    padded = torch.zeros((128, 8), dtype=scale.dtype)
    padded[:5] = scale
    return padded.view(1, 128, 2, 4).permute(2, 0, 1, 3).reshape(-1, 4, 32, 4).transpose(1, 2).reshape(32, 32)


def from_the_second_row(scale: Tensor) -> Tensor:
    padded = torch.zeros((128, 8), dtype=scale.dtype)
    padded[1:6] = scale
    return padded.view(1, 128, 2, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4).transpose(1, 2).reshape(32, 32)


def read_twice(scale: Tensor) -> Tensor:
    return to_blocked(scale).view(torch.uint8) + scale.float().sum().to(torch.uint8)


@pytest.mark.parametrize("layout", [in_other_tiles, down_first, from_the_second_row, read_twice])
def test_other_tiles_are_left_to_a_copy(layout: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantised(x)
        return codes, layout(scale)

    given = randn(5, WIDTH)
    raised = canonicalize(quickly_traced(function, given))
    (node,) = raised.calls(per_token_nv_fp4_quant.overload)
    for got, wanted in zip(runnable(raised.graph)(given), function(given), strict=True):
        assert torch.equal(bits(got), bits(wanted))
    if layout is not read_twice:
        assert node.args[-1] == "rows"


def norm(x: Tensor, r: Tensor, scale: Tensor, group: str) -> Any:
    return quantised(llama(x, None, W)[0], scale)


def add_norm(x: Tensor, r: Tensor, scale: Tensor, group: str) -> Any:
    y, total = llama(x, r, W)
    return *quantised(y), total * 2


def reduced(x: Tensor, r: Tensor, scale: Tensor, group: str) -> Any:
    y, total = llama(all_reduce(x, group), r, W)
    return *quantised(y, scale), total * 2


def activated(x: Tensor, r: Tensor, scale: Tensor, group: str) -> Any:
    codes, scales = quantised(F.silu(x) * r, scale)
    return codes, to_blocked(scales.flatten(0, -2))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("function", "rule"),
    [(norm, "norm_quant"), (add_norm, "norm_quant"), (reduced, "allreduce_rms_quant"), (activated, "act_quant")],
)
@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 5, WIDTH)])
def test_it_is_composed_with_every_core(function: Any, rule: str, shape: tuple[int, ...], one_rank: str) -> None:
    given = randn(*shape), randn(*shape, seed=1), torch.tensor(0.02)
    check_fused(function, given, one_rank, rule, CONFIG)


def test_what_two_layers_quantise_each_is_one() -> None:
    def both(x: Tensor, scale: Tensor) -> list[Tensor]:
        y = llama(x, None, W)[0]
        found = [quantised(y, scale) for _ in range(2)]
        return [codes.sum(-1) * scales.float().sum() for codes, scales in found]

    report = fuseplan.explain(both, randn(5, WIDTH), torch.tensor(0.02), device="b200", config=CONFIG)
    assert report.fused["norm_quant"] == 1


def test_a_plan_for_b200_takes_it_unless_it_is_off() -> None:
    for on in (True, False):
        config = fuseplan.PassConfig(fuse_norm_quant=on)
        report = fuseplan.explain(
            lambda x: quantised(llama(x, None, W)[0]), randn(64, WIDTH), device="b200", config=config
        )
        assert any(report.fused.values()) is on
        assert (report.saved_us > 0) is on


def test_it_comes_with_every_member_of_its_families() -> None:
    composed = [rule for rule in BUILT_IN_RULES if isinstance(rule, ComposedRule)]
    members = [rule for rule in composed if rule.op.name.endswith("_nv_fp4_quant")]
    assert len(members) == 5
    assert {rule.op.packed for rule in members} == {(0,)}


def of_all_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantised(x, x.abs().amax().float() / 2688.0)


def of_every_row(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().view(-1, WIDTH // GROUP, GROUP)
    scale = (groups.abs().amax(-1) / 6.0 / ROWS).clamp(LEAST, 448.0).to(FP8)
    factor = (1.0 / ROWS) / scale.float()
    return packed(e2m1((groups * factor.unsqueeze(-1)).clamp(-6.0, 6.0).view(x.shape))), scale


def divided(x: Tensor) -> tuple[Tensor, Tensor]:
    """By the scale, not multiplied by its reciprocal."""
    groups = x.float().view(-1, WIDTH // GROUP, GROUP)
    scale = (groups.abs().amax(-1) / 6.0).clamp(LEAST, 448.0).to(FP8)
    return packed(e2m1((groups / scale.float().unsqueeze(-1)).clamp(-6.0, 6.0).view(x.shape))), scale


def of_another_axis(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().view(-1, WIDTH // GROUP, GROUP)[..., :8]
    scale = (groups.abs().amax(-1) / 6.0).clamp(LEAST, 448.0).to(FP8)
    factor = (1.0 / scale.float()).view(scale.shape[0], 1, scale.shape[1])
    return packed(e2m1((groups * factor).clamp(-6.0, 6.0).view(-1, WIDTH // 2))), scale


def truncated(x: Tensor) -> Tensor:
    return (x.abs() * 2).clamp(max=7).to(torch.uint8)


OTHERWISE = "codes in e2m1, or their scales, are computed in another way"
NEAR_MISSES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], str]] = {
    "a scale of all": (of_all_rows, "the global scale is computed from all rows at once, and the op is given it"),
    "a scale a row": (of_every_row, "the global scale is float32[5, 1], and the op's is one element in float32"),
    "divided": (divided, OTHERWISE),
    "another axis": (of_another_axis, "what it scales"),
    "truncated": (partial(quantised, convert=truncated), OTHERWISE),
    "a scale of zero": (partial(quantised, least=0.0), "the smallest scale is 0, and the op's is above 0"),
    "a negative scale": (partial(quantised, least=-1.0), "the smallest scale is -1, and the op's is above 0"),
    "a group a row": (partial(quantised, size=WIDTH), f"a row is one group of {WIDTH}"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_it_does_not_compute_is_named(case: str) -> None:
    quantise, says = NEAR_MISSES[case]
    inputs = randn(5, WIDTH)
    graph = canonicalize(quickly_traced(lambda x: quantise(llama(x, None, W)[0]), inputs))
    assert not list(graph.calls(per_token_nv_fp4_quant.overload))
    report = fuseplan.explain(lambda x: quantise(llama(x, None, W)[0]), inputs, device="b200")
    details = [refusal.detail for each in report.graphs for refusal in each.refusals]
    assert any(says in detail for detail in details), details
    assert not any("fp8 quantisation" in detail for detail in details), details


def test_its_reference_launches_no_more_kernels_than_it_is_priced_at() -> None:
    for sample in per_token_nv_fp4_quant.samples:
        arguments = sample.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        with Counted() as counted:
            per_token_nv_fp4_quant.reference(*arguments)
        assert 0 < counted.count <= NvFp4.eager_kernels


def right(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, scales = ops.rms_norm_nv_fp4_quant.reference(*arguments)
    return codes, scales


def two_codes_off(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, scales = right(*arguments)
    return torch.where((codes & 7) < 6, codes + 2, codes), scales


def without_the_global_scale(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, _, least, layout = arguments
    return right(x, *rest, None, least, layout)


def unwritten(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, scales = right(*arguments)
    rest = torch.empty_like(scales)
    rest[:, :-1] = scales[:, :-1]
    return codes, rest


@pytest.mark.parametrize("kernel", [right, two_codes_off, without_the_global_scale, unwritten])
def test_a_wrong_kernel_is_found_before_it_is_used(kernel: Callable[..., Any]) -> None:
    graph = quickly_traced(lambda x, scale: norm(x, x, scale, ""), randn(5, WIDTH), torch.tensor(0.02), dynamic=True)
    reports: list[fuseplan.Report] = []
    own = provider_of(f"nv_fp4_{kernel.__name__}", {ops.rms_norm_nv_fp4_quant: kernel}, cost=0.0, uuid=kernel.__name__)
    fuseplan.PostGradPassManager(CONFIG, providers=[own], on_report=reports.append)(graph)
    (verified,) = reports[0].graphs[0].verified
    assert verified.passed is (kernel is right)
    assert reports[0].fused["norm_quant"] == (kernel is right)


def test_layouts_of_other_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="lie in 'rows' or 'swizzled', not in 'columns'"):
        per_token_nv_fp4_quant.reference(randn(3, WIDTH), GROUP, None, LEAST, "columns")
    with pytest.raises(ValueError, match=r"scales in torch\.float32 have no layout 'swizzled', which is of bytes"):
        lay_out(torch.ones(3, 4), "swizzled")
