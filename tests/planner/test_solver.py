"""The solver against a brute force, on problems without a graph and on random graphs."""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx

from fuseplan.errors import PlanError
from fuseplan.graph.legality import Contraction, is_convex
from fuseplan.planner.baselines import greedy, heaviest, largest
from fuseplan.planner.components import components
from fuseplan.planner.program import CycleFinder, IntegerProgram, Solution
from fuseplan.planner.solver import Solver
from tests.planner import brute_force
from tests.planner.test_packing import tie

PROBLEMS, GRAPHS = 400, 400
MANY = 10_000


def is_legal(program: IntegerProgram, chosen: frozenset[int]) -> bool:
    return (
        not any(i in chosen and j in chosen for i, j in program.conflicts)
        and all(j in chosen for i, j in program.requires if i in chosen)
        and all(len(chosen & group) in (0, len(group)) for group in program.together)
        and all(len(chosen & group) == 1 for group in program.one_of)
        and program.forced <= chosen
        and not program.forbidden & chosen
    )


@st.composite
def programs(draw: st.DrawFn, most: int = 9, tables: bool = True) -> IntegerProgram:
    count = draw(st.integers(1, most))
    index = st.integers(0, count - 1)
    pairs = st.sets(st.tuples(index, index), max_size=2 * count)
    conflicts = {(min(p), max(p)) for p in draw(pairs) if p[0] != p[1]}
    requires = {p for p in draw(st.sets(st.tuples(index, index), max_size=3)) if p[0] != p[1]}
    together = draw(st.lists(st.frozensets(index, min_size=min(2, count), max_size=3), max_size=1))
    forced = draw(st.frozensets(index, max_size=1))
    forbidden = draw(st.frozensets(index, max_size=2))
    one_of = [frozenset(p) for p in sorted(conflicts)[:1] if draw(st.booleans())]
    program = IntegerProgram(
        names=tuple(f"c{i:02}" for i in range(count)),
        savings_ns=tuple(draw(st.lists(st.integers(-5, 20), min_size=count, max_size=count))),
        conflicts=frozenset(conflicts),
        requires=frozenset(requires),
        together=tuple(together),
        forced=forced,
        one_of=tuple(one_of),
        forbidden=forbidden,
    )
    if tables and draw(st.booleans()):
        members = draw(st.sampled_from([frozenset(each) for each in components(program)]))
        subsets = [s for s in brute_force.subsets(count) if s and s <= members and draw(st.booleans())]
        rows = {subset: draw(st.integers(-5, 20)) for subset in subsets[:12]}
        program = replace(program, alternatives={members: rows})
    return program


def check_optimal(program: IntegerProgram, solution: Solution, expected: tuple[int, tuple[int, ...]]) -> None:
    assert (solution.objective_ns, solution.selected) == expected
    assert solution.bound_ns == solution.objective_ns
    assert solution.gap == 0.0


def check_program(program: IntegerProgram, cycles: Collection[frozenset[int]]) -> None:
    """The best legal set is found, or that there is none."""

    def legal(chosen: frozenset[int]) -> bool:
        return is_legal(program, chosen) and not any(cycle <= chosen for cycle in cycles)

    def find_cycles(selected: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(cycle) for cycle in cycles if cycle <= {*selected}]

    expected = brute_force.best(program.savings_ns, legal, program.alternatives)
    if expected is None:
        with pytest.raises(PlanError, match="forced"):
            Solver().solve(program, find_cycles)
    else:
        check_optimal(program, Solver().solve(program, find_cycles), expected)


CYCLES = st.sets(st.frozensets(st.integers(0, 8), min_size=2, max_size=4), max_size=4)


@settings(max_examples=PROBLEMS)
@given(programs(), CYCLES)
def test_solver_finds_what_brute_force_finds(program: IntegerProgram, cycles: set[frozenset[int]]) -> None:
    check_program(program, cycles)


