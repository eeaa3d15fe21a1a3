"""The optimum of a large packing by `scipy.optimize.milp` (HiGHS), which branches on linear relaxations.

Branch and bound with local ratios is faster on the components that graphs have; this one has the better bounds where
hundreds of candidates are tangled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from fuseplan.planner.packing import Packing, State

MAX_FRACTIONAL = 250
"""Variables between 0 and 1 in the linear relaxation above which HiGHS's cuts alone take many seconds, on random
conflicts without any structure; the relaxation's bound and its rounding have to do then."""
MAX_ROWS = 6
"""Constraints a variable above which the relaxation itself takes seconds; conflicts are then so dense and without
structure that its bound is poor anyway."""
NODES_PER_LINEAR_NODE = 100
"""Nodes of the budget that a node of HiGHS counts for: roughly its time relative to a node of branch and bound."""


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The result of linear relaxations.

    Attributes:
        chosen: atoms, `packing.chosen` included; None where nothing feasible was found in the budget.
        bound_ns: no packing saves more.
        nodes: visited by the search.
    """

    chosen: frozenset[int] | None
    bound_ns: int
    nodes: int


def solve_linear(packing: Packing, node_budget: int) -> Relaxed | None:
    """The packing that saves the most and, of several, one of the fewest candidates.

    One thread and a limit on nodes, not on time: the same problem has the same answer.

    Returns:
        None where HiGHS fails, proves that nothing is feasible, or would take seconds.
    """
    atoms = sorted(packing.alive)
    column = {atom: index for index, atom in enumerate(atoms)}
    most = sum(len(packing.members[atom]) for atom in atoms) + 1
    # Saving first, then fewer candidates: one integer objective, exact in a double below 2 ** 53.
    objective = [packing.savings[atom] * most - len(packing.members[atom]) for atom in atoms]
    if sum(map(abs, objective)) >= 2**53:
        return None
    costs = -np.array(objective, dtype=float)
    rows = list(islice(_rows(packing, column), MAX_ROWS * len(atoms) + 1))
    if len(rows) > MAX_ROWS * len(atoms):
        return None
    entries = [(row, each, value) for row, (terms, _) in enumerate(rows) for each, value in terms]
    if entries:
        index, columns, values = zip(*entries, strict=True)
    else:
        index, columns, values = (), (), ()
    matrix = csr_array((values, (index, columns)), shape=(len(rows), len(atoms)))
    limits = np.array([limit for _, limit in rows])
    already = sum(packing.savings[atom] for atom in packing.chosen)

    def saving_bound(dual: float) -> int:
        # Half a unit of the objective is far below one ns and far above what HiGHS tolerates; the division rounds up,
        # since saving * most - count with 0 <= count < most was bounded.
        return already + -(-int(np.floor(-dual + 0.5)) // most)

    linear = linprog(costs, A_ub=matrix if rows else None, b_ub=limits if rows else None, bounds=(0, 1))
    if linear.x is None:
        return None
    bound = saving_bound(linear.fun)
    fractional = int(np.sum((linear.x > 1e-6) & (linear.x < 1 - 1e-6)))
    if not fractional or fractional > MAX_FRACTIONAL or node_budget < NODES_PER_LINEAR_NODE:
        return Relaxed(chosen=_rounded(packing, atoms, linear.x), bound_ns=bound, nodes=1)
    result = milp(
        costs,
        integrality=np.ones(len(atoms)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, ub=limits),
        options={"node_limit": node_budget // NODES_PER_LINEAR_NODE, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return Relaxed(chosen=_rounded(packing, atoms, linear.x), bound_ns=bound, nodes=1)
    bound = min(bound, saving_bound(result.mip_dual_bound))
    return Relaxed(chosen=_rounded(packing, atoms, result.x), bound_ns=bound, nodes=int(result.mip_node_count) + 1)


def _rounded(packing: Packing, atoms: Sequence[int], values: Sequence[float]) -> frozenset[int] | None:
    """Takes atoms in descending order of their variable, as far as they fit; None if that leaves a duty undone."""
    state = State.root(packing)
    by_value = sorted(zip(atoms, values, strict=True), key=lambda pair: (-round(pair[1], 6), pair[0]))
    for atom, value in by_value:
        if atom in state.alive and (value > 0.5 or state.gain(atom) > 0):
            state.take(atom)
    return frozenset(state.chosen) if packing.feasible(state.chosen) else None


def _rows(packing: Packing, column: dict[int, int]) -> Iterator[tuple[list[tuple[int, float]], float]]:
    """Constraints as (terms, upper bound of their sum)."""
    for clique in cliques(packing, sorted(column)):
        yield [(column[atom], 1.0) for atom in clique], 1.0
    for atom, index in column.items():
        for needed in packing.closures[atom]:
            if needed != atom and needed in column:
                yield [(index, 1.0), (column[needed], -1.0)], 0.0
    for limit in packing.limits:
        terms = [(column[atom], float(count)) for atom, count in limit.counts.items() if atom in column]
        load = sum(count for atom, count in limit.counts.items() if atom in packing.chosen)
        if terms:
            yield terms, float(limit.room - load)
    for block in packing.mandatory:
        terms = [(column[atom], -1.0) for atom in block if atom in column]
        if terms and packing.chosen.isdisjoint(block):
            yield terms, -1.0


def cliques(packing: Packing, atoms: Sequence[int]) -> Iterator[list[int]]:
    """Cliques that cover every conflict among `atoms`, each grown from the first conflict not covered yet."""
    allowed = set(atoms)
    covered: dict[int, set[int]] = {atom: set() for atom in atoms}
    for atom in atoms:
        for other in sorted(packing.neighbours[atom] & allowed):
            if other < atom or other in covered[atom]:
                continue
            clique = [atom, other]
            common = packing.neighbours[atom] & packing.neighbours[other] & allowed
            while common:
                member = min(common, key=lambda each: (len(covered[each].intersection(clique)), each))
                clique.append(member)
                common &= packing.neighbours[member]
            for member in clique:
                covered[member].update(each for each in clique if each != member)
            yield clique
