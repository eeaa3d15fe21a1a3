"""The record of a compilation: per graph and range under one policy (`GraphReport`), over all of them (`Report`), and
several policies side by side (`Comparison`, the object that `fuseplan explain --json` prints).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from fuseplan.errors import PlanError
from fuseplan.record.evidence import Evidence
from fuseplan.record.fusion import ConflictClass, Fusion, Loss, SizePrice
from fuseplan.record.graph_break import GraphBreak
from fuseplan.record.near_miss import NearMiss, cause_of, is_of_a_place, near_misses_of
from fuseplan.record.plan import Plan, SavedPlans
from fuseplan.record.refusal import Reason, Refusal
from fuseplan.record.unsure import Unsure, all_of
from fuseplan.record.verification import Pending, Verification


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """The record of one graph in one compile range.

    Attributes:
        graph: a name, unique within a report.
        range: first and last number of tokens that the graph serves, None where it is not limited.
        applied: the fusions of the plan, in graph order.
        lost: fusions that matched and were not applied.
        matched: candidates by rule, whether chosen or not.
        recognized: dialect ops found in the graph as `op[last dimension]`, counted.
        refusals: everything else that was not done, and why.
        stages_ns: time of each stage, in nanoseconds.
        rewritten: whether the graph was changed; False under `off` and in `explain`.
        plan: the plan, under `planned`.
        sizes: the saving at each priced size.
        saved_ns: the saving of the applied fusions, weighted over sizes.
        saved_low_ns: the lower end of the interval that holds `saved_ns` in 80 of 100 cases; None where that isn't
            known.
        saved_high_ns: its upper end.
        unsure: classes of places where measuring could change the plan, by policy `planned`.
        unfused_ns: the unfused time of all contested sites, at the middle size.
        step_ns: the unfused time of the whole graph at the middle size, estimated by `explain` from its memory traffic
            and multiplications at the device's limits; None where that isn't known.
        plan_ns: how long the solver took.
        groups: names of the process groups whose collectives are in the graph.
        workspaces: shared memory that applied fusions need before they run: names of groups, of dtypes and of this
            rank's devices.
        digest: of the applied fusions, as far as ranks have to agree on them: unless it is the same on every rank, none
            runs the plan. Empty where nothing is applied.
        verified: the fused ops that were checked against the unfused ones, those that failed included.
        pending: applied fused ops that all ranks of their group verify together before the first run. The next report
            has them among `verified`.
        from_cache: whether an earlier compilation stored the report, and a warm compile cache brought it.
    """

    graph: str
    range: tuple[int, int] | None = None
    applied: tuple[Fusion, ...] = ()
    lost: tuple[Loss, ...] = ()
    matched: Mapping[str, int] = field(default_factory=dict)
    recognized: Mapping[str, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    stages_ns: Mapping[str, int] = field(default_factory=dict)
    rewritten: bool = False
    plan: Plan | None = None
    sizes: tuple[SizePrice, ...] = ()
    saved_ns: int = 0
    saved_low_ns: int | None = None
    saved_high_ns: int | None = None
    unsure: tuple[Unsure, ...] = ()
    unfused_ns: int = 0
    step_ns: int | None = None
    plan_ns: int = 0
    groups: tuple[str, ...] = ()
    workspaces: tuple[tuple[str, str, str], ...] = ()
    digest: str = ""
    verified: tuple[Verification, ...] = ()
    pending: tuple[Pending, ...] = ()
    from_cache: bool = False

    @property
    def is_lasting(self) -> bool:
        """Whether another run would have the same outcome: not where something failed that may succeed next time."""
        failed = any(each.transient for each in self.verified)
        return not failed and all(refusal.reason is not Reason.FAULT for refusal in self.refusals)

    def count(self, rules: Iterable[str]) -> dict[str, int]:
        """Applied fusions by rule, zeros included."""
        counts = Counter(fusion.rule for fusion in self.applied)
        return {rule: counts[rule] for rule in rules}


def again(report: GraphReport, ordinal: int, first: str | None = None, place: str | None = None) -> GraphReport:
    """The report of a graph that is run once more in a step.

    Args:
        report: on the graph, which was compiled once.
        ordinal: makes its name unique.
        first: module path of the call that the report's places belong to.
        place: module path of this call, below which its places are.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not is_dataclass(value) or isinstance(value, type):
            return value
        paths = ("source", "sources", "site") if isinstance(value, Refusal) else ("source", "sources")
        return replace(value, **{each.name: step(getattr(value, each.name), each.name in paths)
                                 for each in fields(value) if each.init})  # fmt: skip

    def step(value: Any, is_path: bool) -> Any:
        if is_path and isinstance(value, str):
            is_below = value == first or value.startswith(f"{first}.")
            return f"{place}{value.removeprefix(str(first))}" if is_below else value
        return moved(value)

    name = f"{report.graph}.{ordinal}"
    return replace(report if None in (first, place) or first == place else moved(report), graph=name)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The record of one policy on every graph, over all compile ranges.

    Attributes:
        policy: `planned`, `ordered` or `off`.
        order: the order of registration of an `ordered` policy.
        rules: every rule that the configuration switched on, in order of name; `fused` has a key for each.
        graphs: one entry for each graph and range.
        warnings: flags without effect, and other things a user should see once.
        force: selectors of fusions that had to be applied.
        forbid: selectors of fusions that must not be applied.
        breaks: graph breaks met while tracing, of `explain`; a compilation doesn't see them.
    """

    policy: str
    order: tuple[str, ...]
    rules: tuple[str, ...]
    graphs: tuple[GraphReport, ...]
    warnings: tuple[Refusal, ...] = ()
    force: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    breaks: tuple[GraphBreak, ...] = ()

    def __str__(self) -> str:
        """The output of `fuseplan explain`: a verdict, a table, near misses and warnings, as wide as the terminal."""
        from fuseplan.report.terminal import render_report
        from fuseplan.report.text import as_text

        return as_text(render_report(self))

    @property
    def fused(self) -> dict[str, int]:
        """Replacements by rule, over all graphs and ranges; zeros included."""
        return _total(graph.count(self.rules) for graph in self.graphs)

    @property
    def matched(self) -> dict[str, int]:
        """Matches by rule, over all graphs and ranges, whether applied or not; zeros included."""
        totals = _total(graph.matched for graph in self.graphs)
        return {rule: totals.get(rule, 0) for rule in self.rules}

    @property
    def recognized(self) -> dict[str, int]:
        """Dialect ops found, as `op[last dimension]`, over all graphs and ranges."""
        return _total(graph.recognized for graph in self.graphs)

    @property
    def per_range(self) -> dict[tuple[int, int] | None, dict[str, int]]:
        """`fused`, split by compile range."""
        ranges = dict.fromkeys(graph.range for graph in self.graphs)
        return {key: _total(graph.count(self.rules) for graph in self.graphs if graph.range == key) for key in ranges}

    @property
    def conflicts(self) -> tuple[ConflictClass, ...]:
        """Where one rule took the nodes of another, one row a class."""
        classes: dict[tuple[str, str, str], list[Loss]] = {}
        for graph in self.graphs:
            best: dict[tuple[str, str], Loss] = {}
            for loss in (each for each in graph.lost if not each.forbidden):
                place = (loss.fusion.site, loss.fusion.rule)
                if place not in best or loss.margin < best[place].margin:
                    best[place] = loss
            for loss in best.values():
                winners = {winner.rule for winner in loss.blocked_by} or {UNFUSED}
                for winner in sorted(winners - {loss.fusion.rule}):
                    classes.setdefault((winner, loss.fusion.rule, loss.fusion.contested_op), []).append(loss)
        return tuple(
            ConflictClass(
                rules=tuple(sorted({winner, loser} - {UNFUSED})),
                op=op,
                count=len(losses),
                winner=winner,
                loser=loser,
                sources=tuple(dict.fromkeys(s for loss in losses if (s := loss.fusion.source) is not None)),
                lost_us=_mean_us([loss.lost_ns for loss in losses]),
                flips_at_us=_mean_us([loss.flips_at_ns for loss in losses]),
                lost_low_us=_mean_us([loss.lost_low_ns for loss in losses]),
                lost_high_us=_mean_us([loss.lost_high_ns for loss in losses]),
            )
            for (winner, loser, op), losses in sorted(classes.items())
        )

    @property
    def saved_us(self) -> float:
        """The saving of the applied fusions, over all graphs and ranges, in microseconds."""
        return sum(graph.saved_ns for graph in self.graphs) / 1000

    @property
    def assumed(self) -> dict[tuple[str, str], list[Fusion]]:
        """Applied fusions without a known price, by rule and provider, over all graphs and ranges."""
        found: dict[tuple[str, str], list[Fusion]] = {}
        for fusion in (each for graph in self.graphs for each in graph.applied if each.provenance == ASSUMED):
            found.setdefault((fusion.rule, fusion.provider), []).append(fusion)
        return found

    @property
    def unsure(self) -> tuple[Unsure, ...]:
        """Where measuring could change the plan, each class of places once; `fuseplan tune --only-unsure` does it."""
        return all_of(each for graph in self.graphs for each in graph.unsure)

    @property
    def stages_ns(self) -> dict[str, int]:
        """The time of each stage, over all graphs and ranges."""
        return _total(graph.stages_ns for graph in self.graphs)

    @property
    def region_us(self) -> float:
        """The time of all contested sites, over all graphs and ranges, in microseconds."""
        return sum(graph.unfused_ns - graph.saved_ns for graph in self.graphs) / 1000

    @cached_property
    def near_misses(self) -> tuple[NearMiss, ...]:
        """Where a rule nearly matched, one row a cause; the order is that of `near_misses_of`."""
        return near_misses_of(refusal for _, refusal in self._of_places())

    def counted_in(self, miss: NearMiss) -> list[tuple[GraphReport, Refusal]]:
        """The refusals that a row of `near_misses` counts, each with its graph."""
        cause = cause_of(miss)
        return [(graph, refusal) for graph, refusal in self._of_places() if cause_of(refusal) == cause]

    def _of_places(self) -> Iterator[tuple[GraphReport, Refusal]]:
        for graph in self.graphs:
            for refusal in graph.refusals:
                if is_of_a_place(refusal):
                    yield graph, refusal


MOST_RANKS = 65_536
"""The most ranks of tensor parallelism: more than any system has; torch's process groups are limited by a C int."""

