"""Norms and activations that are quantised and read as they are, too, such as by the router of a mixture of experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.dialect import KEPT_ACTIVATION_FAMILY, KEPT_NORM_FAMILY
from fuseplan.providers import provider_of
from fuseplan.record import Nearness, Reason, Report
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.check import check
from fuseplan.verification.specs import Case, TensorSpec
from tests.helpers import HIDDEN, all_reduce, llama, quantize, quantize_rows, quickly_traced, randn
from tests.rules.parts.test_group_fp8 import quantize_groups
from tests.rules.test_rules import ALONE, W, compare

FP8 = torch.float8_e4m3fn
SCALE = torch.tensor([0.02])
FORMATS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "static_fp8_quant": lambda y: (quantize(y, SCALE),),
    "dynamic_fp8_quant": quantize_rows,
    "group_fp8_quant": partial(quantize_groups, group=32),
}
EXPERTS, LAYERS, WIDE = 8, 2, 256


def applied(report: Report) -> list[str]:
    return [fusion.op for graph in report.graphs for fusion in graph.applied]


@pytest.mark.sampled
@pytest.mark.parametrize("core", ["rms_norm", "fused_add_rms_norm", "silu_and_mul"])
@pytest.mark.parametrize("reads", ["product", "pointwise", "itself"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_others_read_is_yielded_beside_the_codes(suffix: str, reads: str, core: str) -> None:
    is_norm = core != "silu_and_mul"

    def model(x: Tensor, r: Tensor, weight: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, r if "add" in core else None, weight) if is_norm else (F.silu(x) * r, x)
        read = {"product": F.linear(y, matrix), "pointwise": y.abs() + 1, "itself": y}
        return *FORMATS[suffix](y), read[reads], total * 2

    inputs = randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W, randn(EXPERTS, HIDDEN, seed=2)
    coded = suffix == "dynamic_fp8_quant" and reads == "product"
    report = compare(model, *inputs, rule="norm_quant" if is_norm else "act_quant", ulps=8, coded=coded)
    assert applied(report) == [f"{core}_{suffix}_and_{'norm' if is_norm else 'activation'}"]
    assert not report.near_misses


@pytest.mark.parametrize("residual", [False, True])
def test_behind_an_all_reduce(residual: bool, one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(all_reduce(x, one_rank), r if residual else None, weight)
        return *quantize_rows(y), y.relu(), total * 2

    inputs = randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W
    report = compare(model, *inputs, rule="allreduce_rms_quant", coded=False)
    core = "fused_add_rms_norm" if residual else "rms_norm"
    assert applied(report) == [f"all_reduce_{core}_dynamic_fp8_quant_and_norm"]


@pytest.mark.parametrize(
    ("core", "rule"), [("rms_norm", "norm_quant"), ("fused_add_rms_norm", "norm_quant"), ("silu_and_mul", "act_quant")]
)
def test_where_nobody_reads_it_it_is_not_yielded(core: str, rule: str) -> None:
    """Nor is the op that yields it among the candidates."""

    def model(x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        if core == "silu_and_mul":
            return quantize_rows(F.silu(x) * r)
        y, total = llama(x, r if "add" in core else None, weight)
        return *quantize_rows(y), total * 2

    graph = quickly_traced(model, randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W)
    matches = PostGradPassManager(ALONE[rule]).analyze(graph).matches
    assert {match.rule.op.name for match in matches.candidates} == {f"{core}_dynamic_fp8_quant"}


def test_it_may_be_returned_in_other_strides_than_rows() -> None:
    """It lies in memory of its own, as the graph promises."""

    def model(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = llama(x.transpose(0, 1), None, weight)[0]
        return *quantize_rows(y), y

    x = randn(5, 3, HIDDEN)
    report = compare(model, x, W, rule="norm_quant", coded=False)
    assert applied(report) == ["rms_norm_dynamic_fp8_quant_and_norm"]
    torch._dynamo.reset()
    with torch.inference_mode():
        expected = torch.compile(model)(x, W)
        torch._dynamo.reset()
        got = fuseplan.compile(model, config=ALONE["norm_quant"])(x, W)
    assert [each.stride() for each in got] == [each.stride() for each in expected]


@pytest.mark.parametrize(
    ("value", "rule", "op"),
    [
        (lambda x, r: llama(x, None, W)[0], "norm_quant", "rms_norm_{}_fp8_quant_and_norm"),
        (lambda x, r: F.silu(x) * r, "act_quant", "silu_and_mul_{}_fp8_quant_and_activation"),
    ],
    ids=["norm", "activation"],
)
def test_of_two_quantisations_one_is_fused_and_the_other_one_reads_the_value(value: Any, rule: str, op: str) -> None:
    def model(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        y = value(x, r)
        return *quantize_rows(y), *quantize_groups(y, group=32)

    report = compare(model, randn(7, HIDDEN), randn(7, HIDDEN, seed=1), rule=rule, coded=False)
    (found,) = applied(report)
    assert found in (op.format("dynamic"), op.format("group"))


def test_a_reduced_value_that_is_read_elsewhere_is_one_near_miss(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        reduced = all_reduce(x, one_rank)
        y = llama(reduced, r, weight)[0]
        return *quantize_rows(y), y.relu(), reduced.sin()

    graph = quickly_traced(model, randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W)
    (refusal,) = PostGradPassManager(ALONE["allreduce_rms_quant"]).analyze(graph).matches.refusals
    assert (refusal.reason, refusal.nearness) == (Reason.USERS, Nearness.REFUSED)
    assert refusal.detail.endswith("all_reduce_fused_add_rms_norm_dynamic_fp8_quant_and_norm doesn't yield it")


@torch.library.custom_op("kept_norms::experts", mutates_args=())
def experts(codes: Tensor, scales: Tensor, scores: Tensor) -> Tensor:
    """Stands for a library's quantised experts."""
    groups = codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
    mixed: Tensor = (groups.flatten(-2) * scores.softmax(-1).amax(-1, keepdim=True)).bfloat16()
    return mixed


