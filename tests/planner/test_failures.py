"""What failed verification is out, with all that needs it; what is forced comes after that."""

from dataclasses import replace

from fuseplan.planner.decide import decide_planned, plan_record, replay
from fuseplan.planner.solver import Solver
from tests.planner.posing import TORCH, problem_of, twice

NEEDS = "needs act_padding by {}, which {}"


def test_a_failed_candidate_is_forbidden() -> None:
    given = problem_of(twice, forbid=["act_padding#1:torch"])
    failed = given.without({0: "wrong"})
    assert failed.failed == {0: "wrong"}
    assert failed.program.forbidden == {0, 2}
    again = failed.without({3: "slow"})
    assert again.failed == {0: "wrong", 3: "slow"}
    assert again.program.forbidden == {0, 2, 3}


def test_whatever_needs_a_failed_candidate_is_out_however_far() -> None:
    given = problem_of(twice)
    chain = replace(given, program=replace(given.program, requires=frozenset({(2, 0), (3, 2), (1, 3), (0, 1)})))
    first = NEEDS.format("triton", "wrong")
    second = NEEDS.format("torch", first)
    third = NEEDS.format("torch", second)
    assert chain.without({1: "wrong"}).failed == {1: "wrong", 0: first, 2: second, 3: third}
    apart = replace(given, program=replace(given.program, requires=frozenset({(2, 0)})))
    assert apart.without({2: "wrong"}).failed == {2: "wrong"}


def test_all_of_what_goes_together_is_out() -> None:
    given = problem_of(twice)
    joined = replace(given, program=replace(given.program, together=(frozenset({0, 1, 2}), frozenset({3}))))
    assert joined.without({2: "wrong", 1: "too"}).failed == {1: "too", 2: "wrong", 0: NEEDS.format("triton", "too")}
    assert joined.without({3: "wrong"}).failed == {3: "wrong"}


def test_what_is_forced_means_what_is_left_of_it() -> None:
    given = problem_of(twice, force=["act_padding", "act_padding#1:triton"])
    one = given.without({0: "wrong"})
    assert one.program.forced == {1, 3}
    assert one.program.one_of == (frozenset({2, 3}),)
    assert [text for text, _ in one.forced] == ["act_padding", "act_padding", "act_padding#1:triton"]
    assert [group for _, group in one.forced] == [{1}, {2, 3}, {3}]
    # A place where all that is forced has failed is open again.
    none = given.without({2: "wrong", 3: "wrong"})
    assert (none.program.forced, none.program.one_of) == (frozenset(), (frozenset({0, 1}),))
    assert none.forced == (("act_padding", frozenset({0, 1})),)


def test_a_saved_plan_is_applied_without_what_failed() -> None:
    given = problem_of(twice, providers=TORCH)
    given = replace(given, program=replace(given.program, savings_ns=(5, 7)))
    plan = plan_record(given, decide_planned(given, Solver()), "graph_0", None, "h200")
    decision = replay(given.without({0: "wrong"}), plan)
    assert (decision.selected, decision.saving_ns) == ((1,), 7)
