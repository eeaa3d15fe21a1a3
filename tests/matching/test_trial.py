"""Which of the obstacles at a place decide: what a rule would match without them, in written graphs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.facts import convert_element_type
from fuseplan.matching import blame
from fuseplan.matching.blame import Shared
from fuseplan.matching.trial import Place, Way, decisive
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import randn, written
from tests.matching.placed import NormTanh

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)
INPUTS = {"x": randn(12, 64), "w": torch.ones(64, dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseplan.matching.candidates.group_size", {"g": 4}.get)


RULES_HERE = {**RULES, "norm_tanh": (NormTanh(),)}


class Sketch:
    """A written graph, raised, whose nodes are known by name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.canonical = canonicalize(written(function, INPUTS))

    def __getitem__(self, name: str) -> fx.Node:
        found: dict[str, fx.Node] = {node.name: node for node in self.canonical.graph.nodes}
        return found[name]

    def way(self, goal: str, *names: str) -> Way:
        """From the consumer's side."""
        return Way(nodes=[self[name] for name in names], goal=self[goal])

    def place(self, rule: str, anchor: str, *ways: Way) -> Place:
        return Place(members=RULES_HERE[rule], anchor=self[anchor], ways=ways)

    def decides(self, place: Place, likely: Sequence[str] = ()) -> tuple[list[str], bool]:
        found = decisive(self.canonical, place, [self[name] for name in likely])
        return [node.name for node in found.nodes], found.suffices


def decided(function: Callable[..., Any], rule: str, anchor: str, *ways: Sequence[str]) -> tuple[list[str], bool]:
    """What decides at a place, between which and what it should read some ways are: a goal and nodes."""
    sketch = Sketch(function)
    return sketch.decides(sketch.place(rule, anchor, *(sketch.way(*way) for way in ways)))


def norm(x: Any, w: Any) -> Any:
    return ops.rms_norm(x, w, 1e-5, "llama")


def rows_of_eight(x: Any) -> Any:
    return aten.reshape.default(x, [96, 8])


def in_blocks(x: Any) -> Any:
    """The same rows in three dimensions."""
    return aten.reshape.default(x, [3, 4, 64])


def half(x: Any) -> Any:
    return aten.split.Tensor(x, 6)[1]


def test_all_that_are_needed_decide_in_the_order_of_the_way() -> None:
    sketch = Sketch(lambda x, w: ops.pad(aten.exp.default(aten.sin.default(norm(x, w))), 28))
    way = sketch.way("rms_norm_default", "exp_default", "sin_default")
    for likely in (["sin_default", "exp_default"], ["exp_default", "sin_default"], []):
        assert sketch.decides(sketch.place("act_padding", "pad_default", way), likely) == (
            ["exp_default", "sin_default"], True,
        )  # fmt: skip


@pytest.mark.parametrize("view_first", [False, True])
def test_a_view_that_rules_see_through_does_not(view_first: bool) -> None:
    """A reshape of whole rows may stand between a norm and a pad."""

    def model(x: Any, w: Any) -> Any:
        y = norm(x, w)
        return ops.pad(aten.sin.default(in_blocks(y)) if view_first else in_blocks(aten.sin.default(y)), 28)

    sketch = Sketch(model)
    names = ["reshape_default", "sin_default"][:: -1 if view_first else 1]
    way = sketch.way("rms_norm_default", *names)
    for likely in (["reshape_default"], ["sin_default"], []):
        assert sketch.decides(sketch.place("act_padding", "pad_default", way), likely) == (["sin_default"], True)


def test_one_of_several_results_goes_with_its_op() -> None:
    sketch = Sketch(lambda x, w: ops.pad(aten.sin.default(half(norm(x, w))), 28))
    way = sketch.way("rms_norm_default", "sin_default", "getitem", "split_tensor")
    assert [[node.name for node in step] for step in way.steps] == [["sin_default"], ["getitem", "split_tensor"]]
    found = sketch.decides(sketch.place("act_padding", "pad_default", way))
    assert found == (["sin_default", "getitem", "split_tensor"], True)


def test_steps_of_several_ops_with_several_results() -> None:
    def model(x: Any, w: Any) -> Any:
        return ops.pad(aten.split.Tensor(half(norm(x, w)), 3)[0], 28)

    sketch = Sketch(model)
    way = sketch.way("rms_norm_default", "getitem_1", "split_tensor_1", "getitem", "split_tensor")
    assert [len(step) for step in way.steps] == [2, 2]
    assert [len(step) for step in Way(nodes=way.nodes[1:], goal=way.goal).steps] == [1, 2]
    assert [len(step) for step in Way(nodes=[way.nodes[0], way.nodes[3]], goal=way.goal).steps] == [1, 1]
    assert Way(nodes=(), goal=way.goal).steps == []


