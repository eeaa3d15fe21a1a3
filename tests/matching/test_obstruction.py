"""What is said of the ops between two that a rule would fuse, in written graphs."""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

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


def test_what_computes_something_else_is_named_between_the_two() -> None:
    edge = before_pad(aten.tanh.default)
    found = edge.told()
    assert found == Obstruction(
        node=edge.way[0], reason=Reason.OP, found="aten.tanh.default",
        detail="aten.tanh.default stands between rms_norm and pad", mend="do it after pad",
    )  # fmt: skip


def test_further_ones_are_named_once_each() -> None:
    edge = before_pad(aten.tanh.default, aten.clone.default)
    assert edge.told().detail == "aten.tanh.default stands between rms_norm and pad; so does aten.clone.default"
    edge = before_pad(aten.tanh.default, aten.clone.default, aten.exp.default, aten.tanh.default)
    found = edge.told()
    assert found.node is edge.way[-1]
    assert found.detail == (
        "aten.tanh.default stands between rms_norm and pad; so do aten.exp.default and aten.clone.default"
    )


def test_what_writes_in_place_is_a_mutation_by_both_of_its_names() -> None:
    found = before_pad(lambda y: in_place(aten.add.Tensor(y, 1.0))).told()
    assert (found.reason, found.found) == (Reason.MUTATION, "aten.add.Tensor")
    assert found.detail == "add_, an in-place op (aten.add.Tensor) stands between rms_norm and pad"
    found = before_pad(lambda y: in_place(aten.mul.Tensor(y, 2.0), "imul_3")).told()
    assert found.detail.startswith("imul, an in-place op (aten.mul.Tensor) stands")


def test_an_op_of_its_own_that_was_in_place_has_one_name() -> None:
    with torch.library._scoped_library("obstructed", "DEF") as library:
        library.define("bump_(Tensor(a!) x) -> ()")
        edge = before_pad(aten.tanh.default)
        (node,) = edge.way
        graph = node.graph
        with graph.inserting_before(node):
            written_to = graph.call_function(
                auto_functionalized, (torch.ops.obstructed.bump_.default,), {"x": edge.goal}
            )
        found = obstruction([written_to], edge.goal, edge.consumer)
    assert (found.reason, found.found) == (Reason.MUTATION, "obstructed.bump_.default")
    assert found.detail == "obstructed.bump_.default stands between rms_norm and pad"


def test_a_cast_is_told_with_both_dtypes() -> None:
    found = before_pad(to_float).told()
    assert found.reason is Reason.DTYPE
    assert found.detail.endswith("stands between rms_norm and pad: bfloat16 is cast to float32")


def test_a_copy_is_a_matter_of_layout() -> None:
    found = before_pad(aten.clone.default).told()
    assert (found.reason, found.detail) == (Reason.LAYOUT, "aten.clone.default stands between rms_norm and pad")


@pytest.mark.parametrize(
    ("shape", "explained"),
    [([48, 16], ": rows of 64 become rows of 16"), ([6, 2, 64], ""), ([768], ": rows of 64 become rows of 768")],
)
def test_a_reshape_to_other_rows_says_so(shape: list[int], explained: str) -> None:
    found = before_pad(lambda y: aten.reshape.default(y, shape)).told()
    assert (found.reason, found.detail) == (
        Reason.OP, f"aten.reshape.default stands between rms_norm and pad{explained}",
    )  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [([], [1]), ([1], []), ([64], [8, 8])])
def test_a_scalar_has_no_rows(before: list[int], after: list[int]) -> None:
    graph = fx.Graph()
    goal, consumer = graph.placeholder("goal"), graph.placeholder("consumer")
    reshape = graph.call_function(aten.reshape.default, (goal, after))
    goal.meta["val"], reshape.meta["val"] = torch.ones(before), torch.ones(after)
    explained = ": rows of 64 become rows of 8" if before and after else ""
    found = obstruction([reshape], goal, consumer)
    assert found.detail == f"aten.reshape.default stands between goal and consumer{explained}"


def test_an_addition_that_is_no_residual_add_says_why() -> None:
    found = behind_reduce(lambda y, r, w: aten.add.Tensor(y, w)).told()
    assert (found.reason, found.mend) == (Reason.OP, "add the bias before all_reduce, on one rank alone")
    assert found.detail == "aten.add.Tensor stands between all_reduce and rms_norm: it adds a bias"


