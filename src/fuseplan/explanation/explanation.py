"""Graphs traced once, and the decisions of every policy, range and size on them."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from fuseplan.compilation.analysis import Analysis, Regions, report_of, stage
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.compilation.whole_graph import hands_off
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.explanation.capture import Capture
from fuseplan.explanation.drawing import draw
from fuseplan.explanation.estimate import rest_ns
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.regions import calls_of
from fuseplan.planner.evidence import cost_rows
from fuseplan.planner.rows import Rows
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import (
    DeviceConstant,
    Evidence,
    GraphReport,
    PolicyAt,
    Report,
    SizePoint,
)
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES, opt_in_parts
from fuseplan.rules.parts import Part


@dataclass(frozen=True, eq=False)
class Entry:
    """One graph in one range.

    Attributes:
        name: of the graph.
        graph: as traced.
        calls: how often a step runs it.
        manager: of the range.
        analysis: of the graph in this range.
    """

    name: str
    graph: fx.Graph
    calls: int
    manager: PostGradPassManager
    analysis: Analysis


class Explanation:
    """The decisions of each policy on the graphs of one model. A graph is raised once, whatever the ranges.

    Args:
        traced: the graphs.
        config: flags and compile ranges.
        device: a profile whose providers are assumed present; None: this machine's.
        providers: those that may run fused ops.
        rules: the fusions.
    """

    def __init__(
        self,
        traced: Capture,
        config: PassConfig,
        device: DeviceProfile | None,
        providers: Sequence[Provider],
        rules: Sequence[Rule] = BUILT_IN_RULES,
    ) -> None:
        self.traced, self.config, self.device, self.providers, self._every = traced, config, device, providers, rules
        self._shared = PostGradPassManager(config, device=device, providers=providers, rules=rules)
        self.entries: list[Entry] = []
        self.skipped: list[GraphReport] = []
        self._canonical: dict[tuple[int, frozenset[Part]], CanonicalGraph] = {}
        self._rest: dict[Entry, int | None] = {}
        for compile_range in config.compile_ranges or (None,):
            self.entries += self._entries(config, compile_range, self.skipped)
        on = {name for entry in self.entries for name in entry.analysis.rules}
        self.rules = tuple(sorted({*self._shared.rules, *on}))

    def _entries(
        self, config: PassConfig, compile_range: CompileRange | None, skipped: list[GraphReport] | None = None
    ) -> list[Entry]:
        manager = PostGradPassManager(
            config, compile_range=compile_range, device=self.device, prices=self._shared.prices,
            providers=self.providers, rules=self._every, solver=self._shared.solver,
        )  # fmt: skip
        span = (compile_range.start, compile_range.end) if compile_range else None
        entries = []
        for index, (gm, calls) in enumerate(zip(self.traced.graphs, calls_of(self.traced.graphs), strict=True)):
            name, refusal = f"graph_{index}", hands_off(gm.graph, manager.environment)
            if refusal is None:
                read_for = index, opt_in_parts(manager.rules_for(gm.graph))
                analysis = manager.analyze(gm.graph, self._canonical.get(read_for))
                self._canonical[read_for] = analysis.canonical
                entries.append(Entry(name, gm.graph, calls, manager, analysis))
            elif skipped is not None:
                skipped.append(GraphReport(graph=name, range=span, refusals=(refusal,)))
        return entries

    def report(self, policy: Policy) -> Report:
        """A policy's decision."""
        graphs, regions = list(self.skipped), defaultdict[CompileRange | None, Regions](Regions)
        for entry in self.entries:
            stages = dict(entry.analysis.stages_ns)
            with stage(stages, "choosing"):
                decision = entry.manager.decide(entry.analysis, policy, entry.name)
            found = entry.manager.report(entry.name, replace(entry.analysis, stages_ns=stages), decision)
            found = replace(found, step_ns=self._step_ns(entry))
            graphs += regions[entry.manager.compile_range].with_calls(entry.graph, found)
        rules = tuple(rule for rule in self.rules if not policy.order or rule in policy.order)
        return replace(report_of(policy, self.config, rules, graphs), breaks=self.traced.breaks)

    def _step_ns(self, entry: Entry) -> int | None:
        """The time of a graph without fusions at its middle size: its sites by the prices of the plan, and the rest
        estimated.
        """
        if entry not in self._rest:
            problem, prices = entry.analysis.problem, self._shared.prices
            claimed = frozenset[fx.Node]().union(
                *(each.consumed for each in problem.candidates if each.site is not None)
            )
            tokens = problem.priced.tokens
            self._rest[entry] = rest_ns(
                entry.graph, claimed, prices.model.hardware, Rows.of(entry.graph), tokens[len(tokens) // 2]
            )  # fmt: skip
        rest = self._rest[entry]
        return None if rest is None else rest + entry.analysis.problem.unfused_ns

    def orders(self) -> list[Policy]:
        """One `ordered` policy for every distinct outcome among the orders of the rules that match anywhere.

        A composed rule, which does the work of several simple ones, is left out, or comes first of all. Rules that are
        on by default only in some graphs are left out, too: no order lists them.
        """
        members = {match.rule.name: match.rule for entry in self.entries for match in entry.analysis.matches.candidates}
        members = {name: rule for name, rule in members.items() if name in self._shared.rules}
        simple = sorted(name for name, rule in members.items() if not rule.is_composed)
        composed = sorted(set(members) - set(simple))
        if not simple:
            return [Policy(name="ordered", order=self.rules)] if self.rules else []
        outcomes: dict[tuple[Any, ...], Policy] = {}
        for first in ((), *itertools.permutations(composed)):
            for rest in itertools.permutations(simple):
                policy = Policy(name="ordered", order=(*first, *rest))
                outcomes.setdefault(self._outcome(policy), policy)
        return list(outcomes.values())

    def _outcome(self, policy: Policy) -> tuple[Any, ...]:
        outcome = []
        for entry in self.entries:
            selected = entry.manager.decide(entry.analysis, policy, entry.name).selected
            outcome.append(tuple(sorted(entry.analysis.problem.candidates[index].name for index in selected)))
        return tuple(outcome)

    def unconstrained(self, policy: Policy) -> Report:
        """A policy's decision without forced and forbidden fusions."""
        config = replace(self.config, force=(), forbid=())
        free = Explanation(self.traced, config, self.device, self.providers, self._every)
        return free.report(policy)

    def evidence(self, policies: Sequence[Policy]) -> Evidence:
        """The evidence for reports under these policies."""
        sized = [(size, self._entries(self._alone, CompileRange(start=size, end=size))) for size in self._sizes]
        hardware = self._shared.prices.model.hardware
        return Evidence(
            drawings=tuple(draw(graph, f"graph_{index}") for index, graph in self._richest.items()),
            costs=cost_rows(entry.analysis.problem for entry in self.entries),
            constants=tuple(
                DeviceConstant(name=name, value=constant.value, unit=constant.unit, source=constant.source)
                for name, constant in hardware.constants()
            ),
            sizes=tuple(self._point(size, entries, policies) for size, entries in sized if entries),
        )

    @property
    def _richest(self) -> dict[int, CanonicalGraph]:
        """The raised copy of each graph with the most parts: in small ranges more rules may be on."""
        found = dict[int, CanonicalGraph]()
        for (index, _), canonical in sorted(self._canonical.items(), key=lambda each: len(each[0][1])):
            found[index] = canonical
        return dict(sorted(found.items()))

    @property
    def _alone(self) -> PassConfig:
        """The configuration without the saved plan, for ranges that it doesn't have."""
        return replace(self.config, plan=None)

    @cached_property
    def _sizes(self) -> list[int]:
        """Sizes from the first of all ranges to the last: two an octave, with the ends of ranges."""
        spans = [entry.manager.compile_range for entry in self.entries]
        ends = {end for span in spans if span for end in (span.start, span.end)}
        if not ends or not any(entry.analysis.problem.pricing.is_dynamic for entry in self.entries):
            return []
        first, last = min(ends), max(ends)
        octaves = {round(2 ** (half / 2)) for half in range(2 * last.bit_length())}
        return sorted(ends | {size for size in octaves if first < size < last})

    def _point(self, size: int, entries: Sequence[Entry], policies: Sequence[Policy]) -> SizePoint:
        steps = [step * entry.calls for entry in entries if (step := self._step_ns(entry)) is not None]
        rows = _policies_at(entries, policies)
        unfused = sum(entry.analysis.problem.unfused_ns * entry.calls for entry in entries)
        step = sum(steps) if len(steps) == len(entries) else None
        return SizePoint(tokens=size, unfused_ns=unfused, policies=rows, step_ns=step)


def _policies_at(entries: Sequence[Entry], policies: Sequence[Policy]) -> tuple[PolicyAt, ...]:
    rows = []
    for policy in policies:
        saved, fused = 0, Counter[str]()
        for entry in entries:
            decision = entry.manager.decide(entry.analysis, policy, entry.name)
            saved += decision.saving_ns * entry.calls
            chosen = [entry.analysis.problem.candidates[index] for index in decision.selected]
            for candidate in chosen:
                fused[f"{candidate.rule} {candidate.provider}"] += entry.calls
        rows.append(PolicyAt(policy=str(policy), saved_ns=saved, fused=dict(sorted(fused.items()))))
    return tuple(rows)
