"""What belongs together is applied together or not at all: limited, in an order, and out of a saved plan."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig, Policy
from fuseplan.errors import PlanError
from fuseplan.planner.decide import Decision, decide_in_order, decide_off, decide_planned, limit, plan_record, replay
from fuseplan.planner.pose import Problem
from fuseplan.planner.prices import Prices
from fuseplan.planner.solver import Solver
from fuseplan.record import Reason, Selected
from fuseplan.rules import Rule
from tests.compilation.test_manager import INPUTS, padded
from tests.helpers import quickly_traced
from tests.planner.posing import MODEL, PROVIDERS, TORCH, measured, pads, problem_of, twice
from tests.planner.test_candidates import together
from tests.planner.test_decisions import priced


def tied(given: Problem, **ties: Any) -> Problem:
    return replace(given, program=replace(given.program, **ties))


def four(**ties: Any) -> Problem:
    return tied(priced(problem_of(pads(4), providers=TORCH), 1, 2, 4, 8), **ties)


@pytest.mark.parametrize(
    ("ties", "steps"),
    [
        ({}, [(), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]),
        ({"together": (frozenset({0, 2}),)}, [(), (0, 2), (0, 1, 2), (0, 1, 2, 3)]),
        ({"requires": frozenset({(0, 3)})}, [(), (0, 3), (0, 1, 3), (0, 1, 2, 3)]),
    ],
)
def test_a_limit_counts_what_is_applied_together_as_one(ties: dict[str, Any], steps: list[tuple[int, ...]]) -> None:
    given = four(**ties)
    decision = decide_planned(given, Solver())
    limited = [limit(given, decision, most) for most in range(len(steps))]
    assert [each.selected for each in limited] == steps
    assert limit(given, decision, None) == limit(given, decision, len(steps)) == decision
    # It counts along the graph, whatever the names are.
    backwards = replace(given, candidates=given.candidates[::-1])
    assert ties or limit(backwards, decision, 2).selected == (2, 3)
    assert {tuple(sorted((*each.selected, *each.limited))) for each in limited} == {(0, 1, 2, 3)}


def test_every_step_of_a_bisection_is_legal() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        pairs = [pair for pair in itertools.permutations(range(4), 2) if rng.random() < 0.2]
        groups = tuple(frozenset(rng.sample(range(4), 2)) for _ in range(rng.randrange(2)))
        given = four(requires=frozenset(pairs), together=groups)
        decision = decide_planned(given, Solver())
        sizes = []
        for most in range(6):
            limited = limit(given, decision, most)
            assert given.illegal(limited.selected) is None, (seed, most)
            assert given.program.saving(limited.selected) == limited.saving_ns
            sizes.append(len(limited.selected))
        assert sizes == sorted(sizes)
        assert sizes[-1] == len(decision.selected)


def test_a_component_saves_at_each_size_what_was_measured_of_all_of_it() -> None:
    given = problem_of(pads(1), providers=TORCH)
    table = measured(given, {"": [(5000, 10)], "torch": [(2000, 10)]})
    given = problem_of(pads(1), Prices(model=MODEL, table=table), providers=TORCH)
    assert given.saved_by_size((0,)) == [3000]
    given.priced.together[frozenset({0})] = {}
    assert given.saved_by_size((0,)) == [0]


def test_an_order_leaves_out_what_lacks_what_it_needs() -> None:
    given = four(requires=frozenset({(0, 1), (1, 2)}))
    assert decide_in_order(given, ["act_padding"]).selected == (0, 1, 2, 3)
    joined = four(together=(frozenset({1, 2, 3}),))
    for problem, selected, uncoupled, saving in ((given, (3,), (0, 1), 8), (joined, (0,), (1, 3), 1)):
        decision = decide_in_order(tied(problem, forbidden=frozenset({2})), ["act_padding"])
        assert (decision.selected, decision.uncoupled, decision.saving_ns) == (selected, uncoupled, saving)


def test_an_order_runs_what_is_coupled_by_one_provider() -> None:
    """The first norm is cheaper by one provider and the second by the other; apart they would be illegal."""
    given = problem_of(pads(2), providers=PROVIDERS, rules=together(together=True))
    named = {candidate.name: index for index, candidate in enumerate(given.candidates)}
    values = [0] * len(named)
    for name, index in named.items():
        values[index] = {"0 torch": 9, "1 torch": 1, "0 triton": 2, "1 triton": 5}[f"{name[4]} {name.split()[3]}"]
    given = tied(given, savings_ns=tuple(values))
    decision = decide_in_order(given, ["act_padding"])
    assert {given.candidates[index].provider for index in decision.selected} == {"torch"}
    assert (decision.saving_ns, decision.uncoupled) == (10, ())
    assert given.illegal(decision.selected) is None


def test_an_order_runs_a_match_by_a_provider_that_has_what_it_needs() -> None:
    """Triton's would save more, and needs what is forbidden."""
    given = problem_of(pads(2), providers=PROVIDERS)
    index = {(each.name[:5], each.provider): place for place, each in enumerate(given.candidates)}
    (first, second) = dict.fromkeys(name for name, _ in index)
    needed = index[second, "torch"]
    values = [9 if each.provider == "triton" else 1 for each in given.candidates]
    needs = frozenset({(index[first, "triton"], needed)})
    given = tied(given, savings_ns=tuple(values), requires=needs, forbidden=frozenset({needed}))
    decision = decide_in_order(given, ["act_padding"])
    assert {*decision.selected} == {index[first, "torch"], index[second, "triton"]}
    assert decision.uncoupled == ()


