"""What stands between two ops that a rule would fuse, in words: the reason, and what would mend it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fuseplan.canonical.noops import is_noop
from fuseplan.dialect import ops
from fuseplan.graph.facts import (
    ADDS,
    RESHAPES,
    Call,
    aten,
    convert_element_type,
    dtype_name,
    equal_shape,
    equal_size,
    is_call,
    tensor_of,
    written_in_place,
)
from fuseplan.graph.reach import is_view
from fuseplan.matching.candidates import op_name
from fuseplan.record import Reason

MOVERS = (
    *RESHAPES,
    aten.slice.Tensor,
    aten.permute.default,
    aten.expand.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.as_strided.default,
    aten.split_with_sizes.default,
    aten.split.Tensor,
)
"""Views: they choose and arrange elements."""


@dataclass(frozen=True, kw_only=True)
class Obstruction:
    """What is told of obstacles.

    Attributes:
        node: the first of them to blame.
        reason: its kind.
        found: what it calls.
        detail: for a person.
        mend: what would mend it, if known.
    """

    node: fx.Node
    reason: Reason
    found: str
    detail: str
    mend: str | None


def without_residual_add(way: Sequence[fx.Node], goal: fx.Node) -> list[fx.Node]:
    """The obstacles without the residual add that the rule would have taken along, and the casts around it.

    Args:
        way: the obstacles, in either direction.
        goal: what is added to the residual.
    """
    read = {goal, *(node for node in way if is_call(node, convert_element_type) and node.args[0] is goal)}
    adds = {node for node in way if _is_residual_add(node) and not read.isdisjoint(node.all_input_nodes)}
    around = {node for node in way if is_call(node, convert_element_type) and (node.args[0] in adds or node in read)}
    return [node for node in way if node not in adds and not (adds and node in around)]


def _is_residual_add(node: fx.Node) -> bool:
    if not is_call(node, aten.add.Tensor) or len(node.all_input_nodes) != 2 or node.kwargs:
        return False
    return all(equal_shape(tensor_of(source), tensor_of(node)) for source in node.all_input_nodes)


def obstruction(way: Sequence[fx.Node], goal: fx.Node, consumer: fx.Node) -> Obstruction:
    """What is to be said of the obstacles between two ops.

    Args:
        way: the obstacles, from the consumer's side.
        goal: the op that should be read.
        consumer: the op that should read it.
    """
    # Views weigh least: alone they are often seen through. Of equals the one next to the goal is in the others' way.
    node = way[0] if len(way) == 1 else min(reversed(way), key=_weight, default=goal)
    before, after = op_name(goal), op_name(consumer)
    if ops.of(node.target) is ops.all_reduce:
        return _second_all_reduce(node, goal, after)
    reader = _other_reader(node, goal)
    if reader is not None and not is_view(reader):
        return _read_elsewhere(reader, node, goal)
    found, in_place = op_name(node), written_in_place(node)
    others = [name for name in dict.fromkeys(op_name(each) for each in way) if name != found]
    reason, why, mend = _judge(node, in_place, reader, before, after)
    too = f"; so {'does' if len(others) == 1 else 'do'} {' and '.join(others)}" if others else ""
    title = f"{in_place}, an in-place op ({found})" if in_place and in_place != found else found
    detail = f"{title} stands between {before} and {after}{why}{too}"
    return Obstruction(node=node, reason=reason, found=found, detail=detail, mend=mend)


def _other_reader(node: fx.Node, goal: fx.Node) -> fx.Node | None:
    """What reads an all-reduce beside a view, which could be moved before it if nothing did."""
    if ops.of(goal.target) is not ops.all_reduce or not is_call(node, *MOVERS) or node not in goal.users:
        return None
    readers = [user for user in goal.users if user is not node]
    return min(readers, key=is_view, default=None)


def _read_elsewhere(reader: fx.Node, view: fx.Node, goal: fx.Node) -> Obstruction:
    before, found = op_name(goal), op_name(reader)
    how, mend = f"also read by {found} ({reader.name})", f"let {found} read something else, or nothing"
    if reader.op == "output":
        how, mend = "returned from the graph, too", f"return what {op_name(view)} makes of it"
    return Obstruction(
        node=view if reader.op == "output" else reader, reason=Reason.USERS, found=found,
        detail=f"{before} is {how}, so that {op_name(view)} can't be moved before it", mend=mend,
    )  # fmt: skip


def _second_all_reduce(node: fx.Node, goal: fx.Node, after: str) -> Obstruction:
    """Of two all-reduces in a row the first is to blame: the second is next to what follows."""
    first, second = (str(each.args[1]) for each in (goal, node))
    if first == second:
        detail = f"what is reduced over group {first!r} is reduced once more before {after}"
        return Obstruction(node=goal, reason=Reason.OP, found=op_name(node), detail=detail, mend="reduce once")
    detail = f"another all_reduce, over group {second!r}, stands between this one, over group {first!r}, and {after}"
    mend = f"reduce over one group: {after} takes one all_reduce along, the last"
    found = f"all_reduce over group {second}"
    return Obstruction(node=goal, reason=Reason.GROUP, found=found, detail=detail, mend=mend)


def _weight(node: fx.Node) -> int:
    if written_in_place(node):
        return 0
    if is_call(node, convert_element_type):
        return 2
    if is_call(node, aten.clone.default):
        return 3
    return 4 if is_call(node, *MOVERS) else 1


def _judge(
    node: fx.Node, in_place: str | None, reader: fx.Node | None, before: str, after: str
) -> tuple[Reason, str, str | None]:
    """(reason, what explains it, what would mend it) of the obstacle to blame."""
    if in_place is not None:
        return Reason.MUTATION, "", f"write in place before {before} or after {after}"
    if is_call(node, convert_element_type):
        source, target = map(dtype_name, (node.args[0], node))
        return Reason.DTYPE, f": {source} is cast to {target}", f"cast to {target} before {before}, or not at all"
    if is_call(node, aten.clone.default):
        seen_through = ", or leave eliminate_noops on, which sees through it" if is_noop(node) else ""
        return Reason.LAYOUT, "", f"drop the copy{seen_through}"
    if reader is not None:
        why = f", and can't be moved before it, since {op_name(reader)} ({reader.name}) reads {before} too"
        return Reason.OP, why, f"do it before {before}, or let nothing else read {before}"
    if is_call(node, *RESHAPES) and (widths := _widths(node)):
        # Norms and scales of rows are others after it.
        return Reason.OP, f": rows of {widths[0]} become rows of {widths[1]}", None
    sums = [each for each in node.all_input_nodes if ops.of(each.target) is ops.all_reduce]
    if is_call(node, *ADDS) and len(sums) > 1:
        return _sum_of_sums(sums, after)
    if is_call(node, aten.add.Tensor) and len(node.all_input_nodes) == 2:
        unfit = _unfit_residual(node, before)
        if unfit is not None:
            return unfit
    return Reason.OP, "", f"do it before {before} or after {after}, where the model allows"


def _widths(reshape: fx.Node) -> tuple[object, object] | None:
    """The size of rows before and after, where that differs."""
    before, after = tensor_of(reshape.args[0]), tensor_of(reshape)
    if before is None or after is None or not before.dim() or not after.dim():
        return None
    widths = before.shape[-1], after.shape[-1]
    return None if equal_size(*widths) else widths


def _unfit_residual(add: Call, before: str) -> tuple[Reason, str, str] | None:
    """Why an addition isn't the residual add that the rule would take along, or None where nothing is known."""
    left, right = add.args
    if add.kwargs:
        return Reason.ATTRIBUTE, f": it adds {add.kwargs['alpha']} times one of the two", f"scale before {before}"
    if not equal_shape(tensor_of(left), tensor_of(right)):
        values = [value for each in add.args if (value := tensor_of(each)) is not None]
        if min(value.dim() for value in values) <= 1:
            return Reason.OP, ": it adds a bias", f"add the bias before {before}, on one rank alone"
        shapes = " and ".join(str([*value.shape]) for value in values)
        why = f": it adds {shapes}, and a residual has the shape of the sum"
        return Reason.SIZE, why, "expand the smaller one first"
    narrow = [each.args[0] if is_call(each, convert_element_type) else each for each in add.args]
    dtypes = [*map(dtype_name, narrow)]
    if dtypes[0] == dtypes[1]:
        return None
    mend = "keep the residual in the dtype of what is added to it"
    return Reason.DTYPE, f": it adds {dtypes[0]} and {dtypes[1]}", mend


def _sum_of_sums(sums: Sequence[fx.Node], after: str) -> tuple[Reason, str, str | None]:
    groups = sorted({str(each.args[1]) for each in sums})
    if len(groups) > 1:
        why = f": it adds all_reduces over groups {' and '.join(map(repr, groups))}"
        return Reason.GROUP, why, f"reduce over one group, or fuse one of them with {after} alone"
    return Reason.OP, ": it adds two all_reduces", "add before the all_reduce, once, instead of after both"
