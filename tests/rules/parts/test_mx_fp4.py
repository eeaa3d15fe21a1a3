"""MXFP4 as torchao leaves it: each scaling is one op, which computes what the graph does, bit for bit. torchao's own
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
from fuseplan.providers import provider_of
from fuseplan.rules.families import BUILT_IN_RULES, ComposedRule
from fuseplan.rules.parts.fp4 import e2m1 as codes_of
from fuseplan.rules.parts.mx_fp4 import MxFp4, per_token_mx_fp4_quant
from tests.helpers import llama, quickly_traced, randn
from tests.planner.test_rotary import Counted
from tests.rules.parts.microscaling import (
    GROUP,
    SCALINGS,
    WIDTH,
    bits,
    check_fused,
    cores,
    e2m1,
    inputs,
    packed,
    scaled,
)

W = 1 + randn(WIDTH, seed=9) / 10
CONFIG = fuseplan.PassConfig(policy="ordered(allreduce_rms_quant, norm_quant, act_quant)")
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
Convert = Callable[[Tensor], Tensor]


def quantised(
    x: Tensor, scaling: str, *, top: int = 2, most: float = 6.0, size: int = GROUP, half: int = 1 << 21,
    convert: Convert = e2m1, pack: Convert = packed,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups, exponent = scaled(x, scaling, most=most, top=top, half=half, size=size)
    return pack(convert(groups.reshape(x.shape))), exponent


@pytest.mark.sampled
@every_scaling
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_scaling_is_an_op(scaling: str, dynamic: bool) -> None:
    graph = canonicalize(
        quickly_traced(lambda x: quantised(llama(x, None, W)[0], scaling), randn(5, WIDTH), dynamic=dynamic)
    )
    assert graph.recognized() == {f"per_token_mx_fp4_quant[{WIDTH}]": 1, f"rms_norm[{WIDTH}]": 1}
    (node,) = graph.calls(per_token_mx_fp4_quant.overload)
    assert node.args[1:] == (GROUP, scaling, "rows")
    assert not graph.refusals


@every_scaling
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_what_the_graph_does(scaling: str, dtype: torch.dtype) -> None:
    graph = quickly_traced(partial(quantised, scaling=scaling), randn(6, WIDTH).to(dtype))
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


def test_every_float_has_the_code_of_its_nearest_number() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    patterns = torch.arange(0, 2**31, 2**13 - 1).int()
    x = torch.cat([patterns.view(torch.float32), (patterns | -(2**31)).view(torch.float32)])
    x = torch.cat([x[x.isfinite()], *(numbers + eps for eps in (0.0, 0.25, -0.25, 0.5, 1.0))])
    away = (x.abs().clamp(max=6.0)[:, None] - numbers).abs()
    nearest = away.amin(-1, keepdim=True)
    codes = codes_of(x)
    even = torch.where(away == nearest, torch.arange(8) + 8 * (torch.arange(8) % 2), 99).argmin(-1)
    assert torch.equal(codes & 7, even.to(torch.uint8))
    assert torch.equal(codes >= 8, x.signbit())


@every_scaling
def test_rows_that_are_apart_in_memory_are_quantised_alike(scaling: str) -> None:
    x = randn(6, 2 * WIDTH)[:, ::2]
    apart = per_token_mx_fp4_quant.reference(x, GROUP, scaling, "rows")
    for got, wanted in zip(
        apart, per_token_mx_fp4_quant.reference(x.contiguous(), GROUP, scaling, "rows"), strict=True
    ):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()


norm, add_norm, reduced, activated = cores(quantised, W)


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
        return [codes.sum(-1) * scales.view(torch.uint8).sum() for codes, scales in found]

    graph = quickly_traced(both, randn(5, WIDTH))
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(verify="off", policy="ordered(norm_quant)")
    fuseplan.PostGradPassManager(config, device=device_profile("b200"), on_report=reports.append)(graph)
    assert reports[0].fused["norm_quant"] == 1
    assert not [node for node in graph.nodes if node.op == "call_function" and not node.users]


def test_a_plan_for_b200_takes_it() -> None:
    report = fuseplan.explain(lambda x: norm(x, x, ""), randn(64, 4096)[:, :WIDTH].contiguous(), device="b200")
    assert report.fused["norm_quant"] == 1
    assert report.saved_us > 0


def test_it_is_left_alone_where_it_is_off() -> None:
    config = fuseplan.PassConfig(fuse_norm_quant=False)
    report = fuseplan.explain(lambda x: norm(x, x, ""), randn(5, WIDTH), device="b200", config=config)
    assert not any(report.fused.values())


def test_it_comes_with_every_member_of_its_families() -> None:
    composed = [rule for rule in BUILT_IN_RULES if isinstance(rule, ComposedRule)]
    members = [rule for rule in composed if rule.op.name.endswith("_mx_fp4_quant")]
    assert len(members) == 5
    assert {rule.op.packed for rule in members} == {(0,)}


def backwards(codes: Tensor) -> Tensor:
    """The first of two in the high half."""
    flat = codes.contiguous().view(-1)
    return (flat[1::2] | flat[::2] << 4).view(*codes.shape[:-1], codes.shape[-1] // 2)


def of_halves(codes: Tensor) -> Tensor:
    """Neighbours are half a tensor apart."""
    flat = codes.contiguous().view(-1)
    count = flat.shape[0] // 2
    return (flat[:count] | flat[count:] << 4).view(*codes.shape[:-1], codes.shape[-1] // 2)


def truncated(x: Tensor) -> Tensor:
    """Without the rounding to the nearest."""
    bits = x.view(torch.int32)
    size = bits & 0x7FFFFFFF
    return (((size - (126 << 23)) >> 22).clamp(0, 7) | ((bits >> 28) & 8)).to(torch.uint8)


SIX = "the codes are MXFP6 (e2m3), or e2m1 that is converted in another way"
DIGIT = "the largest is rounded at another digit than the codes' last"
NEAR_MISSES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], str]] = {
    "a group a row": (partial(quantised, scaling="floor", size=WIDTH), "a row is one group of 128"),
    "the order in a byte": (partial(quantised, scaling="floor", pack=backwards), SIX),
    "halves of a tensor": (partial(quantised, scaling="ceil", pack=of_halves), SIX),
    "truncated": (partial(quantised, scaling="ceil", convert=truncated), SIX),
    "rounded as if to fp8": (partial(quantised, scaling="even", half=1 << 19), DIGIT),
    "divided by 6, truncated": (
        partial(quantised, scaling="rceil", convert=truncated), "the codes are e2m1 that is converted in another way",
    ),
    "e3m2": (partial(quantised, scaling="floor", top=4), "the codes are MXFP6 (e3m2)"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_it_does_not_compute_is_named(case: str) -> None:
    quantise, says = NEAR_MISSES[case]
    graph = canonicalize(quickly_traced(lambda x: quantise(llama(x, None, W)[0]), randn(5, WIDTH)))
    assert not list(graph.calls(per_token_mx_fp4_quant.overload))
    report = fuseplan.explain(lambda x: quantise(llama(x, None, W)[0]), randn(5, WIDTH), device="b200")
    details = [refusal.detail for each in report.graphs for refusal in each.refusals]
    assert any(says in detail for detail in details), details


def test_its_reference_launches_no_more_kernels_than_it_is_priced_at() -> None:
    for sample in per_token_mx_fp4_quant.samples:
        arguments = sample.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        with Counted() as counted:
            per_token_mx_fp4_quant.reference(*arguments)
        assert 0 < counted.count <= MxFp4.eager_kernels


def test_what_is_none_of_its_scalings_is_refused() -> None:
    with pytest.raises(ValueError, match="'nearest' is not a valid MxScaling"):
        ops.per_token_mx_fp4_quant.reference(randn(3, WIDTH), GROUP, "nearest", "rows")


def right(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, exponents = ops.rms_norm_mx_fp4_quant.reference(*arguments)
    return codes, exponents


def two_codes_off(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, exponents = right(*arguments)
    return torch.where((codes & 7) < 6, codes + 2, codes), exponents


def swapped(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, exponents = right(*arguments)
    return codes << 4 | codes >> 4, exponents


def another_exponent(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, exponents = right(*arguments)
    return codes, exponents + 1


def unwritten(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes, exponents = right(*arguments)
    rest = torch.empty_like(codes)
    rest[:, :-1] = codes[:, :-1]
    return rest, exponents


@pytest.mark.parametrize("kernel", [right, two_codes_off, swapped, another_exponent, unwritten])
def test_a_wrong_kernel_is_found_before_it_is_used(kernel: Callable[..., Any]) -> None:
    graph = quickly_traced(lambda x: norm(x, x, ""), randn(5, WIDTH), dynamic=True)
    reports: list[fuseplan.Report] = []
    own = provider_of(f"mx_fp4_{kernel.__name__}", {ops.rms_norm_mx_fp4_quant: kernel}, cost=0.0, uuid=kernel.__name__)
    manager = fuseplan.PostGradPassManager(CONFIG, providers=[own], on_report=reports.append)
    manager(graph)
    (report,) = reports[0].graphs
    (verified,) = report.verified
    assert verified.passed is (kernel is right)
    assert reports[0].fused["norm_quant"] == (kernel is right)
