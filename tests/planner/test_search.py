"""The searches for the heaviest packing: local ratio, branch and bound, linear relaxations, and what they may cost."""

from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

import pytest
from scipy.optimize import OptimizeResult

from fuseplan.planner import milp, solver
from fuseplan.planner.branch_and_bound import search
from fuseplan.planner.components import Component
from fuseplan.planner.milp import solve_linear
from fuseplan.planner.packing import Packing, contract
from fuseplan.planner.program import IntegerProgram
from fuseplan.planner.relaxation import Relaxation
from fuseplan.planner.solver import Solver
from tests.planner.test_packing import contracted, packed, tie


def test_the_bound_holds_and_the_packing_is_one_on_any_graph() -> None:
    random = Random(1)
    gaps = 0
    for _ in range(60):
        size = random.randint(1, 8)
        edges = {(i, j) for j in range(size) for i in range(j) if random.random() < 0.4}
        neighbours = [frozenset(b if a == i else a for a, b in edges if i in (a, b)) for i in range(size)]
        weights = [random.randint(-2, 9) for _ in range(size)]
        bound, packing = Relaxation(weights, neighbours, range(size)).solve(range(size))
        sets = [set(each) for n in range(size + 1) for each in combinations(range(size), n)]
        best = max(sum(weights[i] for i in s) for s in sets if not any(i in s and j in s for i, j in edges))
        assert not any(i in packing and j in packing for i, j in edges)
        assert all(weights[i] > 0 for i in packing)
        assert sum(weights[i] for i in packing) <= best <= bound
        gaps += bound - best
    assert gaps <= 5


def ring(size: int) -> Component:
    """An odd ring, whose relaxation has a gap, so that the search has to branch."""
    conflicts = tuple(sorted((min(i, (i + 1) % size), max(i, (i + 1) % size)) for i in range(size)))
    return Component(savings=(10,) * size, conflicts=conflicts)


@pytest.mark.parametrize(("size", "best"), [(3, 10), (5, 20), (7, 30), (9, 40)])
def test_rings_are_branched_on_and_settled(size: int, best: int) -> None:
    packing = contracted(ring(size))
    outcome = search(packing, 1000)
    assert outcome.is_optimal
    assert packing.saving(outcome.weight) == packing.saving(outcome.bound) == best


def test_a_budget_leaves_the_best_found_and_a_bound() -> None:
    packing = contracted(_tangle(30, 0.3, 5))
    full = search(packing, 10_000)
    assert full.is_optimal
    for budget in (0, 1, 2, full.nodes - 1):
        part = search(packing, budget)
        assert part.nodes <= budget
        assert part.weight <= full.weight <= part.bound or budget == 0
    assert not search(packing, 1).is_optimal


def _tangle(size: int, share: float, seed: int, **constraints: Any) -> Component:
    random = Random(seed)
    conflicts = tuple((i, j) for i in range(size) for j in range(i + 1, size) if random.random() < share)
    return Component(savings=tuple(random.randint(1, 50) for _ in range(size)), conflicts=conflicts, **constraints)


LINEAR = [
    {},
    {"requires": ((0, 1), (2, 3), (4, 3))},
    {"cuts": ((5, 6, 7), (8, 9, 10, 11))},
    {"forced": (3,), "forbidden": (0,)},
    {"one_of": ((1, 2),)},
    {"together": ((0, 9), (4, 11))},
    {"requires": ((0, 1),), "cuts": ((1, 6, 7),), "forced": (7,)},
]


@pytest.mark.parametrize("constraints", LINEAR)
def test_linear_relaxations_agree_with_the_search(constraints: dict[str, Any]) -> None:
    for seed in range(3):
        part = _tangle(16, 0.3, seed)
        if "one_of" in constraints:
            part = replace(part, conflicts=tuple(sorted({*part.conflicts, (1, 2)})))
        packing = contract(replace(part, **constraints))
        if packing is None:
            continue
        exact, linear = search(packing, 10_000), solve_linear(packing, 10_000)
        assert exact.is_optimal
        assert linear is not None
        assert linear.chosen is not None
        assert linear.bound_ns == packing.saving(exact.weight)
        assert sum(packing.savings[atom] for atom in linear.chosen) == linear.bound_ns
        assert packing.chosen <= linear.chosen
        assert packing.feasible(linear.chosen)
        assert linear.nodes >= 1


def linear(packing: Packing, budget: int = 10_000) -> tuple[int, int, int] | None:
    """(bound, saving of what was chosen, nodes)."""
    relaxed = solve_linear(packing, budget)
    if relaxed is None:
        return None
    assert relaxed.chosen is not None
    return relaxed.bound_ns, sum(packing.savings[atom] for atom in relaxed.chosen), relaxed.nodes