def padded_norm_of_half(x: Any, w: Any) -> Any:
    reduced = aten.exp.default(half(aten.cos.default(ops.all_reduce(x, "g"))))
    return ops.pad(sin(norm(reduced, w)), 28)


FAR = "all_reduce_default", "exp_default", "getitem", "split_tensor", "cos_default"
NEAR = "rms_norm_default", "sin_default"
PADDED, REDUCED = "allreduce_rms_padding", "all_reduce_default"
sin = aten.sin.default


def added(x: Any, r: Any, w: Any) -> Any:
    return ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")[0]


DECISIVE: dict[str, tuple[Callable[..., Any], str, str, list[Sequence[str]], list[str], bool]] = {
    "what computes something else": (
        lambda x, w: ops.pad(sin(norm(x, w)), 28), "act_padding", "pad_default", [NEAR], ["sin_default"], True,
    ),
    "a view that makes other rows": (
        lambda x, w: ops.pad(sin(rows_of_eight(norm(x, w))), 28), "act_padding", "pad_default",
        [(*NEAR, "reshape_default")], ["sin_default", "reshape_default"], True,
    ),
    # Without any trial's change the rule matches what is copied: what else reads it is what keeps it from matching.
    "views alone, all of them, where nothing has to go": (
        lambda x, w: (norm(in_blocks(y := ops.all_reduce(x, "g")), w), aten.exp.default(y), sin(y)),
        "allreduce_rms", "rms_norm_default", [(REDUCED, "reshape_default")], ["reshape_default"], True,
    ),
    "the obstacles, which don't suffice where others read what is between": (
        lambda x, w: (aten.tanh.default(z := sin(norm(x, w))), aten.exp.default(z)),
        "norm_tanh", "tanh_default", [NEAR], ["sin_default"], False,
    ),
    "nor where others read what is before": (
        lambda x, w: (aten.tanh.default(sin(y := norm(x, w))), aten.exp.default(y)),
        "norm_tanh", "tanh_default", [NEAR], ["sin_default"], False,
    ),
    "those of the first of several edges": (padded_norm_of_half, PADDED, "pad_default", [FAR, NEAR], [*FAR[1:]], True),
    "whichever it is": (padded_norm_of_half, PADDED, "pad_default", [NEAR, FAR], ["sin_default"], True),
    "those behind an edge without any": (
        padded_norm_of_half, PADDED, "pad_default", [NEAR, ("rms_norm_default",), FAR], ["sin_default"], True,
    ),
    "those before one": (
        lambda x, w: ops.pad(norm(sin(ops.all_reduce(x, "g")), w), 28), PADDED, "pad_default",
        [(REDUCED, "sin_default"), ("rms_norm_default",)], ["sin_default"], True,
    ),
    "what is between and as the rule has it is part of it": (
        lambda x, w: ops.pad(norm(sin(ops.all_reduce(x, "g")), w), 28), PADDED, "pad_default",
        [(REDUCED, "sin_default")], ["sin_default"], True,
    ),
    # The fused op yields what it adds, and not what it reduces.
    "what is taken out reads nothing any more": (
        lambda x, w: added(aten.tanh.default(sin(ops.all_reduce(aten.exp.default(x), "g"))), x, w),
        "allreduce_rms", "getitem", [(REDUCED, "tanh_default", "sin_default")], ["tanh_default", "sin_default"], True,
    ),
    "one of the results of a norm is what should be read": (
        lambda x, w: ops.pad(sin(added(x, aten.exp.default(x), w)), 28), "act_padding", "pad_default",
        [("getitem", "sin_default")], ["sin_default"], True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DECISIVE)
def test_what_decides(what: str) -> None:
    function, rule, anchor, ways, nodes, suffices = DECISIVE[what]
    assert decided(function, rule, anchor, *ways) == (nodes, suffices)


def test_where_nothing_suffices_all_are_named() -> None:
    sketch = Sketch(lambda x, w: norm(aten.exp.default(aten.sin.default(ops.all_reduce(x, "unknown"))), w))
    way = sketch.way("all_reduce_default", "exp_default", "sin_default")
    place = sketch.place("allreduce_rms", "rms_norm_default", way)
    assert sketch.decides(place, ["sin_default"]) == (["exp_default", "sin_default"], False)


def test_no_more_sets_are_tried_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the two, then each, the likelier first."""
    sketch = Sketch(lambda x, w: ops.pad(aten.sin.default(in_blocks(norm(x, w))), 28))
    way = sketch.way("rms_norm_default", "sin_default", "reshape_default")
    place = sketch.place("act_padding", "pad_default", way)
    monkeypatch.setattr("fuseplan.matching.trial.MOST_TRIALS", 2)
    assert sketch.decides(place, ["sin_default"]) == (["sin_default"], True)
    assert sketch.decides(place, ["reshape_default"]) == (["sin_default", "reshape_default"], False)
    monkeypatch.setattr("fuseplan.matching.trial.MOST_TRIALS", 3)
    assert sketch.decides(place, ["reshape_default"]) == (["sin_default"], True)


def test_what_has_no_original_can_not_be_taken_out_of_it() -> None:
    """A view that was moved before an all-reduce, since another op reads what it is moved from."""

    def model(x: Any, w: Any) -> Any:
        y = in_blocks(ops.all_reduce(aten.sin.default(x), "unknown"))
        return norm(y, w), aten.exp.default(y)

    sketch = Sketch(model)
    (moved,) = [node for node in sketch.canonical.graph.nodes if node not in sketch.canonical.origin][:1]
    assert moved.target is aten.reshape.default
    place = sketch.place("allreduce_rms", "rms_norm_default", Way(nodes=[moved], goal=sketch["sin_default"]))
    assert sketch.decides(place) == ([moved.name], False)


@pytest.mark.parametrize("computed", [False, True])
def test_a_cast_is_done_before_the_all_reduce_then(computed: bool) -> None:
    """What is reduced, and what that is computed from, is in the narrow dtype, where the norm's input is."""

    def model(x: Any, w: Any) -> Any:
        wide = convert_element_type(x, torch.float32)
        wide = aten.relu.default(wide) if computed else wide
        return norm(convert_element_type(ops.all_reduce(wide, "g"), torch.bfloat16), w)

    sketch = Sketch(model)
    name = "convert_element_type_default_1"
    place = sketch.place("allreduce_rms", "rms_norm_default", sketch.way("all_reduce_default", name))
    assert sketch.decides(place) == ([name], True)


# Places that are alike.


def two_places(one: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: (one(x, w), other(aten.relu.default(x), w))


def count_trials(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    tried: list[Place] = []

    def counted(canonical: Any, place: Place, likely: Sequence[fx.Node]) -> Any:
        tried.append(place)
        return decisive(canonical, place, likely)

    monkeypatch.setattr(blame, "decisive", counted)
    return tried


def scaled(by: float) -> Callable[..., Any]:
    return lambda x, w: ops.pad(in_blocks(aten.mul.Tensor(norm(x, w), by)), 28)


def test_places_that_are_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = count_trials(monkeypatch)
    sketch = Sketch(two_places(scaled(2.0), scaled(2.0)))
    shared = Shared(sketch.canonical)
    for end in ("", "_1"):
        way = sketch.way(f"rms_norm_default{end}", f"reshape_default{end}", f"mul_tensor{end}")
        place = sketch.place("act_padding", f"pad_default{end}", way)
        found = shared.obstruction(place, sketch[f"pad_default{end}"])
        assert found.node is sketch[f"mul_tensor{end}"]
        assert found.detail == "aten.mul.Tensor stands between rms_norm and pad", "the view is none"
    assert len(tried) == 1


def test_of_several_edges_the_first_is_told_of() -> None:
    sketch = Sketch(padded_norm_of_half)
    place = sketch.place(PADDED, "pad_default", sketch.way(*NEAR), sketch.way(*FAR))
    found = Shared(sketch.canonical).obstruction(place, sketch["pad_default"])
    assert found.detail == "aten.sin.default stands between rms_norm and pad"


@pytest.mark.parametrize("what", ["constant", "readers", "rule", "edge"])
def test_places_that_differ_are_tried_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = count_trials(monkeypatch)

    def read_twice(x: Any, w: Any) -> Any:
        y = aten.mul.Tensor(norm(x, w), 2.0)
        return ops.pad(in_blocks(y), 28), y

    other = {"constant": scaled(3.0), "readers": read_twice}.get(what, scaled(2.0))
    sketch = Sketch(two_places(scaled(2.0), other))
    shared = Shared(sketch.canonical)
    for end in ("", "_1"):
        way = sketch.way(f"rms_norm_default{end}", f"reshape_default{end}", f"mul_tensor{end}")
        place = sketch.place("norm_tanh" if end and what == "rule" else "act_padding", f"pad_default{end}", way)
        if end and what == "edge":
            place = replace(place, ways=[way, sketch.way(f"rms_norm_default{end}")])
        shared.obstruction(place, sketch[f"pad_default{end}"])
    assert len(tried) == 2


def test_a_hint_is_only_given_where_following_it_suffices() -> None:
    for group, hint in (("g", "scale before all_reduce"), ("unknown", None)):
        sketch = Sketch(lambda x, w, group=group: norm(aten.mul.Tensor(ops.all_reduce(x, group), 2.0), w))
        place = sketch.place("allreduce_rms", "rms_norm_default", sketch.way("all_reduce_default", "mul_tensor"))
        found = Shared(sketch.canonical).obstruction(place, sketch["rms_norm_default"])
        assert found.detail == "aten.mul.Tensor stands between all_reduce and rms_norm"
        assert found.mend == hint
