"""From matches to a problem: names, conflicts and couplings, and what selectors force and forbid."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.errors import ConfigError
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.planner.candidates import conflicts_of
from fuseplan.planner.contradiction import ContradictionError, contradiction
from fuseplan.planner.pose import Problem, check_selector, pose, selects
from fuseplan.planner.prices import Prices
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES
from tests.planner.posing import MODEL, TORCH, crossing, matched, norm_and_pad, pads_of, problem_of, somebodys, twice
from tests.planner.test_packing import tie

aten = torch.ops.aten


def named(given: Problem, pairs: Any) -> set[tuple[str, ...]]:
    return {tuple(given.candidates[i].name for i in pair) for pair in pairs}


def test_candidates_are_known_by_place_rule_op_and_provider() -> None:
    given = problem_of(twice)
    assert [candidate.name for candidate in given.candidates] == [
        f"{place} {provider}"
        for place in ("00000 act_padding fused_add_rms_norm_pad", "00001 act_padding rms_norm_pad")
        for provider in ("torch", "triton")
    ]
    assert given.program.conflicts == {(0, 1), (2, 3)}
    assert given.components == [(0, 1), (2, 3)]


def test_signatures_say_dtypes_static_sizes_and_attributes() -> None:
    (first, _) = problem_of().candidates
    sizes = "x:bfloat16[10x100], weight:bfloat16[100]"
    assert first.signature == (
        "fused_add_rms_norm_pad(x:bfloat16[10x100], residual:bfloat16[10x100], weight:bfloat16[100], eps=1e-05, "
        "rounding=llama, right=28)"
    )
    dynamic = problem_of(dynamic=True).candidates[0].signature
    assert dynamic == first.signature.replace("10x100", "?x100")

    def reduced(x: Any, r: Any, w: Any) -> Any:
        return ops.rms_norm(ops.all_reduce(x, "g"), w, 1e-5, "llama"), r

    assert problem_of(reduced).candidates[0].signature == f"all_reduce_rms_norm({sizes}, eps=1e-05, rounding=llama)"


def test_pads_of_one_norm_are_told_apart_by_their_order() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = ops.rms_norm(x, w, 1e-5, "llama")
        wide = ops.pad(aten.relu.default(r), 4), ops.pad(y, 28), ops.pad(y, 12)
        return *wide, ops.pad(ops.rms_norm(r, w, 1e-5, "llama"), 4)

    given = problem_of(model, providers=TORCH)
    assert [candidate.name for candidate in given.candidates] == [
        "00000 act_padding rms_norm_pad torch 1",
        "00000 act_padding rms_norm_pad torch 2",
        "00001 act_padding rms_norm_pad torch",
    ]
    assert [candidate.anchor.args[1] for candidate in given.candidates] == [28, 12, 4]


def test_a_candidate_conflicts_with_one_that_takes_what_it_reads() -> None:
    first, second = problem_of(twice, providers=TORCH).candidates
    lost, yielded = first.match.consumed[0], first.anchor
    reader = replace(second, context=frozenset({lost}))
    assert conflicts_of([first, reader]) == conflicts_of([reader, first]) == {(0, 1)}
    assert conflicts_of([first, replace(second, context=frozenset({yielded}))]) == frozenset()
    # Its own nodes are not lost to it.
    own = second.match.consumed[0]
    assert conflicts_of([first, replace(second, context=frozenset({own}))]) == frozenset()


def with_somebody(function: Any, *targets: Any, providers: Any = TORCH, **more: Any) -> tuple[CanonicalGraph, Problem]:
    """A problem in which somebody's pass takes the calls of `targets`, a match each."""
    canonical, found = matched(function, providers=providers)
    nodes = [node for node in canonical.original.nodes if node.target in targets]
    external = [somebodys(node, ordinal=i) for i, node in enumerate(nodes)]
    return canonical, pose(canonical, found, external, Prices(model=MODEL), (10, 10), **more)


def test_somebodys_matches_are_candidates_that_conflict_by_what_they_take() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return *norm_and_pad(x, r, w), aten.relu.default(x)

    _, given = with_somebody(model, ops.pad.overload, aten.relu.default)
    assert [candidate.name for candidate in given.candidates] == [
        "00000 act_padding fused_add_rms_norm_pad torch", "external somebody 00000", "external somebody 00001",
    ]  # fmt: skip
    assert given.program.conflicts == {(0, 1)}
    pad, relu = given.candidates[1:]
    assert (pad.rule, pad.op, pad.provider, pad.site) == ("somebody", "somebody", "external", None)
    assert pad.signature == "somebody fuseplan.pad.default"
    assert relu.signature == "somebody aten.relu.default"


