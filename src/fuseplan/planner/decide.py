"""Decisions: the candidates of a graph that a policy selects, and the loss of each of the others."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx

from fuseplan.dialect import ops
from fuseplan.errors import PlanError
from fuseplan.matching import Match
from fuseplan.planner.contradiction import contradiction
from fuseplan.planner.disjoint_sets import DisjointSets
from fuseplan.planner.margins import Margin, Margins
from fuseplan.planner.ordered import choose_in_order
from fuseplan.planner.pose import Problem
from fuseplan.planner.program import Solution
from fuseplan.planner.solver import Solver
from fuseplan.record import Fusion, Plan, Rejected, Selected
from fuseplan.record.plan import first_difference


class Lost(NamedTuple):
    """A candidate that was not selected.

    Attributes:
        candidate: its index.
        blocked_by: the selected ones in its way; empty where it doesn't save anything.
        lost_ns: by how much a selection with it saves less than this one; None where there is none.
        flips_at_ns: the time of its op at which the two would be equal; None where that is not known.
        lost_low_ns: the lower end of the interval of `lost_ns`; None where that isn't known.
        lost_high_ns: the upper end.
    """

    candidate: int
    blocked_by: tuple[int, ...] = ()
    lost_ns: int | None = None
    flips_at_ns: int | None = None
    lost_low_ns: int | None = None
    lost_high_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision of a policy on a graph.

    Attributes:
        selected: candidates, ascending.
        saving_ns: their saving.
        lost: the other candidates that the policy looks at.
        cyclic: candidates given up because together with selected ones they would make the graph cyclic.
        uncoupled: candidates given up because one that they require, or belong together with, isn't selected.
        limited: candidates selected and given up again, since `max_fusions` allows no more.
        solution: a plan's proof.
        plan_ns: how long it took.
        ahead: a plan's smallest margin over the next best alternative at a place; None where there is none.
    """

    selected: tuple[int, ...] = ()
    saving_ns: int = 0
    lost: tuple[Lost, ...] = ()
    cyclic: tuple[int, ...] = ()
    uncoupled: tuple[int, ...] = ()
    limited: tuple[int, ...] = ()
    solution: Solution | None = None
    plan_ns: int = 0
    ahead: Margin | None = None


def decide_off() -> Decision:
    """Nothing is applied."""
    return Decision()


def decide_in_order(problem: Problem, order: Sequence[str]) -> Decision:
    """`ordered(a, b, ...)`: see `planner.ordered`. Of several providers the one that saves the most runs a match, or
    all matches that are applied together or not at all.

    Forcing has no influence; forbidden fusions are no candidates. A match is given up, and its nodes stay as they are,
    where one that it requires, or belongs together with, isn't selected.
    """
    program, index = problem.program, problem.index
    matches = sorted(
        (match for chosen in _runners(problem, order) if isinstance(match := problem.candidates[chosen].match, Match)),
        key=lambda match: (match.anchor, match.rule.name, match.rule.op.name),
    )
    choice = choose_in_order(problem.canonical.graph, matches, order)
    lost = []
    for match, winners in choice.lost:
        loser, taken = index[id(match)], tuple(index[id(winner)] for winner in winners)
        known = not program.unmeasured(taken) and not program.unmeasured((loser,))
        margin = program.saving(taken) - program.saving((loser,)) if known else None
        lost.append(Lost(candidate=loser, blocked_by=taken, lost_ns=margin))
    selected = {index[id(match)] for match in choice.chosen}
    uncoupled: set[int] = set()
    while alone := program.uncoupled(selected):
        selected -= alone
        uncoupled |= alone
    return Decision(
        selected=tuple(sorted(selected)),
        saving_ns=program.saving(selected),
        lost=tuple(lost),
        cyclic=tuple(index[id(match)] for match in choice.cyclic),
        uncoupled=tuple(problem.in_graph_order(uncoupled)),
    )


