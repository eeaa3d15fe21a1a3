"""Which place of which rule nearly matches, which gap is named of several, which rule tells of what looks like an op,
and what a rule that is off would match, in written graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import DialectOp, ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import convert_element_type
from fuseplan.matching import blame, find_disabled, find_matches, find_near_misses
from fuseplan.matching.lookalikes import is_always_reported, noted_as, of_rules, unclaimed
from fuseplan.matching.trial import Place, Way, decisive
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, Provider
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule, by_name
from tests.helpers import all_reduce, llama, quickly_traced, randn, written
from tests.matching.placed import (
    INPUTS,
    RULES,
    Model,
    NormAdded,
    NormTanh,
    canonical_of,
    line_of,
    look_like,
    norm,
    placed,
)

aten = torch.ops.aten
TORCH = [each for each in BUILT_IN_PROVIDERS if each.name == "torch"]


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseplan.matching.candidates.group_size", {"g": 4, "h": 4}.get)


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
    assert (refusal.expected, refusal.found, refusal.fix) == ("rms_norm", found, None)
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


def test_a_match_is_no_near_miss_and_neither_is_a_refused_one() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        return ops.pad(norm(reduced(r), w), 28)

    assert missed(model, "act_padding", "allreduce_rms") == []
    assert missed(model, "act_padding", "allreduce_rms", providers=[]) == []


class TwiceTheSame(Rule):
    """The sum of two norms of one weight."""

    name, flags, op, core = "twice", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, z: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return aten.add.Tensor(ops.rms_norm(x, weight, eps, rounding), ops.rms_norm(z, weight, eps, rounding))


(ALONE,) = [each for each in RULES["allreduce_rms_padding"] if each.core is ops.rms_norm]
OWN = {"alone": ALONE, "twice": TwiceTheSame(), "norm_added": NormAdded(), "norm_tanh": NormTanh()}
sin, exp, tanh, add, mul = aten.sin.default, aten.exp.default, aten.tanh.default, aten.add.Tensor, aten.mul.Tensor

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
    "and where others read a further result": (
        lambda x, r, w: (ops.pad(sin((both := added(x, r, w))[0]), 28), both[1]),
        "act_padding", {"fix": "do it after pad"},
    ),
    "those of the first of several edges": (
        lambda x, r, w: ops.pad(norm(exp(half(aten.cos.default(reduced(x)))), w), 28),
        "allreduce_rms_padding",
        {"detail": "aten.cos.default stands between all_reduce and rms_norm; so do aten.exp.default and "
         "aten.split.Tensor"},
    ),
    "what reads the reduced value beside the fused op, which yields what it adds": (
        lambda x, r, w: added(tanh(sin(reduced(exp(x)))), x, w)[0],
        "allreduce_rms",
        {"detail": "aten.sin.default stands between all_reduce and fused_add_rms_norm; so does aten.tanh.default"},
    ),
    "without a hint where others read what is between": (
        lambda x, r, w: (tanh(z := sin(norm(x, w))), exp(z)), "norm_tanh", {"found": "aten.sin.default", "fix": None},
    ),
    "or what is before": (
        lambda x, r, w: (tanh(sin(y := norm(x, w))), exp(y)), "norm_tanh", {"found": "aten.sin.default", "fix": None},
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
    # The norm has an all-reduce of its own, so that the other one is looked at from its own side.
    "what another norm reads behind obstacles, at that norm": (
        lambda x, r, w: added(reduced(x), exp(sin(reduced(r))), w),
        "allreduce_rms",
        {"nearness": Nearness.OBSTRUCTED, "expected": "all_reduce", "found": "aten.sin.default",
         "detail": "aten.sin.default stands between all_reduce and fused_add_rms_norm; so does aten.exp.default",
         "nodes": ("sin_default", "exp_default", "fused_add_rms_norm_default", "all_reduce_default_1")},
    ),
    "two that one norm adds": (
        lambda x, r, w: added(reduced(x), reduced(r), w),
        "allreduce_rms",
        {"reason": Reason.OP, "nearness": Nearness.OBSTRUCTED, "detail": "all_reduce is added as the residual of "
         "fused_add_rms_norm, whose other addend is reduced, too", "expected": "one all_reduce",
         "found": "two of all_reduce", "nodes": ("fused_add_rms_norm_default", "all_reduce_default_1"),
         "fix": "add before the all_reduce, once, instead of after both"},
    ),
    "of two absent ones the first": (
        lambda x, r, w: (add(aten.cumsum.default(x, 0), aten.cumprod.default(r, 0)), norm(x, w)),
        "twice",
        {"detail": "expected rms_norm before aten.add.Tensor, found aten.cumsum.default", "site": "model.py:5",
         "nodes": ("cumsum_default", "add_tensor")},
    ),
    "another constant than the rule's": (
        lambda x, r, w: add(norm(x, w), r, alpha=2),
        "norm_added",
        {"nearness": Nearness.REFUSED, "reason": Reason.ATTRIBUTE, "expected": "1", "found": "2", "fix": None,
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


# What is said of the obstacles between two ops, and which of them decide.


def before_pad(*steps: Callable[[Any], Any]) -> Model:
    """Steps between a norm and a pad."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y = norm(x, w)
        for step in steps:
            y = step(y)
        return ops.pad(y, 28)

    return model


