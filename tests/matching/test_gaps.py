"""Which place of which rule nearly matches, and which gap is named of several, in written graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import convert_element_type
from fuseplan.matching import find_matches, find_near_misses
from fuseplan.matching.near_misses import Attempt, Gap
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, Provider
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import all_reduce, llama, quickly_traced, randn, written
from tests.matching.placed import NormAdded, placed

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)
TORCH = [each for each in BUILT_IN_PROVIDERS if each.name == "torch"]
INPUTS = {"x": randn(12, 64), "r": randn(12, 64, seed=1), "w": torch.ones(64, dtype=torch.bfloat16)}
Model = Callable[[Any, Any, Any], Any]


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseplan.matching.candidates.group_size", {"g": 4, "h": 4}.get)


def canonical_of(model: Model, modules: dict[str, str] | None = None) -> CanonicalGraph:
    return canonicalize(placed(written(model, INPUTS), modules))


def in_graph(
    canonical: CanonicalGraph, *rules: str, own: tuple[Rule, ...] = (), providers: Sequence[Provider] = TORCH
) -> list[Refusal]:
    asked = {**{name: RULES[name] for name in rules}, **by_name(own)}
    return [*find_near_misses(canonical, asked, find_matches(canonical, asked, providers, PROFILES["h200"]))]


def missed(model: Model, *rules: str, **options: Any) -> list[Refusal]:
    return in_graph(canonical_of(model), *rules, **options)


def the_one(model: Model, *rules: str, **options: Any) -> Refusal:
    (refusal,) = missed(model, *rules, **options)
    return refusal


def norm(x: Any, w: Any) -> Any:
    return ops.rms_norm(x, w, 1e-5, "llama")


def added(x: Any, r: Any, w: Any) -> tuple[Any, Any]:
    results = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    return results[0], results[1]


def reduced(x: Any, group: str = "g") -> Any:
    return ops.all_reduce(x, group)


def product(x: Any, r: Any) -> Any:
    return aten.mm.default(x, aten.permute.default(r, [1, 0]))


# What is absent.


@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_what_is_there_in_the_place_of_a_norm(computed: bool, viewed: bool) -> None:
    """Views of it are seen through."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y = product(x, r) if computed else x
        y = aten.slice.Tensor(aten.permute.default(y, [1, 0]), 0, 0, 6) if viewed else y
        return ops.pad(y, 28), norm(r, w)

    refusal = the_one(model, "act_padding")
    found = "aten.mm.default" if computed else "an input of the graph"
    assert (refusal.nearness, refusal.reason) == (Nearness.ABSENT, Reason.OP)
    assert refusal.detail == f"expected rms_norm before pad, found {found}"
    assert (refusal.expected, refusal.found, refusal.mend) == ("rms_norm", found, None)
    assert refusal.nodes == (("mm_default", "pad_default") if computed else ("pad_default",))
    assert refusal.code == ("mm_default" if computed else "pad_default")
    assert (refusal.rule, refusal.op) == ("act_padding", "fused_add_rms_norm")


def test_a_place_is_that_of_the_op_and_its_site_that_of_the_core() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return norm(aten.relu.default(x), w), norm(reduced(r), w)

    modules = {"relu_default": "mlp.act", "rms_norm_default": "norm"}
    (refusal,) = in_graph(canonical_of(model, modules), "allreduce_rms")
    assert (refusal.source, refusal.site, refusal.code) == ("mlp.act", "norm", "relu_default")
    canonical = canonical_of(lambda x, r, w: (norm(x, w), norm(reduced(r), w)), modules)
    (refusal,) = in_graph(canonical, "allreduce_rms")
    assert (refusal.source, refusal.site, refusal.code) == ("norm", "norm", "rms_norm_default")


def test_of_several_members_the_one_of_which_the_most_is_there_is_told_of() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y, total = added(reduced(x), r, w)
        return ops.pad(y, 28), ops.pad(norm(aten.relu.default(total), w), 12)

    refusal = the_one(model, "allreduce_rms_padding")
    assert refusal.detail == "expected all_reduce before rms_norm, found aten.relu.default"
    assert refusal.nodes == ("relu_default", "rms_norm_default")