def test_hints_are_given_together_where_there_is_one_for_each() -> None:
    found = behind_reduce(lambda y, r, w: aten.neg.default(aten.mul.Tensor(aten.mul.Tensor(y, 3.0), 2.0))).told()
    assert found.mend == "negate before all_reduce; scale before all_reduce"
    found = behind_reduce(lambda y, r, w: aten.neg.default(aten.tanh.default(y))).told()
    assert found.mend is None
    assert found.detail == "aten.tanh.default stands between all_reduce and rms_norm; so does aten.neg.default"


# Prologues.


def test_of_two_all_reduces_in_a_row_the_first_is_blamed() -> None:
    edge = behind_reduce(lambda y, r, w: ops.all_reduce(y, "g"))
    found = edge.told()
    assert found == Obstruction(
        node=edge.goal, reason=Reason.OP, found="all_reduce",
        detail="the value reduced over group 'g' is reduced once more before rms_norm",
        mend="reduce once, and multiply by the number of ranks before",
    )  # fmt: skip
    found = behind_reduce(lambda y, r, w: ops.all_reduce(y, "h")).told()
    assert (found.reason, found.mend) == (Reason.GROUP, None)


def part_of_it(y: Any) -> Any:
    return aten.slice.Tensor(y, 0, 0, 6)


def test_a_view_that_could_be_moved_if_nothing_else_read_the_reduced_value() -> None:
    edge = behind_reduce(lambda y, r, w: (part_of_it(y), aten.exp.default(y)))
    found = edge.told()
    assert (found.reason, found.found, found.mend) == (Reason.USERS, "aten.exp.default", None)
    assert found.node.name == "exp_default"
    assert found.detail == (
        "all_reduce is also read by aten.exp.default (exp_default), so that aten.slice.Tensor can't be moved before it"
    )


def test_one_that_is_returned_is_told_of_at_the_view() -> None:
    edge = behind_reduce(lambda y, r, w: (part_of_it(y), y))
    found = edge.told()
    assert (found.reason, found.found) == (Reason.USERS, "output")
    assert found.node is edge.way[0]
    assert (
        found.detail == "all_reduce is returned from the graph, too, so that aten.slice.Tensor can't be moved before it"
    )


def test_of_several_readers_the_first_that_is_no_view_is_told_of() -> None:
    def model(y: Any, r: Any, w: Any) -> Any:
        return part_of_it(y), aten.permute.default(y, [1, 0]), aten.exp.default(y), aten.sin.default(y)

    found = behind_reduce(model).told()
    assert found.found == "aten.exp.default"


def test_where_views_alone_read_it_too_the_view_is_blamed() -> None:
    edge = behind_reduce(lambda y, r, w: (part_of_it(y), aten.permute.default(y, [1, 0])))
    found = edge.told()
    assert (found.node, found.reason, found.found) == (edge.way[0], Reason.OP, "aten.slice.Tensor")
    assert found.detail == (
        "aten.slice.Tensor stands between all_reduce and rms_norm, and can't be moved before it, since "
        "aten.permute.default (permute_default) reads all_reduce too"
    )
    assert found.mend == "do it before all_reduce"


def test_a_view_behind_another_op_is_not_next_to_the_reduced_value() -> None:
    found = behind_reduce(lambda y, r, w: (part_of_it(aten.clone.default(y)), aten.exp.default(y))).told()
    assert (found.reason, found.found) == (Reason.LAYOUT, "aten.clone.default")
    edge = behind_reduce(lambda y, r, w: (part_of_it(part_of_it(y)), aten.exp.default(y)))
    assert edge.told().reason is Reason.USERS


def test_what_else_reads_a_norm_is_no_matter_to_its_views() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y = norm(x, w)
        return ops.pad(part_of_it(y), 28), aten.exp.default(y)

    found = Edge(model, ops.rms_norm, ops.pad).told()
    assert (found.reason, found.detail) == (Reason.OP, "aten.slice.Tensor stands between rms_norm and pad")


def test_what_is_no_view_is_blamed_itself_whoever_reads_the_reduced_value() -> None:
    found = behind_reduce(lambda y, r, w: (aten.tanh.default(y), aten.exp.default(y))).told()
    assert (found.reason, found.found) == (Reason.OP, "aten.tanh.default")
