"""Collective kernels, verified by all ranks together: no rank enters one before all are ready to."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fuseplan.distributed import Agreement
from fuseplan.distributed.agreement import lost, refused
from fuseplan.distributed.groups import resolve
from fuseplan.errors import CollectiveError
from fuseplan.graph.facts import dtype_text
from fuseplan.matching import Match
from fuseplan.record import Argument, Pending, PendingCase, Verification
from fuseplan.rules import Rule
from fuseplan.verification.check import Trial
from fuseplan.verification.deadline import AttemptError, DeadlineError, attempt
from fuseplan.verification.outcomes import seed_of
from fuseplan.verification.specs import Case, TensorSpec

T = TypeVar("T")
READY = "ready"
Meet = Callable[[str, str], Agreement]
"""`meet(said, awaited)` sends this rank's message to the other ranks, and returns once all have arrived, with the
verdict on whether they go on. `awaited` describes a rank that doesn't arrive.
"""


def pending_of(match: Match, signature: str, cases: Sequence[Case], unfused: Mapping[str, Any]) -> Pending:
    """A record of the verification that all ranks have to do.

    Raises:
        TypeError: an argument can't be stored as JSON.
    """
    return Pending(
        rule=match.rule.name,
        op=match.rule.op.name,
        ops=match.rule.describe(),
        provider=match.provider,
        signature=signature,
        group=str(match.values["group_name"]),
        cases=tuple(PendingCase(tokens=case.tokens, arguments=_kept(case.arguments)) for case in cases),
        unfused=_kept(unfused),
    )


def shared_seed(signature: str, tokens: int) -> int:
    """A seed that is the same on all ranks, even if their devices' names differ."""
    return seed_of(f"{signature} {tokens}")


def verify_together(
    pending: Sequence[Pending], rules: Sequence[Rule], meet: Meet, deadline_s: float
) -> list[Verification]:
    """An outcome for each, up to the first that is wrong on some rank. All ranks call this at once with the same
    arguments, outside of graph captures.

    Args:
        pending: the verifications to do, in this order.
        rules: rules, including those of `pending`.
        meet: lets all ranks go on together, or none.
        deadline_s: the most seconds for one step, including the compilation of a kernel.

    Raises:
        CollectiveError: a rank is left in a kernel, or in an all-reduce of the unfused ops.
    """
    verified: list[Verification] = []
    for each in pending:
        verified.append(_verified(each, rules, meet, deadline_s))
        if not verified[-1].passed:
            break
    return verified


def _verified(pending: Pending, rules: Sequence[Rule], meet: Meet, deadline_s: float) -> Verification:
    start, group = time.perf_counter_ns(), resolve(pending.group)
    steps, worst, detail = _Steps(pending, meet, deadline_s), 0.0, None
    tokens: list[int] = []
    try:
        for kept in pending.cases:
            trial = _trial(pending, kept, rules, dist.get_rank(group))
            steps.take(trial.draw, kept.tokens)
            steps.take_together(trial.expect, kept.tokens)
            finding = steps.take_together(trial.run, kept.tokens)
            tokens.append(kept.tokens)
            if finding is not None and finding.wrong is not None:
                steps.find(finding.wrong, kept.tokens)
            worst = max(worst, finding.worst or 0.0) if finding is not None else worst
        steps.meet()
    except _ApartError as apart:
        detail = str(apart)
    return Verification(
        rule=pending.rule, op=pending.op, provider=pending.provider, signature=pending.signature, tokens=tuple(tokens),
        passed=detail is None, detail=detail, worst=worst if detail is None else None,
        time_ns=time.perf_counter_ns() - start, ranks=group.size(),
    )  # fmt: skip


class _ApartError(Exception):
    """The ranks don't go on; the text says why."""


class _Steps:
    """The steps of one verification on this rank: an error in a step is reported at the next meeting, and no rank goes
    on after that.
    """

    def __init__(self, pending: Pending, meet: Meet, deadline_s: float) -> None:
        self._meet, self._deadline_s = meet, deadline_s
        self._kernel, self._forbidden = f"{pending.rule} by {pending.provider}", f"{pending.rule}:{pending.provider}"
        self._said = READY
        self._device = Case(tokens=0, arguments=_arguments(pending.cases[0].arguments)).device
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._said = refused(
                f"captures a graph, before which {self._kernel} has to be verified: run the model once before"
            )

    def find(self, wrong: str, tokens: int) -> None:
        """Records the error."""
        self._said = refused(f"found {self._kernel} wrong at {tokens} tokens: {wrong}")

    def meet(self) -> None:
        """Returns once all ranks have arrived without an error.

        Raises:
            _ApartError: a rank has an error, or doesn't arrive in time.
            CollectiveError: a rank is stuck in a step.
        """
        verdict = self._meet(self._said, f"did not come to verify {self._kernel}")
        if verdict.lost:
            raise CollectiveError(
                f"{verdict.reason}; its group's further messages may end up there. Start all ranks again, with a "
                f"longer verify_timeout_s, or forbid {self._forbidden}"
            )
        if not verdict.fused:
            raise _ApartError(verdict.reason)

    def take(self, step: Callable[[], None], tokens: int) -> None:
        """Runs a step without communication between ranks."""
        if self._said != READY:
            return
        try:
            attempt(self._deadline_s, step, self._device)
        except AttemptError as error:
            self.find(str(error), tokens)

    def take_together(self, step: Callable[[], T], tokens: int) -> T | None:
        """Runs a step in which ranks wait for each other, once all of them are ready for it."""
        self.meet()
        try:
            return attempt(self._deadline_s, step, self._device)
        except DeadlineError as error:
            self._said = lost(f"is left in the verification of {self._kernel} at {tokens} tokens: {error}")
        except AttemptError as error:
            self.find(str(error), tokens)
        return None


def _trial(pending: Pending, kept: PendingCase, rules: Sequence[Rule], rank: int) -> Trial:
    names = pending.rule, pending.op, pending.ops
    rule = next(rule for rule in rules if (rule.name, rule.op.name, rule.describe()) == names)
    case = Case(tokens=kept.tokens, arguments=_arguments(kept.arguments))
    seed = shared_seed(pending.signature, kept.tokens)
    return Trial(rule, pending.provider, case, seed=seed, unfused=_arguments(pending.unfused), rank=rank)


def _kept(arguments: Mapping[str, Any]) -> tuple[Argument, ...]:
    return tuple(_argument(name, value) for name, value in arguments.items())


def _argument(name: str, value: Any) -> Argument:
    if isinstance(value, TensorSpec):
        return Argument(
            name=name, dtype=dtype_text(value.dtype), shape=value.shape, stride=value.stride,
            misalignment=value.misalignment, device=str(value.device), same_as=value.same_as,
            fill=None if value.fill is None or not math.isfinite(value.fill) else float(value.fill),
        )  # fmt: skip
    if isinstance(value, torch.dtype):
        return Argument(name=name, dtype=dtype_text(value))
    return Argument(name=name, value=json.dumps(value))


def _arguments(kept: Sequence[Argument]) -> dict[str, Any]:
    return {argument.name: _value(argument) for argument in kept}


def _value(argument: Argument) -> Any:
    if argument.value is not None:
        return json.loads(argument.value)
    assert argument.dtype is not None
    dtype: torch.dtype = getattr(torch, argument.dtype)
    if argument.shape is None:
        return dtype
    assert argument.device is not None
    return TensorSpec(
        dtype=dtype, shape=argument.shape, stride=argument.stride, misalignment=argument.misalignment,
        device=torch.device(argument.device), same_as=argument.same_as, fill=argument.fill,
    )  # fmt: skip
