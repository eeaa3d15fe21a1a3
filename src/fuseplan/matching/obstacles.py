"""What stands between two ops that a rule would fuse, in words: the reason, and a hint where there is one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fuseplan.canonical.view import is_dialect
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
from fuseplan.matching.hints import MOVERS, hint, sums_all_reduces
from fuseplan.record import Reason


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


def likeliest_first(way: Sequence[fx.Node], goal: fx.Node) -> list[fx.Node]:
    """The obstacles, the one to blame first in front.

    Views weigh least: alone they are often seen through. Of equals the one next to the goal is in the others' way. The
    residual add is what a rule takes along.
    """
    others = without_residual_add(way, goal)
    nearest_first = list(reversed(way))
    return sorted(nearest_first, key=lambda node: (node not in others, _weight(node)))


def obstruction(way: Sequence[fx.Node], goal: fx.Node, consumer: fx.Node) -> Obstruction:
    """What is to be said of the obstacles between two ops.

    Args:
        way: the obstacles, from the consumer's side.
        goal: the op that should be read.
        consumer: the op that should read it.
    """
    node = likeliest_first(way, goal)[0] if way else goal
    before, after = op_name(goal), op_name(consumer)
    if ops.of(node.target) is ops.all_reduce:
        return _second_all_reduce(node, goal, after)
    reader = _other_reader(node, goal)
    if reader is not None and not is_view(reader):
        return _read_elsewhere(reader, node, goal)
    found, in_place = op_name(node), written_in_place(node)
    others = [name for name in dict.fromkeys(op_name(each) for each in way) if name != found]
    reason, why = _judge(node, in_place, reader, before)
    hints = list(dict.fromkeys(hint(each, goal, consumer) for each in way))
    mend = None if None in hints else "; ".join(filter(None, hints))
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
    returned = reader.op == "output"
    how = "returned from the graph, too" if returned else f"also read by {found} ({reader.name})"
    return Obstruction(
        node=view if returned else reader, reason=Reason.USERS, found=found, mend=None,
        detail=f"{before} is {how}, so that {op_name(view)} can't be moved before it",
    )  # fmt: skip


def _second_all_reduce(node: fx.Node, goal: fx.Node, after: str) -> Obstruction:
    """Of two all-reduces in a row the first is to blame: the second is next to what follows."""
    first, second = (str(each.args[1]) for each in (goal, node))
    if first == second:
        detail = f"what is reduced over group {first!r} is reduced once more before {after}"
        mend = "reduce once, and multiply by the number of ranks before"
        return Obstruction(node=goal, reason=Reason.OP, found=op_name(node), detail=detail, mend=mend)
    detail = f"another all_reduce, over group {second!r}, stands between this one, over group {first!r}, and {after}"
    found = f"all_reduce over group {second}"
    return Obstruction(node=goal, reason=Reason.GROUP, found=found, detail=detail, mend=None)


def _weight(node: fx.Node) -> int:
    if written_in_place(node):
        return 0
    if is_call(node, convert_element_type):
        return 2
    if is_call(node, aten.clone.default):
        return 3
    return 4 if is_call(node, *MOVERS) else 1


def _judge(node: fx.Node, in_place: str | None, reader: fx.Node | None, before: str) -> tuple[Reason, str]:
    """(reason, what explains it) of the obstacle to blame."""
    if in_place is not None:
        return Reason.MUTATION, ""
    if is_call(node, convert_element_type):
        source, target = map(dtype_name, (node.args[0], node))
        return Reason.DTYPE, f": {source} is cast to {target}"
    if is_call(node, aten.clone.default):
        return Reason.LAYOUT, ""
    if reader is not None:
        return Reason.OP, f", and can't be moved before it, since {op_name(reader)} ({reader.name}) reads {before} too"
    if is_call(node, *RESHAPES) and (widths := _widths(node)):
        # Norms and scales of rows are others after it.
        return Reason.OP, f": rows of {widths[0]} become rows of {widths[1]}"
    groups = {str(each.args[1]) for each in node.all_input_nodes if is_dialect(each, ops.all_reduce)}
    if is_call(node, *ADDS) and len(groups) > 1:
        return Reason.GROUP, f": it adds all_reduces over groups {' and '.join(map(repr, sorted(groups)))}"
    if is_call(node, *ADDS) and sums_all_reduces(node):
        return Reason.OP, ": it adds two all_reduces"
    if is_call(node, aten.add.Tensor) and len(node.all_input_nodes) == 2:
        return _unfit_residual(node) or (Reason.OP, "")
    return Reason.OP, ""


def _widths(reshape: fx.Node) -> tuple[object, object] | None:
    """The size of rows before and after, where that differs."""
    before, after = tensor_of(reshape.args[0]), tensor_of(reshape)
    if before is None or after is None or not before.dim() or not after.dim():
        return None
    widths = before.shape[-1], after.shape[-1]
    return None if equal_size(*widths) else widths


def _unfit_residual(add: Call) -> tuple[Reason, str] | None:
    """Why an addition isn't the residual add that the rule would take along, or None where nothing is known."""
    left, right = add.args
    if add.kwargs:
        return Reason.ATTRIBUTE, f": it adds {add.kwargs['alpha']} times one of the two"
    if not equal_shape(tensor_of(left), tensor_of(right)):
        values = [value for each in add.args if (value := tensor_of(each)) is not None]
        if min(value.dim() for value in values) <= 1:
            return Reason.OP, ": it adds a bias"
        shapes = " and ".join(str([*value.shape]) for value in values)
        return Reason.SIZE, f": it adds {shapes}, and a residual has the shape of the sum"
    narrow = [each.args[0] if is_call(each, convert_element_type) else each for each in add.args]
    dtypes = [*map(dtype_name, narrow)]
    return None if dtypes[0] == dtypes[1] else (Reason.DTYPE, f": it adds {dtypes[0]} and {dtypes[1]}")
