"""Whose rule tells of what looks like a dialect op and isn't one, and what a rule that is off would match."""

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch

from fuseplan.dialect import DialectOp, ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.matching import find_disabled, find_matches
from fuseplan.matching.lookalikes import is_always_reported, noted_as, of_rules, unclaimed
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import randn, written
from tests.matching.placed import line_of, placed

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)
INPUTS = {"x": randn(10, 64), "w": torch.ones(64, dtype=torch.bfloat16)}


def canonical_of(function: Callable[..., Any]) -> CanonicalGraph:
    return canonicalize(placed(written(function, INPUTS)))


def look_like(canonical: CanonicalGraph, op: DialectOp, *names: str) -> Refusal:
    """Notes that nodes look like an op and aren't one, once for all of them."""
    nodes = [node for node in canonical.graph.nodes if node.name in names]
    assert len(nodes) == len(names)
    detail = f"{' and '.join(names)}: no {op.name}"
    canonical.refuse(op, nodes, Reason.OP, detail, node=nodes[0], place=nodes[0])
    return canonical.unraised[nodes[0]]


def renamed(rule: Rule, name: str) -> Rule:
    made = copy(rule)
    made.name = name
    return made


def in_a_row(x: Any, w: Any) -> Any:
    return aten.tanh.default(aten.sin.default(aten.relu.default(x)))


def told(op: DialectOp, rules: dict[str, Any]) -> list[str | None]:
    """The rules that tell of what looks like an op."""
    canonical = canonical_of(in_a_row)
    look_like(canonical, op, "sin_default")
    return [refusal.rule for refusal in of_rules(canonical, rules, set())]


def only(*names: str) -> dict[str, Any]:
    return {name: RULES[name] for name in names}


BY_FLAGS = ["qk_norm_cached_attention", "cached_attention", "grouped_attention"]
CACHING = ["qk_norm_cached_attention", "qk_norm_rope_cache"]


def test_rules_of_attention_differ_in_what_they_do_beside_it() -> None:
    assert [len(RULES[name][0].flags) for name in BY_FLAGS] == [4, 3, 1]


@pytest.mark.parametrize(
    ("op", "rules", "tells"),
    [
        # The rule whose core it is.
        (ops.attention, ["grouped_attention"], ["grouped_attention"]),
        (ops.eager_attention, ["grouped_attention", "eager_attention"], ["eager_attention"]),
        (ops.attention, ["eager_attention", "act_padding"], []),
        # Of several the one that does the least beside it.
        (ops.attention, BY_FLAGS, ["grouped_attention"]), (ops.attention, BY_FLAGS[::-1], ["grouped_attention"]),
        (ops.attention, BY_FLAGS[:2], ["cached_attention"]), (ops.attention, BY_FLAGS[:1], BY_FLAGS[:1]),
        # Where it is no rule's core one that has it.
        (ops.cache_write, [*CACHING, "rope_cache"], ["qk_norm_rope_cache"]),
        (ops.cache_write, CACHING[:1], CACHING[:1]), (ops.cache_write, ["rope_cache"], []),
        (ops.cached_rotary, ["rope_cache", "cached_attention"], ["rope_cache"]),
        (ops.cached_rotary, ["cached_attention"], ["cached_attention"]),
        # A further op of a part is the part's.
        (ops.repeat_heads, ["grouped_attention"], ["grouped_attention"]),
    ],
    ids=lambda each: each.name if isinstance(each, DialectOp) else "-".join(each) or "none",
)  # fmt: skip
def test_which_rule_tells_of_an_op(op: DialectOp, rules: list[str], tells: list[str]) -> None:
    assert told(op, only(*rules)) == tells


def test_of_several_that_do_as_much_the_first_by_name_tells() -> None:
    (rule,) = RULES["grouped_attention"]
    rules = {name: [renamed(rule, name)] for name in ("b", "a", "c")}
    assert told(ops.attention, rules) == ["a"]


def test_whose_core_it_is_comes_before_those_that_have_it() -> None:
    """Though the other does less beside it."""
    (more,) = (copy(rule) for rule in RULES["rope_cache"])
    (less,) = (renamed(rule, "less") for rule in RULES["cached_attention"])
    more.flags, less.flags = ("a", "b", "c"), ("a",)
    assert told(ops.cached_rotary, {"rope_cache": [more], "less": [less]}) == ["rope_cache"]


def test_it_is_told_once_at_its_place_unless_a_rule_has_told_of_it() -> None:
    canonical = canonical_of(in_a_row)
    look_like(canonical, ops.rms_norm, "relu_default")  # whose part has it told whatever rules ask for
    first, second = (look_like(canonical, ops.attention, name) for name in ("sin_default", "tanh_default"))
    rules = only("grouped_attention", "act_padding")
    both = [*of_rules(canonical, rules, set())]
    assert [refusal.detail for refusal in both] == [first.detail, second.detail]
    assert {refusal.rule for refusal in both} == {"grouped_attention"}
    line = line_of(canonical.original, "sin_default")
    assert (both[0].site, both[0].source, both[0].line, both[0].code) == (line, line, line, "sin_default")
    assert [refusal.detail for refusal in of_rules(canonical, rules, {id(first)})] == [second.detail]
    assert [refusal.detail for refusal in of_rules(canonical, rules, {id(second)})] == [first.detail]


def test_an_op_of_no_part_is_nobodys() -> None:
    canonical = canonical_of(in_a_row)
    look_like(canonical, ops.rms_norm_pad, "relu_default")
    known = look_like(canonical, ops.attention, "sin_default")
    assert [refusal.detail for refusal in of_rules(canonical, only("grouped_attention"), set())] == [known.detail]
    assert [*unclaimed(canonical, set())] == []


