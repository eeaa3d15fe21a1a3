"""`Tuner`: verifies, compiles and times the alternatives of each class of components, in context."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fuseplan.errors import FuseplanError
from fuseplan.measurement.tuning.clock import Call, Subject, Times, cache_bytes, interleaved, subject_of
from fuseplan.measurement.tuning.compiled import argument_sets, at_size, compiled, producers, specs_of
from fuseplan.measurement.tuning.context import Context
from fuseplan.measurement.tuning.lock_step import Ranks
from fuseplan.measurement.tuning.work import Skipped, Work
from fuseplan.planner.alternatives import UNFUSED, row_key
from fuseplan.planner.costs import Provenance, Row
from fuseplan.record import Verification
from fuseplan.record.paired import Paired
from fuseplan.record.text import count_of, one_line
from fuseplan.verification import Verifier
from fuseplan.verification.specs import Sizes

PRODUCERS = "producers"
"""The name of the producers' own time, taken where inputs have to be produced first; no alternative has that name."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The provenance of rows: the fields of `Row` that are the same in all of them."""

    device: str
    torch: str
    triton: str
    topology: str
    date: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """The progress that a watcher gets before a longer step.

    Attributes:
        site: the signature of a component's sites.
        doing: one clause.
        done: times taken, or compiled for, so far, skipped ones included.
        total: of the whole run.
    """

    site: str
    doing: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Unclear:
    """An alternative that the repeats can't distinguish from the component without fusions.

    Attributes:
        site: the signature of the component's sites.
        alternative: its name in the table.
        tokens: at which size.
        beside_unfused: how much longer it takes than unfused.
    """

    site: str
    alternative: str
    tokens: int
    beside_unfused: Paired


