"""Packings: atoms and their weights, and what excludes what; components and the simpler ways of choosing."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from fuseplan.errors import PlanError
from fuseplan.planner import packing as packing_module
from fuseplan.planner.baselines import greedy, heaviest, largest
from fuseplan.planner.components import Component, components, isolate
from fuseplan.planner.packing import Limit, Packing, State, contract
from fuseplan.planner.program import IntegerProgram, Solution
from fuseplan.planner.solver import Solver


def contracted(part: Component) -> Packing:
    packing = contract(part)
    assert packing is not None
    return packing


def packed(*savings: int, **constraints: Any) -> Packing:
    return contracted(Component(savings=savings, **constraints))


def test_places_are_left_out_where_they_would_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "MAX_PLACES", 2)
    assert packed(5, 7).scale == 3 << 2
    assert packed(5, 7, 5).scale == 4
    assert packed(5, 7, 5).weights == [19, 27, 19]


def test_an_atom_with_several_candidates_of_a_cut_counts_as_many() -> None:
    packing = packed(5, 7, 9, 1, together=((0, 1),), cuts=((0, 1, 2, 3),))
    assert packing.members == [(0, 1), (2,), (3,)]
    assert packing.limits == [Limit({0: 2, 1: 1, 2: 1}, 3)]
    # Two pairs of two have no room together; the limit says nothing more.
    pairs = packed(5, 7, 9, 1, together=((0, 1), (2, 3)), cuts=((0, 1, 2, 3),))
    assert pairs.neighbours == [{1}, {0}]
    assert pairs.limits == []


def test_a_group_that_a_limit_has_no_room_for_changes_nothing() -> None:
    packing = packed(5, 7, 9, 1, requires=((3, 0), (3, 1)), cuts=((0, 1, 2),))
    state = State.root(packing)
    assert state.take(2)
    assert state.take(0)
    assert state.alive == set()
    state = State.root(packing)
    assert state.take(2)
    before = (set(state.alive), set(state.chosen), state.weight)
    assert not state.take(3)
    assert (state.alive, state.chosen, state.weight) == before


def test_measured_alternatives_that_fill_a_cut_are_none() -> None:
    packing = packed(1, 1, tables=(((0, 1), (((0,), 3), ((1,), 4), ((0, 1), 10))),), cuts=((0, 1),))
    assert packing.members == [(0,), (1,)]


def test_components_hold_their_own_constraints_by_place() -> None:
    program = IntegerProgram(
        names=tuple("abcdefgh"),
        savings_ns=(1, 2, 3, 4, 5, 6, 7, 8),
        conflicts=frozenset({(1, 3), (0, 2)}),
        requires=frozenset({(3, 5)}),
        together=(frozenset({4, 6}),),
        forced=frozenset({5}),
        one_of=(frozenset({0, 2}),),
        forbidden=frozenset({1, 7}),
        alternatives={frozenset({4, 6}): {frozenset({4, 6}): 9, frozenset(): 0}},
    )
    cuts = [(2, 0)]
    members = components(program, cuts)
    assert members == [(0, 2), (1, 3, 5), (4, 6), (7,)]
    assert components(program, [(7, 6)]) == [(0, 2), (1, 3, 5), (4, 6, 7)]
    first, second, third, fourth = isolate(program, members, cuts)
    assert first == Component(savings=(1, 3), conflicts=((0, 1),), one_of=((0, 1),), cuts=((0, 1),))
    assert second == Component(savings=(2, 4, 6), conflicts=((0, 1),), requires=((1, 2),), forced=(2,), forbidden=(0,))
    assert third == Component(savings=(5, 7), together=((0, 1),), tables=(((0, 1), (((0, 1), 9),)),))
    assert fourth == Component(savings=(8,), forbidden=(0,))
    assert (third.saving((0, 1)), third.saving(()), second.saving((1, 2))) == (9, 0, 10)


def test_components_are_sorted_so_that_equal_ones_are_equal() -> None:
    random = Random(0)
    pairs = [(i, j) for j in range(40) for i in range(j) if random.random() < 0.2]
    cuts = [tuple(random.sample(range(40), 4)) for _ in range(12)]
    program = tie(*[1] * 40, conflicts=frozenset(pairs), requires=frozenset((j, i) for i, j in pairs))
    (only,) = isolate(program, [tuple(range(40))], cuts)
    assert list(only.conflicts) == sorted(pairs)
    assert list(only.requires) == sorted((j, i) for i, j in pairs)
    assert list(only.cuts) == sorted(tuple(sorted(cut)) for cut in cuts)


def tie(*savings: int, **constraints: Any) -> IntegerProgram:
    return IntegerProgram(names=tuple(f"c{i}" for i in range(len(savings))), savings_ns=savings, **constraints)


STAR = tie(10, 9, 9, conflicts=frozenset({(0, 1), (0, 2)}))
JOINED = tie(5, 5, 9, conflicts=frozenset({(1, 2)}), together=(frozenset({0, 1}),))


@pytest.mark.parametrize(
    ("program", "preference", "among", "selected"),
    [
        (STAR, heaviest, None, (0,)), (STAR, largest([1, 2, 2]), None, (1, 2)),
        (STAR, largest([1, 1, 1]), None, (0,)),  # of equals the first
        (tie(5, -5, 0), heaviest, None, (0,)), (STAR, heaviest, [1, 2], (1, 2)), (JOINED, heaviest, None, (0, 1)),
        (JOINED, heaviest, [0, 2], (2,)), (replace(STAR, forced=frozenset({1})), heaviest, None, (1, 2)),
    ],
)  # fmt: skip
def test_simpler_ways_of_choosing(
    program: IntegerProgram, preference: Any, among: list[int] | None, selected: tuple[int, ...]
) -> None:
    found = greedy(program, preference, among=among)
    assert found.selected == selected
    assert found.objective_ns == program.saving(selected)


def test_simpler_ways_heed_cycles_and_say_what_is_impossible() -> None:
    cyclic = tie(9, 5, 3)
    assert greedy(cyclic, heaviest, lambda chosen: [(0, 1)] if {0, 1} <= set(chosen) else []).selected == (0, 2)
    impossible = tie(1, 2, conflicts=frozenset({(0, 1)}), forced=frozenset({0, 1}))
    with pytest.raises(PlanError, match="the forced fusions can't all be applied"):
        greedy(impossible, heaviest)


@pytest.mark.parametrize(
    ("constraints", "says"),
    [
        ({"forced": frozenset({0, 1})}, "the forced fusions can't all be applied: c0; c1"),
        ({"forced": frozenset({0}), "forbidden": frozenset({0})}, "can't all be applied without c0: c0"),
        ({"one_of": (frozenset({0, 1}),), "forbidden": frozenset({0, 1})}, "applied without c0, c1: c0 or c1"),
    ],
)
def test_what_is_forced_and_can_not_be_is_told(constraints: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError) as raised:
        Solver().solve(tie(1, 2, conflicts=frozenset({(0, 1)}), **constraints))
    assert says in str(raised.value)


def test_the_gap_is_relative_to_the_bound() -> None:
    solution = Solution(selected=(), objective_ns=75, bound_ns=100, components=1, classes=1, nodes=1)
    assert solution.gap == 0.25
    assert replace(solution, objective_ns=-3, bound_ns=0).gap == 3.0
    assert replace(solution, objective_ns=-150, bound_ns=-100).gap == 0.5
    assert replace(solution, objective_ns=100).gap == 0.0


def test_a_problem_knows_what_a_selection_saves() -> None:
    program = tie(1, 2, 4, 8, alternatives={frozenset({0, 1}): {frozenset({0}): 100, frozenset({0, 1}): 300}})
    assert program.saving([]) == 0
    assert program.saving([2, 3]) == 12
    assert program.saving([0, 3]) == 108
    assert program.saving([0, 1, 2]) == 304
