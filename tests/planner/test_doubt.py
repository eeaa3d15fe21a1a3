"""How sure savings are: intervals on made-up errors, what plans leave out, which alternatives could be the best."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseplan.devices.errors import HOPPER_ERRORS, UNMEASURED_ERRORS, sources_of
from fuseplan.devices.hardware import FUSED, GENERATED, KINDS, Error
from fuseplan.dialect import ops
from fuseplan.errors import PlanError
from fuseplan.graph.facts import aten
from fuseplan.planner import decide_in_order, decide_planned, not_sure, plan_record, replay
from fuseplan.planner.costs import ROW, CostModel, Estimate, ends
from fuseplan.planner.costs.estimate import HALF_WIDTH
from fuseplan.planner.pose import Problem, _unsure
from fuseplan.planner.prices import Prices
from fuseplan.planner.program import IntegerProgram
from fuseplan.planner.solver import Solver
from fuseplan.planner.undecided import open_alternatives, undecided
from fuseplan.rules.parts.traffic import Kernel
from tests.planner.posing import PROVIDERS, measured, problem_of, twice
from tests.planner.round_device import DEVICE
from tests.planner.test_packing import tie
from tests.planner.test_solver import programs

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
TRITON = PROVIDERS[1:]


def prices(table: Any = None, **errors: tuple[float, float]) -> Prices:
    """The round device, off by shares of what doesn't depend on the bytes, by kind."""
    known = {f"{name}, fixed": Error(less=less, more=more) for name, (less, more) in errors.items()}
    return Prices(model=CostModel(replace(DEVICE, errors=known)), table=table)


def unsure(**more: Any) -> Problem:
    """Norm and pad: two kernels of 2,100 ns beside the bytes, or a fused one of 1,000, which may take 3,000."""
    return problem_of(prices=prices(fused=(0.0, 2.0)), providers=TRITON, **more)


def kernels(*kinds: str) -> Estimate:
    return Estimate.of(tuple(Kernel(name="k", launch=1000, kind=kind) for kind in kinds))


def within(low: int | None, value: int, high: int | None) -> bool:
    """Whether a value lies inside of an interval that is known."""
    return low is not None and high is not None and low < value < high


def test_errors_of_one_source_add_up_and_cancel_in_a_difference() -> None:
    errors = {"generated, fixed": Error(less=0.1, more=0.2), "one GPU, fixed": Error(less=0.5, more=0.5)}
    two = kernels(GENERATED, GENERATED)
    assert ends(two.ns, two.exposure, {"generated, fixed": Error(less=0.1, more=0.2)}) == (
        2000 - round(200 * HALF_WIDTH),
        2000 + round(400 * HALF_WIDTH),
    )
    same = kernels(GENERATED) - kernels(GENERATED)
    assert ends(same.ns, same.exposure, errors) == (0, 0)
    # What both have in common cancels, and a longer fused one makes the saving less.
    saving = kernels(GENERATED) - kernels(FUSED)
    fused = {**errors, "fused, fixed": Error(less=0.0, more=0.1)}
    low, high = ends(saving.ns, saving.exposure, fused)
    assert (low, high) == (-round(HALF_WIDTH * 100 * 2**0.5), round(HALF_WIDTH * 200))
    sides = {f"{ROW}fused": 30.0, f"{ROW}unfused": -40.0, "a source that nobody knows": 1e6}
    assert ends(1000, sides, {}) == (1000 - round(50 * HALF_WIDTH), 1000 + round(50 * HALF_WIDTH))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_errors(kind: str) -> None:
    for source in sources_of(kind):
        assert [part.rpartition(", ")[2] for part in source] == ["fixed", "moved"]
        for part in source:
            measured, other = (errors[part] for errors in (HOPPER_ERRORS, UNMEASURED_ERRORS))
            assert 0 < measured.more <= other.more
            assert measured.less <= other.less


def test_errors_are_those_of_the_benchmark() -> None:
    found = json.loads((RESULTS / "leave_one_out.json").read_text())["errors"]
    for source, shares in found.items():
        mine = (HOPPER_ERRORS[f"{source}, {part}"] for part in ("fixed", "moved"))
        assert [share for each in mine for share in (each.less, each.more)] == shares, source


