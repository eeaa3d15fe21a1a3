"""What attention and the writes before it cost in one op: parts of two sites, and a launch less."""

import functools
from collections.abc import Callable

import pytest
from torch import fx

from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import find_matches
from fuseplan.planner.costs import HARDWARE, CostModel
from fuseplan.planner.evidence import cost_rows
from fuseplan.planner.pose import Problem, pose
from fuseplan.planner.prices import Prices
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.rules import by_name
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES
from fuseplan.rules.parts.traffic import total_ns
from tests.cached import Layer, arguments, attending, layer, normed_layer, visible
from tests.helpers import post_grad

RULES = by_name((*CACHED_ATTENTION_RULES, *CACHED_ROTARY_RULES))


@functools.cache
def traced(inner: Callable[..., Layer]) -> fx.Graph:
    return post_grad(attending(inner(read=lambda x: x)), *arguments(), visible())


def problem_of(inner: Callable[..., Layer], device: str = "h200") -> Problem:
    canonical = canonicalize(traced(inner))
    matches = find_matches(canonical, RULES, BUILT_IN_PROVIDERS, PROFILES[device]).candidates
    return pose(canonical, matches, (), Prices(model=CostModel(HARDWARE[device])), (1, 1))


@pytest.mark.parametrize("inner", [layer, normed_layer])
@pytest.mark.parametrize("device", sorted(HARDWARE))
def test_it_replaces_both_sites(device: str, inner: Callable[..., Layer]) -> None:
    problem = problem_of(inner, device)
    model = CostModel(HARDWARE[device])
    (one,) = {each.places for each in problem.candidates if "attention" in each.rule}
    assert len(one) == 2
    shapes = [problem.pricing.shapes[place][0] for place in sorted(one)]
    for index, candidate in enumerate(problem.candidates):
        if "attention" in candidate.rule:
            saved, cost = problem.priced.values[index], problem.priced.costs[index]
            assert cost is not None
            assert saved == sum(total_ns(shape.unfused(model)) for shape in shapes) - cost
            assert (saved > 0) is (candidate.provider == "triton")


def test_rows_behind_the_numbers_name_both_sites() -> None:
    problem = problem_of(layer)
    rows = [row for row in cost_rows([problem]) if " & " in row.site]
    assert {row.site for row in rows} == {" & ".join(problem.sites)}
    times = {row.alternative: row.time_ns for row in rows}
    (name,) = [each for each in times if each.endswith("triton")]
    index = next(i for i, each in enumerate(problem.candidates) if "attention" in each.name and "triton" in each.name)
    assert times["unfused"] - times[name] == problem.priced.values[index]
