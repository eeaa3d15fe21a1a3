"""Packings: atoms and their weights, and what excludes what; components and the simpler ways of choosing."""

from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

import pytest

from fuseplan.errors import PlanError
from fuseplan.planner import packing as packing_module
from fuseplan.planner.baselines import greedy, heaviest, largest
from fuseplan.planner.branch_and_bound import complete, search
from fuseplan.planner.components import Component, components, isolate
from fuseplan.planner.disjoint_sets import DisjointSets
from fuseplan.planner.packing import MAX_PLACES, Limit, Packing, State, contract
from fuseplan.planner.program import IntegerProgram, Solution
from fuseplan.planner.solver import Solver


def packed(*savings: int, **constraints: Any) -> Packing:
    packing = contract(Component(savings=savings, **constraints))
    assert packing is not None
    return packing


def alive(packing: Packing) -> list[tuple[int, ...]]:
    """The candidates of the atoms that can be chosen."""
    return [packing.members[atom] for atom in sorted(packing.alive)]


def test_weights_order_packings_by_saving_then_number_then_place() -> None:
    packing = packed(5, 7, 5)
    # Three places, so that a nanosecond weighs (3 + 1) * 8, a candidate costs 8 and its place pays 4, 2 or 1.
    assert packing.scale == 32
    assert packing.weights == [5 * 32 - 8 + 4, 7 * 32 - 8 + 2, 5 * 32 - 8 + 1]
    assert packing.savings == [5, 7, 5]
    assert packing.weigh([0, 2]) == packing.weights[0] + packing.weights[2]
    assert packing.candidates([2, 0]) == (0, 2)
    assert packing.alive == {0, 1, 2}
    assert (packing.chosen, packing.weight, packing.bonus) == (frozenset(), 0, 0)


def test_places_are_left_out_where_they_would_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PLACES == 4096
    monkeypatch.setattr(packing_module, "MAX_PLACES", 2)
    assert packed(5, 7).scale == 3 << 2
    assert packed(5, 7, 5).scale == 4
    assert packed(5, 7, 5).weights == [19, 27, 19]


def test_no_two_packings_weigh_the_same() -> None:
    packing = packed(5, 5, 10, 0, -3)
    sets = [each for size in range(6) for each in combinations(range(5), size)]
    weights = {packing.weigh(each): each for each in sets}
    assert len(weights) == len(sets)
    for weight, each in weights.items():
        assert packing.saving(weight) == sum((5, 5, 10, 0, -3)[i] for i in each)
    # A bound between two packings rounds up to what could still be saved.
    assert packing.saving(packing.scale * 3 + 1) == 4
    assert packing.saving(packing.scale * 3) == 3


def test_candidates_that_go_together_are_one_atom() -> None:
    packing = packed(5, 7, 1, together=((0, 2),), conflicts=((1, 2),))
    assert packing.members == [(0, 2), (1,)]
    assert packing.savings == [6, 7]
    assert packing.neighbours == [{1}, {0}]
    assert packing.weights[0] == 6 * 32 - 16 + 4 + 1


@pytest.mark.parametrize(
    ("packing", "left"),
    [
        (packed(5, 7, together=((0, 1),), conflicts=((0, 1),)), []),
        (packed(5, 7, requires=((0, 1),), conflicts=((0, 1),)), [(1,)]),
        (packed(5, 7, 9, requires=((0, 1), (0, 2)), conflicts=((1, 2),)), [(1,), (2,)]),
        (packed(5, 7, 9, together=((0, 1),), cuts=((0, 1),)), [(2,)]),
    ],
    ids=[
        "two that exclude each other",
        "what it needs excludes it",
        "it needs two that do",
        "it fills a cut by itself",
    ],
)
def test_an_atom_that_rules_itself_out_can_not_be_chosen(packing: Packing, left: list[tuple[int, ...]]) -> None:
    assert alive(packing) == left


