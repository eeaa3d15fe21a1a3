"""The arguments that a fused op will be called with, at every size."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.errors import FuseplanWarning
from fuseplan.graph.facts import tensor_of
from fuseplan.matching import Match
from fuseplan.providers import provider_of
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.memory import Guarded, make_arguments
from fuseplan.verification.region import Region
from fuseplan.verification.specs import Case, Sizes, TensorSpec, case_of, cases_of, concrete, spec_of
from fuseplan.verification.verifier import _Question
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.interpreted import no_code

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
    assert case_of(match, Sizes(canonical.graph), 8192).arguments["x"].shape[:2] == (64, 128)
    assert case_of(match, Sizes(canonical.graph), 257).arguments["x"].shape[:2] == (4, 64), "no divisor: as traced"
    assert all(shape[-1] == HIDDEN for shape in shapes)
    assert [shape[0] * shape[1] for shape in shapes] == [8, 24, 32, 64]
    varied = [case_of(match, Sizes(canonical.graph), case.tokens).arguments["x"].shape for case in cases]
    assert [tuple(shape[:2]) for shape in varied] == [(2, 4), (4, 6), (3, 11), (8, 8)]
    assert {case.arguments["weight"].shape for case in cases} == {(HIDDEN,)}
    assert {case.arguments["right"] for case in cases} == {16}


def two_lengths(tokens: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return tokens + 1, torch.nn.functional.pad(llama(x, None, weight)[0], (0, 16))


def test_a_second_length_goes_from_long_to_short() -> None:
    match, canonical = match_of(two_lengths, torch.arange(6), randn(5, HIDDEN), WEIGHT[0], dynamic=True)
    sizes = Sizes(canonical.graph)
    cases = [case_of(match, sizes, tokens) for tokens in sizes.tokens((1, 8192))]
    found = {case.tokens: case.arguments["x"].shape[0] for case in cases}
    assert found == {1: 8191, 6: 5, 7: 8191, 33: 1127, 257: 389, 389: 257, 769: 33, 1127: 33, 8192: 7}
    assert case_of(match, sizes, 6, traced=False).arguments["x"].shape[0] == 8191
    varying = [each for each in sizes.at(1) if len({sizes.at(tokens)[each] for tokens in found}) > 1]
    assert len(varying) == 1, "what is measured and priced varies in tokens alone"


def test_what_the_graph_demands_of_a_size_is_kept() -> None:
    def function(tokens: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[0] % 4 == 0
        assert x.shape[0] <= 600
        return two_lengths(tokens, x, weight)

    match, canonical = match_of(function, torch.arange(6), randn(8, HIDDEN), WEIGHT[0], dynamic=True)
    sizes = Sizes(canonical.graph)
    found = {case_of(match, sizes, tokens).arguments["x"].shape[0] for tokens in sizes.tokens((1, 8192))}
    assert found == {8, 600}


def test_a_kernel_that_is_wrong_at_another_length_of_a_second_input_is_refused() -> None:
    def wrong(x: Tensor, *rest: Any) -> Tensor:
        y: Tensor = ops.rms_norm_pad.reference(x, *rest)
        return y * 2 if x.shape[0] > 100 else y

    reports: list[Any] = []
    torch._dynamo.reset()
    provider = provider_of("wrong_when_long", {ops.rms_norm_pad: wrong}, cost=0.0)
    compiled = fuseplan.compile(
        two_lengths, providers=[provider], on_report=reports.append, dynamic=True,
        config=PassConfig(force=("act_padding:wrong_when_long",)),
    )  # fmt: skip
    inputs = [(torch.arange(6), randn(length, HIDDEN), WEIGHT[0]) for length in (5, 200)]
    with no_code(), torch.inference_mode():
        with pytest.warns(FuseplanWarning, match="wrong_when_long's rms_norm_pad failed verification"):
            compiled(*inputs[0])
        for each in inputs:
            torch.testing.assert_close(compiled(*each), two_lengths(*each), rtol=2**-6, atol=2**-6)
    assert [each.fused["act_padding"] for each in reports] == [0]


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


def spec(*shape: int, stride: tuple[int, ...], device: str = "cpu") -> TensorSpec:
    return TensorSpec(
        dtype=torch.float32, shape=shape, stride=stride, misalignment=0, device=torch.device(device)
    )  # fmt: skip


def test_a_tensor_reaches_from_its_first_element_to_its_last() -> None:
    found = [spec(2, 3, stride=(8, 2)), spec(4, 3, stride=(0, 1)), spec(stride=()), spec(0, 3, stride=(3, 1))]
    assert [each.extent for each in found] == [1 + 8 + 4, 3, 1, 0]


def test_a_case_is_on_the_device_of_its_first_tensor() -> None:
    arguments = {"eps": 1.0, "x": spec(1, stride=(1,), device="cuda:1"), "y": spec(1, stride=(1,))}
    assert Case(tokens=1, arguments=arguments).device == torch.device("cuda:1")
    assert Case(tokens=1, arguments={"eps": 1.0}).device == torch.device("cpu")


def test_an_argument_is_as_far_from_a_border_as_in_memory() -> None:
    memory = torch.zeros(4, 100, dtype=torch.bfloat16)
    found = spec_of(memory[1:, 5:], {}, "x", "y")
    assert (found.shape, found.stride, found.misalignment, found.same_as) == ((3, 95), (100, 1), 210 - 128, "x")
    assert spec_of(memory, {}, "x", "x") == TensorSpec(
        dtype=torch.bfloat16, shape=(4, 100), stride=(100, 1), misalignment=0, device=memory.device
    )


def test_sizes_that_depend_on_data_are_taken_as_some_number() -> None:
    _, canonical = match_of(padded, randn(4, 6, HIDDEN), randn(4, 6, HIDDEN, seed=1), WEIGHT[0], dynamic=True)
    shape = next(node for node in canonical.graph.find_nodes(op="placeholder") if tensor_of(node) is not None)
    size = shape.meta["val"].shape[0]
    symbol = next(iter(size.node.expr.free_symbols))
    assert (concrete(size, {symbol: 7}), concrete(size, {}), concrete("x", {})) == (7, 16, "x")
    sizes = Sizes(canonical.graph)
    assert sizes.tokens((8, 64), traced=False) == (8, 33, 64)
    assert sizes.tokens((1, 8192), traced=False) == (1, 7, 33, 257, 389, 769, 1127, 8192)
    assert sizes.tokens((30, 30)) == (30,)


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (2, 1), (3, 2), (4, 2), (9, 2)])
def test_how_the_graph_was_read_is_checked_at_a_size_that_is_neither_small_nor_large(count: int, middle: int) -> None:
    cases = [Case(tokens=tokens, arguments={}) for tokens in range(count)]
    question = _Question(
        match=None, signature="", cases=cases, unfused={}, region=None, free=frozenset(), meets=False, key="",  # type: ignore[arg-type]
        is_stored=True,
    )  # fmt: skip
    assert question.middle is cases[middle]
