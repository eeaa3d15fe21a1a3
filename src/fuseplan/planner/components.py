"""Candidates that constrain each other form a component. Components are solved apart, and equal ones once."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from fuseplan.planner.disjoint_sets import DisjointSets
from fuseplan.planner.program import IntegerProgram


@dataclass(frozen=True, kw_only=True)
class Component:
    """The problem of one component, its candidates numbered from 0 in ascending order.

    Everything is a sorted tuple, so that components that differ in nothing but names are equal.

    Attributes:
        savings: ns, by candidate.
        conflicts: pairs, never both.
        requires: pairs, the first only with the second.
        together: all or none.
        cuts: not all of these.
        forced: always selected.
        one_of: one of each.
        forbidden: never selected.
        unsure: only selected where they are forced.
        tables: candidates measured as a whole and the saving of each allowed subset of them but the empty one.
    """

    savings: tuple[int, ...]
    conflicts: tuple[tuple[int, int], ...] = ()
    requires: tuple[tuple[int, int], ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    cuts: tuple[tuple[int, ...], ...] = ()
    forced: tuple[int, ...] = ()
    one_of: tuple[tuple[int, ...], ...] = ()
    forbidden: tuple[int, ...] = ()
    unsure: tuple[int, ...] = ()
    tables: tuple[tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], int], ...]], ...] = ()

    def saving(self, selected: Sequence[int]) -> int:
        """The saving of a legal selection, in ns."""
        chosen = set(selected)
        total = 0
        for members, alternatives in self.tables:
            measured = tuple(sorted(chosen.intersection(members)))
            total += dict(alternatives)[measured] if measured else 0
            chosen.difference_update(members)
        return total + sum(self.savings[candidate] for candidate in chosen)


def components(program: IntegerProgram, cuts: Iterable[Sequence[int]] = ()) -> list[tuple[int, ...]]:
    """The sets of candidates that constraints tie together, each in ascending order, by smallest member.

    Forcing and forbidding have no influence, so that a component measured as a whole remains one.

    Args:
        program: the candidates and their constraints.
        cuts: further constraints: sets that may not be selected as a whole.
    """
    sets = DisjointSets(len(program.names))
    ties: Iterable[Collection[int]] = chain(program.conflicts, program.requires, program.together, cuts)
    for tie in ties:
        if tie:
            sets.union(tie)
    return sets.sets()


def isolate(
    program: IntegerProgram, members: Sequence[tuple[int, ...]], cuts: Sequence[tuple[int, ...]] = ()
) -> list[Component]:
    """The problem of each of `members`, which are `components(program, cuts)`."""
    owner: dict[int, int] = {}
    local: dict[int, int] = {}
    for index, candidates in enumerate(members):
        for position, candidate in enumerate(candidates):
            owner[candidate] = index
            local[candidate] = position

    def grouped(ties: Iterable[Iterable[int]], ordered: bool) -> dict[int, list[tuple[int, ...]]]:
        found: dict[int, list[tuple[int, ...]]] = {}
        for tie in ties:
            renamed = tuple(local[candidate] for candidate in tie)
            if renamed:
                place = owner[next(iter(tie))]
                found.setdefault(place, []).append(renamed if ordered else tuple(sorted(renamed)))
        for each in found.values():
            each.sort()
        return found

    conflicts, requires = grouped(program.conflicts, False), grouped(program.requires | program.only_with, True)
    together, excluded = grouped(program.together, False), grouped(cuts, False)
    forced = grouped(((candidate,) for candidate in program.forced), False)
    forbidden = grouped(((candidate,) for candidate in program.forbidden), False)
    unsure = grouped(((candidate,) for candidate in program.unsure), False)
    one_of = grouped(program.one_of, False)
    tables: dict[int, list[tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], int], ...]]]] = {}
    for tabled, alternatives in program.alternatives.items():
        rows = [(tuple(sorted(local[c] for c in subset)), saving) for subset, saving in alternatives.items() if subset]
        table = (tuple(sorted(local[c] for c in tabled)), tuple(sorted(rows)))
        tables.setdefault(owner[min(tabled)], []).append(table)
    return [
        Component(
            savings=tuple(program.savings_ns[candidate] for candidate in candidates),
            conflicts=tuple((i, j) for i, j in conflicts.get(index, ())),
            requires=tuple((i, j) for i, j in requires.get(index, ())),
            together=tuple(together.get(index, ())),
            cuts=tuple(excluded.get(index, ())),
            forced=tuple(candidate for (candidate,) in forced.get(index, ())),
            one_of=tuple(one_of.get(index, ())),
            forbidden=tuple(candidate for (candidate,) in forbidden.get(index, ())),
            unsure=tuple(candidate for (candidate,) in unsure.get(index, ())),
            tables=tuple(sorted(tables.get(index, ()))),
        )
        for index, candidates in enumerate(members)
    ]