@dataclass(frozen=True)
class Case:
    """A graph of integer arithmetic and regions of it that could become one op each."""

    graph: fx.Graph
    nodes: tuple[fx.Node, ...]
    regions: tuple[frozenset[int], ...]
    savings: tuple[int, ...]

    @property
    def edges(self) -> list[tuple[int, int]]:
        place = {node: index for index, node in enumerate(self.graph.nodes)}
        return [(place[node], place[user]) for node in self.graph.nodes for user in node.users]

    @property
    def program(self) -> IntegerProgram:
        pairs = combinations(range(len(self.regions)), 2)
        overlapping = frozenset((i, j) for i, j in pairs if not self.regions[i].isdisjoint(self.regions[j]))
        return tie(*self.savings, conflicts=overlapping)

    @property
    def find_cycles(self) -> CycleFinder:
        contraction = Contraction(self.graph)

        def find(selected: Any) -> list[tuple[int, ...]]:
            groups = [[self.nodes[n] for n in self.regions[i]] for i in selected]
            return [tuple(selected[k] for k in cycle) for cycle in contraction.cycles(groups)]

        return find


INPUTS = 2
OPS = (operator.add, operator.sub, operator.mul)


def random_case(seed: int, calls: int = 9, most: int = 8) -> Case:
    """Regions are convex one by one, and in narrow graphs often cyclic together."""
    random = Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(INPUTS)]
    for _ in range(calls):
        recent = nodes[-4:]
        nodes.append(graph.call_function(random.choice(OPS), (random.choice(recent), random.choice(recent))))
    graph.output(tuple(node for node in nodes if not node.users))
    regions: list[frozenset[int]] = []
    for _ in range(4 * most):
        region = frozenset(random.sample(range(INPUTS, len(nodes)), random.choice([2, 2, 3])))
        if len(regions) < most and region not in regions and is_convex([nodes[i] for i in region]):
            regions.append(region)
    savings = tuple(random.choice([random.randint(-3, 20), 7]) for _ in regions)
    return Case(graph, tuple(nodes), tuple(regions), savings)


CYCLIC_ONLY_TOGETHER = 7
"""A seed whose best selection without regard to cycles is cyclic; a test makes sure of it."""


def check_graph(seed: int) -> None:
    """The best legal set of a random graph is found."""
    case = random_case(seed)
    program = case.program

    def legal(chosen: frozenset[int]) -> bool:
        return is_legal(program, chosen) and brute_force.is_acyclic(case.edges, case.regions, chosen)

    expected = brute_force.best(program.savings_ns, legal)
    assert expected is not None
    solution = Solver().solve(program, case.find_cycles)
    check_optimal(program, solution, expected)
    for cut in solution.cuts:
        assert len(cut) > 1
        assert not brute_force.is_acyclic(case.edges, case.regions, frozenset(cut))
    sizes = [len(region) for region in case.regions]
    for preference in (heaviest, largest(sizes)):
        simple = greedy(program, preference, case.find_cycles)
        assert legal(frozenset(simple.selected))
        assert simple.objective_ns == program.saving(simple.selected) <= solution.objective_ns


@settings(max_examples=GRAPHS)
@given(st.integers(0, 2**32))
@example(CYCLIC_ONLY_TOGETHER)
def test_best_legal_set_of_a_random_graph(seed: int) -> None:
    check_graph(seed)


@pytest.mark.nightly
@settings(max_examples=MANY)
@given(programs(), CYCLES, st.integers(0, 2**32))
def test_best_legal_sets_of_many_problems(program: IntegerProgram, cycles: set[frozenset[int]], seed: int) -> None:
    check_program(program, cycles)
    check_graph(seed)


def test_seeds_hold_sets_that_are_cyclic_only_together() -> None:
    cyclic = []
    for seed in range(300):
        case = random_case(seed)
        if Solver().solve(case.program, case.find_cycles).cuts:
            cyclic.append(seed)
    assert CYCLIC_ONLY_TOGETHER in cyclic
    assert len(cyclic) > 20