@pytest.mark.parametrize("fused", [False, True])
def test_a_member_that_came_further_is_told_of_whatever_stands_in_its_way(fused: bool) -> None:
    """The other one's norm isn't there, nor what is before it."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y = added(x, r, w)[0] if fused else norm(x, w)
        return ops.pad(aten.sin.default(y), 28), ops.pad(norm(reduced(r), w), 12)

    refusal = the_one(model, "allreduce_rms_padding")
    name = "fused_add_rms_norm" if fused else "rms_norm"
    assert refusal.detail == f"expected all_reduce before {name}, found an input of the graph"
    assert refusal.nodes == (f"{name}_default",)


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_that_is_there_is_the_one_that_is_expected(fused: bool) -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = added(x, r, w)[0] if fused else norm(x, w)
        return ops.pad(aten.sin.default(y), 28)

    refusal = the_one(model, "act_padding")
    name = "fused_add_rms_norm" if fused else "rms_norm"
    assert refusal.nearness is Nearness.OBSTRUCTED
    assert refusal.detail == f"aten.sin.default stands between {name} and pad"
    assert (refusal.expected, refusal.found) == (name, "aten.sin.default")
    assert refusal.nodes == ("sin_default", "pad_default", "getitem" if fused else "rms_norm_default")


def test_places_are_told_of_in_the_order_of_the_graph() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        first = norm(aten.relu.default(x), w)
        second, _ = added(aten.relu.default(r), first, w)
        third = norm(aten.relu.default(second), w)
        return first, second, third, norm(reduced(r), w)

    assert [refusal.nodes[1] for refusal in missed(model, "allreduce_rms")] == [
        "rms_norm_default", "fused_add_rms_norm_default", "rms_norm_default_1",
    ]  # fmt: skip


def test_a_match_is_no_near_miss_and_neither_is_a_refused_one() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return ops.pad(norm(reduced(r), w), 28)

    assert missed(model, "act_padding", "allreduce_rms") == []
    assert missed(model, "act_padding", "allreduce_rms", providers=[]) == []


def ranked(*, absent: int = 0, obstacles: int = 0, ops_found: int = 0, lacking: int = 1) -> Attempt:
    graph = fx.Graph()
    node = graph.placeholder("x")
    gaps = [Gap(expected="", consumer=node, found=node, lacking=lacking) for _ in range(absent)]
    gaps += [Gap(expected="", consumer=node, found=node, way=[node] * obstacles, goal=node)]
    return Attempt(rule=RULES["act_padding"][0], anchor=node, gaps=gaps, calls=[node] * ops_found)


def test_the_nearest_lacks_the_least_then_came_furthest_or_has_all_and_the_fewest_obstacles() -> None:
    nearest = [
        ranked(ops_found=3), ranked(ops_found=1), ranked(obstacles=1, ops_found=2), ranked(obstacles=1),
        ranked(obstacles=3, ops_found=9), ranked(absent=1, ops_found=9), ranked(absent=1, ops_found=2, obstacles=3),
        ranked(absent=1, ops_found=1), ranked(absent=1, ops_found=1, obstacles=1), ranked(absent=2, ops_found=1),
        ranked(absent=1, lacking=3, ops_found=9),
    ]  # fmt: skip
    others_first = nearest[::-1]
    assert sorted(others_first, key=lambda each: each.rank) == nearest


def test_of_two_gaps_the_absent_one_is_told_of() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = norm(product(x, r), aten.slice.Tensor(w, 0, 0, 12))
        return ops.pad(aten.sin.default(y), 28), ops.pad(norm(reduced(x), w), 28)

    (rule,) = [each for each in RULES["allreduce_rms_padding"] if each.core is ops.rms_norm]
    refusal = the_one(model, own=(rule,))
    assert refusal.detail == "expected all_reduce before rms_norm, found aten.mm.default"
    assert refusal.code == "mm_default"


def test_of_two_obstacles_the_nearest_to_the_end_is_told_of() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return ops.pad(aten.sin.default(norm(aten.exp.default(reduced(x)), w)), 28)

    refusal = the_one(model, "allreduce_rms_padding")
    assert refusal.detail == "aten.sin.default stands between rms_norm and pad"
    assert refusal.nodes == ("sin_default", "pad_default", "rms_norm_default")
    assert refusal.site == refusal_line(model, "rms_norm_default")


def refusal_line(model: Model, name: str) -> str:
    names = [node.name for node in written(model, INPUTS).nodes]
    return f"model.py:{names.index(name)}"


def test_a_hint_is_given_where_the_rest_of_the_pattern_is_there() -> None:
    refusal = the_one(lambda x, r, w: ops.pad(aten.sin.default(norm(reduced(x), w)), 28), "allreduce_rms_padding")
    assert refusal.mend == "do it after pad"


def test_a_hint_is_given_where_others_read_a_further_result() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y, total = added(x, r, w)
        return ops.pad(aten.sin.default(y), 28), total

    assert the_one(model, "act_padding").mend == "do it after pad"


def test_places_that_differ_in_what_is_there_are_tried_anew() -> None:
    """Of the second one another op reads what is reduced, too, which no fused op yields."""

    def model(x: Any, r: Any, w: Any) -> Any:
        first, second = reduced(x), reduced(r)
        sums = [added(each, r, w) for each in (first, second)]
        return [(ops.pad(aten.sin.default(y), 28), total) for y, total in sums], aten.exp.default(second)

    assert [refusal.mend for refusal in missed(model, "allreduce_rms_padding")] == ["do it after pad", None]


# Prologues.


def test_an_obstacle_between_the_two_is_told_once() -> None:
    refusal = the_one(lambda x, r, w: norm(aten.sin.default(reduced(x)), w), "allreduce_rms")
    assert refusal.detail == "aten.sin.default stands between all_reduce and rms_norm"
    assert refusal.nodes == ("sin_default", "rms_norm_default", "all_reduce_default")
    assert (refusal.expected, refusal.nearness) == ("all_reduce", Nearness.OBSTRUCTED)


def test_a_prologue_of_another_match_is_none_of_this_norms() -> None:
    """Both norms read it; the first has it."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y = reduced(x)
        return norm(y, w), norm(aten.sin.default(y), w)

    refusal = the_one(model, "allreduce_rms")
    assert refusal.nearness is Nearness.ABSENT
    assert refusal.detail == "expected all_reduce before rms_norm, found aten.sin.default"
    assert refusal.nodes == ("sin_default", "rms_norm_default_1")