def together(name: str = "act_padding", **attributes: Any) -> list[Rule]:
    """The built-in rules of a name, each asking for more."""
    rules = [copy(rule) for rule in BUILT_IN_RULES if rule.name == name]
    for rule in rules:
        vars(rule).update(attributes)
    return rules


def test_couplings_hold_between_candidates_of_one_provider() -> None:
    given = problem_of(twice, rules=together(together=True))
    assert named(given, given.program.together) == {
        ("00000 act_padding fused_add_rms_norm_pad torch", "00001 act_padding rms_norm_pad torch"),
        ("00000 act_padding fused_add_rms_norm_pad triton", "00001 act_padding rms_norm_pad triton"),
    }
    assert problem_of(twice).program.together == ()
    assert problem_of(twice).program.requires == frozenset()


def test_a_rule_requires_those_that_it_shares_a_value_with() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        """The second norm reads the sum of the first; the third reads nothing of theirs."""
        y, total = ops.fused_add_rms_norm(ops.all_reduce(x, "g"), r, w, 1e-5, "llama")
        z, _ = ops.fused_add_rms_norm(aten.relu.default(y), total, w, 1e-5, "llama")
        return ops.pad(z, 28), ops.rms_norm(ops.all_reduce(r, "g"), w, 1e-5, "llama")

    given = problem_of(model, rules=[*together(requires=("allreduce_rms",)), *together("allreduce_rms")])
    pad, first = "00001 act_padding fused_add_rms_norm_pad", "00000 allreduce_rms all_reduce_fused_add_rms_norm"
    assert named(given, given.program.requires) == {
        (f"{pad} {each}", f"{first} {each}") for each in ("torch", "triton")
    }
    # The other way round: what reads is required by what yields.
    pads = together("act_padding")
    given = problem_of(model, rules=[*together("allreduce_rms", requires=("act_padding",)), *pads])
    assert named(given, given.program.requires) == {
        (f"{first} {each}", f"{pad} {each}") for each in ("torch", "triton")
    }


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("act_padding", True), ("act_padding:torch", True), ("act_padding:triton", False), ("allreduce_rms", False),
        ("act_padding#1", True), ("act_padding#1:torch", True), ("act_padding#0", False),
        ("act_padding@layers.3.*", True), ("act_padding@layers.3", False), ("act_padding@LAYERS.3.*", False),
        ("act_padding@layers.?.norm:torch", True),
    ],
)  # fmt: skip
def test_selectors_mean_rules_places_and_providers(text: str, meant: bool) -> None:
    check_selector(text, ["act_padding", "allreduce_rms"])
    candidate = problem_of(twice, providers=TORCH).candidates[1]
    object.__setattr__(candidate, "source", "layers.3.norm")
    assert selects(text, candidate) is meant


def test_selectors_of_a_place_mean_nothing_that_has_none() -> None:
    _, given = with_somebody(norm_and_pad, ops.pad.overload)
    (candidate,) = [each for each in given.candidates if each.rule == "somebody"]
    meant = [text for text in ("", "#0", "@layers.*", "@*") if selects(f"somebody{text}", candidate)]
    assert meant == ["", "@*"]


