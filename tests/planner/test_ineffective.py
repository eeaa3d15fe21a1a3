"""Flags and selectors without effect in a graph are reported, with the reason."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch

from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.matching import Match, Matches, find_matches
from fuseplan.planner.decide import Decision, Lost
from fuseplan.planner.ineffective import ineffective_requests
from fuseplan.planner.pose import Problem
from fuseplan.providers import PROFILES
from fuseplan.record import Reason
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.planner.posing import TORCH, problem_of, twice

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)


def ineffective(
    given: Problem,
    decision: Decision,
    *,
    matches: Matches | None = None,
    flags: Sequence[str] = (),
    overruled: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    rules: Any = RULES,
    **config: Any,
) -> list[tuple[str | None, str]]:
    found = matches or Matches(candidates=tuple(c.match for c in given.candidates if isinstance(c.match, Match)))
    given_config = PassConfig(**config)
    refusals = list(ineffective_requests(given_config, flags, overruled, rules, found, given, decision))
    assert {refusal.reason for refusal in refusals} <= {Reason.NO_EFFECT}
    return [(refusal.rule, refusal.detail) for refusal in refusals]


def test_flags_that_no_rule_answers_to_are_reported() -> None:
    given = problem_of(providers=TORCH)
    flag = "enable_qk_norm_rope_fusion"
    found = ineffective(given, Decision(), flags=[flag], enable_qk_norm_rope_fusion=True)
    expected = (None, f"{flag}=True has no effect: none of the given rules answers to it")
    assert [each for each in found if each[0] is None] == [expected]
    assert ineffective(given, Decision(), flags=[flag], enable_qk_norm_rope_fusion=False) == []


def test_selectors_that_select_nothing_are_told() -> None:
    given = problem_of(providers=TORCH, force=["act_padding#0", "norm_quant"], forbid=["act_padding#7"])
    assert [detail for _, detail in ineffective(given, Decision())] == [
        "'norm_quant' is forced or forbidden, and selects no match in this graph",
        "'act_padding#7' is forced or forbidden, and selects no match in this graph",
    ]


def test_flags_whose_ops_the_graph_lacks_are_told() -> None:
    given = problem_of(providers=TORCH)
    missing = "the graph has no dynamic_per_token_scaled_fp8_quant and no silu_and_mul"
    expected = [("act_quant", f"fuse_act_quant=True has no effect: {missing}")]
    assert ineffective(given, Decision(), fuse_act_quant=True) == expected
    # Of the rules that need two flags both must be True.
    assert ineffective(given, Decision(), fuse_allreduce_rms=True) == [
        ("allreduce_rms", "fuse_allreduce_rms=True has no effect: the graph has no all_reduce")
    ]
    both = ineffective(given, Decision(), fuse_allreduce_rms=True, fuse_act_padding=True)
    assert ("allreduce_rms_padding", "fuse_allreduce_rms and fuse_act_padding=True has no effect: ") in [
        (rule, detail[: detail.index("the graph")]) for rule, detail in both if "the graph" in detail
    ]


def test_a_rule_that_was_refused_says_why() -> None:
    def mixed(x: Any, r: Any, w: Any) -> Any:
        return ops.pad(ops.rms_norm(x, aten.to.dtype(w, torch.float32), 1e-5, "llama"), 28), r

    given = problem_of(mixed, providers=TORCH)
    matches = find_matches(given.canonical, RULES, TORCH, PROFILES["h200"])
    ((rule, detail),) = ineffective(given, Decision(), matches=matches, fuse_act_padding=True)
    assert rule == "act_padding"
    assert detail.startswith("fuse_act_padding=True has no effect: weight is float32 and x is bfloat16")


def test_a_rule_that_just_does_not_match_says_so() -> None:
    def apart(x: Any, r: Any, w: Any) -> Any:
        return ops.pad(x, 28), ops.rms_norm(r, w, 1e-5, "llama")

    given = problem_of(apart, providers=TORCH)
    expected = [("act_padding", "fuse_act_padding=True has no effect: act_padding matches nowhere")]
    assert ineffective(given, Decision(), fuse_act_padding=True) == expected


def test_a_flag_has_an_effect_where_one_of_its_rules_matches() -> None:
    given, rules = problem_of(providers=TORCH), dict.fromkeys(("act_padding", "another"), RULES["act_padding"])
    assert ineffective(given, Decision(selected=(0,)), rules=rules, fuse_act_padding=True) == []


DEAR, PLACES = "it costs at least", "more than it saves in each of 2 places"


@pytest.mark.parametrize(
    ("lost", "detail"),
    [
        ([Lost(candidate=0, lost_ns=2500), Lost(candidate=1, lost_ns=1200)], f"{DEAR} 1.2 us {PLACES}"),
        ([Lost(candidate=0, lost_ns=2500), Lost(candidate=1)], f"{DEAR} 2.5 us {PLACES}"),
        # It is applied, blocked, or nobody knows.
        ([Lost(candidate=0, lost_ns=2500)], None),
        ([Lost(candidate=0, lost_ns=2500), Lost(candidate=1, lost_ns=1, blocked_by=(0,))], None),
        ([Lost(candidate=0), Lost(candidate=1)], None),
    ],
)
def test_a_rule_that_is_too_dear_everywhere_says_by_how_much(lost: list[Lost], detail: str | None) -> None:
    given = problem_of(twice, providers=TORCH)
    found = ineffective(given, Decision(lost=tuple(lost)), fuse_act_padding=True)
    assert found == ([("act_padding", f"fuse_act_padding=True has no effect: {detail}")] if detail else [])
    assert ineffective(given, Decision(lost=tuple(lost))) == []


def test_a_rule_that_is_too_dear_in_its_one_place() -> None:
    decision = Decision(lost=(Lost(candidate=0, lost_ns=100),))
    ((_, text),) = ineffective(problem_of(providers=TORCH), decision, fuse_act_padding=True)
    assert text.endswith("it costs at least 0.1 us more than it saves in each of 1 place")


@pytest.mark.parametrize("remaining", [(), ("cached_eager_attention",)])
def test_a_flag_that_another_one_overrules_is_reported_once(remaining: tuple[str, ...]) -> None:
    """Whether all of its rules are off by it, or the graph lacks what the others need."""
    given, rules = problem_of(providers=TORCH), {name: RULES[name] for name in ("norm_quant", *remaining)}
    overruled = {"fuse_cached_attention": ("cached_attention", "fuse_grouped_attention")}
    found = ineffective(given, Decision(), overruled=overruled, rules=rules, fuse_cached_attention=True)
    detail = "fuse_cached_attention=True has no effect: fuse_grouped_attention=False switches cached_attention off"
    assert [each for _, each in found] == [detail]
