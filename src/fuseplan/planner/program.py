"""The solver's input and output: an integer program, selections and solutions, without a graph."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fuseplan.planner.disjoint_sets import DisjointSets

CycleFinder = Callable[[Sequence[int]], Sequence[tuple[int, ...]]]
"""The cycles that candidates make when they are applied together: for each the candidates on it, one or more cycles if
there are any. A selection with all candidates of one of them is cyclic, too.
"""


@dataclass(frozen=True, kw_only=True)
class IntegerProgram:
    """Maximise the saving of the selected candidates, as a 0-1 integer program.

    Candidates are indices. Among selections with equal savings the one with fewer candidates is preferred, then the
    first in lexicographic order.

    Attributes:
        names: unique, in ascending order of a key that does not depend on the order of discovery.
        savings_ns: the saving of each candidate; may be zero or negative.
        conflicts: pairs `(i, j)`, `i < j`: never both.
        requires: pairs `(i, j)`: `i` only together with `j`.
        together: sets of candidates: all of a set or none of it.
        forced: always selected.
        one_of: of each of these sets one candidate is selected. The members of a set conflict with each other.
        forbidden: never selected.
        unsure: only selected where they are forced.
        only_with: pairs `(i, j)`: `i`, which is unsure by itself, only together with `j`, which requires it.
        alternatives: for components (see `components.components`) measured as a whole: the saving of each compatible
            subset, in place of the sum of `savings_ns`. An absent subset is not allowed; the empty one always is, and
            saves 0.
    """

    names: tuple[str, ...]
    savings_ns: tuple[int, ...]
    conflicts: frozenset[tuple[int, int]] = frozenset()
    requires: frozenset[tuple[int, int]] = frozenset()
    together: tuple[frozenset[int], ...] = ()
    forced: frozenset[int] = frozenset()
    one_of: tuple[frozenset[int], ...] = ()
    forbidden: frozenset[int] = frozenset()
    unsure: frozenset[int] = frozenset()
    only_with: frozenset[tuple[int, int]] = frozenset()
    alternatives: Mapping[frozenset[int], Mapping[frozenset[int], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.savings_ns) == len(set(self.names))
        assert all(i < j for i, j in self.conflicts)
        assert all(
            (min(i, j), max(i, j)) in self.conflicts for each in self.one_of for i in each for j in each if i != j
        )

    def saving(self, selected: Collection[int]) -> int:
        """The saving of a selection, in ns. Parts that were never measured together count 0: see `unmeasured`."""
        chosen = set(selected)
        total = 0
        for members, savings in self.alternatives.items():
            if measured := chosen & members:
                total += savings.get(frozenset(measured), 0)
                chosen -= measured
        return total + sum(self.savings_ns[candidate] for candidate in chosen)

    def unmeasured(self, selected: Collection[int]) -> frozenset[int]:
        """The selected candidates in components measured as a whole, where no row has just this subset."""
        chosen = set(selected)
        parts = [(frozenset(chosen & members), savings) for members, savings in self.alternatives.items()]
        return frozenset().union(*(part for part, savings in parts if part and part not in savings))

    def uncoupled(self, selected: Collection[int]) -> frozenset[int]:
        """The selected candidates that lack one that they need."""
        chosen = set(selected)
        lone = {i for i, j in self.requires if i in chosen and j not in chosen}
        return frozenset(lone.union(*(group & chosen for group in self.together if not group <= chosen)))

    def units(self, selected: Sequence[int]) -> list[tuple[int, ...]]:
        """A selection in parts that are applied together or not at all, by their couplings.

        Args:
            selected: in the order that the parts have by their first candidates.
        """
        place = {candidate: index for index, candidate in enumerate(selected)}
        sets = DisjointSets(len(selected))
        for tie in (*self.requires, *self.together):
            if inside := [place[candidate] for candidate in tie if candidate in place]:
                sets.union(inside)
        return [tuple(selected[index] for index in members) for members in sets.sets()]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A legal selection, and how much a better one could save at most.

    Attributes:
        selected: in ascending order.
        objective_ns: the saving of the selection.
        bound_ns: no legal selection saves more.
        components: how many sets of candidates were solved independently of each other.
        classes: how many of these differ.
        nodes: branch-and-bound nodes visited.
        cuts: the sets of candidates found cyclic together on the way, in the order in which they were found.
    """

    selected: tuple[int, ...]
    objective_ns: int
    bound_ns: int
    components: int
    classes: int
    nodes: int
    cuts: tuple[tuple[int, ...], ...] = ()

    @property
    def gap(self) -> float:
        """(bound - objective) / max(1, |bound|). 0.0 certifies that no legal selection saves more."""
        return (self.bound_ns - self.objective_ns) / max(1, abs(self.bound_ns))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A legal selection, without a bound.

    Attributes:
        selected: in ascending order.
        objective_ns: its saving.
    """

    selected: tuple[int, ...]
    objective_ns: int