def test_intervals_hold_what_was_left_out() -> None:
    found = json.loads((RESULTS / "leave_one_out.json").read_text())
    for left_out in ("one size left out", "one shape left out"):
        for what in ("times", "savings"):
            assert found[left_out][what]["within"] > 0.78, (left_out, what)
            assert found[left_out]["in intervals of 90 %"][what]["within"] > 0.85
    assert found["rows of a table between two others"]["within"] >= 0.9


def test_a_fusion_that_may_cost_is_left_out_unless_it_is_forced() -> None:
    given = unsure()
    assert given.unsure == {0}
    assert not given.ruled_out
    decision = decide_planned(given, Solver())
    assert decision.selected == ()
    assert not_sure(decision, given.unsure) == [0]
    (lost,) = decision.lost
    assert lost.lost_ns == -given.program.savings_ns[0] < 0
    assert within(lost.lost_low_ns, 0, lost.lost_high_ns)
    plan = plan_record(given, decision, "graph_0", None, "round")
    (rejected,) = plan.rejected
    assert within(rejected.low_ns, 0, rejected.high_ns)
    assert 0 < rejected.saving_ns <= (rejected.high_ns or 0)

    forced = unsure(force=["act_padding"])
    assert not forced.unsure
    assert decide_planned(forced, Solver()).selected == (0,)
    assert decide_in_order(given, ["act_padding"]).selected == (0,)
    saved = plan_record(forced, decide_planned(forced, Solver()), "graph_0", None, "round")
    assert within(saved.low_ns, 0, saved.high_ns)
    assert replay(given, saved).selected == (0,)


def test_a_fusion_that_surely_gains_is_applied_with_its_interval() -> None:
    given = problem_of(prices=prices(fused=(0.0, 0.1)), providers=TRITON)
    decision = decide_planned(given, Solver())
    plan = plan_record(given, decision, "graph_0", None, "round")
    assert decision.selected == (0,)
    low = given.program.savings_ns[0] - round(HALF_WIDTH * 100)
    assert (plan.low_ns, plan.high_ns) == (low, plan.objective_ns)
    assert (plan.ahead_ns, plan.ahead_low_ns, plan.ahead_high_ns) == (plan.objective_ns, low, plan.objective_ns)
    (selected,) = plan.selected
    assert (selected.low_ns, selected.high_ns) == (low, plan.objective_ns)


def test_equal_sites_of_other_rows_err_by_those_of_their_own() -> None:
    def padded(x: Any, w: Any) -> Any:
        return ops.pad(ops.rms_norm(x, w, 1e-5, "llama"), 28)

    def last_alone(x: Any, r: Any, w: Any) -> Any:
        return padded(x, w), padded(aten.slice.Tensor(r, 0, 9, 10), w)

    one = problem_of(lambda x, r, w: padded(x, w), providers=TRITON)
    times = {"": [(3000, 10), (60_000, 9000)], "triton": [(2000, 10), (40_000, 9000)]}
    given = problem_of(last_alone, prices=prices(measured(one, times, (1, 10)), fused=(0.0, 0.1)), providers=TRITON)
    assert given.program.savings_ns == (20_000, 1000)
    wide, narrow = (value - given.priced.ends_of(i)[0] for i, value in enumerate(given.program.savings_ns))
    assert wide == pytest.approx(900 * narrow, rel=0.1)


@pytest.mark.parametrize(
    ("less", "ties", "unsure", "only_with"),
    [
        (0, {}, {0}, set()),
        (0, {"requires": frozenset({(1, 0)})}, set(), {(0, 1)}),
        (1, {"requires": frozenset({(1, 0)})}, {0}, set()),  # of both, 1 ns may be lost
        (0, {"together": (frozenset({0, 1}),)}, set(), set()),
    ],
)
def test_what_may_cost_alone_is_held_against_what_needs_it(
    less: int, ties: dict[str, Any], unsure: set[int], only_with: set[tuple[int, int]]
) -> None:
    """Of two places the first saves next to nothing, and both together, at the worst, nothing or 1 ns less."""
    given = problem_of(twice, prices=prices(fused=(0.0, 0.1)), providers=TRITON)
    may_cost = -given.priced.ends(0, (0, 1))[0]
    priced = replace(given.priced, values=[1, may_cost - 1 - less])
    found = _unsure(given.candidates, priced, frozenset(), tie(*priced.values, **ties))
    assert ({*found.unsure}, {*found.only_with}) == (unsure, only_with)