@pytest.mark.parametrize("returned", [False, True])
def test_an_all_reduce_that_no_norm_reads(returned: bool) -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = reduced(x)
        return (y if returned else product(y, r)), norm(reduced(r), w)

    refusal = the_one(model, "allreduce_rms")
    found = "the graph's output" if returned else "aten.mm.default"
    assert (refusal.nearness, refusal.reason) == (Nearness.ABSENT, Reason.OP)
    assert refusal.detail == f"expected rms_norm after all_reduce, found {found}"
    assert (refusal.expected, refusal.found) == ("rms_norm", found)
    assert refusal.nodes == (("all_reduce_default",) if returned else ("mm_default", "all_reduce_default"))
    assert refusal.code == ("all_reduce_default" if returned else "mm_default")
    assert refusal.site == refusal_line(model, "all_reduce_default")


def test_a_reader_that_computes_is_named_before_the_output() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = reduced(x)
        return y, product(y, r), norm(reduced(r), w)

    assert the_one(model, "allreduce_rms").found == "aten.mm.default"


def test_what_another_norm_reads_behind_an_obstacle_is_told_at_that_norm() -> None:
    """The norm has an all-reduce of its own, so that the other one is looked at from its own side."""

    def model(x: Any, r: Any, w: Any) -> Any:
        return added(reduced(x), aten.sin.default(reduced(r)), w)

    refusal = the_one(model, "allreduce_rms")
    assert refusal.nearness is Nearness.OBSTRUCTED
    assert refusal.detail == "aten.sin.default stands between all_reduce and fused_add_rms_norm"
    assert refusal.nodes == ("sin_default", "fused_add_rms_norm_default", "all_reduce_default_1")
    assert (refusal.expected, refusal.found) == ("all_reduce", "aten.sin.default")


def test_of_several_obstacles_all_are_on_the_way_from_the_norm() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return added(reduced(x), aten.exp.default(aten.sin.default(reduced(r))), w)

    refusal = the_one(model, "allreduce_rms")
    assert refusal.detail.startswith("aten.sin.default stands between all_reduce and fused_add_rms_norm")
    assert refusal.nodes == ("sin_default", "exp_default", "fused_add_rms_norm_default", "all_reduce_default_1")


