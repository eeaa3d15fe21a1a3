"""What stands between two ops that a rule would fuse, in words: the reason, and a hint where there is one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fuseplan.graph.facts import (
    RESHAPES,
    aten,
    convert_element_type,
    dtype_name,
    equal_size,
    is_call,
    tensor_of,
    written_in_place,
)
from fuseplan.graph.reach import is_view
from fuseplan.matching.candidates import op_name
from fuseplan.matching.hints import hint
from fuseplan.record import Reason
from fuseplan.rules.parts import PARTS, Prologue, part_at
from fuseplan.rules.parts.views import MOVERS


@dataclass(frozen=True, kw_only=True)
class Obstruction:
    """What a report says about obstacles.

    Attributes:
        node: the first of them to blame.
        reason: its kind.
        found: the op that it calls.
        detail: for a person.
        fix: how to fix it, if known.
    """

    node: fx.Node
    reason: Reason
    found: str
    detail: str
    fix: str | None


def without_taken(way: Sequence[fx.Node], goal: fx.Node) -> list[fx.Node]:
    """The obstacles without a residual add and the casts around it, which the rule would have fused, too.

    Args:
        way: the obstacles, in either direction.
        goal: the op behind them.
    """
    others = [*way]
    for part in PARTS:
        if isinstance(part, Prologue) and part.without is not None:
            others = part.without(others, goal)
    return others


def likeliest_first(way: Sequence[fx.Node], goal: fx.Node) -> list[fx.Node]:
    """The obstacles, the one to blame first in front.

    Views weigh least: a pattern often sees through a lone one. Among equals the one next to the goal comes first, as it
    blocks the others. The residual add comes last: the rule fuses it.
    """
    others = without_taken(way, goal)
    nearest_first = list(reversed(way))
    return sorted(nearest_first, key=lambda node: (node not in others, _weight(node)))


def obstruction(way: Sequence[fx.Node], goal: fx.Node, consumer: fx.Node) -> Obstruction:
    """The reason, wording and hint for the obstacles between two ops.

    Args:
        way: the obstacles, one at least, from the consumer's side.
        goal: the op that should be read.
        consumer: the op that should read it.
    """
    node = likeliest_first(way, goal)[0]
    before, after = op_name(goal), op_name(consumer)
    if isinstance(part := part_at(node), Prologue) and part.twice is not None:
        # Of two in a row the first is to blame: the second is next to the consumer.
        blame = part.twice(goal, node, after)
        return Obstruction(node=goal, reason=blame.reason, found=blame.found, detail=blame.detail, fix=blame.fix)
    reader = _other_reader(node, goal)
    if reader is not None and not is_view(reader):
        return _read_elsewhere(reader, node, goal)
    found, in_place = op_name(node), written_in_place(node)
    others = [name for name in dict.fromkeys(op_name(each) for each in way) if name != found]
    reason, why = _judge(node, in_place, reader, before)
    hints = list(dict.fromkeys(hint(each, goal, consumer) for each in way))
    fix = None if None in hints else "; ".join(filter(None, hints))
    too = f"; so {'does' if len(others) == 1 else 'do'} {' and '.join(others)}" if others else ""
    title = f"{in_place}, an in-place op ({found})" if in_place and in_place != found else found
    detail = f"{title} stands between {before} and {after}{why}{too}"
    return Obstruction(node=node, reason=reason, found=found, detail=detail, fix=fix)


def _other_reader(node: fx.Node, goal: fx.Node) -> fx.Node | None:
    """The other reader of a prologue, without which a view could be moved before it."""
    if not isinstance(part_at(goal), Prologue) or not is_call(node, *MOVERS) or node not in goal.users:
        return None
    readers = [user for user in goal.users if user is not node]
    return min(readers, key=is_view, default=None)


def _read_elsewhere(reader: fx.Node, view: fx.Node, goal: fx.Node) -> Obstruction:
    before, found = op_name(goal), op_name(reader)
    returned = reader.op == "output"
    how = "returned from the graph, too" if returned else f"also read by {found} ({reader.name})"
    return Obstruction(
        node=view if returned else reader, reason=Reason.USERS, found=found, fix=None,
        detail=f"{before} is {how}, so that {op_name(view)} can't be moved before it",
    )  # fmt: skip


def _weight(node: fx.Node) -> int:
    """How late a node is blamed: in-place ops first, then arithmetic, casts, copies and views."""
    kinds = (
        written_in_place(node) is not None,
        not is_call(node, convert_element_type, aten.clone.default, *MOVERS),
        is_call(node, convert_element_type),
        is_call(node, aten.clone.default),
        True,
    )
    return kinds.index(True)


def _judge(node: fx.Node, in_place: str | None, reader: fx.Node | None, before: str) -> tuple[Reason, str]:
    """(reason, explanation) of the obstacle to blame."""
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
        # It changes the norms and scales of rows.
        return Reason.OP, f": rows of {widths[0]} become rows of {widths[1]}"
    prologues = (part for part in PARTS if isinstance(part, Prologue))
    return next((known for part in prologues if (known := part.blame(node)) is not None), (Reason.OP, ""))


def _widths(reshape: fx.Node) -> tuple[object, object] | None:
    """The size of rows before and after, where that differs."""
    before, after = tensor_of(reshape.args[0]), tensor_of(reshape)
    if before is None or after is None or not before.dim() or not after.dim():
        return None
    widths = before.shape[-1], after.shape[-1]
    return None if equal_size(*widths) else widths
