"""What attention and the writes before it cost in one op: parts of two sites, and a launch less."""

import functools
from collections.abc import Callable

import pytest
from torch import fx

from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import find_matches
from fuseplan.planner.candidates import candidates_of
from fuseplan.planner.costs import HARDWARE, CostModel
from fuseplan.planner.evidence import cost_rows
from fuseplan.planner.pose import Problem, pose
from fuseplan.planner.prices import Prices
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.rules import by_name
from fuseplan.rules.families import find_sites
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


@pytest.mark.parametrize(("inner", "read_again"), [(layer, False), (normed_layer, True)])
def test_it_is_the_kernel_of_attention_with_what_the_other_moves(inner: Callable[..., Layer], read_again: bool) -> None:
    """And no launch of that; where they aren't normed, queries are neither written nor read again."""
    problem = problem_of(inner)
    model = CostModel(HARDWARE["h200"])
    candidate = next(each for each in problem.candidates if each.provider == "triton" and "attention" in each.rule)
    assert candidate.site is not None
    parts = candidate.site.taken(candidate.match.consumed)
    assert parts is not None
    (own, also) = problem.pricing.taken(candidate, parts)
    shape = candidate.others[0].shape(2**20)
    (alone,) = shape.fused(model, "triton", reduce=False, tail=also[1].tail)
    (within,) = shape.within(model, "triton", reduce=False, tail=also[1].tail)
    assert (alone.launch > 0, within.launch) == (True, 0)
    assert (within.memory == alone.memory) is read_again
    shape = problem.pricing.shapes[also[0]][0]
    (within,) = shape.within(model, "triton", reduce=False, tail=also[1].tail)
    cost = problem.priced.costs[problem.candidates.index(candidate)]
    attention = problem.pricing.shapes[own[0]][0].fused(model, "triton", reduce=False, tail=None)
    assert cost == total_ns(attention) + within.ns
    eager = shape.within(model, "torch", reduce=False, tail=also[1].tail)
    assert eager == shape.fused(model, "torch", reduce=False, tail=also[1].tail)


def test_rows_behind_the_numbers_name_both_sites() -> None:
    problem = problem_of(layer)
    rows = [row for row in cost_rows([problem]) if " & " in row.site]
    assert {row.site for row in rows} == {" & ".join(problem.sites)}
    times = {row.alternative: row.time_ns for row in rows}
    (name,) = [each for each in times if each.endswith("triton")]
    index = next(i for i, each in enumerate(problem.candidates) if "attention" in each.name and "triton" in each.name)
    assert times["unfused"] - times[name] == problem.priced.values[index]


def test_a_fusion_of_more_than_both_sites_is_none_of_theirs() -> None:
    canonical = canonicalize(traced(layer))
    site = next(each for each in find_sites(canonical) if each.part.name == "attention")
    calls = [node for node in canonical.graph.nodes if node.op == "call_function"]
    (match, *_) = find_matches(canonical, RULES, BUILT_IN_PROVIDERS, PROFILES["h200"]).candidates
    assert candidates_of(canonical, find_sites(canonical), [match], [])
    assert site.taken(calls) is None