def test_a_device_that_says_nothing_has_no_intervals() -> None:
    given = problem_of(providers=TRITON)
    assert not given.unsure
    assert given.interval(0) == given.interval_of((0,), 5) == (None, None)
    plan = plan_record(given, decide_planned(given, Solver()), "graph_0", None, "round")
    assert (plan.low_ns, plan.ahead_low_ns) == (None, None)


def test_what_could_be_the_best_is_known_before_anything_is_measured() -> None:
    given = problem_of(prices=prices(fused=(0.5, 2.0)), providers=TRITON)
    (found,) = undecided(given, "cpu")
    assert found.alternatives == ("unfused", "act_padding fused_add_rms_norm_pad triton")
    assert (found.places, found.tokens, found.tuning_s) == (1, (1,), 8.0)
    ahead = -given.program.savings_ns[0]
    assert found.ahead_ns == ahead
    assert (found.low_ns, found.high_ns) == (ahead - round(HALF_WIDTH * 500), ahead + round(HALF_WIDTH * 2000))
    sure = problem_of(prices=prices(fused=(0.0, 0.1)), providers=TRITON)
    assert open_alternatives(sure, sure.components[0]) == [(0,)]
    assert not undecided(sure, "round")
    assert not undecided(unsure(force=["act_padding"]), "round")


def test_a_table_may_lack_what_is_surely_behind() -> None:
    errors = {"fused": (0.0, 2.0), "eager": (0.1, 0.1)}
    given = problem_of(prices=prices(**errors))
    rows = measured(given, {"": [(5000, 10)], "triton": [(4000, 10)]})
    known = problem_of(prices=prices(rows, **errors))
    assert {each.value for each in known.priced.provenance} == {"measured"}
    chosen = decide_planned(known, Solver())
    assert [known.candidates[index].provider for index in chosen.selected] == ["triton"]
    assert not undecided(known, "round")
    low, high = known.interval_of(chosen.selected, chosen.saving_ns)
    assert within(low, 1000, high)
    # Without the one that could be the best the model has to do it.
    lacking = measured(given, {"": [(5000, 10)]})
    assert {each.value for each in problem_of(prices=prices(lacking, **errors)).priced.provenance} == {"modelled"}


def test_what_is_unsure_alone_comes_with_what_surely_gains() -> None:
    tied = tie(5, 1, requires=frozenset({(0, 1)}), only_with=frozenset({(1, 0)}))
    assert Solver().solve(tied).selected == (0, 1)
    alone = replace(tied, forbidden=frozenset({0}))
    assert Solver().solve(alone).selected == ()
    assert Solver().solve(tie(5, 1, unsure=frozenset({1}))).selected == (0,)
    assert Solver().solve(tie(5, 1, unsure=frozenset({1}), forced=frozenset({1}))).selected == (0, 1)
    given, solver = tie(5, 7, conflicts=frozenset({(0, 1)}), unsure=frozenset({1})), Solver()
    assert solver.solve(given).selected == (0,)
    rivals = [rival for rival in solver.rivals(given, ()) if rival]
    assert [(rival.lost_ns, rival.selected) for rival in rivals] == [(5, ()), (-2, (1,))]


@settings(max_examples=200)
@given(programs(tables=False), st.data())
def test_more_certainty_never_makes_a_plan_worse(given: IntegerProgram, data: st.DataObject) -> None:
    index = st.integers(0, len(given.names) - 1)
    fewer = data.draw(st.frozensets(index)) - given.forced
    more = fewer | (data.draw(st.frozensets(index)) - given.forced)
    found = []
    for unsure_ones in (frozenset[int](), fewer, more):
        try:
            found.append(Solver().solve(replace(given, unsure=unsure_ones)).objective_ns)
        except PlanError:
            break
    assert found == sorted(found, reverse=True)