def test_two_that_one_norm_adds() -> None:
    refusal = the_one(lambda x, r, w: added(reduced(x), reduced(r), w), "allreduce_rms")
    assert (refusal.reason, refusal.nearness) == (Reason.OP, Nearness.OBSTRUCTED)
    assert (
        refusal.detail
        == "all_reduce is added as the residual of fused_add_rms_norm, whose other addend is reduced, too"
    )
    assert (refusal.expected, refusal.found) == ("one all_reduce", "two of all_reduce")
    assert refusal.nodes == ("fused_add_rms_norm_default", "all_reduce_default_1")
    assert refusal.mend == "add before the all_reduce, once, instead of after both"


def test_one_that_what_the_norm_adds_depends_on() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = reduced(x)
        return *added(aten.cumsum.default(y, 0), y, w), norm(reduced(r), w)

    refusal = next(each for each in missed(model, "allreduce_rms") if each.nearness is Nearness.OBSTRUCTED)
    assert refusal.reason is Reason.USERS
    assert refusal.detail == (
        "all_reduce is also read by aten.cumsum.default (cumsum_default), and what fused_add_rms_norm adds depends on "
        "it"
    )
    assert (refusal.expected, refusal.found) == ("no other reader of all_reduce", "aten.cumsum.default")
    assert refusal.nodes == ("cumsum_default", "all_reduce_default", "fused_add_rms_norm_default")
    assert refusal.code == "cumsum_default"
    assert refusal.site == refusal_line(model, "fused_add_rms_norm_default")


def test_of_several_readers_the_one_that_what_the_norm_adds_depends_on_is_named() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = reduced(x)
        return aten.exp.default(y), added(aten.cumsum.default(y, 0), y, w), norm(reduced(r), w)

    assert "aten.cumsum.default" in [refusal.found for refusal in missed(model, "allreduce_rms")]
    assert "aten.exp.default" not in [refusal.found for refusal in missed(model, "allreduce_rms")]


def test_a_residual_of_another_dtype_than_the_norms() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        wide = reduced(convert_element_type(x, torch.float32))
        results = ops.fused_add_rms_norm(aten.cumsum.default(r, 0), wide, w, 1e-5, "vllm_fp32_residual")
        return results[0], results[1], norm(reduced(r), w)

    refusal = next(each for each in missed(model, "allreduce_rms") if each.nearness is Nearness.OBSTRUCTED)
    assert refusal.reason is Reason.DTYPE
    assert refusal.detail == (
        "all_reduce is added as the residual of fused_add_rms_norm: it is float32, and the norm yields bfloat16"
    )
    assert (refusal.expected, refusal.found) == ("all_reduce of bfloat16", "float32")
    assert refusal.nodes == ("fused_add_rms_norm_default", "all_reduce_default")
    assert refusal.code == "fused_add_rms_norm_default"


