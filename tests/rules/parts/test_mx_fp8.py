"""MXFP8 as torchao leaves it: each scaling is one op, which computes what the graph does, bit for bit. torchao's own
code is run in `tests/integrations/test_torchao.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.devices import device_profile
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.rules.families import BUILT_IN_RULES, ComposedRule
from fuseplan.rules.parts.mx_fp4 import per_token_mx_fp4_quant
from fuseplan.rules.parts.mx_fp8 import MxFp8, per_token_mx_fp8_quant
from tests.helpers import llama, quickly_traced, randn
from tests.planner.test_rotary import Counted
from tests.rules.parts import test_mx_fp4 as mx_fp4
from tests.rules.parts.microscaling import GROUP, SCALINGS, WIDTH, bits, check_fused, cores, inputs, scaled
from tests.rules.parts.test_nv_fp4 import down_first, from_the_second_row, in_other_tiles, read_twice, to_blocked

FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
W = 1 + randn(WIDTH, seed=9) / 10
CONFIG = fuseplan.PassConfig(policy="ordered(allreduce_rms_quant, norm_quant, act_quant)")
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
every_code = pytest.mark.parametrize("code", [FP8, E5M2], ids=str)


def quantised(
    x: Tensor, scaling: str, *, top: int | None = None, size: int = GROUP, code: torch.dtype = FP8,
    clamped: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    own, half = (8, 1 << 19) if code is FP8 else (15, 1 << 20)
    most = torch.finfo(code).max
    groups, exponent = scaled(x, scaling, most=most, top=own if top is None else top, half=half, size=size)
    if clamped is None:
        clamped = code is E5M2
    groups = groups.clamp(-most, most) if clamped and scaling != "rceil" else groups
    return groups.to(code).reshape(x.shape), exponent


@pytest.mark.sampled
@every_code
@every_scaling
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_scaling_is_an_op(scaling: str, dynamic: bool, code: torch.dtype) -> None:
    graph = canonicalize(
        quickly_traced(lambda x: quantised(llama(x, None, W)[0], scaling, code=code), randn(5, WIDTH), dynamic=dynamic)
    )
    assert graph.recognized() == {f"per_token_mx_fp8_quant[{WIDTH}]": 1, f"rms_norm[{WIDTH}]": 1}
    (node,) = graph.calls(per_token_mx_fp8_quant.overload)
    assert node.args[1:] == (GROUP, code, scaling, "rows")
    assert not [refusal for refusal in graph.refusals if "fp8" in refusal.detail]


@every_code
@every_scaling
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_what_the_graph_does(scaling: str, dtype: torch.dtype, code: torch.dtype) -> None:
    graph = quickly_traced(partial(quantised, scaling=scaling, code=code), randn(6, WIDTH).to(dtype))
    raised = canonicalize(graph)
    is_refused = scaling == "rceil" and dtype is torch.float32
    assert len(raised.dialect_nodes) == (not is_refused)
    constants = {str(node.target): torch.tensor(torch.nan) for node in graph.find_nodes(op="get_attr")}
    ours, theirs = fx.GraphModule(constants, raised.graph), fx.GraphModule(constants, graph)
    for kind, value in inputs().items():
        most = torch.finfo(dtype).max
        x = value.clamp(-most, most).to(dtype) if dtype is torch.float16 else value.to(dtype)
        for got, wanted in zip(ours(x), theirs(x), strict=True):
            assert got.dtype is wanted.dtype
            assert torch.equal(bits(got), bits(wanted)), kind


@pytest.mark.parametrize("scaling", ["floor", "rceil"])
def test_what_is_clamped_is_the_same_op(scaling: str) -> None:
    graph = quickly_traced(partial(quantised, scaling=scaling, clamped=True), randn(6, WIDTH))
    raised = canonicalize(graph)
    assert len(raised.calls(per_token_mx_fp8_quant.overload)) == 1
    assert not raised.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp_max.default)


@pytest.mark.sampled
@every_scaling
@pytest.mark.parametrize("bits_of_codes", [8, 4])
@pytest.mark.parametrize(("rows", "width"), [(5, 192), (128, 128), (130, 160), (1, 96)])
def test_exponents_in_tiles_are_the_ops_own(scaling: str, bits_of_codes: int, rows: int, width: int) -> None:
    check_tiles(scaling, bits_of_codes, rows, width, dynamic=False)


@pytest.mark.parametrize(
    "scaling", ["floor", *(pytest.param(each, marks=pytest.mark.nightly) for each in SCALINGS if each != "floor")]
)
@pytest.mark.parametrize("bits_of_codes", [8, 4])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(5, 192), (130, 160), *(pytest.param(*each, marks=pytest.mark.nightly) for each in ((128, 128), (1, 96)))],
)
def test_exponents_of_any_number_of_rows_in_tiles_are_the_ops_own(
    scaling: str, bits_of_codes: int, rows: int, width: int
) -> None:
    check_tiles(scaling, bits_of_codes, rows, width, dynamic=True)


def check_tiles(scaling: str, bits_of_codes: int, rows: int, width: int, *, dynamic: bool) -> None:
    """What isn't there is zero, whose exponent no group has."""
    kinds: dict[int, tuple[Callable[..., Any], Any]] = {
        8: (quantised, per_token_mx_fp8_quant), 4: (mx_fp4.quantised, per_token_mx_fp4_quant)
    }  # fmt: skip
    quantise, op = kinds[bits_of_codes]

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, exponent = quantise(x, scaling)
        return codes, to_blocked(exponent, flat=rows == 5)

    given = randn(rows, width)
    graph = quickly_traced(function, given, dynamic=dynamic)
    raised = canonicalize(graph)
    (node,) = raised.calls(op.overload)
    assert node.args[-1] == "swizzled"
    assert not raised.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    assert not raised.graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)
    sizes = [rows] * (len(graph.find_nodes(op="placeholder")) - 1)
    constants = {str(each.target): torch.tensor(torch.nan) for each in graph.find_nodes(op="get_attr")}
    for got, wanted in zip(fx.GraphModule(constants, raised.graph)(*sizes, given), function(given), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.equal(bits(got), bits(wanted))


@pytest.mark.parametrize("layout", [in_other_tiles, down_first, from_the_second_row, read_twice])
def test_other_tiles_are_left_to_a_copy(layout: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, exponent = quantised(x, "floor")
        return codes, layout(exponent)

    given = randn(5, 8 * GROUP)
    raised = canonicalize(quickly_traced(function, given))
    (node,) = raised.calls(per_token_mx_fp8_quant.overload)
    assert node.args[-1] == "rows" or layout is read_twice
    for got, wanted in zip(fx.GraphModule({}, raised.graph)(given), function(given), strict=True):
        assert torch.equal(bits(got), bits(wanted))


def test_exponents_that_are_read_as_numbers_too_stay_in_rows() -> None:
    """In tiles they would be computed again for those who read them."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, exponent = quantised(x, "floor")
        return codes, to_blocked(exponent)

    given, aten = randn(5, 8 * GROUP), torch.ops.aten
    graph = quickly_traced(function, given)
    (exponent,) = (
        node.args[0]
        for node in graph.find_nodes(op="call_function", target=aten.view.dtype)
        if node.args[1] is torch.float8_e8m0fnu
    )
    values: Any = graph.output_node().args[0]
    graph.output_node().args = ((*values, exponent),)
    raised = canonicalize(graph)
    (node,) = raised.calls(per_token_mx_fp8_quant.overload)
    assert node.args[-1] == "rows"
    assert not raised.graph.find_nodes(op="call_function", target=aten.amax.default)
    for got, wanted in zip(*(fx.GraphModule({}, each)(given) for each in (raised.graph, graph)), strict=True):
        assert torch.equal(bits(got), bits(wanted))


norm, add_norm, reduced, activated = cores(quantised, W)


def tiled(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    codes, exponent = quantised(x, scaling, code=E5M2)
    return codes, to_blocked(exponent.flatten(0, -2))


@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 5, WIDTH)])
def test_tiles_are_fused_with_every_core(shape: tuple[int, ...], one_rank: str) -> None:
    given = randn(*shape), randn(*shape, seed=1)
    rules = ("norm_quant", "norm_quant", "allreduce_rms_quant", "act_quant")
    for function, rule in zip(cores(tiled, W), rules, strict=True):
        check_fused(function, given, one_rank, rule, CONFIG)


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="exponents lie in 'rows' or 'swizzled', not in 'columns'"):
        ops.per_token_mx_fp8_quant.reference(randn(3, WIDTH), GROUP, FP8, "floor", "columns")


def test_code_of_it_is_right(one_rank: str) -> None:
    check_fused(add_norm, (randn(7, WIDTH), randn(7, WIDTH, seed=1)), one_rank, "norm_quant", CONFIG)


@pytest.mark.parametrize(
    ("function", "rule"),
    [(norm, "norm_quant"), (add_norm, "norm_quant"), (reduced, "allreduce_rms_quant"), (activated, "act_quant")],
)
@pytest.mark.parametrize("shape", [pytest.param((7, WIDTH), marks=pytest.mark.nightly), (2, 5, WIDTH)])
def test_it_is_composed_with_every_core(function: Any, rule: str, shape: tuple[int, ...], one_rank: str) -> None:
    given = randn(*shape), randn(*shape, seed=1)
    check_fused(function, given, one_rank, rule, CONFIG)


@every_scaling
def test_what_two_layers_quantise_each_leaves_nothing_behind(scaling: str) -> None:
    def both(x: Tensor) -> list[Tensor]:
        y = llama(x, None, W)[0]
        found = [quantised(y, scaling) for _ in range(2)]
        return [codes.float() @ torch.ones(WIDTH, 2) * scales.view(torch.uint8).sum() for codes, scales in found]

    graph = quickly_traced(both, randn(5, WIDTH))
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(verify="off", policy="ordered(norm_quant)")
    fuseplan.PostGradPassManager(config, device=device_profile("h200"), on_report=reports.append)(graph)
    assert reports[0].fused["norm_quant"] == 1
    assert not [node for node in graph.nodes if node.op == "call_function" and not node.users]


def test_it_is_left_alone_where_it_is_off() -> None:
    config = fuseplan.PassConfig(fuse_norm_quant=False)
    report = fuseplan.explain(lambda x: norm(x, x, ""), randn(5, WIDTH), device="h200", config=config)
    assert not any(report.fused.values())


def test_it_comes_with_every_member_of_its_families() -> None:
    composed = [rule for rule in BUILT_IN_RULES if isinstance(rule, ComposedRule)]
    assert len([rule for rule in composed if rule.op.name.endswith("_mx_fp8_quant")]) == 5


def of_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.reshape(-1, WIDTH // GROUP, GROUP)
    largest = groups.amax(-1).unsqueeze(-1).float()
    power = (torch.bitwise_right_shift(largest.view(torch.int32), 23) & 255) - 127
    exponent = torch.where(largest.isnan(), 255, ((power - 8).clamp(-127, 128) + 127).to(torch.uint8))
    scale = torch.bitwise_left_shift(exponent.to(torch.int32), 23).view(torch.float32)
    return (groups.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).to(FP8).reshape(x.shape), exponent


def exponents_of(largest: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.view(-1, WIDTH // GROUP, GROUP)
        wanted = groups.abs().amax(-1).unsqueeze(-1).float() / largest
        finite = (torch.ceil(torch.log2(wanted)).clamp(-127, 127) + 127).to(torch.uint8)
        exponent = torch.where(wanted.isnan(), 255, torch.where(wanted.isinf(), 254, finite))
        scaled = groups.float() * torch.exp2(127 - exponent.float())
        return scaled.clamp(-largest, largest).view(x.shape), exponent.view(torch.float8_e8m0fnu)

    return quantise


NEAR_MISSES: dict[Callable[[Tensor], tuple[Tensor, Tensor]], str] = {
    of_signed: "the scale is neither one number nor computed from the largest value it scales",
    partial(quantised, scaling="floor", size=WIDTH): "a row is one group of 128",
    partial(quantised, scaling="floor", top=7): "the scale",
    partial(quantised, scaling="floor", code=E5M2, clamped=False): "what is cast isn't clamped: torch makes infinity",
    partial(quantised, scaling="even", code=E5M2, clamped=False): "what is cast isn't clamped: torch makes infinity",
    partial(quantised, scaling="ceil", code=E5M2, top=14): "the scale",
    partial(quantised, scaling="even", top=2): "the codes are MXFP6 (e2m3), or e2m1 that is converted in another way",
    exponents_of(6.0): "the codes are e2m1 that is converted in another way",
    exponents_of(7.5): "the codes are MXFP6 (e2m3)",
    exponents_of(28.0): "the codes are MXFP6 (e3m2)",
}


@pytest.mark.parametrize("quantise", NEAR_MISSES)
def test_what_it_does_not_compute_is_named(quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    graph = canonicalize(quickly_traced(lambda x: quantise(llama(x, None, W)[0]), randn(5, WIDTH)))
    assert not list(graph.calls(per_token_mx_fp8_quant.overload))
    report = fuseplan.explain(lambda x: quantise(llama(x, None, W)[0]), randn(5, WIDTH), device="b200")
    details = [refusal.detail for each in report.graphs for refusal in each.refusals]
    assert any(NEAR_MISSES[quantise] in detail for detail in details), details


def test_its_reference_launches_no_more_kernels_than_it_is_priced_at() -> None:
    for sample in per_token_mx_fp8_quant.samples:
        arguments = sample.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        with Counted() as counted:
            per_token_mx_fp8_quant.reference(*arguments)
        assert 0 < counted.count <= MxFp8.eager_kernels


def test_what_is_none_of_its_scalings_is_refused() -> None:
    with pytest.raises(ValueError, match="'nearest' is not a valid MxScaling"):
        ops.per_token_mx_fp8_quant.reference(randn(3, WIDTH), GROUP, FP8, "nearest", "rows")