def behind_reduce(step: Callable[..., Any], group: str = "g") -> Model:
    """A step of the reduced value and the residual between an all-reduce and a norm."""

    def model(x: Any, r: Any, w: Any) -> Any:
        found = step(reduced(x, group), r)
        y, *more = found if isinstance(found, tuple) else (found,)
        return norm(y, w), *more

    return model


def in_place(value: Any, name: str = "add_") -> Any:
    """A value as Dynamo notes what writes in place."""
    value.node.meta["source_fn_stack"] = [(name, name)]
    return value


def cast(y: Any, dtype: torch.dtype = torch.float32) -> Any:
    return convert_element_type(y, dtype)


def turned(y: Any) -> Any:
    return aten.permute.default(y, [1, 0])


def part_of_it(y: Any) -> Any:
    return aten.slice.Tensor(y, 0, 0, 6)


def half(y: Any) -> Any:
    return aten.split.Tensor(y, 6)[1]


def reshaped(*shape: int) -> Callable[[Any], Any]:
    return lambda y: aten.reshape.default(y, [*shape])


in_blocks = reshaped(3, 4, 64)
MOVED = "all_reduce is {}, so that aten.slice.Tensor can't be moved before it"
VIEWED_TOO = (
    "aten.slice.Tensor {}, and can't be moved before it, since aten.permute.default (permute_default) reads all_reduce "
    "too"
)
ALSO = "also read by aten.exp.default (exp_default)"

