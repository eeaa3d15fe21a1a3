"""Where measuring could change a plan: the classes of places whose prices leave open which alternative is the best."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from fuseplan.matching import Match
from fuseplan.planner.alternatives import MAX_ENUMERATED, alternative_name, places_of
from fuseplan.planner.costs import Provenance
from fuseplan.planner.doubt import Price, contenders
from fuseplan.planner.pose import Problem
from fuseplan.record import Unsure


def undecided(problem: Problem, device: str) -> tuple[Unsure, ...]:
    """The classes of a problem, each once.

    Args:
        problem: of a graph.
        device: the device that it was priced for.
    """
    found: dict[tuple[str, tuple[str, ...]], Unsure] = {}
    counts = Counter[tuple[str, tuple[str, ...]]]()
    known: dict[tuple[object, ...], tuple[str, tuple[str, ...]] | None] = {}
    for component in problem.components:
        if not is_open(problem, component):
            continue
        places = places_of(component, problem.candidates)
        kind = _kind(problem, component, places)
        if kind not in known:
            known[kind] = None
            subsets = open_alternatives(problem, component)
            if len(subsets) > 1:
                signature = problem.pricing.signature(places)
                names = tuple(_names(problem, subsets, places))
                known[kind] = signature, names
                found[signature, names] = _record(problem, subsets, signature, names, device)
        key = known[kind]
        if key is not None:
            counts[key] += 1
    return tuple(replace(each, places=counts[key]) for key, each in found.items())


def is_open(problem: Problem, component: Sequence[int]) -> bool:
    """Whether measuring a component could add information: it can be measured, wasn't, and the user hasn't decided."""
    ours = all(isinstance(problem.candidates[index].match, Match) for index in component)
    forced = problem.program.forced.union(*problem.program.one_of)
    was_measured = frozenset(component) in problem.program.alternatives
    has_site = any(problem.candidates[index].site is not None for index in component)
    return ours and has_site and len(component) <= MAX_ENUMERATED and not was_measured and forced.isdisjoint(component)


def open_alternatives(problem: Problem, component: Sequence[int]) -> list[tuple[int, ...]]:
    """The alternatives that could be the best, the one that would be applied first."""
    priced = problem.priced
    left = [index for index in component if index not in problem.ruled_out]
    prices = {
        index: Price(
            priced.values[index], priced.provenance[index], priced.savings[index], priced.costs[index],
            priced.doubts[index],
        )
        for index in left
    }  # fmt: skip
    return contenders(left, problem.program, prices, priced.errors)


def _kind(problem: Problem, component: Sequence[int], places: Sequence[int]) -> tuple[object, ...]:
    """A key that is equal for equal components."""
    shapes = tuple(tuple(problem.pricing.shapes[place]) for place in places)
    program, priced = problem.program, problem.priced
    first = {index: number for number, index in enumerate(component)}
    names = tuple(
        (each.rule, each.op, each.provider, priced.values[index], index in problem.ruled_out)
        for index in component
        for each in [problem.candidates[index]]
    )
    conflicts = tuple((first[i], first[j]) for i in component for j in component if (i, j) in program.conflicts)
    return shapes, names, conflicts


def _names(problem: Problem, subsets: Iterable[Sequence[int]], places: Sequence[int]) -> Iterator[str]:
    for subset in subsets:
        yield alternative_name([problem.candidates[index] for index in subset], places)


def _record(
    problem: Problem, subsets: Sequence[tuple[int, ...]], signature: str, names: tuple[str, ...], device: str
) -> Unsure:
    priced = problem.priced
    best, *others = subsets
    margins = list[tuple[int, int, int]]()
    for other in others:
        if all(priced.provenance[index] is not Provenance.ASSUMED for index in other):
            ahead = sum(priced.values[index] for index in best) - sum(priced.values[index] for index in other)
            margins.append((ahead, *priced.ends(ahead, best, other)))
    nearest = min(margins, key=lambda each: each[1], default=(None, None, None))
    return Unsure(
        site=signature, places=1, alternatives=names, tokens=priced.tokens, ahead_ns=nearest[0], low_ns=nearest[1],
        high_ns=nearest[2],
        device=device,
    )  # fmt: skip