def _runners(problem: Problem, order: Sequence[str]) -> list[int]:
    """A candidate for each match of an order's rules: by the provider that saves the most; for coupled matches by one
    that can run all of them.
    """
    program = problem.program
    offers: dict[tuple[str, str, fx.Node], dict[str, int]] = {}
    for index, candidate in enumerate(problem.candidates):
        match = candidate.match
        if isinstance(match, Match) and candidate.rule in order and index not in problem.ruled_out:
            offers.setdefault((candidate.rule, candidate.op, match.anchor), {}).setdefault(candidate.provider, index)
    keys = list(offers)
    place = {index: number for number, key in enumerate(keys) for index in offers[key].values()}
    sets = DisjointSets(len(keys))
    for tie in (*program.requires, *program.together):
        if inside := [place[index] for index in tie if index in place]:
            sets.union(inside)
    runners = list[int]()
    for members in sets.sets():
        unit = [offers[keys[number]] for number in members]
        able = {name: [offer[name] for offer in unit] for name in unit[0] if all(name in offer for offer in unit)}
        legal = {name: chosen for name, chosen in able.items() if not program.uncoupled(chosen)} or able
        if legal:
            runners += max(legal.values(), key=lambda chosen: sum(program.savings_ns[index] for index in chosen))
        else:
            runners += [max(offer.values(), key=lambda index: program.savings_ns[index]) for offer in unit]
    return runners


def decide_planned(problem: Problem, solver: Solver) -> Decision:
    """The best legal selection, and the loss of each other candidate.

    Raises:
        PlanError: a forced fusion can't be applied.
    """
    start = time.perf_counter_ns()
    try:
        solution = solver.solve(problem.program, problem.find_cycles)
    except PlanError:
        raise contradiction(problem.program, problem.forced, [each.source for each in problem.candidates]) from None
    plan_ns = time.perf_counter_ns() - start
    program, chosen = problem.program, set(solution.selected)
    winners: dict[int, set[int]] = {}
    for i, j in program.conflicts:
        if i in chosen:
            winners.setdefault(j, set()).add(i)
        elif j in chosen:
            winners.setdefault(i, set()).add(j)
    for cut in solution.cuts:
        for i in cut:
            winners.setdefault(i, set()).update(chosen.intersection(cut))
    margins = Margins(problem, solver.rivals(program, solution.cuts))
    lost = []
    for index in range(len(problem.candidates)):
        if index in chosen:
            continue
        margin, cost = margins[index], problem.priced.costs[index]
        regret = margin.ns if margin is not None else None
        flips = cost - regret if cost is not None and regret is not None and cost > regret else None
        blocked = tuple(sorted(winners.get(index, ())))
        lost.append(
            Lost(
                candidate=index, blocked_by=blocked, lost_ns=regret, flips_at_ns=flips,
                lost_low_ns=margin.low_ns if margin else None, lost_high_ns=margin.high_ns if margin else None,
            )
        )  # fmt: skip
    return Decision(
        selected=solution.selected,
        saving_ns=solution.objective_ns,
        lost=tuple(lost),
        solution=solution,
        plan_ns=plan_ns,
        ahead=margins.closest(solution.selected),
    )


def limit(problem: Problem, decision: Decision, most: int | None) -> Decision:
    """The same decision, cut after the first `most` of its parts in graph order: of fusions, or of fusions that are
    applied together or not at all.
    """
    in_order = problem.in_graph_order(decision.selected)
    units = problem.program.units(in_order)
    if most is None or len(units) <= most:
        return decision
    kept = {index for unit in units[:most] for index in unit}
    return replace(
        decision,
        selected=tuple(sorted(kept)),
        limited=tuple(index for index in in_order if index not in kept),
        saving_ns=problem.program.saving(kept),
    )


def not_sure(decision: Decision, unsure: Collection[int]) -> list[int]:
    """Unsure candidates with nothing that the plan applies in their way: it would have applied them, or something no
    better, had they been sure.
    """
    return [lost.candidate for lost in decision.lost if lost.candidate in unsure and not lost.blocked_by]


