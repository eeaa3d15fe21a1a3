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
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import randn, written

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)
INPUTS = {"x": randn(12, 64), "w": torch.ones(64, dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseplan.matching.candidates.group_size", {"g": 4}.get)


class NormTanh(Rule):
    """rms_norm -> tanh, without what the norm yields."""

    name, flags, op, core = "norm_tanh", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return aten.tanh.default(ops.rms_norm(x, weight, eps, rounding))


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


def norm(x: Any, w: Any) -> Any:
    return ops.rms_norm(x, w, 1e-5, "llama")


def rows_of_eight(x: Any) -> Any:
    return aten.reshape.default(x, [96, 8])


def in_blocks(x: Any) -> Any:
    """The same rows in three dimensions."""
    return aten.reshape.default(x, [3, 4, 64])


def half(x: Any) -> Any:
    return aten.split.Tensor(x, 6)[1]


def test_what_computes_something_else_decides() -> None:
    sketch = Sketch(lambda x, w: ops.pad(aten.sin.default(norm(x, w)), 28))
    place = sketch.place("act_padding", "pad_default", sketch.way("rms_norm_default", "sin_default"))
    assert sketch.decides(place) == (["sin_default"], True)


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


def test_a_view_that_makes_other_rows_does() -> None:
    sketch = Sketch(lambda x, w: ops.pad(aten.sin.default(rows_of_eight(norm(x, w))), 28))
    way = sketch.way("rms_norm_default", "sin_default", "reshape_default")
    assert sketch.decides(sketch.place("act_padding", "pad_default", way)) == (["sin_default", "reshape_default"], True)


def test_views_alone_are_all_in_the_way_where_nothing_has_to_go() -> None:
    """Without any trial's change the rule matches what is copied: what else reads it is what keeps it from matching."""

    def model(x: Any, w: Any) -> Any:
        reduced = ops.all_reduce(x, "g")
        return norm(in_blocks(reduced), w), aten.exp.default(reduced), aten.sin.default(reduced)

    sketch = Sketch(model)
    way = sketch.way("all_reduce_default", "reshape_default")
    found = sketch.decides(sketch.place("allreduce_rms", "rms_norm_default", way))
    assert found == (["reshape_default"], True)


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


def read_by_exp(*, before: bool) -> Callable[..., Any]:
    def model(x: Any, w: Any) -> Any:
        y = norm(x, w)
        z = aten.sin.default(y)
        return aten.tanh.default(z), aten.exp.default(y if before else z)

    return model


@pytest.mark.parametrize("before", [False, True])
def test_where_others_read_what_is_between_too_the_obstacles_alone_do_not_suffice(before: bool) -> None:
    sketch = Sketch(read_by_exp(before=before))
    way = sketch.way("rms_norm_default", "sin_default")
    assert sketch.decides(sketch.place("norm_tanh", "tanh_default", way)) == (["sin_default"], False)


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


def padded_norm_of_half(x: Any, w: Any) -> Any:
    reduced = aten.exp.default(half(aten.cos.default(ops.all_reduce(x, "g"))))
    return ops.pad(aten.sin.default(norm(reduced, w)), 28)


@pytest.mark.parametrize("first", ["before the norm", "behind it"])
def test_what_stands_at_other_edges_is_no_part_of_the_question(first: str) -> None:
    sketch = Sketch(padded_norm_of_half)
    ways = [
        sketch.way("all_reduce_default", "exp_default", "getitem", "split_tensor", "cos_default"),
        sketch.way("rms_norm_default", "sin_default"),
    ]
    if first == "behind it":
        ways.reverse()
    place = sketch.place("allreduce_rms_padding", "pad_default", *ways)
    assert sketch.decides(place) == ([node.name for node in ways[0].nodes], True)


def test_an_edge_without_obstacles_is_as_the_rule_has_it() -> None:
    sketch = Sketch(lambda x, w: ops.pad(norm(aten.sin.default(ops.all_reduce(x, "g")), w), 28))
    ways = sketch.way("all_reduce_default", "sin_default"), sketch.way("rms_norm_default")
    place = sketch.place("allreduce_rms_padding", "pad_default", *ways)
    assert sketch.decides(place) == (["sin_default"], True)


def test_edges_behind_one_without_obstacles_are_looked_at() -> None:
    sketch = Sketch(padded_norm_of_half)
    far = sketch.way("all_reduce_default", "exp_default", "getitem", "split_tensor", "cos_default")
    near = sketch.way("rms_norm_default", "sin_default")
    place = sketch.place("allreduce_rms_padding", "pad_default", near, sketch.way("rms_norm_default"), far)
    assert sketch.decides(place) == (["sin_default"], True)


def test_what_is_between_and_as_the_rule_has_it_is_part_of_it() -> None:
    sketch = Sketch(lambda x, w: ops.pad(norm(aten.sin.default(ops.all_reduce(x, "g")), w), 28))
    place = sketch.place("allreduce_rms_padding", "pad_default", sketch.way("all_reduce_default", "sin_default"))
    assert sketch.decides(place) == (["sin_default"], True)


def test_what_is_taken_out_reads_nothing_any_more() -> None:
    """The fused op yields what it adds, and not what it reduces."""

    def model(x: Any, w: Any) -> Any:
        reduced = ops.all_reduce(aten.exp.default(x), "g")
        return ops.fused_add_rms_norm(aten.tanh.default(aten.sin.default(reduced)), x, w, 1e-5, "llama")[0]

    sketch = Sketch(model)
    way = sketch.way("all_reduce_default", "tanh_default", "sin_default")
    assert sketch.decides(sketch.place("allreduce_rms", "getitem", way)) == (["tanh_default", "sin_default"], True)


def test_one_of_the_results_of_a_norm_is_what_should_be_read() -> None:
    def model(x: Any, w: Any) -> Any:
        results = ops.fused_add_rms_norm(x, aten.exp.default(x), w, 1e-5, "llama")
        return ops.pad(aten.sin.default(results[0]), 28)

    sketch = Sketch(model)
    place = sketch.place("act_padding", "pad_default", sketch.way("getitem", "sin_default"))
    assert sketch.decides(place) == (["sin_default"], True)


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
    near = sketch.way("rms_norm_default", "sin_default")
    far = sketch.way("all_reduce_default", "exp_default", "getitem", "split_tensor", "cos_default")
    place = sketch.place("allreduce_rms_padding", "pad_default", near, far)
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
    def model(x: Any, w: Any) -> Any:
        reduced = aten.mul.Tensor(ops.all_reduce(x, "g"), 2.0)
        return norm(reduced, w)

    sketch = Sketch(model)
    place = sketch.place("allreduce_rms", "rms_norm_default", sketch.way("all_reduce_default", "mul_tensor"))
    found = Shared(sketch.canonical).obstruction(place, sketch["rms_norm_default"])
    assert found.mend == "scale before all_reduce"
    sketch = Sketch(lambda x, w: norm(aten.mul.Tensor(ops.all_reduce(x, "unknown"), 2.0), w))
    place = sketch.place("allreduce_rms", "rms_norm_default", sketch.way("all_reduce_default", "mul_tensor"))
    found = Shared(sketch.canonical).obstruction(place, sketch["rms_norm_default"])
    assert found.detail == "aten.mul.Tensor stands between all_reduce and rms_norm"
    assert found.mend is None