@pytest.mark.parametrize(
    ("text", "says"),
    [(text, "isn't of the form RULE") for text in ("", "act padding", "act_padding#x", "act_padding@", "act_padding:",
                                                   "@a", "a#1@b")]
    + [("act_pading", "did you mean 'act_padding'")],
)  # fmt: skip
def test_selectors_of_no_form_or_of_an_unknown_rule(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_selector(text, ["act_padding", "a"])


def test_forcing_means_one_of_the_providers_at_each_place() -> None:
    given = problem_of(twice, force=["act_padding"])
    assert given.program.one_of == (frozenset({0, 1}), frozenset({2, 3}))
    assert given.program.forced == frozenset()
    assert given.forced == (("act_padding", frozenset({0, 1})), ("act_padding", frozenset({2, 3})))
    given = problem_of(twice, force=["act_padding:triton", "act_padding#0:triton"])
    assert given.program.forced == {1, 3}
    assert given.program.one_of == ()
    assert given.forced[2] == ("act_padding#0:triton", frozenset({1}))
    # What is forbidden isn't open to that.
    given = problem_of(twice, force=["act_padding"], forbid=["act_padding#0:torch"])
    assert given.program.forbidden == {0}
    assert given.program.forced == {1}
    assert given.program.one_of == (frozenset({2, 3}),)


def test_what_is_forced_and_forbidden_is_refused_with_all_that_forbids_it() -> None:
    for forced, forbidden, told in (
        ("act_padding", ["act_padding#1:torch", "act_padding:triton", "act_padding#0:triton"], 2),
        ("act_padding#0:torch", ["act_padding"], 1),
    ):
        with pytest.raises(ContradictionError) as raised:
            problem_of(twice, force=[forced], forbid=forbidden)
        assert raised.value.selectors == [f"force '{forced}'", *(f"forbid '{each}'" for each in forbidden[:told])]
        assert raised.value.why == "every fusion forced there is forbidden"
    # One of the two is left at each place.
    problem_of(twice, force=["act_padding"], forbid=["act_padding:torch"])


SOURCES = ["one", "one", None, "two"]


@pytest.mark.parametrize(
    ("pairs", "groups", "selectors", "sources", "why"),
    [
        ([(0, 1)], [("p", {0}), ("q", {1})], ["force 'p'", "force 'q'"], ("one",), "they want the same op there"),
        ([(1, 3)], [("p", {0}), ("q", {1}), ("r", {3})], ["force 'q'", "force 'r'"], ("one", "two"), "same op"),
        ([(0, 1)], [("p", {0}), ("p", {1})], ["force 'p'"], ("one",), "they want the same op"),
        # One of the two could be applied beside the other.
        ([(0, 1)], [("p", {0}), ("q", {1, 2})], ["force 'p'", "force 'q'"], ("one", None), "can't all be applied"),
        # Both may mean the same one.
        ([(0, 1)], [("p", {0, 1}), ("q", {0, 1})], ["force 'p'", "force 'q'"], ("one",), "can't all be applied"),
        ([], [("p", {2}), ("p", {3})], ["force 'p'"], (None, "two"), "they can't all be applied together"),
    ],
)
def test_contradictions_name_the_selectors_and_places(
    pairs: list[tuple[int, int]], groups: list[tuple[str, set[int]]], selectors: list[str],
    sources: tuple[str | None, ...], why: str,
) -> None:  # fmt: skip
    program = tie(*[0] * 4, conflicts=frozenset(pairs))
    error = contradiction(program, [(text, frozenset(group)) for text, group in groups], SOURCES)
    assert (error.selectors, error.sources) == (selectors, sources)
    assert why in error.why


def test_cycles_are_found_in_the_canonical_graph_and_with_others_in_the_original() -> None:
    _, given = with_somebody(crossing, aten.relu.default)
    names = [candidate.name.split()[0] for candidate in given.candidates]
    assert names == ["00000", "00001", "external"]
    # A cycle of rules' matches is reported once.
    for selected, cycles in (([0], []), ([0, 1], [(0, 1)]), ([1, 2], []), ([0, 1, 2], [(0, 1)])):
        assert given.find_cycles(selected) == cycles


def test_cycles_through_somebodys_match_are_found() -> None:
    """Somebody takes two relus as one op, one before a norm and pad and one after it."""

    def model(x: Any, r: Any, w: Any) -> Any:
        before, other = aten.relu.default(x), aten.relu.default(r)
        wide = ops.pad(ops.rms_norm(before, w, 1e-5, "llama"), 28)
        return aten.relu.default(wide), other

    canonical, matches = matched(model, providers=TORCH)
    before, other, after = [node for node in canonical.original.nodes if node.target is aten.relu.default]
    for nodes, cycles in (((before, after), [(0, 1)]), ((before, other), [])):
        given = pose(canonical, matches, [somebodys(*nodes)], Prices(model=MODEL), (10, 10))
        assert given.find_cycles([0, 1]) == cycles


def test_candidates_are_the_same_in_any_order_of_matches() -> None:
    def several(x: Any, r: Any, w: Any) -> Any:
        return *twice(x, r, w), *pads_of(28, 12, 4)(x, r, w)

    canonical, found = matched(several)

    def names(matches: Sequence[Any]) -> list[tuple[str, str]]:
        given = pose(canonical, matches, [], Prices(model=MODEL), (10, 10))
        return [(each.name, each.anchor.name) for each in given.candidates]

    assert names(found) == names(found[::-1])