def test_what_a_linear_relaxation_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of all atoms of a ring of five make a bound of 25; branching on them makes it 20."""
    packing = contracted(ring(5))
    branched, relaxed = linear(packing), (25, 20, 1)
    assert branched is not None
    assert branched[:2] == (20, 20)
    assert linear(packing, milp.NODES_PER_LINEAR_NODE) == branched
    assert linear(packing, milp.NODES_PER_LINEAR_NODE - 1) == relaxed
    with monkeypatch.context() as patched:
        patched.setattr(milp, "milp", lambda *given, **options: OptimizeResult(x=None))  # in the nodes that it had
        assert linear(packing) == relaxed
    for limit, most, expected in (("FRACTIONAL", 5, branched), ("FRACTIONAL", 4, relaxed), ("ROWS", 0, None)):
        monkeypatch.setattr(milp, f"MAX_{limit}", most)
        assert linear(packing) == expected


def test_a_linear_relaxation_is_exact_or_isn_t_asked() -> None:
    """Of two candidates a nanosecond is three units, one for each candidate and one more."""
    most = (2**53 - 1 + 2) // 3
    assert linear(packed(0, most - 2)) == (most - 2, most - 2, 1)
    assert linear(packed(most, most)) is None


@pytest.mark.parametrize(
    ("packing", "chosen"),
    [
        (packed(5, 7, -3, 0), (0, 1)), (packed(5, 7, forced=(1,)), (0, 1)),
        (packed(5, 5, 10, conflicts=((0, 2), (1, 2))), (2,)), (packed(10, 5, 5, conflicts=((0, 1), (0, 2))), (0,)),
    ],
)  # fmt: skip
def test_a_linear_relaxation_prefers_fewer_candidates(packing: Packing, chosen: tuple[int, ...]) -> None:
    relaxed = solve_linear(packing, 10_000)
    assert relaxed is not None
    assert packing.candidates(relaxed.chosen or ()) == chosen


def regrets(given: Solver, program: IntegerProgram) -> list[int | None]:
    """By candidate what holding it costs, 0 of those selected."""
    selected = given.solve(program).selected
    rivals = enumerate(given.rivals(program, ()))
    return [0 if index in selected else None if rival is None else rival.lost_ns for index, rival in rivals]


@pytest.mark.parametrize("large", [2, 48])
def test_regrets_of_large_components_are_what_neighbours_save(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "LARGE", large)
    star = tie(9, 10, 4, conflicts=frozenset({(0, 1), (1, 2)}))
    assert regrets(Solver(), star) == [0, 3, 0]
    held = replace(star, forced=frozenset({1}))
    assert regrets(Solver(), held) == ([None, 0, None] if large > 2 else [1, 0, 6])
    # Neighbours count that are chosen alone.
    row = tie(10, 1, 2, 20, conflicts=frozenset({(0, 1), (1, 2), (2, 3)}))
    assert regrets(Solver(), row) == [0, 9, 18, 0]


def test_large_components_are_searched_a_little_and_then_relaxed(monkeypatch: pytest.MonkeyPatch) -> None:
    part = _tangle(30, 0.3, 5)
    program = tie(*part.savings, conflicts=frozenset(part.conflicts))
    exact = Solver().solve(program)
    assert exact.gap == 0.0
    for large, visits in ((29, solver.FIRST_VISITS), (29, 0), (30, 0)):
        monkeypatch.setattr(solver, "LARGE", large)
        monkeypatch.setattr(solver, "FIRST_VISITS", visits)
        again = Solver().solve(program)
        assert (again.objective_ns, again.bound_ns) == (exact.objective_ns, exact.objective_ns)
    assert again.nodes == exact.nodes
    monkeypatch.setattr(solver, "LARGE", 29)
    monkeypatch.setattr(solver, "solve_linear", lambda packing, budget: None)
    alone = Solver().solve(program)
    assert alone.nodes == 1
    assert alone.objective_ns <= exact.objective_ns <= alone.bound_ns


def test_what_a_relaxation_adds_is_its_bound_and_a_better_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    part = ring(5)
    program = tie(*part.savings, conflicts=frozenset(part.conflicts))
    monkeypatch.setattr(solver, "LARGE", 4)
    monkeypatch.setattr(solver, "FIRST_NODES", 1)
    # A bound below what is saved would be wrong, and isn't believed.
    for chosen, given, bound in ((None, 20, 20), (frozenset({0}), 21, 21), (None, 5, 20)):
        relaxed = milp.Relaxed(chosen=chosen, bound_ns=given, nodes=7)
        monkeypatch.setattr(solver, "solve_linear", lambda packing, budget, relaxed=relaxed: relaxed)
        solution = Solver().solve(program)
        assert (solution.objective_ns, solution.bound_ns, solution.nodes) == (20, bound, 1 + 7)