def test_an_atom_brings_all_that_it_needs() -> None:
    packing = packed(5, 7, 9, 1, requires=((0, 1), (1, 2)))
    assert packed(5, 7, 9, requires=((0, 1), (1, 2), (2, 0))).closures == [{0, 1, 2}] * 3
    assert packing.closures == [{0, 1, 2}, {1, 2}, {2}, {3}]
    assert packing.dependents == [{0}, {0, 1}, {0, 1, 2}, {3}]
    assert packing.coupled
    assert packed(5, 7, requires=((0, 1),)).coupled
    assert not packed(5, 7, conflicts=((0, 1),)).coupled
    state = State.root(packing)
    weights = packing.weights
    assert state.gain(0) == weights[0] + weights[1] + weights[2]
    assert state.take(1)
    assert (state.chosen, state.alive) == ({1, 2}, {0, 3})
    assert state.weight == weights[1] + weights[2]
    assert state.gain(0) == weights[0]
    assert state.take(0)
    assert state.weight == weights[0] + weights[1] + weights[2]


def test_taking_excludes_neighbours_and_whatever_needs_them() -> None:
    packing = packed(5, 7, 9, 1, conflicts=((0, 1),), requires=((2, 1),))
    state = State.root(packing)
    copied = state.copy()
    assert state.take(0)
    assert (state.chosen, state.alive) == ({0}, {3})
    assert copied.alive == {0, 1, 2, 3}
    assert (copied.chosen, copied.weight) == (set(), 0)
    copied.drop([1])
    assert copied.alive == {0, 3}
    copied.drop([1, 7])
    assert copied.alive == {0, 3}


def test_a_cut_of_two_makes_neighbours_and_a_larger_one_a_limit() -> None:
    pair = packed(5, 7, 9, cuts=((0, 1),))
    assert pair.neighbours == [{1}, {0}, set()]
    assert pair.limits == []
    assert not pair.coupled
    triple = packed(5, 7, 9, 1, cuts=((0, 1, 2),))
    assert triple.limits == [Limit({0: 1, 1: 1, 2: 1}, 2)]
    assert triple.limits_of == [triple.limits, triple.limits, triple.limits, []]
    assert triple.coupled
    state = State.root(triple)
    assert state.take(0)
    assert state.alive == {1, 2, 3}
    assert state.take(1)
    assert state.alive == {3}  # no room is left for the third


def test_an_atom_with_several_candidates_of_a_cut_counts_as_many() -> None:
    packing = packed(5, 7, 9, 1, together=((0, 1),), cuts=((0, 1, 2, 3),))
    assert packing.members == [(0, 1), (2,), (3,)]
    assert packing.limits == [Limit({0: 2, 1: 1, 2: 1}, 3)]
    # Two pairs of two have no room together; the limit says nothing more.
    pairs = packed(5, 7, 9, 1, together=((0, 1), (2, 3)), cuts=((0, 1, 2, 3),))
    assert pairs.neighbours == [{1}, {0}]
    assert pairs.limits == []


def test_a_cut_whose_atoms_exclude_each_other_anyway_is_no_limit() -> None:
    packing = packed(5, 7, 9, conflicts=((0, 1), (0, 2), (1, 2)), cuts=((0, 1, 2),))
    assert packing.limits == []
    partly = packed(5, 7, 9, conflicts=((0, 1),), cuts=((0, 1, 2),))
    assert partly.limits == [Limit({0: 1, 1: 1, 2: 1}, 2)]


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