BETWEEN: dict[str, tuple[Callable[[Any], Any], Reason, str, str, str | None]] = {
    "the nearest of several that compute, and further ones once each": (
        lambda y: tanh(exp(sin(exp(y)))), Reason.OP, "exp_default",
        "aten.exp.default {}; so do aten.tanh.default and aten.sin.default", None,
    ),
    "what writes in place, by both of its names": (
        lambda y: in_place(add(tanh(y), 1.0)), Reason.MUTATION, "add_tensor",
        "add_, an in-place op (aten.add.Tensor) {}; so does aten.tanh.default", None,
    ),
    "an operator that does": (
        lambda y: in_place(mul(y, 2.0), "imul_3"), Reason.MUTATION, "mul_tensor",
        "imul, an in-place op (aten.mul.Tensor) {}", "do it after pad",
    ),
    "what computes before a cast": (
        lambda y: tanh(cast(y)), Reason.OP, "tanh_default",
        "aten.tanh.default {}; so does prims.convert_element_type.default", "do it after pad",
    ),
    "a cast before a view": (
        lambda y: cast(part_of_it(y)), Reason.DTYPE, "convert_element_type_default",
        "prims.convert_element_type.default {}: bfloat16 is cast to float32; so does aten.slice.Tensor", None,
    ),
    "a reshape to shorter rows": (
        reshaped(48, 16), Reason.OP, "reshape_default", "aten.reshape.default {}: rows of 64 become rows of 16", None,
    ),
    "none that rules see through": (
        lambda y: sin(in_blocks(y)), Reason.OP, "sin_default", "aten.sin.default {}", "do it after pad",
    ),
    "but one that makes other rows": (
        lambda y: sin(reshaped(96, 8)(y)), Reason.OP, "sin_default",
        "aten.sin.default {}; so does aten.reshape.default", None,
    ),
    "one of several results together with its op": (
        lambda y: sin(half(y)), Reason.OP, "getitem", "aten.split.Tensor {}; so does aten.sin.default", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BETWEEN)
def test_between_a_norm_and_a_pad_is_blamed(what: str) -> None:
    step, reason, code, detail, fix = BETWEEN[what]
    refusal = the_one(before_pad(step), "act_padding")
    detail = detail.format("stands between rms_norm and pad")
    assert (refusal.reason, refusal.code, refusal.detail, refusal.fix) == (reason, code, detail, fix)


BEHIND: dict[str, tuple[Callable[..., Any], Reason, str, str, str | None]] = {
    "what there is a hint for, each with its own": (
        lambda y, r: aten.neg.default(mul(mul(y, 3.0), 2.0)), Reason.OP, "mul_tensor",
        "aten.mul.Tensor {}; so does aten.neg.default", "negate before all_reduce; scale before all_reduce",
    ),
    "what there is none for beside what there is one for": (
        lambda y, r: aten.neg.default(tanh(y)), Reason.OP, "tanh_default",
        "aten.tanh.default {}; so does aten.neg.default", None,
    ),
    "what computes, the residual add after it": (
        lambda y, r: add(sin(y), r), Reason.OP, "sin_default", "aten.sin.default {}; so does aten.add.Tensor", None,
    ),
    "of two all-reduces in a row the first": (
        lambda y, r: reduced(y), Reason.OP, "all_reduce_default",
        "the value reduced over group 'g' is reduced once more before rms_norm",
        "reduce once, and multiply by the number of ranks before",
    ),
    "and of another group": (
        lambda y, r: reduced(y, "h"), Reason.GROUP, "all_reduce_default",
        "another all_reduce, over group 'h', stands between this one, over group 'g', and rms_norm", None,
    ),
    "another reader, without which a view could be moved": (
        lambda y, r: (part_of_it(y), exp(y)), Reason.USERS, "exp_default", MOVED.format(ALSO), None,
    ),
    "the first that is no view": (
        lambda y, r: (part_of_it(part_of_it(y)), turned(y), exp(y), sin(y)), Reason.USERS, "exp_default",
        MOVED.format(ALSO), None,
    ),
    "a view of what is returned": (
        lambda y, r: (part_of_it(y), y), Reason.USERS, "slice_tensor", MOVED.format("returned from the graph, too"),
        None,
    ),
    "a view where views alone read it, too": (
        lambda y, r: (part_of_it(y), turned(y)), Reason.OP, "slice_tensor", VIEWED_TOO, "do it before all_reduce",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BEHIND)
def test_between_an_all_reduce_and_a_norm_is_blamed(what: str) -> None:
    step, reason, code, detail, fix = BEHIND[what]
    refusal = missed(behind_reduce(step), "allreduce_rms")[-1]
    detail = detail.format("stands between all_reduce and rms_norm")
    assert (refusal.reason, refusal.code, refusal.detail, refusal.fix) == (reason, code, detail, fix)


def test_a_hint_is_only_given_where_following_it_suffices() -> None:
    for group, hint in (("g", "scale before all_reduce"), ("unknown", None)):
        assert the_one(behind_reduce(lambda y, r: mul(y, 2.0), group), "allreduce_rms").fix == hint


@pytest.mark.parametrize("computed", [False, True])
def test_without_a_cast_what_is_reduced_has_the_dtype_behind_it(computed: bool) -> None:
    """And what that is computed from, so that the rule would match: nothing else is blamed."""

    def model(x: Any, r: Any, w: Any) -> Any:
        wide = aten.relu.default(cast(x)) if computed else cast(x)
        return ops.pad(norm(cast(in_blocks(reduced(wide)), torch.bfloat16), w), 28)

    refusal = the_one(model, "allreduce_rms")
    assert (refusal.reason, refusal.code) == (Reason.DTYPE, "convert_element_type_default_1")
    assert refusal.detail.endswith("between all_reduce and rms_norm: float32 is cast to bfloat16")


def test_what_has_no_original_can_not_be_taken_out_of_it() -> None:
    """A view that was moved before an all-reduce, since another op reads what it is moved from."""
    canonical = canonical_of(lambda x, r, w: (norm(y := in_blocks(reduced(sin(x), "unknown")), w), exp(y)))
    known = {node.name: node for node in canonical.graph.nodes}
    moved = next(node for node in known.values() if node not in canonical.origin)
    ways = [Way(nodes=[moved], goal=known["sin_default"])]
    place = Place(members=RULES["allreduce_rms"], anchor=known["rms_norm_default"], ways=ways)
    assert decisive(canonical, place, []) == ([moved], False)


def test_places_that_are_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def counted(canonical: Any, place: Any, likely: Any) -> Any:
        tried.append(place.anchor.name)
        return decisive(canonical, place, likely)

    def scaled(x: Any, w: Any, by: float) -> Any:
        return ops.pad(in_blocks(mul(norm(x, w), by)), 28)

    monkeypatch.setattr(blame, "decisive", counted)
    found = missed(lambda x, r, w: (scaled(x, w, 2.0), scaled(sin(x), w, 2.0), scaled(tanh(x), w, 3.0)), "act_padding")
    assert [refusal.code for refusal in found] == ["mul_tensor", "mul_tensor_1", "mul_tensor_2"]
    assert tried == ["pad_default", "pad_default_2"]


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

    assert [refusal.fix for refusal in missed(model, "allreduce_rms_padding")] == ["do it after pad", None]


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


def test_a_residual_where_what_the_norm_adds_to_it_is_computed_from_another() -> None:
    """Of two all-reduces the one that nothing else reads is the block's."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        y = all_reduce(x, "g")
        return *llama(all_reduce(r, "g").sigmoid(), y, w), y.relu()

    of_other, refusal = in_graph(canonicalize(quickly_traced(model, *INPUTS.values())), "allreduce_rms")
    assert of_other.detail.startswith("aten.sigmoid.default stands between all_reduce and fused_add_rms_norm")
    assert (refusal.reason, refusal.nearness, refusal.fix) == (Reason.OP, Nearness.OBSTRUCTED, None)
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
    assert refusal.fix == "swap the two addends of fused_add_rms_norm"
    assert refusal.nodes == ("fused_add_rms_norm_default", "all_reduce_default")


# What looks like an op.


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


# Whose rule tells of what looks like an op.


def in_a_row(x: Any, r: Any, w: Any) -> Any:
    return aten.tanh.default(aten.sin.default(aten.relu.default(x)))


def told(op: DialectOp, rules: dict[str, Any]) -> list[str | None]:
    """The rules that tell of what looks like an op."""
    canonical = canonical_of(in_a_row)
    look_like(canonical, op, "sin_default")
    return [refusal.rule for refusal in of_rules(canonical, rules, set())]


def only(*names: str) -> dict[str, Any]:
    return {name: RULES[name] for name in names}


# Rules of attention, which differ in what they do beside it.
BY_FLAGS = ["qk_norm_cached_attention", "cached_attention", "grouped_attention"]
CACHING = ["qk_norm_cached_attention", "qk_norm_rope_cache"]


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


def test_it_is_told_once_at_its_place_unless_a_rule_has_told_of_it() -> None:
    canonical = canonical_of(in_a_row)
    look_like(canonical, ops.rms_norm, "relu_default")  # whose part has it told whatever rules ask for
    first, second = (look_like(canonical, ops.attention, name) for name in ("sin_default", "tanh_default"))
    rules = only("grouped_attention", "act_padding")
    both = [*of_rules(canonical, rules, set())]
    assert [(refusal.rule, refusal.detail) for refusal in both] == [
        ("grouped_attention", each.detail) for each in (first, second)
    ]
    line = line_of(canonical.original, "sin_default")
    assert (both[0].site, both[0].source, both[0].line, both[0].code) == (line, line, line, "sin_default")
    assert [refusal.detail for refusal in of_rules(canonical, rules, {id(first)})] == [second.detail]


# What no rule has told of.


def test_what_looks_like_a_norm_is_told_wherever_it_stands_once() -> None:
    canonical = canonical_of(in_a_row)
    first = look_like(canonical, ops.fused_add_rms_norm, "relu_default", "tanh_default")
    second = look_like(canonical, ops.rms_norm, "sin_default")
    claimed: set[int] = set()
    assert [*unclaimed(canonical, claimed)] == [first, second]
    assert claimed == {id(first), id(second)}
    assert [*unclaimed(canonical, claimed)] == []


@pytest.mark.parametrize("op", [ops.silu_and_mul, ops.linear, ops.attention, ops.cache_write, ops.rms_norm_pad])
def test_what_looks_like_others_is_not_even_beside_a_norm(op: DialectOp) -> None:
    canonical = canonical_of(lambda x, r, w: norm(aten.relu.default(norm(x, w)), w))
    look_like(canonical, op, "relu_default")
    assert [*unclaimed(canonical, set())] == []


def around_a_norm(x: Any, r: Any, w: Any) -> Any:
    """relu, sin, a norm, tanh, exp."""
    return exp(aten.tanh.default(norm(sin(aten.relu.default(x)), w)))


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


def test_attention_is_no_core_that_prologues_and_epilogues_stand_around() -> None:
    def model(q: Any) -> Any:
        return aten.relu.default(ops.eager_attention(q, q, q, None, None, 0.5, None, "eager"))

    canonical = canonicalize(written(model, {"q": randn(1, 2, 4, 8)}))
    look_like(canonical, ops.pad, "relu_default")
    assert [*unclaimed(canonical, set())] == []


@pytest.mark.parametrize(
    ("op", "name", "always"),
    [("rms_norm", "rms_norm", True), ("fused_add_rms_norm", "rms_norm", True), ("pad", "pad", False),
     ("rms_norm_pad", "rms_norm_pad", False), ("aten.relu.default", "aten.relu.default", False)],
)  # fmt: skip
def test_by_which_name_an_op_is_refused_and_whether_it_is_reported_in_any_case(
    op: str, name: str, always: bool
) -> None:
    """A fused op is of no part."""
    assert noted_as(op) == name
    assert is_always_reported(Refusal(reason=Reason.OP, op=op, detail="")) is always


# Rules that are off.


def test_what_a_rule_that_is_off_would_match() -> None:
    canonical = canonical_of(
        lambda x, r, w: (ops.pad(norm(x, w), 28), ops.pad(norm(aten.relu.default(x), w), 12)),
        {"rms_norm_default": "layers.0.norm"},
    )
    providers = [each for each in BUILT_IN_PROVIDERS if each.name in ("torch", "triton")]
    matches = find_matches(canonical, only("act_padding"), providers, PROFILES["h200"])
    assert len(matches.candidates) == 4, "by two providers each"
    first, second = find_disabled(matches, {"act_padding": "fuse_act_padding", "norm_quant": "fuse_norm_quant"})
    assert (first.reason, first.rule, first.op) == (Reason.DISABLED, "act_padding", "rms_norm")
    assert first.nodes == ("rms_norm_default",)
    assert first.detail == "it matches, and fuse_act_padding=False switches it off"
    assert first.fix == "leave fuse_act_padding out, or set it to True"
    assert (first.expected, first.found) == ("fuse_act_padding not False", "fuse_act_padding=False")
    assert (first.source, first.site, first.nearness) == ("layers.0.norm", "layers.0.norm", Nearness.REFUSED)
    assert (first.line, first.code) == (line_of(canonical.original, "rms_norm_default"), "rms_norm_default")
    assert (second.nodes, second.code) == (("rms_norm_default_1",), "rms_norm_default_1")
    assert second.source == line_of(canonical.original, "rms_norm_default_1")
