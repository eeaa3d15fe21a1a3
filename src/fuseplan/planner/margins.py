"""How far a plan's choice at a place is ahead of others there, and how sure that is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fuseplan.planner.pose import Problem
from fuseplan.planner.solver import Rival


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The difference in saving between a selection and another one.

    Attributes:
        ns: the difference.
        low_ns: the lower end of its interval; None where unknown.
        high_ns: the upper end.
    """

    ns: int
    low_ns: int | None = None
    high_ns: int | None = None


class Margins:
    """The margins of a plan over the rivals of its candidates, computed once for equal places.

    Args:
        problem: as it was solved.
        rivals: by candidate; see `Solver.rivals`.
    """

    def __init__(self, problem: Problem, rivals: Sequence[Rival | None]) -> None:
        self._priced, self._rivals = problem.priced, rivals
        self._known: dict[tuple[object, ...], Margin] = {}
        self._found: dict[int, Margin | None] = {}

    def __getitem__(self, candidate: int) -> Margin | None:
        """The margin over a candidate's rival; None where there is none."""
        if candidate not in self._found:
            self._found[candidate] = self._before(self._rivals[candidate])
        return self._found[candidate]

    def _before(self, rival: Rival | None) -> Margin | None:
        if rival is None:
            return None
        if not self._priced.has_doubts:
            return Margin(ns=rival.lost_ns)
        only, others = set(rival.best) - set(rival.selected), set(rival.selected) - set(rival.best)
        doubts = self._priced.doubts
        kind = tuple(sorted(id(doubts[each]) for each in side) for side in (only, others))
        key = (rival.lost_ns, *map(tuple, kind), *((tuple(rival.best),) if self._priced.together_doubts else ()))
        if key not in self._known:
            low, high = self._priced.ends(rival.lost_ns, rival.best, rival.selected)
            self._known[key] = Margin(ns=rival.lost_ns, low_ns=low, high_ns=high)
        return self._known[key]

    def closest(self, selected: Iterable[int]) -> Margin | None:
        """The smallest margin of the places where something is selected."""
        mine = set(selected)
        found = [
            margin
            for index, rival in enumerate(self._rivals)
            if rival is not None and not mine.isdisjoint(rival.best) and (margin := self[index]) is not None
        ]
        return min(found, key=lambda margin: margin.ns if margin.low_ns is None else margin.low_ns, default=None)
