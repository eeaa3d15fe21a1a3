"""An upper bound on a packing and a packing near it, by local ratio, in time linear in the conflicts.

Conflicts that come from overlaps along a graph's order make an interval graph or close to one. On chordal graphs, which
include interval graphs, bound and packing meet (A. Frank, 1975), so that most components never branch.
"""

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush


class Relaxation:
    """Respects neighbours only; the packing's other constraints are left to the caller."""

    def __init__(self, weights: Sequence[int], neighbours: Sequence[Collection[int]], atoms: Collection[int]) -> None:
        self._weights, self._neighbours = weights, neighbours
        self._order = elimination_order(neighbours, [atom for atom in atoms if weights[atom] > 0])
        place = {atom: index for index, atom in enumerate(self._order)}
        self._later = {
            atom: sorted((u for u in neighbours[atom] if place.get(u, -1) > place[atom]), key=place.__getitem__)
            for atom in self._order
        }

    def solve(self, alive: Collection[int]) -> tuple[int, list[int]]:
        """A weight that no packing of atoms that are alive exceeds, and a packing of them.

        Takes an atom, pays the rest of its weight once for a clique of it and its neighbours, reduces their weights by
        that, and repeats until no weight is left. Every packing has at most one atom of a clique.
        """
        neighbours, later = self._neighbours, self._later
        left = {atom: self._weights[atom] for atom in self._order if atom in alive}
        bound, paid = 0, []
        for atom, weight in left.items():
            if weight <= 0:
                continue
            bound += weight
            paid.append(atom)
            clique: list[int] = []
            for other in later[atom]:
                if left.get(other, 0) > 0:
                    adjacent = neighbours[other]
                    if all(each in adjacent for each in clique):
                        clique.append(other)
                        left[other] -= weight
        packing: list[int] = []
        blocked: set[int] = set()
        for atom in reversed(paid):
            if atom not in blocked:
                packing.append(atom)
                blocked.update(neighbours[atom])
        return bound, packing


def elimination_order(neighbours: Sequence[Collection[int]], atoms: Collection[int]) -> list[int]:
    """The reverse of a maximum cardinality search: on a chordal graph the later neighbours of every atom are a clique.

    Ties go to the smaller atom, so that the order depends on nothing but the graph.
    """
    visited = dict.fromkeys(atoms, 0)
    heap = [(0, atom) for atom in visited]
    heapify(heap)
    order: list[int] = []
    while heap:
        count, atom = heappop(heap)
        if visited.get(atom) != -count:
            continue
        del visited[atom]
        order.append(atom)
        for other in neighbours[atom]:
            if other in visited:
                visited[other] += 1
                heappush(heap, (-visited[other], other))
    order.reverse()
    return order