def test_a_residual_where_what_the_norm_adds_to_it_is_computed_from_another() -> None:
    """Of two all-reduces the one that nothing else reads is the block's."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        y = all_reduce(x, "g")
        return *llama(all_reduce(r, "g").sigmoid(), y, w), y.relu()

    of_other, refusal = in_graph(canonicalize(quickly_traced(model, *INPUTS.values())), "allreduce_rms")
    assert of_other.detail.startswith("aten.sigmoid.default stands between all_reduce and fused_add_rms_norm")
    assert (refusal.reason, refusal.nearness, refusal.mend) == (Reason.OP, Nearness.OBSTRUCTED, None)
    assert refusal.detail == (
        "all_reduce is added as the residual of fused_add_rms_norm, whose other addend, aten.sigmoid.default, is "
        "computed from all_reduce, too"
    )
    assert (refusal.expected, refusal.found) == ("one all_reduce", "two of all_reduce")


@pytest.mark.parametrize("computed", [False, True])
def test_a_residual_by_the_order_in_which_an_op_was_called(computed: bool) -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return added(product(x, r) if computed else x, reduced(r), w)

    shapes = {**INPUTS, "x": randn(12, 12), "r": randn(12, 12, seed=1), "w": torch.ones(12, dtype=torch.bfloat16)}
    _, refusal = in_graph(canonicalize(placed(written(model, shapes))), "allreduce_rms")
    found = "aten.mm.default" if computed else "an input of the graph"
    assert (refusal.reason, refusal.nearness) == (Reason.OP, Nearness.OBSTRUCTED)
    assert refusal.detail == (
        "all_reduce is added as the residual of fused_add_rms_norm: the rule has it in the place of the other addend, "
        f"{found}"
    )
    assert (refusal.expected, refusal.found) == ("all_reduce", found)
    assert refusal.mend == "swap the two addends of fused_add_rms_norm"
    assert refusal.nodes == ("fused_add_rms_norm_default", "all_reduce_default")


def test_one_that_is_a_weight_is_no_residual() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return norm(x, reduced(w)), norm(reduced(r), w)

    _, refusal = missed(model, "allreduce_rms")
    assert (refusal.reason, refusal.detail) == (Reason.OP, "all_reduce is read as the weight of rms_norm")
    assert refusal.nodes == ("rms_norm_default", "all_reduce_default")


# What looks like an op.


def look_like(canonical: CanonicalGraph, op: Any, *names: str) -> Refusal:
    nodes = [node for node in canonical.graph.nodes if node.name in names]
    canonical.refuse(op, nodes, Reason.OP, f"no {op.name}", node=nodes[0], place=nodes[0])
    return canonical.unraised[nodes[0]]


def test_what_looks_like_a_norm_behind_an_all_reduce_is_the_rules() -> None:
    canonical = canonical_of(lambda x, r, w: aten.exp.default(aten.sin.default(reduced(x))))
    told = look_like(canonical, ops.rms_norm, "exp_default")
    (refusal,) = in_graph(canonical, "allreduce_rms")
    assert (refusal.rule, refusal.op, refusal.nearness) == ("allreduce_rms", "rms_norm", Nearness.UNRECOGNIZED)
    assert (refusal.detail, refusal.site, refusal.code) == (told.detail, told.source, "exp_default")


def test_what_looks_like_a_norm_before_a_pad_is_the_rules() -> None:
    canonical = canonical_of(lambda x, r, w: ops.pad(aten.exp.default(aten.sin.default(x)), 28))
    look_like(canonical, ops.rms_norm, "sin_default")
    (refusal,) = in_graph(canonical, "act_padding")
    assert (refusal.rule, refusal.nearness, refusal.detail) == ("act_padding", Nearness.UNRECOGNIZED, "no rms_norm")
    assert refusal.op == "fused_add_rms_norm"


def test_what_looks_like_an_all_reduce_before_a_norm_is_the_rules() -> None:
    canonical = canonical_of(lambda x, r, w: norm(aten.exp.default(aten.sin.default(x)), w))
    look_like(canonical, ops.all_reduce, "sin_default")
    (refusal,) = in_graph(canonical, "allreduce_rms")
    assert (refusal.rule, refusal.op, refusal.detail) == ("allreduce_rms", "rms_norm", "no all_reduce")


def test_what_looks_like_a_pad_behind_a_norm_is_the_rules() -> None:
    canonical = canonical_of(lambda x, r, w: aten.exp.default(aten.sin.default(norm(x, w))))
    look_like(canonical, ops.pad, "exp_default")
    (refusal,) = in_graph(canonical, "act_padding")
    assert (refusal.rule, refusal.detail) == ("act_padding", "no pad")
    canonical = canonical_of(lambda x, r, w: (aten.exp.default(product(x, r)), norm(x, w)))
    look_like(canonical, ops.pad, "exp_default")
    assert in_graph(canonical, "act_padding") == [], "no norm is behind it"


def test_what_no_rule_has_told_of_is_told_without_one() -> None:
    canonical = canonical_of(lambda x, r, w: aten.exp.default(aten.sin.default(x)))
    told = look_like(canonical, ops.rms_norm, "sin_default")
    assert in_graph(canonical, "allreduce_rms", "act_padding") == [told]
    canonical = canonical_of(lambda x, r, w: aten.exp.default(x))
    told = look_like(canonical, ops.attention, "exp_default")
    (refusal,) = in_graph(canonical, "grouped_attention")
    assert (refusal.rule, refusal.detail) == ("grouped_attention", told.detail)


# Rules of which an op is nowhere.


def test_a_rule_of_which_an_op_is_nowhere_says_nothing() -> None:
    assert missed(lambda x, r, w: norm(x, w), "allreduce_rms", "act_padding") == []


def test_one_without_a_core_anywhere_tells_what_it_has() -> None:
    refusals = missed(lambda x, r, w: (ops.pad(product(x, r), 28), reduced(r)), "act_padding", "allreduce_rms")
    assert [(each.rule, each.detail) for each in refusals] == [
        ("act_padding", "expected rms_norm before pad, found aten.mm.default"),
        ("allreduce_rms", "expected rms_norm after all_reduce, found the graph's output"),
    ]


def test_one_without_a_core_says_nothing_of_what_others_match_or_nearly_do() -> None:
    """A quantisation behind a norm is no activation's."""

    def model(x: Any, r: Any, w: Any) -> Any:
        scale = convert_element_type(aten.slice.Tensor(w, 0, 0, 1), torch.float32)
        normed = norm(x, w), aten.sin.default(norm(r, w))
        return [ops.static_scaled_fp8_quant(y, scale, torch.float8_e4m3fn, "divide") for y in normed]

    for providers in (TORCH, []):  # without any the match is a miss
        refusals = missed(model, "act_quant", "norm_quant", providers=providers)
        assert [(each.rule, each.nearness) for each in refusals] == [("norm_quant", Nearness.OBSTRUCTED)]
    alone = missed(model, "act_quant")
    assert [(each.rule, each.nearness) for each in alone] == [("act_quant", Nearness.ABSENT)] * 2