@dataclass(kw_only=True)
class Tuner:
    """Measures.

    Attributes:
        verifier: of the configuration.
        ranks: measure in lock step.
        origin: of the rows.
        repeats: at least `clock.LEAST_REPEATS`.
        save: called with the rows of each class once it is complete.
        watch: called before each step.
        lower: as for `compiled`.
        saved: the rows of all finished classes.
        skipped: alternatives that aren't measured.
        unclear: measured alternatives that could be faster or slower than the component without fusions.
    """

    verifier: Verifier
    ranks: Ranks
    origin: Origin
    repeats: int
    save: Callable[[Sequence[Row]], None]
    watch: Callable[[Step], None]
    lower: Callable[[fx.Graph], None] | None = None
    saved: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unclear: list[Unclear] = field(default_factory=list)
    _done: int = 0
    _total: int = 0

    def run(self, works: Sequence[Work]) -> None:
        """Measures all of `works`, one class after the other.

        Raises:
            RanksError: a rank failed, or didn't come in time.
            ConfigError: raised by `save`.
        """
        self._total = sum(work.steps for work in works)
        for work in works:
            verified = self._verified(work)
            self._done += work.steps - verified.steps
            rows = self._measured(verified)
            if rows:
                self.save(rows)
                self.saved += rows

    def _verified(self, work: Work) -> Work:
        """The alternatives whose fused ops all pass; on all ranks."""
        self._tell(work, "verifying")
        chosen = sorted({index for subset in work.alternatives.values() for index in subset})
        candidates = [work.problem.candidates[index] for index in chosen]
        outcomes = self.verifier.verify(candidates, work.problem.canonical, work.span)
        failed = {
            str(i): each.failure
            for i, each in zip(chosen, outcomes, strict=True)
            if isinstance(each, Verification) and not each.passed
        }
        everywhere: dict[str, str] = {}
        for rank, of_rank in enumerate(self.ranks.exchange(failed)):
            for index, why in of_rank.items():
                everywhere.setdefault(index, why if self.ranks.size == 1 else f"{why} (rank {rank})")
        for name, subset in work.alternatives.items():
            reasons = [f"{work.problem.candidates[i].op} {everywhere[str(i)]}" for i in subset if str(i) in everywhere]
            if reasons:
                self.skipped.append(Skipped(site=work.signature, alternative=name, reason=reasons[0]))
        return work.without(frozenset(map(int, everywhere)))

    def _measured(self, work: Work) -> list[Row]:
        context = work.context
        graphs, errors = dict[str, fx.Graph](), dict[str, str]()
        for name, subset in work.alternatives.items():
            matches = [work.problem.candidates[index].match for index in subset]
            with _noted(errors, name):
                graphs[name] = context.fused(matches)  # type: ignore[arg-type]
        self._agree(work, None, graphs, errors)
        sizes, found = Sizes(work.problem.canonical.graph), list[Row]()
        for tokens, rows in zip(work.tokens, work.rows, strict=True):
            times = self._times(work, context, graphs, sizes.at(tokens), rows)
            # The time of producing inputs isn't the component's.
            less = times.pop(PRODUCERS).median_ns if PRODUCERS in times else 0
            found += [self._row(work, name, rows, each, less) for name, each in times.items()]
            self._done += len(work.alternatives)
        return found

    def _times(
        self, work: Work, context: Context, graphs: Mapping[str, fx.Graph], symbols: Mapping[Any, int], rows: int
    ) -> dict[str, Times]:
        """The times of all alternatives at one size, without those that fail."""
        unfused = context.fused(())
        specs = specs_of(unfused, symbols)
        if not specs:
            self.skipped.append(
                Skipped(site=work.signature, tokens=rows, reason="nothing of it depends on an argument")
            )
            return {}
        device = specs[0].device
        sets = argument_sets(specs, cache_bytes(device))
        modules = {name: at_size(graph, symbols, context.produced) for name, graph in graphs.items()}
        if context.produced:
            modules[PRODUCERS] = producers(unfused, context.produced)
        subjects, errors = dict[str, Subject](), dict[str, str]()
        try:
            for place, (name, module) in enumerate(modules.items()):
                self._tell(work, f"compiling {name} for {count_of(rows, 'token')}", min(place, len(graphs) - 1))
                with _noted(errors, name):
                    subjects[name] = subject_of(_called(compiled(module, sets[0], self.lower)), sets, device)
            self._agree(work, rows, subjects, errors)
            with torch.no_grad():
                for name in list(subjects):
                    self._tell(work, f"running {name} at {count_of(rows, 'token')}", len(graphs) - 1)
                    with _noted(errors, name):
                        subjects[name].warm_up()
                    self._agree(work, rows, subjects, errors)
                self._tell(work, f"timing {len(graphs)} alternatives at {count_of(rows, 'token')}", len(graphs) - 1)
                times = interleaved(subjects, self.repeats, self.ranks, device)
        finally:
            for subject in subjects.values():
                subject.close()
        for name in [name for name in times if name not in (UNFUSED, PRODUCERS) and UNFUSED in times]:
            beside = Paired.of(times[name], times[UNFUSED])
            if not beside.is_clear and not beside.is_even(Times.of(times[UNFUSED]).median_ns):
                self.unclear.append(Unclear(site=work.signature, alternative=name, tokens=rows, beside_unfused=beside))
        return {name: Times.of(repeats) for name, repeats in times.items()}

    def _row(self, work: Work, name: str, rows: int, times: Times, less: int) -> Row:
        return Row(
            key=row_key(work.signature, name), tokens=rows, time_ns=max(0, times.median_ns - less),
            spread_ns=times.spread_ns, provenance=Provenance.MEASURED, **dataclasses.asdict(self.origin),
        )  # fmt: skip

    def _agree(self, work: Work, rows: int | None, found: dict[str, Any], errors: dict[str, str]) -> None:
        """Removes alternatives that failed on any rank, and records why."""
        everywhere: dict[str, str] = {}
        for of_rank in self.ranks.exchange(errors):
            everywhere = {**of_rank, **everywhere}
        for name, why in everywhere.items():
            if name in found or name in errors:
                found.pop(name, None)
                self.skipped.append(Skipped(site=work.signature, alternative=name, tokens=rows, reason=why))
        errors.clear()

    def _tell(self, work: Work, doing: str, ahead: int = 0) -> None:
        self.watch(Step(site=work.signature, doing=doing, done=self._done + ahead, total=self._total))


def _called(call: Callable[..., Any]) -> Call:
    return lambda arguments: call(*arguments)


@contextmanager
def _noted(errors: dict[str, str], name: str) -> Iterator[None]:
    """Records any error of an alternative as the reason why it isn't measured; fuseplan's own errors end the run."""
    try:
        yield
    except FuseplanError:
        raise
    except Exception as error:  # noqa: BLE001 - kernels and compilers raise what they like
        errors[name] = f"{type(error).__name__}: {one_line(error)}"
