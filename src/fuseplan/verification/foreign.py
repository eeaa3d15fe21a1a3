"""Checks other people's replacements against the regions they replace, both on the same random arguments."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fuseplan.caching.fingerprint import pass_content
from fuseplan.dialect import Draw, draw_activations, draw_near_one, draw_positive
from fuseplan.graph.facts import dtype_text
from fuseplan.matching import ExternalMatch
from fuseplan.record import Verification
from fuseplan.verification import outcomes
from fuseplan.verification.compare import bits, compare, described
from fuseplan.verification.deadline import AttemptError, attempt
from fuseplan.verification.layout import misplaced, significant_strides
from fuseplan.verification.memory import Guarded, Loopback, make_arguments, poison_allocator, unguarded
from fuseplan.verification.replaced import Replaced, unverifiable
from fuseplan.verification.sides import PoisonedInside, Side, run_exactly, run_node
from fuseplan.verification.specs import Case, Sizes, TensorSpec, concrete
from fuseplan.verification.telling import told

ERROR_FACTOR = 2.0
"""The allowed multiple of the error of the graph's own ops; fuseplan's ops have the same by default."""

FEWEST = 8
"""The least number of the graph's elements that must change when an argument is rounded. If none of the replacement's
changes, that is then no coincidence.
"""

ROUNDED_UP_TO, DRAWS = 300, 8
"""The most tokens at which arguments are rounded, and the most draws until enough elements have changed."""

UNVERIFIED = "not verified: "
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Foreign:
    """Verifies matches of other people's passes.

    Args:
        mode: `first-use`, `always` or `off`.
        deadline_s: the most seconds for one size.
    """

    def __init__(self, mode: str, deadline_s: float) -> None:
        self.mode, self.deadline_s = mode, deadline_s
        self._known: dict[str, tuple[Any, Verification]] = {}

    def verify(self, match: ExternalMatch, sizes: Sizes, span: tuple[int, int]) -> Verification:
        """The outcome; a match that can't be run passes, and the outcome says why it wasn't run.

        Args:
            match: a match of another pass.
            sizes: sizes of its graph.
            span: first and last number of tokens.
        """
        outcome = Verification(
            rule=match.owner.name, op=" ".join(match.emits) or match.owner.name, provider="external",
            signature=match.owner.name,
        )  # fmt: skip
        try:
            if (why := unverifiable(match)) is not None:
                return replace(outcome, detail=UNVERIFIED + why)
            question = Replaced.of(match, sizes, span)
        except ValueError as error:
            return replace(outcome, detail=f"{UNVERIFIED}{error}")
        outcome = replace(outcome, signature=question.signature)
        content = pass_content(match.owner)
        # The outcome of a pass without a version is remembered while the pass is alive.
        seed = outcomes.seed_of(question.key(content.digest))
        key = question.key(content.key or f"{content.digest} {id(match.owner.matcher)}")
        if key in self._known and self.mode == "first-use":
            return replace(self._known[key][1], from_cache=True, time_ns=0)
        stored = outcomes.load(key) if content.key is not None and self.mode == "first-use" else None
        found = replace(stored, from_cache=True, time_ns=0) if stored else self._run(question, seed, outcome)
        self._known[key] = match.owner.matcher, found
        is_settled = not found.transient and (found.detail is None or not found.passed)
        if content.key is not None and stored is None and is_settled:
            outcomes.save(key, found)
        return found

    def _run(self, question: Replaced, seed: int, outcome: Verification) -> Verification:
        start, tokens, worst = time.perf_counter_ns(), list[int](), 0.0
        thorough = max(question.cases, key=lambda case: (case.tokens <= ROUNDED_UP_TO, case.tokens))
        for case in question.cases:
            trial = _Trial(question, case, seed)
            try:
                attempt(self.deadline_s, trial.expect, case.device)
            except AttemptError as error:
                why = str(error).replace("the kernel ", "the region it replaces ", 1)
                return replace(outcome, detail=f"{UNVERIFIED}{why} here", tokens=tuple(tokens))
            tokens.append(case.tokens)
            transient = False
            try:
                wrong, share = attempt(self.deadline_s, partial(trial.run, thorough=case is thorough), case.device)
                worst = max(worst, share)
            except AttemptError as error:
                wrong, transient = str(error).replace("the kernel ", "it ", 1), True
            if wrong is not None:
                where = told(question.match, question.before, question.after, case.symbols)
                return replace(
                    outcome, tokens=tuple(tokens), passed=False, detail=f"at {case.tokens} tokens: {wrong}; {where}",
                    transient=transient, time_ns=time.perf_counter_ns() - start,
                )  # fmt: skip
        return replace(outcome, tokens=tuple(tokens), worst=worst, time_ns=time.perf_counter_ns() - start)


class _Trial:
    """Both sides on fresh random arguments."""

    def __init__(self, question: Replaced, case: Case, seed: int) -> None:
        self.question, self.case, self.seed = question, case, seed

    def expect(self) -> None:
        """Runs the region in its own dtypes and in float64."""
        self.given = self.fresh()
        self.expected = self.results_of(self.question.before, self.given)
        with torch.no_grad(), Loopback():
            precise = self.question.before.run(unguarded(self.fresh()), self.case.symbols, call=run_exactly)
        exact = [each.of(precise) for each in self.question.results]
        self.exact = [_like(true, own) for true, own in zip(exact, self.expected, strict=True)]

    def run(self, *, thorough: bool) -> tuple[str | None, float]:
        """Runs the replacement.

        Args:
            thorough: whether to round arguments as well, to see whether that makes a difference.

        Returns:
            (the error or None, the largest deviation as a share of the allowed one).
        """
        made = self.fresh()
        for device in {each.device for each in self.expected}:
            poison_allocator(device, max(each.nbytes for each in self.expected))
        actual = self.results_of(self.question.after, made)
        wrong = self._kind(actual)
        if wrong is not None:
            return wrong, 0.0
        worst = 0.0
        for index, (got, own, true) in enumerate(zip(actual, self.expected, self.exact, strict=True)):
            deviation = compare(got, own, true, ERROR_FACTOR)
            if deviation.share > 1:
                return f"{self._name(index)}: {deviation.text}{_largest(got, own)}", 0.0
            worst = max(worst, deviation.share)
        inputs, before = unguarded(made), unguarded(self.given)
        wrong = misplaced(actual, self.expected, inputs, self.question.free, before) or self._written(made)
        return wrong or (self._rounded() if thorough else None), worst

    def fresh(self) -> dict[str, Any]:
        """Copies of the arguments."""
        return {name: each.copied() if isinstance(each, Guarded) else each for name, each in self._drawn.items()}

    @cached_property
    def _drawn(self) -> dict[str, Any]:
        return make_arguments(self.case.arguments, lambda name: _draw_of(self.case.arguments[name]), self.seed)

    def results_of(self, side: Side, given: Mapping[str, Any]) -> list[Any]:
        with torch.no_grad(), PoisonedInside(), Loopback():
            values = side.run(unguarded(given), self.case.symbols, call=run_node)
        return [each.of(values) for each in self.question.results]

    def _name(self, index: int) -> str:
        result = self.question.results[index]
        return f"result {index} ({result.node.name})"

    def _kind(self, actual: Sequence[Any]) -> str | None:
        """The difference of dtypes, shapes and strides from the graph's or from the fake implementations'; or None."""
        for index, (got, own) in enumerate(zip(actual, self.expected, strict=True)):
            if not isinstance(got, Tensor):
                return f"{self._name(index)} is a {type(got).__name__} and no tensor"
            if (got.dtype, got.shape, got.device) != (own.dtype, own.shape, own.device):
                return f"{self._name(index)} is {described([got])}, and the graph's own value is {described([own])}"
            promise = self.question.results[index].promise
            if promise is None or not got.numel():
                continue
            strides = [concrete(each, self.case.symbols) for each in promise.stride()]
            fake = torch.empty_strided(got.shape, strides, dtype=promise.dtype, device="meta")
            if got.dtype is not fake.dtype or significant_strides(got) != significant_strides(fake):
                return (
                    f"{self._name(index)} is {described([got])}, and its fake implementation yields {described([fake])}"
                )
        return None

    def _written(self, made: Mapping[str, Any]) -> str | None:
        """The error of an argument that only one of replacement and graph writes to, or that they leave different."""
        for name, mine in made.items():
            own = self.given[name]
            if not isinstance(mine, Guarded):
                continue
            if not mine.is_written_inside:
                return f"it writes beyond the elements of its argument {name}"
            if not own.is_untouched:
                deviation = compare(mine.tensor, own.tensor, _like(own.tensor, own.tensor), ERROR_FACTOR)
                if deviation.share > 1:
                    return f"the value left in its argument {name}: {deviation.text}"
            elif not mine.is_untouched and (reader := self.question.kept.get(name)) is not None:
                later = f"{reader.name} reads later" if reader.op == "call_function" else "the caller has"
                later = "the graph returns" if reader.op == "output" else later
                return f"it writes to its argument {name}, which {later}"
        return None

    def _rounded(self) -> str | None:
        """The error of an argument read in a narrower dtype: rounding it changes only the graph's results."""
        specs = {n: s for n, s in self.case.arguments.items() if isinstance(s, TensorSpec) and s.dtype in FLOATS}
        for name, spec in specs.items():
            for dtype in {each.dtype for each in specs.values() if each.dtype.itemsize < spec.dtype.itemsize}:
                if (changed := self._changed(name, dtype)) >= FEWEST:
                    short, own = (dtype_text(each) for each in (dtype, spec.dtype))
                    return (
                        f"it takes its argument {name}, {own}, for {short}: rounding it to {short} changes {changed} "
                        "elements of the graph's results, and none of its own"
                    )
        return None

    def _changed(self, name: str, dtype: torch.dtype) -> int:
        """The number of the graph's elements that change when an argument is rounded; 0 if the replacement's do."""
        changed = 0
        for draw in range(DRAWS):
            trial = _Trial(self.question, self.case, self.seed + draw)
            sides = self.question.after, self.question.before
            for side in sides:
                whole, rounded = (trial.results_of(side, made) for made in (trial.fresh(), trial.narrowed(name, dtype)))
                differing = sum(map(_differing, whole, rounded))
                if side is self.question.before:
                    changed += differing
                elif differing:
                    return 0
            if changed >= FEWEST:
                break
        return changed

    def narrowed(self, name: str, dtype: torch.dtype) -> dict[str, Any]:
        made = self.fresh()
        made[name].tensor.copy_(made[name].tensor.to(dtype))
        return made


