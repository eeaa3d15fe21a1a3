"""`check_rule`: what it lets pass, what it finds, and what it says to do."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan import testing
from fuseplan.dialect import define, ops
from fuseplan.errors import FuseplanError, VerificationError
from fuseplan.providers import provider_of
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Bindings, Rule
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.families.attention import ATTENTION_RULES
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.testing import check_rule
from tests.rules.test_rules import arguments_of, rule_id
from tests.verification.fused_norm import (
    FAULTS,
    AddNormRelu,
    Kernel,
    add_norm_relu,
    hangs,
    provider,
    reference,
    right,
    wrong_above_4096,
)

# Attention isn't made of rows, which are varied here: tests of its own hold it.
CHECKED = [rule for rule in BUILT_IN_RULES if rule not in (*ATTENTION_RULES, *CACHED_ATTENTION_RULES)]
BY_DAY = [rule for rule in CHECKED if not re.search("fused_add|all_reduce.*quant", rule.op.name)]
"""Each part of a composed rule, on one sample, of which all is varied: `test_pattern_and_replacement_compute_the_same`
has all rules on all samples.
"""

VARIATIONS = 12
"""Of the first sample: five numbers of rows, three dtypes, four layouts."""


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        *(pytest.param(rule, 1, id=f"{rule_id(rule)}-one sample") for rule in BY_DAY),
        *(pytest.param(each, len(each.op.samples), id=rule_id(each), marks=pytest.mark.nightly) for each in CHECKED),
    ],
)
def test_built_in_rules_hold(rule: Rule, count: int, one_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_whole = count == len(rule.op.samples) and not getattr(rule, "transposes", False)
    if count == 1:  # references are run again at night: no race is to be found in torch's ops on one thread
        monkeypatch.setattr(testing, "repeated", lambda *_, **__: True)
    checked = check_rule(rule, samples=None if is_whole else arguments_of(rule, torch.device("cpu"))[:count])
    assert checked.cases["torch"] + len(checked.refused) == count + VARIATIONS
    assert all("_cache has gaps or overlaps" in each for each in checked.refused)  # what is written has to be whole
    assert len(checked.refused) <= 2 * len(rule.op.writes)


SMALL = {
    "x": torch.empty(3, 48).bfloat16(), "residual": torch.empty(3, 48).bfloat16(),
    "weight": torch.empty(48).bfloat16(), "eps": 1e-5, "rounding": "llama",
}  # fmt: skip
"""One set of arguments, with all that is varied of it, for what doesn't need the samples of the op too."""


def test_a_right_kernel_holds() -> None:
    mine = provider(right)
    assert check_rule(AddNormRelu(), providers=[mine]).cases == {mine.name: 23}
    assert check_rule(AddNormRelu(), providers=[mine], samples=[SMALL]).cases == {mine.name: 13}


def picky(x: Tensor, *rest: Any) -> Any:
    if x.shape[0] == 257:
        raise ValueError("257 rows are too many")
    return right(x, *rest)


CALLS = itertools.count()


def racing(x: Tensor, *rest: Any) -> Any:
    y, total = reference(x, *rest)
    y.view(torch.int16)[0, 0] ^= next(CALLS) % 2
    return y, total


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        *((each, r"\d+ checks? failed\n") for each in FAULTS if each not in (hangs, wrong_above_4096)),
        (picky, r"1 check failed\n.*ValueError: 257 rows are too many\. .*What to do: fix the error, or refuse these"),
        (racing, r"\d+ checks failed\n.*determinism, .*: equal arguments give different bits"),
    ],
)
def test_a_wrong_kernel_fails_with_advice(kernel: Kernel, says: str) -> None:
    with pytest.raises(VerificationError, match=rf"add_norm_relu \(add_norm_relu\): {says}") as failure:
        check_rule(AddNormRelu(), providers=[provider(kernel)], samples=[SMALL])
    assert all("What to do: " in line for line in str(failure.value).splitlines()[1:])


def test_what_a_provider_refuses_is_left_out_and_told() -> None:
    def only_bfloat16(m: Bindings) -> Refusal | None:
        if m.x.dtype is not torch.bfloat16:
            return Refusal(reason=Reason.DTYPE, detail=f"takes bfloat16, not {m.x.dtype}")
        return None if m.x.is_contiguous() else Refusal(reason=Reason.LAYOUT, detail="takes contiguous activations")

    def kernel(x: Tensor, *rest: Any) -> Any:
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        return reference(x, *rest)

    mine = provider(kernel, accepts=only_bfloat16)
    checked = check_rule(AddNormRelu(), providers=[mine], samples=[SMALL])
    assert 0 < checked.cases[mine.name] < 13
    assert any("takes bfloat16, not torch.float16" in line for line in checked.refused)
    assert any("takes contiguous activations" in line for line in checked.refused)


def test_what_runs_nothing_is_no_success() -> None:
    def nothing(m: Bindings) -> Refusal | None:
        return Refusal(reason=Reason.SIZE, detail="takes nothing")

    with pytest.raises(VerificationError, match=r"nothing could be run: .*takes nothing"):
        check_rule(AddNormRelu(), providers=[provider(right, accepts=nothing)], samples=[SMALL])
    with pytest.raises(FuseplanError, match="no provider that is available here implements add_norm_relu; given: none"):
        check_rule(AddNormRelu(), providers=[])


class Dropping(AddNormRelu):
    """vLLM #51477, #43676: its replacement drops an attribute."""

    name = "dropping"

    def replacement(self, x: Any, residual: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        fused = add_norm_relu(x, residual, weight, 1e-2, rounding)
        return fused[0], fused[1]


def test_case_7_sides_that_disagree_fail() -> None:
    with pytest.raises(VerificationError, match=r"dropping .*\n.*agreement, .*: result 0: element .* off by"):
        check_rule(Dropping(), providers=[provider(right)])


def settles_a_size(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(int(x.shape[0]), *x.shape[1:]), torch.empty_like(x)


specialised = define(
    "add_norm_relu_specialised", add_norm_relu.schema, reference=reference, fake=settles_a_size,
    samples=ops.fused_add_rms_norm.samples, draws=ops.fused_add_rms_norm.draws, fused=True,
)  # fmt: skip


class Specialised(AddNormRelu):
    """One whose fake implementation has one size."""

    name, op = "specialised", specialised

    def replacement(self, x: Any, residual: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        fused = specialised(x, residual, weight, eps, rounding)
        return fused[0], fused[1]


def test_a_fake_that_settles_a_size_fails() -> None:
    with pytest.raises(VerificationError, match=r"symbolic sizes, .*no int\(\)"):
        check_rule(Specialised(), providers=[provider_of("specialised", {specialised: reference})], samples=[SMALL])
