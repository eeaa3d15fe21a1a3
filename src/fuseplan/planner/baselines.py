"""Selections by simpler methods; a plan is never worse than any of them."""

from collections.abc import Callable, Collection, Sequence

from fuseplan.errors import PlanError
from fuseplan.planner.components import isolate
from fuseplan.planner.packing import Packing, State, contract
from fuseplan.planner.program import CycleFinder, IntegerProgram, Selection

Preference = Callable[[Packing, int], tuple[int, ...]]
"""A sort key of atoms; the smallest is taken first."""


def heaviest(packing: Packing, atom: int) -> tuple[int, ...]:
    """The largest saving first."""
    return -packing.savings[atom], atom


def largest(sizes: Sequence[int]) -> Preference:
    """The candidate with the most nodes first, whatever it saves: the longest match.

    Args:
        sizes: nodes by candidate.
    """
    return lambda packing, atom: (-sum(sizes[candidate] for candidate in packing.members[atom]), atom)


def greedy(
    program: IntegerProgram,
    preference: Preference,
    find_cycles: CycleFinder | None = None,
    among: Collection[int] | None = None,
) -> Selection:
    """Takes one candidate after another, in order of preference, where it saves something and fits what was taken.

    Args:
        program: the candidates and their constraints.
        preference: e.g. `heaviest`.
        find_cycles: as for the solver.
        among: the only candidates to take; None: all.

    Raises:
        PlanError: forced fusions rule each other out.
    """
    (whole,) = isolate(program, [tuple(range(len(program.names)))])
    packing = contract(whole)
    if packing is None:
        raise PlanError("the forced fusions can't all be applied")
    state = State.root(packing)
    mandatory = frozenset().union(*packing.mandatory)
    for atom in sorted(packing.alive, key=lambda each: (each not in mandatory, preference(packing, each))):
        if among is not None and not set(packing.members[atom]).issubset(among):
            continue
        if atom in state.alive and state.gain(atom) > 0:
            tried = state.copy()
            if tried.take(atom) and not (find_cycles and find_cycles(packing.candidates(tried.chosen))):
                state = tried
    selected = packing.candidates(state.chosen)
    return Selection(selected=selected, objective_ns=program.saving(selected))