def _differing(left: Tensor, right: Tensor) -> int:
    """The number of elements with different bits."""
    return int((bits(left) != bits(right)).view(-1, left.element_size()).any(-1).sum())


def _draw_of(spec: TensorSpec) -> Draw:
    """A draw for the likely kind of an argument: a scale, a weight or activations."""
    rows = spec.shape[:-1]
    if math.prod(spec.shape) == 1 or (spec.dtype is torch.float32 and spec.shape[-1:] == (1,)):
        return draw_positive
    return draw_near_one if math.prod(rows) == 1 and len(spec.shape) < 2 else draw_activations


def _like(exact: Tensor, own: Tensor) -> Tensor:
    """An exact value in the dtype that `compare` takes."""
    if own.dtype in FLOATS:
        return exact.double()
    return exact.to(own.dtype)


def _largest(got: Tensor, own: Tensor) -> str:
    """The largest differences from the results of the graph's own ops."""
    a, b = got.double().flatten(), own.double().flatten()
    finite = a.isfinite() & b.isfinite()
    off = (a - b).abs()[finite]
    if not off.numel():
        return ""
    relative = (off / b.abs()[finite]).nan_to_num(0.0, 0.0, 0.0)
    return f"; the largest differences from the graph's own are {off.max():.3g} and {relative.max():.3g} of the value"