def fusion_record(problem: Problem, index: int) -> Fusion:
    """A candidate as a record."""
    candidate, canonical = problem.candidates[index], problem.canonical
    match = candidate.match
    core = match.core if isinstance(match, Match) else match.anchor
    op = ops.of(core.target)
    low, high = problem.interval(index)
    return Fusion(
        rule=candidate.rule,
        op=candidate.op,
        provider=candidate.provider,
        provenance=problem.priced.provenance[index].value,
        anchor=canonical.source_node(match.anchor).name,
        consumed=tuple(node.name for node in match.consumed),
        contested_op=op.name if op else str(core.target),
        site=core.name,
        source=candidate.source,
        saving_ns=problem.program.savings_ns[index],
        rounding_change=match.rounding_change if isinstance(match, Match) else None,
        site_class=problem.sites[candidate.site.ordinal] if candidate.site else None,
        low_ns=low,
        high_ns=high,
    )


def plan_record(problem: Problem, decision: Decision, graph: str, span: tuple[int, int] | None, device: str) -> Plan:
    """A decision as a record."""
    candidates, values, solution = problem.candidates, problem.program.savings_ns, decision.solution
    known = [provenance.value for provenance in problem.priced.provenance]
    rejected = []
    for lost in decision.lost:
        candidate = candidates[lost.candidate]
        rejected.append(
            Rejected(
                name=candidate.name,
                signature=candidate.signature,
                source=candidate.source,
                saving_ns=values[lost.candidate],
                blocked_by=tuple(candidates[index].name for index in lost.blocked_by),
                lost_ns=lost.lost_ns,
                flips_at_ns=lost.flips_at_ns,
                provenance=known[lost.candidate],
                low_ns=problem.interval(lost.candidate)[0],
                high_ns=problem.interval(lost.candidate)[1],
                lost_low_ns=lost.lost_low_ns,
                lost_high_ns=lost.lost_high_ns,
            )
        )
    low, high = problem.interval_of(decision.selected, decision.saving_ns)
    ahead = decision.ahead
    return Plan(
        graph=graph,
        range=span,
        device=device,
        prices=tuple(sorted(set(known))),
        sites=problem.sites,
        selected=tuple(
            Selected(
                name=candidates[index].name,
                signature=candidates[index].signature,
                source=candidates[index].source,
                saving_ns=values[index],
                provenance=known[index],
                low_ns=problem.interval(index)[0],
                high_ns=problem.interval(index)[1],
            )
            for index in decision.selected
        ),
        rejected=tuple(rejected),
        objective_ns=decision.saving_ns,
        bound_ns=solution.bound_ns if solution else decision.saving_ns,
        unfused_ns=problem.unfused_ns,
        components=solution.components if solution else 0,
        classes=solution.classes if solution else 0,
        cuts=tuple(tuple(candidates[i].name for i in cut) for cut in solution.cuts) if solution else (),
        low_ns=low,
        high_ns=high,
        ahead_ns=ahead.ns if ahead else None,
        ahead_low_ns=ahead.low_ns if ahead else None,
        ahead_high_ns=ahead.high_ns if ahead else None,
    )


def replay(problem: Problem, plan: Plan) -> Decision:
    """The selection of a saved plan, if it still fits.

    Raises:
        PlanError: the graph has other sites, or lacks a match that the plan applies; the text names the first
            difference.
    """
    where = f"the saved plan of {plan.graph} doesn't fit this graph"
    if difference := first_difference(plan.sites, problem.sites):
        raise PlanError(f"{where}: {difference}")
    by_name = {candidate.name: index for index, candidate in enumerate(problem.candidates)}
    selected = []
    for each in plan.selected:
        index = by_name.get(each.name)
        if index is None:
            raise PlanError(f"{where}: it applies {each.name!r}, which matches nothing here")
        found = problem.candidates[index].signature
        if found != each.signature:
            raise PlanError(f"{where}: {each.name!r} was {each.signature} and is {found}")
        selected.append(index)
    chosen = tuple(sorted(index for index in selected if index not in problem.failed))
    if why := problem.illegal(chosen):
        raise PlanError(f"{where}: {why}")
    return Decision(selected=chosen, saving_ns=problem.program.saving(chosen))
