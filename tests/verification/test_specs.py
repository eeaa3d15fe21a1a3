"""The arguments that a fused op will be called with, at every size."""

from typing import Any

import torch
from torch import Tensor

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import Match
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.memory import Guarded, make_arguments
from fuseplan.verification.region import Region
from fuseplan.verification.specs import Sizes, TensorSpec, cases_of
from tests.helpers import HIDDEN, llama, post_grad, randn

WEIGHT = torch.ones(2, HIDDEN).bfloat16()


def padded(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, total = llama(x, residual, weight)
    return torch.nn.functional.pad(y, (0, 16)), total


def match_of(function: Any, *inputs: Tensor, dynamic: bool = False) -> tuple[Match, Any]:
    canonical = canonicalize(post_grad(function, *inputs, dynamic=dynamic))
    manager = PostGradPassManager(PassConfig(), rules=BUILT_IN_RULES)
    (match,) = manager.analyze(canonical.original, canonical).matches.candidates
    return match, canonical


def test_rows_follow_the_tokens_and_nothing_else_does() -> None:
    match, canonical = match_of(padded, randn(4, 6, HIDDEN), randn(4, 6, HIDDEN, seed=1), WEIGHT[0], dynamic=True)
    cases = cases_of(match, Sizes(canonical.graph), (8, 64))
    assert [case.tokens for case in cases] == [8, 24, 33, 64]
    assert Sizes(canonical.graph).tokens((1, 8193)) == (1, 7, 24, 33, 257, 389, 769, 1127, 8191, 8193)
    assert Sizes(canonical.graph).tokens((1, 8192)) == (1, 7, 24, 33, 257, 389, 769, 1127, 8192)
    large = cases_of(match, Sizes(canonical.graph), (1, 8192))
    assert [case.tokens for case in large] == [1, 7, 24, 33], "the reference is right by definition"
    shapes = [case.arguments["x"].shape for case in cases]
    assert all(shape[-1] == HIDDEN for shape in shapes)
    assert [shape[0] * shape[1] for shape in shapes] == [8, 24, 32, 64]
    assert {case.arguments["weight"].shape for case in cases} == {(HIDDEN,)}
    assert {case.arguments["right"] for case in cases} == {16}


def test_a_static_graph_is_checked_at_its_own_size() -> None:
    match, canonical = match_of(padded, randn(3, HIDDEN), randn(3, HIDDEN, seed=1), WEIGHT[0])
    (case,) = cases_of(match, Sizes(canonical.graph), (1, 8192))
    assert case.tokens == 3
    assert case.arguments["x"].shape == (3, HIDDEN)


def test_strides_and_alignment_are_those_of_the_graph() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return padded(x[:, 1 : HIDDEN + 1], residual, weight[1])

    match, canonical = match_of(function, randn(3, 2 * HIDDEN), randn(3, HIDDEN, seed=1), WEIGHT)
    (case,) = cases_of(match, Sizes(canonical.graph), (1, 8192))
    x, weight = case.arguments["x"], case.arguments["weight"]
    assert (x.stride, x.misalignment) == ((2 * HIDDEN, 1), 2)
    assert weight.misalignment == HIDDEN * 2 % 128
    made = make_arguments(case.arguments, ops.fused_add_rms_norm.draw, 0)
    assert made["x"].tensor.stride() == x.stride
    assert made["x"].tensor.data_ptr() % 4 == 2


def test_one_tensor_in_two_places_stays_one() -> None:
    def doubled(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return padded(x, x, weight)

    match, canonical = match_of(doubled, randn(3, HIDDEN), WEIGHT[0])
    if match.values["x"] is match.values["residual"]:
        (case,) = cases_of(match, Sizes(canonical.graph), (1, 8192))
        assert {case.arguments["x"].same_as, case.arguments["residual"].same_as} == {None, "x"}
        made = make_arguments(case.arguments, ops.fused_add_rms_norm.draw, 0)
        assert made["x"] is made["residual"]


def test_expanded_rows_are_one_row() -> None:
    spec = TensorSpec(dtype=torch.bfloat16, shape=(5, 8), stride=(0, 1), misalignment=0, device=torch.device("cpu"))
    made = make_arguments({"x": spec}, ops.rms_norm.draw, 0)["x"]
    assert isinstance(made, Guarded)
    assert made.tensor.stride() == (0, 1)
    assert torch.equal(made.tensor[0], made.tensor[4])
    assert made.buffer.isnan().sum() == made.buffer.numel() - 8
    made.buffer[0] = 1
    assert not made.is_untouched


def test_a_region_is_what_the_match_stands_for() -> None:
    x, residual = randn(3, HIDDEN), randn(3, HIDDEN, seed=1)
    match, canonical = match_of(padded, x, residual, WEIGHT[0])
    region = Region.of(canonical, match)
    assert region is not None
    arguments = {"x": x, "residual": residual, "weight": WEIGHT[0]}
    results = region.evaluate(arguments, {})
    expected, total = padded(x, residual, WEIGHT[0])
    assert results[0] is not None
    assert torch.equal(results[0], expected)
    assert any(each is not None and torch.equal(each, total) for each in results[1:])