@pytest.mark.parametrize(
    ("constraints", "chosen", "left"),
    [
        ({"forced": (0,)}, {(0,)}, [(1,), (2,)]),
        ({"forced": (0,), "conflicts": ((0, 1),)}, {(0,)}, [(2,)]),
        ({"forced": (0,), "requires": ((0, 1),)}, {(0,), (1,)}, [(2,)]),
        ({"forced": (0, 1), "requires": ((0, 1),)}, {(0,), (1,)}, [(2,)]),
        ({"forbidden": (0,)}, set(), [(1,), (2,)]),
        ({"forbidden": (0,), "requires": ((1, 0),)}, set(), [(2,)]),
        ({"forced": (0,), "together": ((0, 1),)}, {(0, 1)}, [(2,)]),
    ],
)
def test_what_is_forced_is_chosen_and_what_is_forbidden_is_gone(
    constraints: dict[str, Any], chosen: set[tuple[int, ...]], left: list[tuple[int, ...]]
) -> None:
    packing = packed(5, 7, 9, **constraints)
    assert {packing.members[atom] for atom in packing.chosen} == chosen
    assert alive(packing) == left
    assert packing.weight == packing.weigh(packing.chosen)


@pytest.mark.parametrize(
    "constraints",
    [
        {"forced": (0, 1), "conflicts": ((0, 1),)},
        {"forced": (0,), "forbidden": (0,)},
        {"forced": (0,), "requires": ((0, 1),), "forbidden": (1,)},
        {"forced": (0, 1, 2), "cuts": ((0, 1, 2),)},
        {"forced": (2,), "one_of": ((0, 1),), "conflicts": ((0, 1), (0, 2), (1, 2))},
        {"one_of": ((0, 1),), "conflicts": ((0, 1),), "forbidden": (0, 1)},
        {"tables": (((0, 1), (((0,), 3),)),), "forced": (1,)},
    ],
)
def test_what_is_forced_and_rules_itself_out_has_no_packing(constraints: dict[str, Any]) -> None:
    assert contract(Component(savings=(5, 7, 9), **constraints)) is None


def test_one_of_a_set_has_to_be_chosen_and_pays_for_anything() -> None:
    packing = packed(-5, -7, 9, one_of=((0, 1),), conflicts=((0, 1), (0, 2), (1, 2)))
    plain = packed(-5, -7, 9, conflicts=((0, 1), (0, 2), (1, 2))).weights
    assert packing.bonus == 1 + sum(map(abs, plain))
    assert packing.weights == [plain[0] + packing.bonus, plain[1] + packing.bonus, plain[2]]
    assert packing.mandatory == [frozenset({0, 1})]
    assert not packing.feasible([2])
    assert packing.feasible([0])
    outcome = search(packing, 1000)
    assert outcome.chosen == {0}
    assert packing.saving(outcome.weight) == -5
    chosen = packed(-5, -7, 9, one_of=((0, 1),), conflicts=((0, 1),), forced=(0,))
    assert chosen.chosen == {0}


ROWS = (((0,), 3), ((1,), 4), ((0, 1), 10))


def test_measured_alternatives_are_atoms_that_exclude_each_other() -> None:
    packing = packed(1, 1, 7, tables=(((0, 1), ROWS),), conflicts=())
    assert packing.members == [(0,), (1,), (0, 1), (2,)]
    assert packing.savings == [3, 4, 10, 7]
    assert packing.neighbours == [{1, 2}, {0, 2}, {0, 1}, set()]
    assert packing.mandatory == []


@pytest.mark.parametrize(
    ("constraints", "left"),
    [
        ({"forbidden": (0,)}, [(1,)]), ({"conflicts": ((0, 1),)}, [(0,), (1,)]),
        ({"requires": ((0, 1),)}, [(1,), (0, 1)]), ({"together": ((0, 1),)}, [(0, 1)]),
        ({"cuts": ((0, 1),)}, [(0,), (1,)]), ({"forced": (1,)}, [(1,), (0, 1)]), ({"forced": (0, 1)}, [(0, 1)]),
    ],
)  # fmt: skip
def test_measured_alternatives_that_contradict_what_is_known_are_none(
    constraints: dict[str, Any], left: list[tuple[int, ...]]
) -> None:
    packing = packed(1, 1, tables=(((0, 1), ROWS),), **constraints)
    assert packing.members == left
    expected = [frozenset(range(len(left)))] if "forced" in constraints else []
    assert packing.mandatory == expected


