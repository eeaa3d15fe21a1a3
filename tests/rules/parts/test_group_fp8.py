"""fp8 with a scale for each group of a row: what it computes, how graphs spell it, what it is fused with and costs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.matching import find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.parts.group_fp8 import per_token_group_fp8_quant
from fuseplan.verification.check import check
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Sizes, cases_of
from tests.helpers import llama, quickly_traced, randn

FP8 = torch.float8_e4m3fn
WIDTH, GROUP = 256, 64
LEAST = 1 / (448.0 * 512.0)
W = 1 + randn(WIDTH, seed=9) / 10
Scale = Callable[[Tensor], Tensor]


def before(amax: Tensor) -> Tensor:
    return amax.clamp(min=1e-10) / 448.0


def behind(amax: Tensor) -> Tensor:
    return (amax / 448.0).clamp(min=1e-12)


def power(amax: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(before(amax))))


BEFORE = float(torch.tensor(1e-10) / 448.0)
SCALES: dict[str, tuple[Any, ...]] = {
    "before": (before, BEFORE, 0.0, False, 0.0, 0.0, None),
    "behind": (behind, 1e-12, 0.0, False, 0.0, 0.0, None),
    "without": (lambda amax: amax / 448.0, 0.0, 0.0, False, 0.0, 0.0, None),
    "both": (lambda amax: before(amax).clamp(min=1e-6), 1e-6, 0.0, False, 0.0, 0.0, None),
    "tensors": (
        lambda amax: torch.maximum(amax / 448.0, torch.full_like(amax, 1e-6)), 1e-6, 0.0, False, 0.0, 0.0, None,
    ),
    "power": (power, BEFORE, 0.0, True, 0.0, 0.0, None),
    "lifted": (
        lambda amax: torch.exp2(torch.ceil(torch.log2(amax / 448.0))).clamp(min=LEAST),
        0.0, 0.0, True, LEAST, 0.0, None,
    ),
    "deep_gemm": (
        lambda amax: torch.pow(2.0, torch.ceil(torch.log2(before(amax).abs()))), BEFORE, 0.0, True, 0.0, 0.0, None,
    ),
}  # fmt: skip


def quantize_groups(
    x: Tensor, scale_of: Scale = before, *, group: int = GROUP, multiplies: bool = False, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """As models spell it."""
    groups = x.view(*x.shape[:-1], -1, group)
    groups = groups.float() if wide else groups
    scale = scale_of(groups.abs().amax(-1, keepdim=True).float())
    scaled = groups.float() * scale.reciprocal() if multiplies else groups.float() / scale
    return scaled.clamp(-448.0, 448.0).to(FP8).view(x.shape), scale.squeeze(-1)


def test_rows_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(RuntimeError, match="unflatten"):
        per_token_group_fp8_quant.reference(randn(3, 100), 64, FP8, 0.0, 0.0, False, 0.0, 0.0, None, "divide", "rows")


NEAR_MISSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "of tensors": (
        lambda x, amax: torch.maximum(amax / 448.0, amax.mean(-1, keepdim=True)),
        "the smallest scale is a tensor (aten.maximum.default), and the op takes a number",
    ),
    "another number": (lambda x, amax: amax / 440.0, "the largest isn't divided by 448 but by 440"),
    "multiplied": (lambda x, amax: amax * (1 / 448.0), "multiplied by 0.00223214, which rounds otherwise"),
    "rounded down": (
        lambda x, amax: torch.exp2(torch.floor(torch.log2(before(amax)))),
        "the scale's exponent is taken by aten.floor.default, and the op rounds it up",
    ),
}


def raised_behind_a_norm(quantize: Callable[[Tensor], Any], weight: Tensor = W) -> CanonicalGraph:
    inputs = randn(5, WIDTH, dtype=weight.dtype)
    return canonicalize(quickly_traced(lambda x: quantize(F.rms_norm(x, (WIDTH,), weight, 1e-5)), inputs))


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_the_op_does_not_compute_is_named(case: str) -> None:
    scale_of, says = NEAR_MISSES[case]
    graph = raised_behind_a_norm(lambda x: quantize_groups(x, lambda amax: scale_of(x, amax)))
    assert f"per_token_group_fp8_quant[{WIDTH}]" not in graph.recognized()
    assert any(says in refusal.detail for refusal in graph.refusals), [each.detail for each in graph.refusals]


def of_another(x: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The scale of something that is made of the magnitudes."""
    groups = x.view(*x.shape[:-1], -1, GROUP)
    scale = behind(change(groups.abs()).amax(-1, keepdim=True).float())
    return (groups.float() / scale).clamp(-448.0, 448.0).to(FP8).view(x.shape), scale.squeeze(-1)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "doubled": lambda y: y * 2, "shifted": lambda y: y + 1, "capped": lambda y: y.clamp(max=0.5),
    "rolled": lambda y: y.roll(1, 0), "of the next": lambda y: y.flip(-2), "of a block": lambda y: y.amax(-2, True),
    "narrowed": lambda y: y.to(torch.float8_e4m3fn).to(torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_scale_of_something_else_is_left_alone(change: str) -> None:
    graph = raised_behind_a_norm(lambda x: of_another(x, CHANGES[change]))
    assert not [name for name in graph.recognized() if "fp8" in name]
    wide = raised_behind_a_norm(lambda x: quantize_groups(x, lambda amax: before(amax.half().float())), W.float())
    assert not [name for name in wide.recognized() if "fp8" in name], "a scale is rounded on the way"


def test_the_least_scale_is_of_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        graph = canonicalize(quickly_traced(lambda x: quantize_groups(F.silu(x) * x, before), randn(5, WIDTH)))
    finally:
        torch.set_default_dtype(torch.float32)
    (node,) = graph.calls(per_token_group_fp8_quant.overload)
    assert node.args[3] == SCALES["before"][1]


def test_a_row_of_one_group_is_a_row() -> None:
    graph = canonicalize(
        quickly_traced(lambda x: quantize_groups(llama(x, None, W)[0], behind, group=WIDTH), randn(5, WIDTH))
    )
    assert f"per_token_group_fp8_quant[{WIDTH}]" not in graph.recognized()


def test_it_is_verified_against_the_graphs_own_nodes() -> None:
    """Groups are a view of rows there, and codes are viewed back."""
    graph = canonicalize(quickly_traced(lambda x: quantize_groups(llama(x, None, W)[0], power), randn(5, WIDTH)))
    rules = {"norm_quant": by_name(BUILT_IN_RULES)["norm_quant"]}
    (match, *_) = find_matches(graph, rules, BUILT_IN_PROVIDERS[:1]).candidates
    region = MatchedRegion.of(graph, match)
    assert region is not None
    (case, *_) = cases_of(match, Sizes(graph.graph), (5, 5))
    assert check(match.rule, "torch", case, seed=1, region=region, free=()).wrong is None
    other = replace(case, arguments={**case.arguments, "ue8m0": False})
    assert "don't compute what the graph does" in str(check(match.rule, "torch", other, seed=1, region=region).wrong)
