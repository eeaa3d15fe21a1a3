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


def added(x: Any, r: Any, w: Any, rounding: str = "llama") -> tuple[Any, Any]:
    results = ops.fused_add_rms_norm(x, r, w, 1e-5, rounding)
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


class TwiceTheSame(Rule):
    """The sum of two norms of one weight."""

    name, flags, op, core = "twice", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, z: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return aten.add.Tensor(ops.rms_norm(x, weight, eps, rounding), ops.rms_norm(z, weight, eps, rounding))


(ALONE,) = [each for each in RULES["allreduce_rms_padding"] if each.core is ops.rms_norm]
OWN = {"alone": ALONE, "twice": TwiceTheSame(), "norm_added": NormAdded()}
sin, exp, add = aten.sin.default, aten.exp.default, aten.add.Tensor

THE_ONE: dict[str, tuple[Model, str, dict[str, Any]]] = {
    "of several members the one of which the most is there": (
        lambda x, r, w: (ops.pad((both := added(reduced(x), r, w))[0], 28),
                         ops.pad(norm(aten.relu.default(both[1]), w), 12)),
        "allreduce_rms_padding",
        {"detail": "expected all_reduce before rms_norm, found aten.relu.default",
         "nodes": ("relu_default", "rms_norm_default")},
    ),
    "a member that came further whatever stands in its way, and the other one's norm isn't there": (
        lambda x, r, w: (ops.pad(sin(norm(x, w)), 28), ops.pad(norm(reduced(r), w), 12)),
        "allreduce_rms_padding",
        {"detail": "expected all_reduce before rms_norm, found an input of the graph", "nodes": ("rms_norm_default",)},
    ),
    "the same with a norm that adds": (
        lambda x, r, w: (ops.pad(sin(added(x, r, w)[0]), 28), ops.pad(norm(reduced(r), w), 12)),
        "allreduce_rms_padding",
        {"detail": "expected all_reduce before fused_add_rms_norm, found an input of the graph",
         "nodes": ("fused_add_rms_norm_default",)},
    ),
    "the norm that is there is expected": (
        lambda x, r, w: ops.pad(sin(norm(x, w)), 28),
        "act_padding",
        {"nearness": Nearness.OBSTRUCTED, "detail": "aten.sin.default stands between rms_norm and pad",
         "expected": "rms_norm", "found": "aten.sin.default",
         "nodes": ("sin_default", "pad_default", "rms_norm_default")},
    ),
    "and one that adds, if it is": (
        lambda x, r, w: ops.pad(sin(added(x, r, w)[0]), 28),
        "act_padding",
        {"nearness": Nearness.OBSTRUCTED, "detail": "aten.sin.default stands between fused_add_rms_norm and pad",
         "expected": "fused_add_rms_norm", "found": "aten.sin.default",
         "nodes": ("sin_default", "pad_default", "getitem")},
    ),
    "of two gaps the absent one": (
        lambda x, r, w: (ops.pad(sin(norm(product(x, r), aten.slice.Tensor(w, 0, 0, 12))), 28),
                         ops.pad(norm(reduced(x), w), 28)),
        "alone",
        {"detail": "expected all_reduce before rms_norm, found aten.mm.default", "code": "mm_default"},
    ),
    "of two obstacles the nearest to the end": (
        lambda x, r, w: ops.pad(sin(norm(exp(reduced(x)), w)), 28),
        "allreduce_rms_padding",
        {"detail": "aten.sin.default stands between rms_norm and pad",
         "nodes": ("sin_default", "pad_default", "rms_norm_default"), "site": "model.py:5"},
    ),
    "with a hint where the rest of the pattern is there": (
        lambda x, r, w: ops.pad(sin(norm(reduced(x), w)), 28), "allreduce_rms_padding", {"mend": "do it after pad"},
    ),
    "and where others read a further result": (
        lambda x, r, w: (ops.pad(sin((both := added(x, r, w))[0]), 28), both[1]),
        "act_padding", {"mend": "do it after pad"},
    ),
    "an obstacle between the two, once": (
        lambda x, r, w: norm(sin(reduced(x)), w),
        "allreduce_rms",
        {"detail": "aten.sin.default stands between all_reduce and rms_norm", "expected": "all_reduce",
         "nodes": ("sin_default", "rms_norm_default", "all_reduce_default"), "nearness": Nearness.OBSTRUCTED},
    ),
    "a prologue that both norms read, and the first one has": (
        lambda x, r, w: (norm(y := reduced(x), w), norm(sin(y), w)),
        "allreduce_rms",
        {"detail": "expected all_reduce before rms_norm, found aten.sin.default", "nearness": Nearness.ABSENT,
         "nodes": ("sin_default", "rms_norm_default_1")},
    ),
    "a reader that computes before the output": (
        lambda x, r, w: (y := reduced(x), product(y, r), norm(reduced(r), w)),
        "allreduce_rms", {"found": "aten.mm.default"},
    ),
    # The norm has an all-reduce of its own, so that the other one is looked at from its own side.
    "what another norm reads behind an obstacle, at that norm": (
        lambda x, r, w: added(reduced(x), sin(reduced(r)), w),
        "allreduce_rms",
        {"nearness": Nearness.OBSTRUCTED, "expected": "all_reduce", "found": "aten.sin.default",
         "detail": "aten.sin.default stands between all_reduce and fused_add_rms_norm",
         "nodes": ("sin_default", "fused_add_rms_norm_default", "all_reduce_default_1")},
    ),
    "all of several obstacles on the way from it": (
        lambda x, r, w: added(reduced(x), exp(sin(reduced(r))), w),
        "allreduce_rms",
        {"found": "aten.sin.default",
         "nodes": ("sin_default", "exp_default", "fused_add_rms_norm_default", "all_reduce_default_1")},
    ),
    "two that one norm adds": (
        lambda x, r, w: added(reduced(x), reduced(r), w),
        "allreduce_rms",
        {"reason": Reason.OP, "nearness": Nearness.OBSTRUCTED, "detail": "all_reduce is added as the residual of "
         "fused_add_rms_norm, whose other addend is reduced, too", "expected": "one all_reduce",
         "found": "two of all_reduce", "nodes": ("fused_add_rms_norm_default", "all_reduce_default_1"),
         "mend": "add before the all_reduce, once, instead of after both"},
    ),
    "of two absent ones the first": (
        lambda x, r, w: (add(aten.cumsum.default(x, 0), aten.cumprod.default(r, 0)), norm(x, w)),
        "twice",
        {"detail": "expected rms_norm before aten.add.Tensor, found aten.cumsum.default",
         "nodes": ("cumsum_default", "add_tensor")},
    ),
    "an absent one, where the core is that is there": (
        lambda x, r, w: add(norm(x, w), aten.cumprod.default(r, 0)),
        "twice",
        {"detail": "expected rms_norm before aten.add.Tensor, found aten.cumprod.default", "site": "model.py:3"},
    ),
    "of two obstructed ones the first": (
        lambda x, r, w: add(sin(norm(x, w)), exp(norm(r, w))),
        "twice",
        {"detail": "aten.sin.default stands between rms_norm and aten.add.Tensor",
         "nodes": ("sin_default", "add_tensor", "rms_norm_default")},
    ),
    "another constant than the rule's": (
        lambda x, r, w: add(norm(x, w), r, alpha=2),
        "norm_added",
        {"nearness": Nearness.REFUSED, "reason": Reason.ATTRIBUTE, "expected": "1", "found": "2", "mend": None,
         "detail": "aten.add.Tensor takes 2, and the rule has 1 there", "nodes": ("add_tensor",), "code": "add_tensor"},
    ),
    "a variable that is two things": (
        lambda x, r, w: add(norm(x, w), ops.rms_norm(r, w, 1e-6, "llama")),
        "twice",
        {"detail": "eps is 1e-05 in one place and 1e-06 in another, and rms_norm_pad takes one",
         "expected": "eps 1e-05", "found": "1e-06", "nodes": ("rms_norm_default_1", "add_tensor"),
         "code": "rms_norm_default_1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", THE_ONE)
def test_the_one_near_miss_is(what: str) -> None:
    model, rule, fields = THE_ONE[what]
    refusal = the_one(model, own=(OWN[rule],)) if rule in OWN else the_one(model, rule)
    assert {name: getattr(refusal, name) for name in fields} == fields


# Where another all-reduce is told of, too.
BESIDE: dict[str, tuple[Model, dict[str, Any]]] = {
    "one that what the norm adds depends on": (
        lambda x, r, w: (*added(aten.cumsum.default(y := reduced(x), 0), y, w), norm(reduced(r), w)),
        {"reason": Reason.USERS, "detail": "all_reduce is also read by aten.cumsum.default (cumsum_default), and what "
         "fused_add_rms_norm adds depends on it", "expected": "no other reader of all_reduce",
         "found": "aten.cumsum.default", "code": "cumsum_default", "site": "model.py:5",
         "nodes": ("cumsum_default", "all_reduce_default", "fused_add_rms_norm_default")},
    ),
    "a residual of another dtype than the norm's": (
        lambda x, r, w: (
            *added(aten.cumsum.default(r, 0), reduced(convert_element_type(x, torch.float32)), w, "vllm_fp32_residual"),
            norm(reduced(r), w),
        ),
        {"reason": Reason.DTYPE, "detail": "all_reduce is added as the residual of fused_add_rms_norm: it is float32, "
         "and the norm yields bfloat16", "expected": "all_reduce of bfloat16", "found": "float32",
         "nodes": ("fused_add_rms_norm_default", "all_reduce_default"), "code": "fused_add_rms_norm_default"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
def test_the_first_all_reduce_that_is_obstructed_is(what: str) -> None:
    model, fields = BESIDE[what]
    refusal = next(each for each in missed(model, "allreduce_rms") if each.nearness is Nearness.OBSTRUCTED)
    assert {name: getattr(refusal, name) for name in fields} == fields


def test_one_that_is_a_weight_is_no_residual() -> None:
    _, refusal = missed(lambda x, r, w: (norm(x, reduced(w)), norm(reduced(r), w)), "allreduce_rms")
    assert (refusal.reason, refusal.detail) == (Reason.OP, "all_reduce is read as the weight of rms_norm")
    assert refusal.nodes == ("rms_norm_default", "all_reduce_default")


def test_places_that_differ_in_what_is_there_are_tried_anew() -> None:
    """Of the second one another op reads what is reduced, too, which no fused op yields."""

    def model(x: Any, r: Any, w: Any) -> Any:
        first, second = reduced(x), reduced(r)
        sums = [added(each, r, w) for each in (first, second)]
        return [(ops.pad(aten.sin.default(y), 28), total) for y, total in sums], aten.exp.default(second)

    assert [refusal.mend for refusal in missed(model, "allreduce_rms_padding")] == ["do it after pad", None]


# Prologues.


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
    assert refusal.site == "model.py:3"


def test_of_several_readers_the_one_that_what_the_norm_adds_depends_on_is_named() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = reduced(x)
        return aten.exp.default(y), added(aten.cumsum.default(y, 0), y, w), norm(reduced(r), w)

    assert "aten.cumsum.default" in [refusal.found for refusal in missed(model, "allreduce_rms")]
    assert "aten.exp.default" not in [refusal.found for refusal in missed(model, "allreduce_rms")]


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


# What looks like an op.


def look_like(canonical: CanonicalGraph, op: Any, *names: str) -> Refusal:
    nodes = [node for node in canonical.graph.nodes if node.name in names]
    canonical.refuse(op, nodes, Reason.OP, f"no {op.name}", node=nodes[0], place=nodes[0])
    return canonical.unraised[nodes[0]]


LOOKALIKES: dict[str, tuple[Model, Any, str, str, str]] = {
    "a norm behind an all-reduce": (
        lambda x, r, w: exp(sin(reduced(x))), ops.rms_norm, "exp_default", "allreduce_rms", "rms_norm",
    ),
    "a norm before a pad": (
        lambda x, r, w: ops.pad(exp(sin(x)), 28), ops.rms_norm, "sin_default", "act_padding", "fused_add_rms_norm",
    ),
    "an all-reduce before a norm": (
        lambda x, r, w: norm(exp(sin(x)), w), ops.all_reduce, "sin_default", "allreduce_rms", "rms_norm",
    ),
    "a pad behind a norm": (lambda x, r, w: exp(sin(norm(x, w))), ops.pad, "exp_default", "act_padding", "rms_norm"),
}  # fmt: skip


@pytest.mark.parametrize("what", LOOKALIKES)
def test_what_looks_like_an_op_of_a_rule_is_the_rules(what: str) -> None:
    model, op, name, rule, of = LOOKALIKES[what]
    canonical = canonical_of(model)
    told = look_like(canonical, op, name)
    (refusal,) = in_graph(canonical, rule)
    assert (refusal.rule, refusal.op, refusal.nearness) == (rule, of, Nearness.UNRECOGNIZED)
    assert (refusal.detail, refusal.site, refusal.code) == (told.detail, told.source, name)


def test_what_looks_like_a_pad_without_a_norm_before_it_is_none() -> None:
    canonical = canonical_of(lambda x, r, w: (exp(product(x, r)), norm(x, w)))
    look_like(canonical, ops.pad, "exp_default")
    assert in_graph(canonical, "act_padding") == []


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