def overlapping(count: int, seed: int = 0, width: int = 8) -> IntegerProgram:
    """One component, as overlapping regions of a graph make it."""
    random = Random(seed)
    places = [random.randrange(count // 2) for _ in range(count)]
    regions = [{place + random.randrange(width) for _ in range(3)} for place in places]
    conflicts = {(i, j) for j in range(count) for i in range(j) if regions[i] & regions[j]}
    return tie(*(random.randint(1, 20_000) for _ in range(count)), conflicts=frozenset(conflicts))


def is_valid(program: IntegerProgram, solution: Solution) -> bool:
    chosen = frozenset(solution.selected)
    return is_legal(program, chosen) and program.saving(chosen) == solution.objective_ns <= solution.bound_ns


def test_large_components_are_certified_and_beat_the_heuristics() -> None:
    program = overlapping(400)
    solution = Solver().solve(program)
    assert is_valid(program, solution)
    assert solution.gap == 0.0
    for preference in (heaviest, largest([1] * 400)):
        assert greedy(program, preference).objective_ns <= solution.objective_ns


def test_a_component_past_every_limit_returns_its_incumbent_and_bound() -> None:
    random = Random(3)
    pairs = {(min(p), max(p)) for p in ((random.randrange(600), random.randrange(600)) for _ in range(4000))}
    conflicts = frozenset(pair for pair in pairs if pair[0] != pair[1])
    program = tie(*(random.randint(1, 20_000) for _ in range(600)), conflicts=conflicts)
    for budget in (1, 20_000):
        solution = Solver(budget).solve(program)
        assert is_valid(program, solution)
        assert solution.objective_ns > 0
    assert Solver(1).solve(program) == Solver(1).solve(program)
    assert Solver(1).solve(program).gap > 0


@pytest.mark.parametrize("seed", [7, 16, 21, 26])
def test_a_budget_of_one_node_is_still_legal_where_cycles_are(seed: int) -> None:
    case = random_case(seed)
    solution = Solver(1).solve(case.program, case.find_cycles)
    chosen = frozenset(solution.selected)
    assert is_legal(case.program, chosen)
    assert brute_force.is_acyclic(case.edges, case.regions, chosen)
    best = Solver().solve(case.program, case.find_cycles)
    assert solution.objective_ns <= best.objective_ns <= solution.bound_ns


def test_equal_components_are_solved_once() -> None:
    layers = 50
    pairs = frozenset((2 * i, 2 * i + 1) for i in range(layers))
    solution = Solver().solve(tie(*(5, 7) * layers, conflicts=pairs))
    assert (solution.components, solution.classes, solution.nodes) == (layers, 1, 1)
    assert solution.objective_ns == 7 * layers


def test_rivals_are_of_the_program_that_is_asked_for() -> None:
    """Whatever was solved in between, and if a program differs in its savings or its cuts alone."""
    first, second = (tie(*savings, conflicts=frozenset({(0, 1)})) for savings in ((5, 3), (2, 7)))
    solver = Solver()
    for program in (first, second):
        solver.solve(program)
    lost = [[each.lost_ns for each in solver.rivals(program, ()) if each] for program in (first, second)]
    assert lost == [[2, 2], [5, 5]]
    free = tie(5, 3)
    solver.solve(free)
    solver.solve(free, lambda selected: [(0, 1)] if len(selected) > 1 else [])
    assert [each.lost_ns for each in solver.rivals(free, [(0, 1)]) if each] == [2, 2]


@settings(max_examples=100)
@given(programs(tables=False))
def test_rivals_are_the_best_with_a_candidate_or_without_it(program: IntegerProgram) -> None:
    solver = Solver()
    try:
        best = solver.solve(program)
    except PlanError:
        return
    for index, rival in enumerate(solver.rivals(program, best.cuts)):
        is_in = index in best.selected
        field = "forbidden" if is_in else "forced"
        try:
            other = Solver().solve(replace(program, **{field: getattr(program, field) | {index}}))
        except PlanError:
            assert rival is None
        else:
            assert rival is not None
            assert rival.lost_ns == best.objective_ns - other.objective_ns
            assert {*rival.selected} <= {*other.selected}
            assert (index in rival.best, index in rival.selected) == (is_in, not is_in)
