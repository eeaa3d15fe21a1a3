"""What each policy selects of a graph, what the others lost, and the records of both."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.errors import PlanError
from fuseplan.planner.contradiction import ContradictionError
from fuseplan.planner.decide import (
    Lost,
    decide_in_order,
    decide_off,
    decide_planned,
    fusion_record,
    plan_record,
    replay,
)
from fuseplan.planner.pose import Problem
from fuseplan.planner.solver import Solver
from fuseplan.record import Selected
from tests.planner.posing import TORCH, contested, crossing, problem_of, twice

aten = torch.ops.aten


def priced(given: Problem, *savings: int, **changes: Any) -> Problem:
    return replace(given, program=replace(given.program, savings_ns=savings, **changes))


def names(given: Problem, indices: Sequence[int]) -> list[str]:
    return [f"{given.candidates[i].rule} {given.candidates[i].provider}" for i in indices]


def test_in_order_the_first_rule_takes_what_it_wants() -> None:
    given = problem_of(contested, providers=TORCH)
    given = priced(given, 10, 20, 50)
    assert names(given, range(3)) == ["act_padding torch", "allreduce_rms torch", "allreduce_rms_padding torch"]
    decision = decide_in_order(given, ["act_padding", "allreduce_rms", "allreduce_rms_padding"])
    assert (decision.selected, decision.saving_ns) == ((0,), 10)
    # The margin is what the winner saves, less what the loser would have.
    assert [(each.candidate, each.blocked_by, each.lost_ns) for each in decision.lost] == [
        (1, (0,), -10),
        (2, (0,), -40),
    ]
    # Rules that the order doesn't list are no losers.
    decision = decide_in_order(given, ["allreduce_rms", "act_padding"])
    assert (decision.selected, decision.saving_ns) == ((1,), 20)
    assert decision.lost == (Lost(candidate=0, blocked_by=(1,), lost_ns=10),)


@pytest.mark.parametrize(
    ("savings", "forbidden", "winner"),
    [((5, 7), (), "triton"), ((7, 5), (), "torch"), ((7, 7), (), "torch"), ((5, 7), (1,), "torch"),
     ((7, 5), (0,), "triton")],
)  # fmt: skip
def test_in_order_the_provider_that_saves_the_most_runs_a_match(
    savings: tuple[int, ...], forbidden: tuple[int, ...], winner: str
) -> None:
    given = priced(problem_of(), *savings, forbidden=frozenset(forbidden))
    decision = decide_in_order(given, ["act_padding"])
    assert names(given, decision.selected) == [f"act_padding {winner}"]
    assert decision.lost == ()


def two_crossings(x: Any, r: Any, w: Any) -> Any:
    first, second, _ = crossing(x, r, w)
    return *crossing(aten.add.Tensor(first, second), r, w), w


@pytest.mark.parametrize(
    ("model", "savings", "selected", "cyclic"),
    [(crossing, (5, 7), (1,), (0,)), (two_crossings, (1, 2, 4, 8), (1, 3), (0, 2))],
)
def test_in_order_what_would_be_cyclic_is_given_up(
    model: Any, savings: tuple[int, ...], selected: tuple[int, ...], cyclic: tuple[int, ...]
) -> None:
    """Of several cycles the first in the graph is cut first."""
    given = priced(problem_of(model, providers=TORCH), *savings)
    decision = decide_in_order(given, ["allreduce_rms"])
    assert (decision.selected, decision.cyclic) == (selected, cyclic)
    assert decision.saving_ns == sum(savings[index] for index in selected)


def test_in_order_what_is_given_up_stands_in_nobodys_way() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        first, second, third = crossing(x, r, w)
        return ops.pad(first, 28), ops.pad(second, 28), third

    given = priced(problem_of(model, providers=TORCH), 1, 2, 4, 8, 16, 32)
    decision = decide_in_order(given, ["allreduce_rms", "act_padding"])
    assert names(given, (0, 1, 3, 4)) == ["act_padding torch", "allreduce_rms torch"] * 2
    assert (decision.selected, decision.cyclic) == ((4,), (1,))
    assert [(each.candidate, each.blocked_by, each.lost_ns) for each in decision.lost] == [(0, (), -1), (3, (4,), 8)]


def test_planned_every_other_candidate_knows_its_margin() -> None:
    given = priced(problem_of(contested, providers=TORCH), 10, 20, 50)
    given.priced.costs[:] = [100, 25, 7]
    decision = decide_planned(given, Solver())
    assert (decision.selected, decision.saving_ns) == ((2,), 50)
    assert decision.solution
    assert decision.solution.gap == 0.0
    assert decision.plan_ns > 0
    assert decision.lost == (
        Lost(candidate=0, blocked_by=(2,), lost_ns=40, flips_at_ns=60),
        Lost(candidate=1, blocked_by=(2,), lost_ns=30, flips_at_ns=None),
    )


@pytest.mark.parametrize(("cost", "flips"), [(None, None), (40, None), (41, 1)])
def test_no_time_is_short_enough_where_the_margin_is_larger(cost: int | None, flips: int | None) -> None:
    given = priced(problem_of(providers=TORCH), -40)
    given.priced.costs[:] = [cost]
    (lost,) = decide_planned(given, Solver()).lost
    assert lost == Lost(candidate=0, blocked_by=(), lost_ns=40, flips_at_ns=flips)


def test_planned_what_is_cyclic_with_the_chosen_is_blocked_by_it() -> None:
    given = priced(problem_of(crossing, providers=TORCH), 5, 7)
    decision = decide_planned(given, Solver())
    assert decision.selected == (1,)
    assert [(each.candidate, each.blocked_by, each.lost_ns) for each in decision.lost] == [(0, (1,), 2)]
    record = plan_record(given, decision, "graph_0", None, "round")
    assert record.cuts == (tuple(candidate.name for candidate in given.candidates),)
    assert (record.bound_ns, record.components, record.classes) == (7, 1, 1)


def test_planned_what_is_forced_and_can_not_be_is_a_contradiction() -> None:
    given = problem_of(contested, providers=TORCH, force=["act_padding", "allreduce_rms"])
    with pytest.raises(ContradictionError, match="force 'act_padding' and force 'allreduce_rms' contradict each other"):
        decide_planned(given, Solver())
    given = priced(problem_of(contested, providers=TORCH, force=["act_padding"]), 10, 20, 50)
    decision = decide_planned(given, Solver())
    assert (decision.selected, decision.saving_ns) == ((0,), 10)
    assert [each.lost_ns for each in decision.lost] == [None, None]


def test_the_record_of_a_fusion() -> None:
    given = priced(problem_of(twice, providers=TORCH), 5, 7)
    object.__setattr__(given.candidates[1], "source", "layers.1.norm")
    fusion = fusion_record(given, 1)
    assert (fusion.rule, fusion.op, fusion.provider) == ("act_padding", "rms_norm_pad", "torch")
    assert (fusion.anchor, fusion.site, fusion.contested_op) == ("pad_default_1", "rms_norm_default", "rms_norm")
    assert fusion.consumed == ("rms_norm_default", "pad_default_1")
    assert (fusion.source, fusion.saving_ns, fusion.rounding_change) == ("layers.1.norm", 7, None)
    assert fusion.site_class == given.sites[1]


def test_the_record_of_a_plan() -> None:
    given = priced(problem_of(contested, providers=TORCH), 10, 20, 50)
    decision = decide_planned(given, Solver())
    plan = plan_record(given, decision, "graph_3", (1, 64), "h200")
    first, second, third = given.candidates
    assert (plan.graph, plan.range, plan.device, plan.prices) == ("graph_3", (1, 64), "h200", ("modelled",))
    assert plan.selected == (Selected(name=third.name, signature=third.signature, source=None, saving_ns=50),)
    assert [(each.name, each.saving_ns, each.blocked_by, each.lost_ns) for each in plan.rejected] == [
        (first.name, 10, (third.name,), 40), (second.name, 20, (third.name,), 30),
    ]  # fmt: skip
    assert [each.flips_at_ns for each in plan.rejected] == [each.flips_at_ns for each in decision.lost]
    assert (plan.objective_ns, plan.bound_ns, plan.unfused_ns) == (50, 50, given.unfused_ns)
    assert (plan.components, plan.classes, plan.cuts, plan.sites) == (1, 1, (), given.sites)
    # That of no plan claims nothing.
    plan = plan_record(given, decide_in_order(given, ["act_padding"]), "graph_0", None, "h200")
    assert (plan.objective_ns, plan.bound_ns, plan.components, plan.classes, plan.cuts) == (10, 10, 0, 0, ())


def test_a_saved_plan_is_selected_again() -> None:
    given = priced(problem_of(twice, providers=TORCH), 5, 7)
    plan = plan_record(given, decide_planned(given, Solver()), "graph_0", None, "h200")
    backwards = replace(plan, selected=plan.selected[::-1])
    decision = replay(given, backwards)
    assert (decision.selected, decision.saving_ns, decision.solution) == ((0, 1), 12, None)


def selection(given: Problem, *indices: int) -> Any:
    plan = plan_record(given, decide_off(), "graph_0", None, "h200")
    chosen = [given.candidates[index] for index in indices]
    picked = [Selected(name=c.name, signature=c.signature, source=None, saving_ns=1) for c in chosen]
    return replace(plan, selected=tuple(picked))


def test_a_saved_plan_whose_fusions_exclude_each_other_is_refused() -> None:
    given = problem_of(contested, providers=TORCH)
    both = " and ".join(given.candidates[index].name for index in (0, 2))
    with pytest.raises(PlanError, match=f"doesn't fit this graph: {both} can't be applied together"):
        replay(given, selection(given, 2, 0))
    given = problem_of(crossing, providers=TORCH)
    assert replay(given, selection(given, 0)).selected == (0,)
    with pytest.raises(PlanError, match="its fusions can't be applied together"):
        replay(given, selection(given, 0, 1))