# Where all ops are there.


class TwiceTheSame(Rule):
    """The sum of two norms of one weight."""

    name, flags, op, core = "twice", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, z: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return aten.add.Tensor(ops.rms_norm(x, weight, eps, rounding), ops.rms_norm(z, weight, eps, rounding))


def test_of_two_absent_ones_the_first_is_named() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return aten.add.Tensor(aten.cumsum.default(x, 0), aten.cumprod.default(r, 0)), norm(x, w)

    refusal = the_one(model, own=(TwiceTheSame(),))
    assert refusal.detail == "expected rms_norm before aten.add.Tensor, found aten.cumsum.default"
    assert refusal.nodes == ("cumsum_default", "add_tensor")
    refusal = the_one(lambda x, r, w: aten.add.Tensor(norm(x, w), aten.cumprod.default(r, 0)), own=(TwiceTheSame(),))
    assert refusal.detail == "expected rms_norm before aten.add.Tensor, found aten.cumprod.default"
    assert refusal.site == "model.py:3", "where the core is that is there"


def test_of_two_obstructed_ones_the_first_is_named() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return aten.add.Tensor(aten.sin.default(norm(x, w)), aten.exp.default(norm(r, w)))

    refusal = the_one(model, own=(TwiceTheSame(),))
    assert refusal.detail == "aten.sin.default stands between rms_norm and aten.add.Tensor"
    assert refusal.nodes == ("sin_default", "add_tensor", "rms_norm_default")


def test_another_constant_than_the_rules_is_named() -> None:
    refusal = the_one(lambda x, r, w: aten.add.Tensor(norm(x, w), r, alpha=2), own=(NormAdded(),))
    assert (refusal.nearness, refusal.reason) == (Nearness.REFUSED, Reason.ATTRIBUTE)
    assert refusal.detail == "aten.add.Tensor takes 2, and the rule has 1 there"
    assert (refusal.expected, refusal.found, refusal.mend) == ("1", "2", None)
    assert (refusal.nodes, refusal.code) == (("add_tensor",), "add_tensor")


def test_a_variable_that_is_two_things_is_named() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return aten.add.Tensor(norm(x, w), ops.rms_norm(r, w, 1e-6, "llama"))

    refusal = the_one(model, own=(TwiceTheSame(),))
    assert refusal.detail == "eps is 1e-05 in one place and 1e-06 in another, and rms_norm_pad takes one"
    assert (refusal.expected, refusal.found) == ("eps 1e-05", "1e-06")
    assert refusal.nodes == ("rms_norm_default_1", "add_tensor")
    assert refusal.code == "rms_norm_default_1"