def test_completing_takes_what_fits_and_adds_weight() -> None:
    packing = packed(5, -7, 9, 2, conflicts=((0, 2),))
    state = State.root(packing)
    assert complete(state, [0, 1, 2, 3]).chosen == {0, 3}
    assert complete(state, [2, 0]).chosen == {2}
    assert state.chosen == set()
    helped = packed(5, -4, requires=((0, 1),))
    assert complete(State.root(helped), [0]).chosen == {0, 1}
    assert complete(State.root(packed(4, -4, requires=((0, 1),))), [0]).chosen == set()


def test_disjoint_sets() -> None:
    sets = DisjointSets(6)
    assert sets.sets() == [(0,), (1,), (2,), (3,), (4,), (5,)]
    sets.union((4, 2))
    sets.union((5, 4))
    sets.union((1,))
    assert sets.sets() == [(0,), (1,), (2, 4, 5), (3,)]
    assert [sets.find(item) for item in range(6)] == [0, 1, 2, 3, 2, 2]
    sets.union((5, 3, 0))
    assert sets.sets() == [(0, 2, 3, 4, 5), (1,)]
    assert {sets.find(item) for item in (2, 3, 4, 5)} == {0}


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
    assert third.saving((0, 1)) == 9
    assert third.saving(()) == 0
    assert second.saving((1, 2)) == 10


def test_components_are_sorted_so_that_equal_ones_are_equal() -> None:
    random = Random(0)
    pairs = [(i, j) for j in range(40) for i in range(j) if random.random() < 0.2]
    groups = [frozenset(random.sample(range(40), 3)) for _ in range(12)]
    program = IntegerProgram(
        names=tuple(f"c{i:02}" for i in range(40)), savings_ns=(1,) * 40, conflicts=frozenset(pairs),
        requires=frozenset((j, i) for i, j in pairs), together=tuple(groups), forced=frozenset(range(0, 40, 3)),
    )  # fmt: skip
    cuts = [tuple(random.sample(range(40), 4)) for _ in range(12)]
    (only,) = isolate(program, [tuple(range(40))], cuts)
    assert list(only.conflicts) == sorted(pairs)
    assert list(only.requires) == sorted((j, i) for i, j in pairs)
    assert list(only.together) == sorted(tuple(sorted(group)) for group in groups)
    assert list(only.cuts) == sorted(tuple(sorted(cut)) for cut in cuts)
    assert list(only.forced) == list(range(0, 40, 3))


def tie(*savings: int, **constraints: Any) -> IntegerProgram:
    return IntegerProgram(names=tuple(f"c{i}" for i in range(len(savings))), savings_ns=savings, **constraints)


STAR = tie(10, 9, 9, conflicts=frozenset({(0, 1), (0, 2)}))
JOINED = tie(5, 5, 9, conflicts=frozenset({(1, 2)}), together=(frozenset({0, 1}),))
FORCED = tie(1, 9, 5, conflicts=frozenset({(0, 1), (0, 2)}), forced=frozenset({0}))
ONE_OF = tie(1, 2, 9, conflicts=frozenset({(0, 1), (0, 2), (1, 2)}), one_of=(frozenset({0, 1}),))


@pytest.mark.parametrize(
    ("program", "preference", "among", "selected"),
    [
        (STAR, heaviest, None, (0,)), (STAR, largest([1, 2, 2]), None, (1, 2)),
        (STAR, largest([1, 1, 1]), None, (0,)),  # of equals the first
        (tie(5, 5, conflicts=frozenset({(0, 1)})), heaviest, None, (0,)), (tie(5, -5, 0), heaviest, None, (0,)),
        (STAR, heaviest, [1, 2], (1, 2)), (STAR, heaviest, [], ()), (JOINED, heaviest, None, (0, 1)),
        (JOINED, heaviest, [0, 2], (2,)), (FORCED, heaviest, None, (0,)), (ONE_OF, heaviest, None, (1,)),
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