@experts.register_fake
def _(codes: Tensor, scales: Tensor, scores: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("suffix", "quantise"),
    [("dynamic_fp8_quant", quantize_rows), ("group_fp8_quant", partial(quantize_groups, group=128))],
)
def test_every_layer_of_a_mixture_of_experts(suffix: str, quantise: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """Its router reads what is quantised for the experts, by rows or by groups."""

    def model(x: Tensor, residual: Tensor, weight: Tensor, *routers: Tensor) -> Tensor:
        for router in routers:
            y, residual = llama(x, residual, weight)
            x = experts(*quantise(y), F.linear(y, router))
        return x + residual

    weight = torch.linspace(0.5, 1.5, WIDE).bfloat16()
    inputs = [*(randn(7, WIDE, seed=seed) for seed in (0, 1)), weight]
    inputs += [randn(EXPERTS, WIDE, seed=seed) / 16 for seed in range(2, 2 + LAYERS)]
    report = compare(model, *inputs, rule="norm_quant", ulps=8, coded=False)
    assert applied(report) == [f"fused_add_rms_norm_{suffix}_and_norm"] * LAYERS
    planned = fuseplan.explain(model, *inputs, device="h200")
    assert planned.fused["norm_quant"] == LAYERS
    assert {fusion.provider for fusion in planned.graphs[0].applied} == {"triton"}
    assert not [miss for miss in planned.near_misses if miss.rule == "norm_quant" and miss.nearness is Nearness.REFUSED]


def sound(results: list[Tensor]) -> None:
    """As they are."""


def other_numbers(results: list[Tensor]) -> None:
    """One element in each row of the norm is off by a sixteenth of the largest."""
    results[2][:, 5] += results[2].abs().amax(-1) / 16


def never_written(results: list[Tensor]) -> None:
    """It isn't stored at all."""
    results[2] = torch.empty_like(results[2])


def the_sum(results: list[Tensor]) -> None:
    """In the place of the norm."""
    results[2] = results[3].clone()


OWN: dict[str, dict[str, Any]] = {
    "dynamic_fp8_quant": {
        "dtype": FP8, "min_scale": 1e-6, "max_scale": 0.0, "zero_scale": 0.0, "scale_ub": None,
        "quant_rounding": "divide",
    },
    "mx_fp8_quant": {"group_size": 32, "dtype": FP8, "scaling": "floor", "layout": "rows"},
}  # fmt: skip


def checked(op: Any, spoil: Callable[[list[Tensor]], None], **given: Any) -> str | None:
    """What verification says of an op by its reference, spoilt."""
    rule = next(each for each in BUILT_IN_RULES if each.op is op)

    def kernel(*arguments: Any) -> Any:
        results = list(op.reference(*arguments))
        spoil(results)
        return tuple(results)

    name = f"{op.name}_{spoil.__name__}"
    provider_of(name, {op: kernel}, cost=0.0, uuid=name)
    return check(rule, name, Case(tokens=33, arguments={**given, "rounding": "llama"}), seed=3).wrong


def of_shape(*shape: int) -> TensorSpec:
    stride = torch.empty(shape).stride()
    return TensorSpec(dtype=torch.bfloat16, shape=shape, stride=stride, misalignment=0, device=torch.device("cpu"))


X, WEIGHT = of_shape(33, WIDE), of_shape(WIDE)
KEPT: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Callable[[list[Tensor]], None], ...]]] = {
    "norm": (
        {suffix: KEPT_NORM_FAMILY[False, True, suffix] for suffix in OWN},
        {"x": X, "residual": X, "weight": WEIGHT, "eps": 1e-5}, (other_numbers, never_written, the_sum),
    ),
    "activation": (KEPT_ACTIVATION_FAMILY, {"gate": X, "up": X}, (other_numbers, never_written)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("suffix", OWN)
def test_verification_holds_it_against_the_graphs(suffix: str, kind: str) -> None:
    family, given, wrong = KEPT[kind]
    assert checked(family[suffix], sound, **given, **OWN[suffix]) is None
    for spoil in wrong:
        assert "result 2" in str(checked(family[suffix], spoil, **given, **OWN[suffix])), spoil.__name__