def test_a_saved_plan_with_half_of_a_pair_is_refused() -> None:
    given = four(requires=frozenset({(0, 1)}), together=(frozenset({2, 3}),))

    def replayed(*indices: int) -> Decision:
        chosen = [given.candidates[index] for index in indices]
        picked = tuple(Selected(name=c.name, signature=c.signature, source=None, saving_ns=1) for c in chosen)
        return replay(given, replace(plan_record(given, decide_off(), "graph_0", None, "h200"), selected=picked))

    assert replayed(0, 1).selected == (0, 1)
    assert replayed(1).selected == (1,)
    names = [candidate.name for candidate in given.candidates]
    with pytest.raises(PlanError, match=f"{names[0]} needs {names[1]}, which isn't applied"):
        replayed(0)
    with pytest.raises(PlanError, match=f"{names[2]} and {names[3]} are applied together or not at all"):
        replayed(2)


def test_what_a_required_rule_offers_by_another_provider_alone_is_given_up() -> None:
    """Triton's pad needs the norm behind it by Triton, which only the reference runs."""

    def called(name: str, op: str, **ties: Any) -> Rule:
        (rule,) = (rule for rule in together(**ties) if rule.op.name == op)
        rule.name = name
        return rule

    rules = [called("first", "fused_add_rms_norm_pad", requires=("second",)), called("second", "rms_norm_pad")]
    reference, triton = PROVIDERS
    given = problem_of(twice, providers=PROVIDERS, rules=rules)
    assert given.unmet == {}

    lacking = replace(triton, implements={k: v for k, v in triton.implements.items() if k != "rms_norm_pad"})
    given = problem_of(twice, providers=[reference, lacking], rules=rules)
    names = [(each.rule, each.provider) for each in given.candidates]
    assert names == [("first", "torch"), ("first", "triton"), ("second", "torch")]
    assert given.unmet == {1: "it needs second by triton, which matches there by torch alone"}
    assert given.ruled_out == {1}
    given = priced(given, 1, 100, 1)
    for decision in (decide_planned(given, Solver()), decide_in_order(given, ["first", "second"])):
        assert decision.selected == (0, 2)
    assert given.illegal((1, 2)) == f"{given.candidates[1].name} can't be applied: {given.unmet[1]}"


def test_reports_name_what_is_given_up_for_its_couple() -> None:
    rules = together(together=True)
    config = PassConfig(policy="ordered(act_padding)", forbid=("act_padding#1",))
    manager = PostGradPassManager(config, rules=rules)
    analysis = manager.analyze(quickly_traced(padded, *INPUTS))
    decision = manager.decide(analysis, Policy.parse("ordered(act_padding)"), "graph_0")
    report = manager.report("graph_0", analysis, decision)
    assert report.applied == ()
    (refusal,) = [each for each in report.refusals if each.reason is Reason.COUPLED]
    assert refusal.detail == "a fusion that it needs isn't applied"