# What no rule has told of.


def test_what_looks_like_a_norm_is_told_wherever_it_stands_once() -> None:
    canonical = canonical_of(in_a_row)
    first = look_like(canonical, ops.fused_add_rms_norm, "relu_default", "tanh_default")
    second = look_like(canonical, ops.rms_norm, "sin_default")
    claimed: set[int] = set()
    assert [*unclaimed(canonical, claimed)] == [first, second]
    assert claimed == {id(first), id(second)}
    assert [*unclaimed(canonical, {id(first)})] == [second]
    assert [*unclaimed(canonical, claimed)] == []


@pytest.mark.parametrize("op", [ops.silu_and_mul, ops.linear, ops.attention, ops.cache_write])
def test_what_looks_like_others_is_not_even_beside_a_norm(op: DialectOp) -> None:
    canonical = canonical_of(
        lambda x, w: ops.rms_norm(aten.relu.default(ops.rms_norm(x, w, 1e-5, "llama")), w, 1e-5, "llama")
    )
    look_like(canonical, op, "relu_default")
    assert [*unclaimed(canonical, set())] == []


def around_a_norm(x: Any, w: Any) -> Any:
    """relu, sin, a norm, tanh, exp."""
    return aten.exp.default(aten.tanh.default(ops.rms_norm(aten.sin.default(aten.relu.default(x)), w, 1e-5, "llama")))


@pytest.mark.parametrize(
    ("op", "names"),
    [
        (ops.all_reduce, ["relu_default", "sin_default"]),
        (ops.pad, ["tanh_default", "exp_default"]),
        (ops.static_scaled_fp8_quant, ["tanh_default", "exp_default"]),
    ],
)
def test_what_looks_like_a_prologue_is_told_before_a_core_and_an_epilogue_behind_one(
    op: DialectOp, names: list[str]
) -> None:  # fmt: skip
    heard = []
    for name in ("relu_default", "sin_default", "tanh_default", "exp_default"):
        canonical = canonical_of(around_a_norm)
        look_like(canonical, op, name)
        heard += [name for _ in unclaimed(canonical, set())]
    assert heard == names


def test_others_that_read_it_or_that_it_reads_are_no_matter() -> None:
    def model(x: Any, w: Any) -> Any:
        reduced = aten.relu.default(x)
        normed = ops.rms_norm(reduced, w, 1e-5, "llama")
        return reduced, aten.mm.default(reduced.t(), reduced), aten.add.Tensor(x, normed)

    canonical = canonical_of(model)
    before, behind = look_like(canonical, ops.all_reduce, "relu_default"), look_like(canonical, ops.pad, "add_tensor")
    assert [*unclaimed(canonical, set())] == [before, behind]


def test_attention_is_no_core_that_prologues_and_epilogues_stand_around() -> None:
    def model(q: Any) -> Any:
        return aten.relu.default(ops.eager_attention(q, q, q, None, None, 0.5, None, "eager"))

    canonical = canonicalize(written(model, {"q": randn(1, 2, 4, 8)}))
    look_like(canonical, ops.pad, "relu_default")
    assert [*unclaimed(canonical, set())] == []


def test_by_which_name_an_op_is_refused() -> None:
    assert noted_as("fused_add_rms_norm") == "rms_norm"
    assert noted_as("rms_norm") == "rms_norm"
    assert noted_as("rms_norm_pad") == "rms_norm_pad", "a fused op is of no part"
    assert noted_as("aten.relu.default") == "aten.relu.default"


@pytest.mark.parametrize(
    ("op", "always"),
    [("rms_norm", True), ("fused_add_rms_norm", True), ("pad", False), ("attention", False), ("linear", False),
     ("rms_norm_pad", False), (None, False)],
)  # fmt: skip
def test_what_is_reported_whatever_rules_ask_for(op: str | None, always: bool) -> None:
    assert is_always_reported(Refusal(reason=Reason.OP, op=op, detail="")) is always


# Rules that are off.


def test_what_a_rule_that_is_off_would_match() -> None:
    def model(x: Any, w: Any) -> Any:
        wide = ops.pad(ops.rms_norm(x, w, 1e-5, "llama"), 28)
        return wide, ops.pad(ops.rms_norm(aten.relu.default(x), w, 1e-5, "llama"), 12)

    canonical = canonicalize(placed(written(model, INPUTS), {"rms_norm_default": "layers.0.norm"}))
    providers = [each for each in BUILT_IN_PROVIDERS if each.name in ("torch", "triton")]
    matches = find_matches(canonical, only("act_padding"), providers, PROFILES["h200"])
    assert len(matches.candidates) == 4, "by two providers each"
    first, second = find_disabled(matches, {"act_padding": "fuse_act_padding", "norm_quant": "fuse_norm_quant"})
    assert (first.reason, first.rule, first.op) == (Reason.DISABLED, "act_padding", "rms_norm")
    assert first.nodes == ("rms_norm_default",)
    assert first.detail == "it matches, and fuse_act_padding=False switches it off"
    assert first.mend == "leave fuse_act_padding out, or set it to True"
    assert (first.expected, first.found) == ("fuse_act_padding not False", "fuse_act_padding=False")
    assert (first.source, first.site, first.nearness) == ("layers.0.norm", "layers.0.norm", Nearness.REFUSED)
    assert (first.line, first.code) == (line_of(canonical.original, "rms_norm_default"), "rms_norm_default")
    assert (second.nodes, second.code) == (("rms_norm_default_1",), "rms_norm_default_1")
    assert second.source == line_of(canonical.original, "rms_norm_default_1")