MOST_LAYERS = 10_000
"""The most layers of a model that is built from a number: more than any has, and building them ends within minutes."""

ASSUMED = "assumed"
"""The provenance of a price that is neither measured, modelled nor declared."""

UNFUSED = "unfused"
"""The winner where leaving a site to Inductor is cheaper."""


def _mean_us(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known) / 1000, 3) if known else None


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several policies on one workload.

    Attributes:
        workload: as the user named it.
        tp: ranks of tensor parallelism, up to `MOST_RANKS`.
        device: the device profile whose providers were assumed present.
        ranges: the compile ranges.
        reports: one for each policy.
        breaks: graph breaks met while tracing, one line each.
        trace_ns: time to build and trace the model.
        notes: caveats about the figures, one line each.
        unconstrained: the first policy that forcing and forbidding affects, without them; None where nothing is forced
            or forbidden.
        evidence: the data behind the figures, where requested.
    """

    workload: str
    tp: int
    device: str
    ranges: tuple[tuple[int, int], ...]
    reports: tuple[Report, ...]
    breaks: tuple[str, ...] = ()
    trace_ns: int = 0
    notes: tuple[str, ...] = ()
    unconstrained: Report | None = None
    evidence: Evidence | None = None

    @property
    def constrained(self) -> Report | None:
        """The counterpart of `unconstrained`."""
        free = self.unconstrained
        if free is None:
            return None
        asked = (report for report in self.reports if (report.policy, report.order) == (free.policy, free.order))
        return next(asked, None)

    def plans(self) -> SavedPlans:
        """The plans of policy `planned`, for a file.

        Raises:
            PlanError: the policy isn't among the reports.
        """
        # A graph that is run several times in a step is planned once.
        found: dict[tuple[object, ...], Plan] = {}
        for plan in (graph.plan for report in self.reports for graph in report.graphs):
            if plan is not None:
                found.setdefault((plan.graph, plan.range), plan)
        if not found:
            raise PlanError(
                "there is no plan to save: policy planned isn't among those compared, or nothing was traced"
            )
        return SavedPlans(workload=self.workload, tp=self.tp, plans=tuple(found.values()))


def merged(reports: Sequence[Report]) -> Report:
    """One report on the graphs of several, at least one, of one policy."""
    return replace(
        reports[0],
        graphs=tuple(graph for report in reports for graph in report.graphs),
        warnings=tuple(dict.fromkeys(warning for report in reports for warning in report.warnings)),
    )


def latest(reports: Iterable[Report]) -> list[Report]:
    """The last report on each graph: ranks that settle before its first run may add a second one."""
    found = {tuple((each.graph, each.range, each.digest) for each in report.graphs): report for report in reports}
    return list(found.values())
