"""What a layer lacks that others have at the same place, in written graphs of layers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.matching import Match, find_matches, find_near_misses
from fuseplan.matching.siblings import Siblings, layer_of
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.record import Nearness, Reason, Refusal
from tests.matching.placed import RULES, canonical_of

aten = torch.ops.aten
PADDING = {"act_padding": RULES["act_padding"]}
MEMBERS = PADDING["act_padding"]
PROVIDERS = [each for each in BUILT_IN_PROVIDERS if each.name in ("torch", "triton")]

Layer = Callable[[str, Any, Any], list[Any]]
"""What a layer of a given path yields for an activation and a weight."""


def within(path: str, value: Any) -> Any:
    """A value as the module of that path computes it."""
    value.node.meta["nn_module_stack"] = {path: (path, object)}
    return value


def norm(path: str, x: Any, w: Any) -> Any:
    return within(path, ops.rms_norm(within(path, aten.relu.default(x)), w, 1e-5, "llama"))


def padded(name: str = "first") -> Layer:
    return lambda layer, x, w: [within(f"{layer}.{name}", ops.pad(norm(f"{layer}.{name}", x, w), 28))]


def read_by(target: Any, name: str) -> Layer:
    """A norm that nothing pads."""
    return lambda layer, x, w: [within(f"{layer}.{name}", target(norm(f"{layer}.{name}", x, w)))]


def added(name: str = "first", *, is_padded: bool = True, is_read: bool = False) -> Layer:
    """A norm behind a residual add, whose sum is read in any case."""

    def layer(path: str, x: Any, w: Any) -> list[Any]:
        path = f"{path}.{name}"
        results = within(path, ops.fused_add_rms_norm(within(path, aten.relu.default(x)), x, w, 1e-5, "llama"))
        total = within(path, results[1])
        y = within(path, results[0]) if is_padded or is_read else None
        pads = [within(path, ops.pad(y, 28))] if is_padded else []
        return [total, *pads, *([within(path, aten.tanh.default(y))] if is_read else [])]

    return layer


def both(*layers: Layer) -> Layer:
    return lambda path, x, w: [value for layer in layers for value in layer(path, x, w)]


OTHER = read_by(aten.tanh.default, "second")
"""By which a layer is there at all."""


def layered(layers: Sequence[Layer], root: str = "layers.") -> CanonicalGraph:
    return canonical_of(
        lambda x, r, w: [value for number, layer in enumerate(layers) for value in layer(f"{root}{number}", x, w)]
    )


def candidates_of(canonical: CanonicalGraph) -> Sequence[Match]:
    return find_matches(canonical, PADDING, PROVIDERS, PROFILES["h200"]).candidates


def lacking(*layers: Layer, root: str = "layers.") -> list[Refusal]:
    canonical = layered(layers, root)
    return [*Siblings(canonical).missing(MEMBERS, candidates_of(canonical), ())]


@pytest.mark.parametrize("root", ["layers.", "model.decoder.layers."])
def test_a_layer_without_the_norm_of_the_others(root: str) -> None:
    whole = both(padded(), OTHER)
    (refusal,) = lacking(whole, OTHER, whole, whole, root=root)
    assert (refusal.reason, refusal.nearness) == (Reason.DEAD, Nearness.MISSING)
    assert (refusal.rule, refusal.op) == ("act_padding", "rms_norm")
    assert refusal.detail == (
        "3 other layers have rms_norm there and this one has none: is its result not used? Dead code is removed "
        "before matching"
    )
    assert (refusal.source, refusal.site) == (f"{root}1.first", f"{root}1.first")
    assert (refusal.expected, refusal.found, refusal.nodes) == ("rms_norm", "nothing", ())


def test_a_layer_whose_norm_nothing_reads_lacks_what_comes_after_it() -> None:
    (refusal,) = lacking(added(), added(), added(is_padded=False))
    assert refusal.detail.startswith("2 other layers have pad there and this one has none")
    assert (refusal.expected, refusal.op, refusal.site) == ("pad", "fused_add_rms_norm", "layers.2.first")
    assert refusal.nodes == ("fused_add_rms_norm_default_2",)


def elsewhere(layer: str, x: Any, w: Any) -> list[Any]:
    return [within(f"{layer}.mlp", aten.tanh.default(norm(f"{layer}.first", x, w)))]


def read_here(layer: str, x: Any, w: Any) -> list[Any]:
    y = norm(f"{layer}.first", x, w)
    return [within(f"{layer}.first", ops.pad(y, 28)), within(f"{layer}.first", aten.tanh.default(y))]


def outside(layer: str, x: Any, w: Any) -> list[Any]:
    return padded("first")("final", x, w)


def sum_read(layer: str, x: Any, w: Any) -> list[Any]:
    """A sum that other layers' ops read says nothing of what reads the norm."""
    total, *_ = added(is_padded=False)(layer, x, w)
    return [within(f"{layer}.first", aten.exp.default(total))]


