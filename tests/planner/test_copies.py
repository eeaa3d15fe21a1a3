"""A copy that a reader's layout asks for is part of what a fusion costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.matching import Match
from fuseplan.planner import Solver, decide_planned
from fuseplan.planner.alternatives import UNFUSED
from fuseplan.planner.costs import CostModel, Provenance
from fuseplan.planner.evidence import cost_rows
from fuseplan.planner.pose import Problem
from fuseplan.planner.prices import Prices
from tests.planner.posing import MODEL, by_provider, measured, problem_of
from tests.planner.round_device import DEVICE

aten = torch.ops.aten


def read(x: Any, r: Any, w: Any) -> Any:
    """Nobody can tell where the norm lies."""
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return ops.pad(y, 28), total, aten.mm.default(y, aten.permute.default(r, [1, 0]))


def returned(x: Any, r: Any, w: Any) -> Any:
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return ops.pad(y, 28), total, y


def saved(given: Problem) -> dict[str, Any]:
    return by_provider(given, given.program.savings_ns)


def applied(given: Problem) -> list[str]:
    return [given.candidates[i].provider for i in decide_planned(given, Solver(1000)).selected]


def test_a_copy_grows_with_the_number_of_tokens() -> None:
    given = problem_of(returned, span=(10, 1000), dynamic=True)
    (candidate,) = [each for each in given.candidates if each.provider == "triton"]
    assert isinstance(candidate.match, Match)
    for tokens in given.priced.tokens:
        assert given.pricing.copies(candidate.match, tokens) == (MODEL.copy(tokens * 200),)


def test_a_fusion_that_saves_no_more_than_its_copy_costs_is_not_applied() -> None:
    """A norm and a pad are two kernels, and so are a norm that pads and a copy."""
    no_slower = replace(DEVICE, generated_norm=replace(DEVICE.generated_norm, value=0.0))
    free, copied = (problem_of(function, Prices(model=CostModel(no_slower))) for function in (read, returned))
    assert saved(free)["triton"] > 0 >= saved(copied)["triton"]
    assert applied(free) == ["triton"]
    assert applied(copied) == []


def test_the_copy_is_among_the_kernels_of_a_price() -> None:
    rows = {row.alternative: row for row in cost_rows([problem_of(returned)])}
    row = rows["act_padding fused_add_rms_norm_pad triton + 1 copy"]
    assert [kernel.name for kernel in row.kernels][1:] == ["copy"]
    assert row.time_ns == sum(k.launch + k.signal + k.staging + k.memory + k.wire for k in row.kernels)
    assert "act_padding fused_add_rms_norm_pad triton" in {row.alternative for row in cost_rows([problem_of(read)])}


@pytest.mark.parametrize("function", [read, returned])
def test_rows_measured_without_a_copy_say_nothing_of_a_fusion_with_one(function: Any) -> None:
    table = measured(problem_of(read), {UNFUSED: [(9000, 0)], "torch": [(8000, 0)], "triton": [(1000, 0)]})
    given = problem_of(function, Prices(model=MODEL, table=table))
    expected = Provenance.MEASURED if function is read else Provenance.MODELLED
    assert set(given.priced.provenance) == {expected}


def test_plans_tell_places_with_copies_from_those_without() -> None:
    for function in (read, returned):
        signatures = [candidate.signature for candidate in problem_of(function).candidates]
        assert {each.endswith(" + 1 copy") for each in signatures} == {function is returned}
