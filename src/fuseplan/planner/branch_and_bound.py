"""The exact optimum of a packing, or the best one found and a bound when the budget of nodes is spent."""

from collections.abc import Iterable
from dataclasses import dataclass

from fuseplan.planner.packing import Packing, State
from fuseplan.planner.relaxation import Relaxation


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A packing.

    Attributes:
        chosen: atoms.
        weight: their weight.
        bound: no packing weighs more.
        nodes: visited by the search.
    """

    chosen: frozenset[int]
    weight: int
    bound: int
    nodes: int

    @property
    def is_optimal(self) -> bool:
        """Whether no packing weighs more."""
        return self.weight == self.bound


def search(packing: Packing, node_budget: int) -> Outcome:
    """Depth first; every node is relaxed, and branched on while its bound leaves room for something heavier.

    The budget holds as soon as a feasible packing is known, which is at once unless a table has forced candidates.
    """
    relaxation = Relaxation(packing.weights, packing.neighbours, packing.alive)
    root = State.root(packing)
    by_weight = sorted(packing.alive, key=lambda atom: -packing.weights[atom])
    best = complete(root, by_weight)
    open_nodes: list[tuple[State, int | None]] = [(root, None)]
    nodes = 0
    while open_nodes and (nodes < node_budget or not packing.feasible(best.chosen)):
        state, bound = open_nodes.pop()
        if bound is not None and bound <= best.weight:
            continue
        nodes += 1
        rest, picks = relaxation.solve(state.alive)
        bound = state.weight + rest if bound is None else min(bound, state.weight + rest)
        if bound <= best.weight:
            continue
        found = complete(state, picks)
        if found.weight > best.weight:
            best = found
        if bound <= best.weight:
            continue
        atom = _branch(state, picks, found)
        without = state.copy()
        without.drop((atom,))
        open_nodes.append((without, bound))
        if state.take(atom):
            open_nodes.append((state, bound))
    bounds = [bound for _, bound in open_nodes if bound is not None]
    return Outcome(chosen=frozenset(best.chosen), weight=best.weight, bound=max([best.weight, *bounds]), nodes=nodes)


def complete(state: State, picks: Iterable[int]) -> State:
    """A copy of the state with those picks taken, one after another, that fit and add weight."""
    result = state.copy()
    for atom in picks:
        if atom in result.alive and result.gain(atom) > 0:
            result.take(atom)
    return result


def _branch(state: State, picks: Iterable[int], found: State) -> int:
    """The atom to decide next: a pick that did not fit, else the one that most depends on."""
    packing = state.packing
    if packing.coupled:
        for atom in picks:
            if atom not in found.chosen:
                return atom

    def weight_of_decision(atom: int) -> tuple[int, int, int]:
        decided = len(state.alive.intersection(packing.neighbours[atom]))
        return decided + len(packing.closures[atom] - state.chosen), packing.weights[atom], -atom

    return max((atom for atom in state.alive if packing.weights[atom] > 0), key=weight_of_decision)
