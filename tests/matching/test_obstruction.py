"""What is said of the ops between two that a rule would fuse, in written graphs."""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import fx

from fuseplan.dialect import ops
from fuseplan.graph.facts import convert_element_type
from fuseplan.matching.obstacles import Obstruction, likeliest_first, obstruction, without_taken
from fuseplan.record import Reason
from tests.helpers import randn, written

aten = torch.ops.aten
INPUTS = {"x": randn(12, 64), "r": randn(12, 64, seed=1), "w": torch.ones(64, dtype=torch.bfloat16)}


def names(nodes: Sequence[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


class Edge:
    """The nodes between two of a written graph.

    Attributes:
        way: from the consumer's side, along first arguments.
        goal: what a rule would have the consumer read.
        consumer: the last op.
    """

    def __init__(self, function: Callable[..., Any], goal: Any, consumer: Any) -> None:
        graph = written(function, INPUTS)
        (self.consumer,) = graph.find_nodes(op="call_function", target=consumer.overload)
        self.goal = graph.find_nodes(op="call_function", target=goal.overload)[0]
        self.way: list[fx.Node] = []
        node = self.consumer.args[0]
        while node is not self.goal:
            assert isinstance(node, fx.Node)
            self.way.append(node)
            node = node.args[0]

    def told(self) -> Obstruction:
        return obstruction(self.way, self.goal, self.consumer)


def norm(x: Any, w: Any) -> Any:
    return ops.rms_norm(x, w, 1e-5, "llama")


def before_pad(*steps: Callable[[Any], Any]) -> Edge:
    """Steps between a norm and a pad."""

    def model(x: Any, r: Any, w: Any) -> Any:
        y = norm(x, w)
        for step in steps:
            y = step(y)
        return ops.pad(y, 28)

    return Edge(model, ops.rms_norm, ops.pad)


def behind_reduce(step: Callable[..., Any], group: str = "g") -> Edge:
    """A step of the reduced value, the residual and the weight between an all-reduce and a norm."""

    def model(x: Any, r: Any, w: Any) -> Any:
        found = step(ops.all_reduce(x, group), r, w)
        y, *more = found if isinstance(found, tuple) else (found,)
        return norm(y, w), *more

    return Edge(model, ops.all_reduce, ops.rms_norm)


def in_place(value: Any, name: str = "add_") -> Any:
    """A value as Dynamo notes what writes in place."""
    value.node.meta["source_fn_stack"] = [(name, name)]
    return value


def to_float(y: Any) -> Any:
    return convert_element_type(y, torch.float32)


def part_of_it(y: Any) -> Any:
    return aten.slice.Tensor(y, 0, 0, 6)


STEPS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda y: in_place(aten.add.Tensor(y, 1.0)),
    "computed": aten.tanh.default,
    "cast": to_float,
    "copied": aten.clone.default,
    "viewed": lambda y: aten.permute.default(y, [1, 0]),
}
"""What is blamed, the likeliest first."""


@pytest.mark.parametrize(("likelier", "other"), list(permutations(STEPS, 2)))
def test_what_is_blamed_first(likelier: str, other: str) -> None:
    order = [*STEPS]
    edge = before_pad(STEPS[likelier], STEPS[other])
    first = likeliest_first(edge.way, edge.goal)[0]
    nearest, second = edge.way[::-1]
    assert first is (nearest if order.index(likelier) < order.index(other) else second)


def test_of_equals_the_nearest_to_what_should_be_read_is_blamed() -> None:
    edge = before_pad(aten.tanh.default, aten.exp.default, aten.clone.default, aten.sin.default)
    assert names(likeliest_first(edge.way, edge.goal)) == [
        "tanh_default", "exp_default", "sin_default", "clone_default",
    ]  # fmt: skip


def test_the_residual_add_that_a_rule_takes_along_is_blamed_last() -> None:
    edge = behind_reduce(lambda y, r, w: aten.clone.default(aten.add.Tensor(y, r)))
    assert names(edge.way) == ["clone_default", "add_tensor"]
    assert names(without_taken(edge.way, edge.goal)) == ["clone_default"]
    assert names(likeliest_first(edge.way, edge.goal)) == ["clone_default", "add_tensor"]
    edge = behind_reduce(lambda y, r, w: aten.clone.default(aten.add.Tensor(aten.sin.default(y), r)))
    assert names(without_taken(edge.way, edge.goal)) == ["clone_default", "add_tensor", "sin_default"]
    assert names(likeliest_first(edge.way, edge.goal)) == ["sin_default", "add_tensor", "clone_default"]


# What is said.


tanh, clone, exp, permute = aten.tanh.default, aten.clone.default, aten.exp.default, aten.permute.default
BETWEEN, BEHIND = "{} stands between rms_norm and pad", "{} stands between all_reduce and rms_norm"


def reshaped(*shape: int) -> Edge:
    return before_pad(lambda y: aten.reshape.default(y, [*shape]))


TOLD: dict[str, tuple[Edge, str, dict[str, Any]]] = {
    "what computes something else": (
        before_pad(tanh), "tanh_default",
        {"reason": Reason.OP, "found": "aten.tanh.default", "detail": BETWEEN.format("aten.tanh.default"),
         "mend": "do it after pad"},
    ),
    "a further one": (
        before_pad(tanh, clone), "tanh_default",
        {"detail": BETWEEN.format("aten.tanh.default") + "; so does aten.clone.default"},
    ),
    "further ones, once each": (
        before_pad(tanh, clone, exp, tanh), "tanh_default",
        {"detail": BETWEEN.format("aten.tanh.default") + "; so do aten.exp.default and aten.clone.default"},
    ),
    "what writes in place, by both of its names": (
        before_pad(lambda y: in_place(aten.add.Tensor(y, 1.0))), "add_tensor",
        {"reason": Reason.MUTATION, "found": "aten.add.Tensor",
         "detail": BETWEEN.format("add_, an in-place op (aten.add.Tensor)")},
    ),
    "an operator that does": (
        before_pad(lambda y: in_place(aten.mul.Tensor(y, 2.0), "imul_3")), "mul_tensor",
        {"detail": BETWEEN.format("imul, an in-place op (aten.mul.Tensor)")},
    ),
    "a cast, with both dtypes": (
        before_pad(to_float), "convert_element_type_default",
        {"reason": Reason.DTYPE,
         "detail": BETWEEN.format("prims.convert_element_type.default") + ": bfloat16 is cast to float32"},
    ),
    "a copy": (
        before_pad(clone), "clone_default", {"reason": Reason.LAYOUT, "detail": BETWEEN.format("aten.clone.default")},
    ),
    "a reshape to shorter rows": (
        reshaped(48, 16), "reshape_default",
        {"reason": Reason.OP, "detail": BETWEEN.format("aten.reshape.default") + ": rows of 64 become rows of 16"},
    ),
    "to the same rows": (
        reshaped(6, 2, 64), "reshape_default", {"reason": Reason.OP, "detail": BETWEEN.format("aten.reshape.default")},
    ),
    "to one row": (
        reshaped(768), "reshape_default",
        {"reason": Reason.OP, "detail": BETWEEN.format("aten.reshape.default") + ": rows of 64 become rows of 768"},
    ),
    "an addition that is no residual add": (
        behind_reduce(lambda y, r, w: aten.add.Tensor(y, w)), "add_tensor",
        {"reason": Reason.OP, "mend": "add the bias before all_reduce, on one rank alone",
         "detail": BEHIND.format("aten.add.Tensor") + ": it adds a bias"},
    ),
    "hints together where there is one for each": (
        behind_reduce(lambda y, r, w: aten.neg.default(aten.mul.Tensor(aten.mul.Tensor(y, 3.0), 2.0))), "mul_tensor",
        {"mend": "negate before all_reduce; scale before all_reduce"},
    ),
    "and none where there isn't": (
        behind_reduce(lambda y, r, w: aten.neg.default(tanh(y))), "tanh_default",
        {"mend": None, "detail": BEHIND.format("aten.tanh.default") + "; so does aten.neg.default"},
    ),
    # Prologues.
    "of two all-reduces in a row the first": (
        behind_reduce(lambda y, r, w: ops.all_reduce(y, "g")), "all_reduce_default",
        {"reason": Reason.OP, "found": "all_reduce", "mend": "reduce once, and multiply by the number of ranks before",
         "detail": "the value reduced over group 'g' is reduced once more before rms_norm"},
    ),
    "and of another group": (
        behind_reduce(lambda y, r, w: ops.all_reduce(y, "h")), "all_reduce_default",
        {"reason": Reason.GROUP, "mend": None},
    ),
    "a view that could be moved if nothing else read the reduced value": (
        behind_reduce(lambda y, r, w: (part_of_it(y), exp(y))), "exp_default",
        {"reason": Reason.USERS, "found": "aten.exp.default", "mend": None, "detail": "all_reduce is also read by "
         "aten.exp.default (exp_default), so that aten.slice.Tensor can't be moved before it"},
    ),
    "one that is returned, at the view": (
        behind_reduce(lambda y, r, w: (part_of_it(y), y)), "slice_tensor",
        {"reason": Reason.USERS, "found": "output", "detail": "all_reduce is returned from the graph, too, so that "
         "aten.slice.Tensor can't be moved before it"},
    ),
    "of several readers the first that is no view": (
        behind_reduce(lambda y, r, w: (part_of_it(y), permute(y, [1, 0]), exp(y), aten.sin.default(y))), "exp_default",
        {"found": "aten.exp.default"},
    ),
    "where views alone read it, too, the view": (
        behind_reduce(lambda y, r, w: (part_of_it(y), permute(y, [1, 0]))), "slice_tensor",
        {"reason": Reason.OP, "found": "aten.slice.Tensor", "mend": "do it before all_reduce",
         "detail": BEHIND.format("aten.slice.Tensor") + ", and can't be moved before it, since aten.permute.default "
         "(permute_default) reads all_reduce too"},
    ),
    "a view that isn't next to the reduced value": (
        behind_reduce(lambda y, r, w: (part_of_it(clone(y)), exp(y))), "clone_default",
        {"reason": Reason.LAYOUT, "found": "aten.clone.default"},
    ),
    "a view of a view": (
        behind_reduce(lambda y, r, w: (part_of_it(part_of_it(y)), exp(y))), "exp_default", {"reason": Reason.USERS},
    ),
    "what is no view itself, whoever reads the reduced value": (
        behind_reduce(lambda y, r, w: (tanh(y), exp(y))), "tanh_default",
        {"reason": Reason.OP, "found": "aten.tanh.default"},
    ),
    "a view of a norm, whatever else reads that": (
        Edge(lambda x, r, w: (ops.pad(part_of_it(y := norm(x, w)), 28), exp(y)), ops.rms_norm, ops.pad), "slice_tensor",
        {"reason": Reason.OP, "detail": BETWEEN.format("aten.slice.Tensor")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_what_is_blamed_and_said_of_it(what: str) -> None:
    edge, blamed, fields = TOLD[what]
    found = edge.told()
    assert found.node.name == blamed
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize(("before", "after"), [([], [1]), ([1], []), ([64], [8, 8])])
def test_a_scalar_has_no_rows(before: list[int], after: list[int]) -> None:
    graph = fx.Graph()
    goal, consumer = graph.placeholder("goal"), graph.placeholder("consumer")
    reshape = graph.call_function(aten.reshape.default, (goal, after))
    goal.meta["val"], reshape.meta["val"] = torch.ones(before), torch.ones(after)
    explained = ": rows of 64 become rows of 8" if before and after else ""
    found = obstruction([reshape], goal, consumer)
    assert found.detail == f"aten.reshape.default stands between goal and consumer{explained}"
