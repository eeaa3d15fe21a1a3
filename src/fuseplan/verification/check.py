"""Checks one rule by one provider on one set of arguments, against the unfused ops."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseplan.dialect import DialectOp, ops
from fuseplan.distributed.workspace import loopback
from fuseplan.rules import Rule
from fuseplan.verification.compare import bits, compare, described
from fuseplan.verification.evaluate import exact, fused, reference
from fuseplan.verification.layout import misplaced, shares, significant_strides
from fuseplan.verification.memory import (
    Gathered,
    Guarded,
    Loopback,
    Poisoned,
    make_arguments,
    poison_allocator,
    unguarded,
)
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Case, undrawn
from fuseplan.verification.steps import Stepped


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of a check on one set of arguments.

    Attributes:
        wrong: the error, with its numbers; None: no error.
        worst: the largest deviation as a share of the allowed one.
    """

    wrong: str | None
    worst: float | None = None


def check(
    rule: Rule,
    provider: str,
    case: Case,
    *,
    seed: int,
    unfused: Mapping[str, Any] | None = None,
    region: MatchedRegion | None = None,
    free: Collection[int] = (),
    rank: int | None = None,
) -> CheckResult:
    """Runs both sides of a rule on fresh random arguments, in poisoned memory.

    Args:
        rule: the fusion.
        provider: the provider of the fused op's kernel.
        case: the arguments.
        seed: equal seeds draw equal arguments.
        unfused: plain values of the graph that replace those of the case, where a kernel rounds elsewhere.
        region: the region of the graph that the match replaces, if there is one: its values are compared with the same
            exact values, and the kernel's results must have its strides, offsets and aliasing.
        free: indices of results whose layout nothing in the graph reads, or that it gets as copies.
        rank: the rank of this process among those that check in lock step, with one seed: tensors that are summed over
            the ranks are drawn anew on each. None: this process checks alone, as if all ranks had its values.

    Raises:
        Exception: any error of the kernel.
    """
    trial = Trial(rule, provider, case, seed=seed, unfused=unfused, rank=rank)
    trial.draw()
    trial.expect()
    return trial.run(region, free)


class Trial:
    """`check` in steps, to be run in this order; only `expect` and `run` communicate with other ranks."""

    def __init__(
        self, rule: Rule, provider: str, case: Case, *, seed: int, unfused: Mapping[str, Any] | None, rank: int | None
    ) -> None:
        self.rule, self.provider, self.case = rule, provider, case
        self.seed, self.unfused, self.rank = seed, unfused or {}, rank
        self.stepped = Stepped.of(rule)

    def draw(self) -> None:
        """Makes the arguments."""
        self.inputs, self.guarded = _fresh(self.rule, self.case, self.seed, self.rank)

    def expect(self) -> None:
        """Runs the unfused ops in their own dtypes and in float64."""
        graphs = {**self.inputs, **self.unfused}
        with torch.no_grad(), _meeting(self.rank):
            quantised = self.stepped.node if self.stepped is not None else None
            self.expected, self.given = reference(self.rule, graphs, quantised)
            self.precise, self.given_exactly = exact(self.rule, graphs, quantised)

    def run(self, region: MatchedRegion | None = None, free: Collection[int] = ()) -> CheckResult:
        """Runs the kernel and, if there is one, the region of the graph that the match replaces."""
        rule, inputs, expected = self.rule, self.inputs, self.expected
        watch = _Watched(rule.op, rule.op.kernel(self.provider), self.guarded)
        with torch.no_grad():  # no mode during comparisons, which take thousands of ops
            for device in {each.device for each in expected}:
                poison_allocator(device, max(each.nbytes for each in expected))
            try:
                with _meeting(self.rank), Poisoned():
                    actual = fused(rule, inputs, watch)
            except _MisbehavedError as error:
                return CheckResult(wrong=str(error))
            wrong = _of_another_kind(rule, inputs, actual, expected)
            if wrong is not None:
                return CheckResult(wrong=wrong)
            finding = self._compared(actual, "")
            if finding.wrong is None and region is not None:
                with _meeting(self.rank):
                    unraised = region.evaluate(inputs, self.case.symbols)
                wrong = self._compared(unraised, READ_WRONG).wrong
                wrong = wrong or misplaced(actual, unraised, inputs, free)
                return replace(finding, wrong=wrong)
            return finding

    def _compared(self, actual: Sequence[Tensor | None], prefix: str) -> CheckResult:
        rule, kinds = self.rule, _of_other_kinds(actual, self.expected)
        if kinds is not None:
            return CheckResult(wrong=prefix + kinds)
        if self.stepped is not None:
            actual, wrong = self.stepped.settled(
                actual, self.expected, self.given, self.given_exactly, rule.op.error_factor
            )
            if wrong is not None:
                return CheckResult(wrong=prefix + wrong)
        return _compared(rule, actual, self.expected, self.precise, prefix)