WHOLE, THIRD, READ = both(padded(), OTHER), read_by(aten.exp.default, "third"), added(is_read=True)
BY_EXP, LACKS, MOST = both(read_by(aten.exp.default, "first"), OTHER), both(OTHER, THIRD), both(padded(), OTHER, THIRD)
LACKING: dict[str, tuple[Sequence[Layer], list[tuple[str, str]]]] = {
    "a norm that another op reads is meant to be without a pad": ([WHOLE, WHOLE, BY_EXP], []),
    "but none at all isn't": ([WHOLE, BY_EXP, WHOLE, both(OTHER), WHOLE, WHOLE], [("layers.3", "rms_norm")]),
    "where the others' are read by that op, too, the pad is gone": (
        [READ, added(is_padded=False, is_read=True), READ], [("layers.1", "pad")],
    ),
    "one that the same op reads in another module is meant to be as it is": ([read_here, elsewhere, read_here], []),
    "and in the same module isn't": (
        [read_here, read_by(aten.tanh.default, "first"), read_here], [("layers.1", "pad")],
    ),
    "one against one": ([WHOLE, OTHER], []),
    "every other layer is by design": ([WHOLE, OTHER, WHOLE, OTHER], []),
    "as many norms, this one by another name": ([WHOLE, both(THIRD, OTHER), WHOLE], []),
    "held against the one with the most norms": ([WHOLE, LACKS, MOST], [("layers.1", "rms_norm")]),
    "what is outside of layers is held against nothing": ([outside, outside, outside], []),
    "nor holds anything": ([outside, WHOLE, OTHER, WHOLE], [("layers.2", "rms_norm")]),
    "readers are those of the norm and not of the sum": ([added(), sum_read, added()], [("layers.1", "pad")]),
}  # fmt: skip


@pytest.mark.parametrize("what", LACKING)
def test_what_layers_lack(what: str) -> None:
    layers, wanted = LACKING[what]
    assert [(refusal.site, refusal.expected) for refusal in lacking(*layers)] == [
        (f"{layer}.first", op) for layer, op in wanted
    ]


def test_what_only_looks_like_a_norm_is_one_of_them() -> None:
    def another(layer: str, x: Any, w: Any) -> list[Any]:
        return [within(f"{layer}.third", aten.exp.default(x)), *OTHER(layer, x, w)]

    canonical = layered([WHOLE, another, WHOLE])
    candidates = candidates_of(canonical)
    (node,) = canonical.graph.find_nodes(op="call_function", target=aten.exp.default)
    assert len([*Siblings(canonical).missing(MEMBERS, candidates, ())]) == 1
    canonical.refuse(ops.all_reduce, [node], Reason.OP, "no all-reduce", node=node, place=node)
    assert len([*Siblings(canonical).missing(MEMBERS, candidates, ())]) == 1, "it is none of the rule's"
    canonical.refuse(ops.rms_norm, [node], Reason.OP, "no norm", node=node, place=node)
    assert [*Siblings(canonical).missing(MEMBERS, candidates, ())] == []


def test_a_place_of_which_something_is_said_already_is_left_out() -> None:
    def obstructed(layer: str, x: Any, w: Any) -> list[Any]:
        y = norm(f"{layer}.first", x, w)
        return [within(f"{layer}.first", ops.pad(aten.tanh.default(y), 28)), *OTHER(layer, x, w)]

    canonical = layered([WHOLE, obstructed, WHOLE])
    matches = find_matches(canonical, PADDING, PROVIDERS, PROFILES["h200"])
    (refusal,) = find_near_misses(canonical, PADDING, matches)
    assert refusal.nearness is Nearness.OBSTRUCTED


def test_every_place_of_a_layer_is_held_against_its_own() -> None:
    whole = both(padded("b"), padded("a"), OTHER)
    refusals = lacking(whole, both(padded("a"), OTHER), both(padded("b"), OTHER), whole, whole)
    assert [refusal.site for refusal in refusals] == ["layers.2.a", "layers.1.b"]
    assert {refusal.detail.split(" have")[0] for refusal in refusals} == {"4 other layers"}


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("layers.3.mlp", ("layers.", 3, ".mlp")), ("model.layers.12", ("model.layers.", 12, "")),
        ("0.norm", ("", 0, ".norm")), ("7", ("", 7, "")), ("blocks.2.experts.7.w", ("blocks.", 2, ".experts.7.w")),
        ("layer3.norm", None), ("layers.3b.norm", None), ("model.norm", None), ("model.py:12", None), ("", None),
        (None, None),
    ],
)  # fmt: skip
def test_the_layer_of_a_module_is_the_first_number_of_its_path(place: str | None, layer: Any) -> None:
    assert layer_of(place) == layer
