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
from fuseplan.providers import provider_of
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.memory import make_arguments
from fuseplan.verification.specs import Case, Sizes, cases_of, possible, spec_of
from fuseplan.verification.verifier import _Question
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.interpreted import no_code
from tests.verification.made import spec

WEIGHT = torch.ones(2, HIDDEN).bfloat16()


def inner(x: Tensor, count: Tensor) -> Tensor:
    """All rows but the first ones and the last one."""
    return torch.nn.functional.pad(llama(x[4:-1], None, WEIGHT[0])[0], (0, 16))


def behind(x: Tensor, count: Tensor) -> Tensor:
    """Rows from one on that depends on data."""
    first = count.item()
    torch._check(first >= 0)
    torch._check(first <= x.shape[0])
    return torch.nn.functional.pad(llama(x[first:], None, WEIGHT[0])[0], (0, 16))


@pytest.mark.parametrize("function", [inner, behind])
def test_a_slice_is_checked_where_it_has_rows(function: Any) -> None:
    """It would have less than none at a token, or from the 16th on."""
    reports: list[Any] = []
    config = PassConfig(policy="ordered(act_padding)")
    x, count = randn(9, HIDDEN), torch.tensor(3)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    with no_code(), torch.inference_mode(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = fuseplan.compile(function, config=config, on_report=reports.append)
        assert torch.equal(compiled(x, count), function(x, count))
    assert [each.fused["act_padding"] for each in reports] == [1]
    assert not reports[0].warnings


def test_where_no_size_can_be_the_last_one_says_so() -> None:
    cases = [Case(tokens=5 + rows, arguments={"x": spec(rows, 8, stride=(8, 1))}) for rows in (-3, -2, 3)]
    assert possible(cases) == (cases[2],)
    assert possible(cases[:2]) == (cases[1],)
    assert possible([]) == ()


def two_lengths(tokens: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return tokens + 1, torch.nn.functional.pad(llama(x, None, weight)[0], (0, 16))


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


def test_strides_and_alignment_are_those_of_the_graph() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(x[:, 1 : HIDDEN + 1], residual, weight[1])
        return torch.nn.functional.pad(y, (0, 16)), total

    canonical = canonicalize(post_grad(function, randn(3, 2 * HIDDEN), randn(3, HIDDEN, seed=1), WEIGHT))
    manager = PostGradPassManager(PassConfig(), rules=BUILT_IN_RULES)
    (match,) = manager.analyze(canonical.original, canonical).matches.candidates
    (case,) = cases_of(match, Sizes(canonical.graph), (1, 8192))
    x, weight = case.arguments["x"], case.arguments["weight"]
    assert (x.stride, x.misalignment) == ((2 * HIDDEN, 1), 2)
    assert weight.misalignment == HIDDEN * 2 % 128
    made = make_arguments(case.arguments, ops.fused_add_rms_norm.draw, 0)
    assert made["x"].tensor.stride() == x.stride
    assert made["x"].tensor.data_ptr() % 4 == 2


def test_a_case_is_on_the_device_of_its_first_tensor() -> None:
    arguments = {"eps": 1.0, "x": spec(1, device="cuda:1"), "y": spec(1)}
    assert Case(tokens=1, arguments=arguments).device == torch.device("cuda:1")
    assert Case(tokens=1, arguments={"eps": 1.0}).device == torch.device("cpu")


def test_an_argument_is_as_far_from_a_border_as_in_memory() -> None:
    memory = torch.zeros(4, 100, dtype=torch.bfloat16)
    found = spec_of(memory[1:, 5:], {}, "x", "y")
    assert (found.shape, found.stride, found.misalignment, found.same_as) == ((3, 95), (100, 1), 210 - 128, "x")
    assert spec_of(memory, {}, "x", "x") == spec(4, 100, dtype=torch.bfloat16)


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (2, 1), (3, 2), (4, 2), (9, 2)])
def test_how_the_graph_was_read_is_checked_at_a_size_that_is_neither_small_nor_large(count: int, middle: int) -> None:
    cases = [Case(tokens=tokens, arguments={}) for tokens in range(count)]
    question = _Question(
        match=None, signature="", cases=cases, unfused={}, region=None, free=frozenset(), meets=False, key="",  # type: ignore[arg-type]
        is_stored=True,
    )  # fmt: skip
    assert question.middle is cases[middle]