def repeated(rule: Rule, provider: str, case: Case, *, seed: int, times: int = 3) -> bool:
    """Whether equal arguments give equal bits every time; different bits mean a race."""
    runs = []
    with torch.no_grad(), _meeting(None):
        for _ in range(times):
            inputs, _ = _fresh(rule, case, seed)
            with Poisoned():
                runs.append(fused(rule, inputs, _on_copies(rule.op, rule.op.kernel(provider))))
        return all(torch.equal(bits(a), bits(b)) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def call_without_data(rule: Rule, provider: str, case: Case) -> None:
    """Calls a kernel like `check`, with arguments of any content, for callers that inspect its launches."""
    with torch.no_grad(), _meeting(None):
        fused(rule, undrawn(case), rule.op.kernel(provider))


@contextlib.contextmanager
def _meeting(rank: int | None) -> Iterator[None]:
    """Runs all-reduces as if every rank had this one's values; given a rank, runs them with all ranks."""
    if rank is not None:
        with Gathered():
            yield
        return
    with Loopback(), loopback():
        yield


READ_WRONG = "the unfused ops don't compute what the graph does: "


def _of_other_kinds(actual: Sequence[Tensor | None], expected: Sequence[Tensor]) -> str | None:
    for index, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        if got is not None and (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            return f"result {index} is {described([got])} and not {described([wanted])}"
    return None


def _compared(
    rule: Rule, actual: Sequence[Tensor | None], expected: Sequence[Tensor], precise: Sequence[Tensor], prefix: str
) -> CheckResult:
    worst = 0.0
    for index, (got, wanted, true) in enumerate(zip(actual, expected, precise, strict=True)):
        if got is None:
            continue
        deviation = compare(got, wanted, true, rule.op.error_factor, is_packed=index in rule.op.packed)
        worst = max(worst, deviation.share)
        if deviation.share > 1:
            share = deviation.share if math.isfinite(deviation.share) else None
            return CheckResult(wrong=f"{prefix}result {index}: {deviation.text}", worst=share)
    return CheckResult(wrong=None, worst=worst)


def _fresh(rule: Rule, case: Case, seed: int, rank: int | None = None) -> tuple[dict[str, Any], list[Guarded]]:
    """Random arguments, and the buffers that hold them."""
    made = make_arguments(case.arguments, rule.op.draw, seed)
    if rank is not None:
        own = make_arguments(case.arguments, rule.op.draw, seed + 1 + rank)
        made.update({name: own[name] for name in _summed(rule)})
    return unguarded(made), [value for value in made.values() if isinstance(value, Guarded)]


def _summed(rule: Rule) -> list[str]:
    """The variables of a rule that are summed over the ranks, and so differ between them."""
    traced = rule.traced_pattern
    called = ((node, ops.of(node.target)) for node in traced.graph.nodes)
    read = {node.args[0] for node, op in called if op is not None and op.collective}
    return [name for name, node in traced.inputs.items() if node in read]


class _MisbehavedError(Exception):
    """A kernel didn't behave like a function of its arguments."""


class _Watched:
    """A kernel, watched for behaviour that a function of its arguments doesn't have."""

    def __init__(self, op: DialectOp, kernel: Callable[..., Any], guarded: Sequence[Guarded]) -> None:
        self.op, self.kernel, self.guarded = op, kernel, guarded

    def __call__(self, *args: Any) -> Any:
        # It writes to copies, since others run on these arguments too.
        copies = {name: self._guarding(given).copied() for name, given in self._written_of(args)}
        given = [
            copies[name].tensor if name in copies else each for name, each in zip(self.op.arguments, args, strict=True)
        ]
        results = self.kernel(*given)
        yielded = list(results) if isinstance(results, (tuple, list)) else [results]
        wrong = self._misshaped(yielded) or self._shared(given, yielded) or self._written(args)
        beyond = [name for name, each in copies.items() if not each.is_written_inside]
        if wrong is None and beyond:
            wrong = f"the kernel writes beyond the elements of its argument {beyond[0]}"
        if wrong is not None:
            raise _MisbehavedError(wrong)
        return (*yielded, *(each.tensor.clone() for each in copies.values())) if copies else results

    def _written_of(self, args: Sequence[Any]) -> list[tuple[str, Tensor]]:
        return [(name, args[self.op.arguments.index(name)]) for name in self.op.writes]

    def _guarding(self, tensor: Tensor) -> Guarded:
        return next(each for each in self.guarded if each.tensor is tensor)

    def _misshaped(self, yielded: Sequence[Any]) -> str | None:
        count = len(self.op.overload._schema.returns) - len(self.op.writes)
        if len(yielded) == count and all(isinstance(each, Tensor) for each in yielded):
            return None
        kinds = ", ".join(type(each).__name__ for each in yielded)
        return f"the kernel yields {len(yielded)} values ({kinds}) where the schema has {count} tensors"

    def _shared(self, args: Sequence[Any], yielded: Sequence[Any]) -> str | None:
        memory = [("an argument", each) for each in args if isinstance(each, Tensor)]
        for index, result in enumerate(yielded):
            for name, other in memory:
                if shares(result, other):
                    return f"result {index} of the kernel shares memory with {name}; each result must be a new tensor"
            memory.append((f"result {index}", result))
        return None

    def _written(self, args: Sequence[Any]) -> str | None:
        for each in self.guarded:
            if not each.is_untouched:
                names = self.op.arguments
                at = [name for name, given in zip(names, args, strict=False) if given is each.tensor]
                where = f"its argument {at[0]}" if at else "an argument"
                if torch.equal(bits(each.tensor), bits(each.of_before)):
                    return f"the kernel writes beyond the end of {where}"
                return f"the kernel writes to {where}, and its schema says that it doesn't"
        return None


def _on_copies(op: DialectOp, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel as a function that leaves its arguments alone and yields their updated values."""
    if not op.writes:
        return kernel

    def run(*args: Any) -> Any:
        given = dict(zip(op.arguments, args, strict=True))
        given |= {name: given[name].clone() for name in op.writes}
        results = kernel(*given.values())
        yielded = results if isinstance(results, tuple) else (results,)
        return (*yielded, *(given[name] for name in op.writes))

    return run


def _of_another_kind(
    rule: Rule, inputs: Mapping[str, Any], actual: Sequence[Tensor], expected: Sequence[Tensor]
) -> str | None:
    """The difference of the results' dtypes, shapes and strides from the unfused ops' or from the fake
    implementation's, which Inductor relies on; or None.
    """
    promised = _fake(rule, inputs)
    for index, (got, wanted, fake) in enumerate(zip(actual, expected, promised, strict=True)):
        if (got.dtype, got.shape, got.device) != (wanted.dtype, wanted.shape, wanted.device):
            return f"result {index} is {described([got])}, and the unfused ops yield {described([wanted])}"
        laid_out = significant_strides(got) == significant_strides(fake) or not got.numel()
        if (got.dtype, got.shape) != (fake.dtype, fake.shape) or not laid_out:
            return f"result {index} is {described([got])}, and its fake implementation yields {described([fake])}"
    return None


def _fake(rule: Rule, inputs: Mapping[str, Any]) -> list[Tensor]:
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        return fused(rule, fakes, rule.op.fake)
