"""The searches for the heaviest packing: local ratio, branch and bound, linear relaxations, and what they may cost."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

import pytest
from scipy.optimize import OptimizeResult

from fuseplan.planner import milp, solver
from fuseplan.planner.branch_and_bound import Outcome, search
from fuseplan.planner.components import Component
from fuseplan.planner.milp import cliques, solve_linear
from fuseplan.planner.packing import Packing, contract
from fuseplan.planner.program import IntegerProgram
from fuseplan.planner.relaxation import Relaxation, elimination_order
from fuseplan.planner.solver import Solver
from tests.planner.test_packing import packed, tie


def path(*weights: int) -> tuple[list[int], list[frozenset[int]]]:
    """Each excludes the one before and the one after."""
    last = len(weights) - 1
    return [*weights], [frozenset(i for i in (place - 1, place + 1) if 0 <= i <= last) for place in range(last + 1)]


def contracted(part: Component) -> Packing:
    packing = contract(part)
    assert packing is not None
    return packing


@pytest.mark.parametrize(
    ("weights", "best"), [((3, 5, 3), [0, 2]), ((3, 7, 3), [1]), ((4, 1, 1, 4), [0, 3]), ((1, 2, 3, 4, 5), [0, 2, 4])]
)
def test_bound_and_packing_meet_on_paths(weights: tuple[int, ...], best: list[int]) -> None:
    given, neighbours = path(*weights)
    bound, packing = Relaxation(given, neighbours, range(len(weights))).solve(range(len(weights)))
    assert bound == sum(weights[atom] for atom in best)
    assert sorted(packing) == best


def test_only_what_is_alive_and_weighs_something_counts() -> None:
    given, neighbours = path(3, 5, 3, 0, -4, 9)
    relaxation = Relaxation(given, neighbours, range(6))
    assert relaxation.solve(range(6)) == (6 + 9, relaxation.solve(range(6))[1])
    assert sorted(relaxation.solve(range(6))[1]) == [0, 2, 5]
    assert relaxation.solve([1, 2]) == (5, [1])
    assert relaxation.solve([3, 4]) == (0, [])
    assert relaxation.solve([]) == (0, [])
    assert Relaxation(given, neighbours, [1, 2]).solve(range(6)) == (5, [1])


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


def test_later_neighbours_of_a_chordal_graph_are_cliques() -> None:
    given, neighbours = path(1, 1, 1, 1)
    assert elimination_order(neighbours, range(4)) == [3, 2, 1, 0]
    assert elimination_order([frozenset()] * 3, [0, 2]) == [2, 0]
    # A triangle with a tail at 1: the tail's end goes before what it hangs on.
    triangle = [frozenset({1, 2}), frozenset({0, 2, 3}), frozenset({0, 1}), frozenset({1})]
    assert elimination_order(triangle, range(4)) == [3, 2, 1, 0]
    assert len(given) == 4


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
    assert full.nodes > 2
    for budget in (0, 1, 2, full.nodes - 1):
        part = search(packing, budget)
        assert part.nodes <= budget
        assert part.weight <= full.weight <= part.bound or budget == 0
    first = search(packing, 1)
    assert not first.is_optimal
    assert Outcome(chosen=frozenset(), weight=3, bound=3, nodes=0).is_optimal


def _tangle(size: int, share: float, seed: int, **constraints: Any) -> Component:
    random = Random(seed)
    conflicts = tuple((i, j) for i in range(size) for j in range(i + 1, size) if random.random() < share)
    return Component(savings=tuple(random.randint(1, 50) for _ in range(size)), conflicts=conflicts, **constraints)


NEEDS = ((0, 1), (2, 3), (4, 3), (10, 11), (12, 11), (14, 15))


@pytest.mark.parametrize(
    ("size", "share", "constraints", "nodes"),
    [
        (28, 0.25, {}, 418),
        (20, 0.15, {"requires": NEEDS[:3], "cuts": ((5, 6, 7), (8, 9, 10, 11))}, 122),
        (24, 0.3, {"requires": NEEDS}, 284),
    ],
)
def test_the_search_costs_the_same_everywhere(size: int, share: float, constraints: dict[str, Any], nodes: int) -> None:
    """On components without any structure; another choice of what to branch on costs more, or less."""
    packings = [contract(_tangle(size, share, seed, **constraints)) for seed in range(12)]
    assert sum(search(packing, 10_000).nodes for packing in packings if packing) == nodes


def covers(packing: Packing, found: Iterable[Sequence[int]], atoms: Iterable[int]) -> bool:
    pairs = {tuple(sorted(pair)) for clique in found for pair in combinations(clique, 2)}
    wanted = {(i, j) for i in atoms for j in packing.neighbours[i] if i < j and j in set(atoms)}
    return pairs == wanted


def test_cliques_cover_every_conflict_and_nothing_else() -> None:
    for seed in range(8):
        packing = contracted(_tangle(12, 0.5, seed))
        for atoms in (range(12), range(0, 12, 2)):
            found = list(cliques(packing, list(atoms)))
            assert covers(packing, found, atoms)
            assert len(found) < sum(len(each) for each in packing.neighbours) / 2
    triangle = packed(1, 1, 1, 1, conflicts=((0, 1), (0, 2), (1, 2), (2, 3)))
    assert list(cliques(triangle, [0, 1, 2, 3])) == [[0, 1, 2], [2, 3]]
    assert list(cliques(triangle, [1, 2, 3])) == [[1, 2], [2, 3]]


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
    assert branched[2] >= 1
    assert linear(packing, milp.NODES_PER_LINEAR_NODE) == branched
    assert linear(packing, milp.NODES_PER_LINEAR_NODE - 1) == relaxed
    monkeypatch.setattr(milp, "MAX_FRACTIONAL", 5)
    assert linear(packing) == branched
    with monkeypatch.context() as patched:
        patched.setattr(milp, "milp", lambda *given, **options: OptimizeResult(x=None))  # in the nodes that it had
        assert linear(packing) == relaxed
    monkeypatch.setattr(milp, "MAX_FRACTIONAL", 4)
    assert linear(packing) == relaxed
    monkeypatch.setattr(milp, "MAX_ROWS", 1)
    assert linear(packing) == relaxed
    monkeypatch.setattr(milp, "MAX_ROWS", 0)
    assert linear(packing) is None


def test_a_linear_relaxation_is_exact_or_isn_t_asked() -> None:
    """Of two candidates a nanosecond is three units, one for each candidate and one more."""
    most = (2**53 - 1 + 2) // 3
    assert linear(packed(0, most - 2)) == (most - 2, most - 2, 1)
    assert linear(packed(most, most)) is None


@pytest.mark.parametrize(
    ("packing", "bound"),
    [
        (packed(5, 7, -3, 0), 12), (packed(5, 7, forced=(1,)), 12),
        (packed(4, 4, 9, conflicts=((0, 2), (1, 2))), 9),
    ],
)  # fmt: skip
def test_a_linear_relaxation_of_what_excludes_nothing(packing: Packing, bound: int) -> None:
    assert linear(packing) == (bound, bound, 1)


def test_a_linear_relaxation_prefers_fewer_candidates() -> None:
    for packing, chosen in (
        (packed(5, 5, 10, conflicts=((0, 2), (1, 2))), (2,)), (packed(10, 5, 5, conflicts=((0, 1), (0, 2))), (0,)),
    ):  # fmt: skip
        relaxed = solve_linear(packing, 10_000)
        assert relaxed is not None
        assert packing.candidates(relaxed.chosen or ()) == chosen


def star(*savings: int, centre: int, **constraints: Any) -> IntegerProgram:
    pairs = frozenset((min(centre, i), max(centre, i)) for i in range(len(savings)) if i != centre)
    return tie(*savings, conflicts=pairs, **constraints)


def regrets(given: Solver, program: IntegerProgram, cuts: Sequence[tuple[int, ...]]) -> list[int | None]:
    """By candidate what holding it costs, 0 of those selected."""
    selected = given.solve(program).selected
    rivals = enumerate(given.rivals(program, cuts))
    return [0 if index in selected else None if rival is None else rival.lost_ns for index, rival in rivals]


@pytest.mark.parametrize("centre", [0, 1, 2])
@pytest.mark.parametrize("large", [2, 48])
def test_regrets_of_large_components_are_what_neighbours_save(
    centre: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "LARGE", large)
    around = [9, 4]
    savings = [*around[:centre], 10, *around[centre:]]
    program = star(*savings, centre=centre)
    given = Solver()
    solution = given.solve(program)
    assert solution.objective_ns == 13
    assert regrets(given, program, solution.cuts) == [3 if i == centre else 0 for i in range(3)]
    held = star(*savings, centre=centre, forced=frozenset({centre}))
    solution = given.solve(held)
    assert (solution.objective_ns, solution.selected) == (10, (centre,))
    if large > 2:
        assert regrets(given, held, ()) == [0 if i == centre else None for i in range(3)]
    else:
        assert regrets(given, held, ()) == [10 - saving if i != centre else 0 for i, saving in enumerate(savings)]


def test_regrets_of_large_components_count_neighbours_that_are_chosen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "LARGE", 2)
    program = tie(10, 1, 2, 20, conflicts=frozenset({(0, 1), (1, 2), (2, 3)}))
    given = Solver()
    assert given.solve(program).selected == (0, 3)
    assert regrets(given, program, ()) == [0, 9, 18, 0]


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
    monkeypatch.setattr(solver, "FIRST_VISITS", solver.FIRST_VISITS + 10**6)
    monkeypatch.setattr(solver, "FIRST_NODES", 3)
    assert Solver().solve(program).nodes == 3
    assert Solver(2).solve(program).nodes == 2


def test_what_a_relaxation_adds_is_its_bound_its_nodes_and_a_better_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    part = ring(5)
    program = tie(*part.savings, conflicts=frozenset(part.conflicts))
    monkeypatch.setattr(solver, "LARGE", 4)
    monkeypatch.setattr(solver, "FIRST_NODES", 1)

    def relaxed(chosen: frozenset[int] | None, bound: int) -> Any:
        monkeypatch.setattr(
            solver, "solve_linear", lambda packing, budget: milp.Relaxed(chosen=chosen, bound_ns=bound, nodes=7)
        )
        return Solver().solve(program)

    first = relaxed(None, 1000)
    assert (first.objective_ns, first.nodes) == (20, 1 + 7)
    assert first.bound_ns > 20
    assert relaxed(None, 20).bound_ns == 20
    assert relaxed(frozenset({0}), 21).selected == first.selected
    assert relaxed(frozenset({0}), 21).bound_ns == 21
    # A bound below what is saved would be wrong, and isn't believed.
    assert relaxed(None, 5).bound_ns == 20
