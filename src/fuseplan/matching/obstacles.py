"""What stands between two ops that a rule would fuse, in words: the reason, and what would mend it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fuseplan.canonical.noops import is_noop
from fuseplan.dialect import ops
from fuseplan.graph.facts import (
    ADDS,
    RESHAPES,
    aten,
    convert_element_type,
    dtype_of,
    equal_shape,
    is_call,
    tensor_of,
    written_in_place,
)
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


def drop_residual_adds(way: Sequence[fx.Node], goal: fx.Node) -> list[fx.Node]:
    """The obstacles without the residual add that the rule would have taken along, were it not for the others."""
    others = [node for node in way if not _is_residual_add(node, goal)]
    return others or list(way)


def _is_residual_add(node: fx.Node, goal: fx.Node) -> bool:
    if not is_call(node, aten.add.Tensor) or goal not in node.all_input_nodes or written_in_place(node):
        return False
    return len(node.all_input_nodes) == 2 and all(
        equal_shape(tensor_of(source), tensor_of(node)) for source in node.all_input_nodes
    )


def obstruction(way: Sequence[fx.Node], goal: fx.Node, consumer: fx.Node) -> Obstruction:
    """What is to be said of the obstacles between two ops.

    Args:
        way: the obstacles, from the consumer's side.
        goal: the op that should be read.
        consumer: the op that should read it.
    """
    # A cast or an arithmetic op weighs more than the views around it: views alone are often seen through.
    node = min(way, key=lambda each: (_weight(each), way.index(each)), default=goal)
    names = list(dict.fromkeys(op_name(each) for each in way))
    found = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or op_name(goal)
    before, after = op_name(goal), op_name(consumer)
    verb = "stands" if len(names) < 2 else "stand"
    detail = f"{_title(node, found)} {verb} between {before} and {after}"
    reason, why, mend = _judge(node, goal, before, after)
    return Obstruction(node=node, reason=reason, found=found, detail=f"{detail}{why}", mend=mend)


def _weight(node: fx.Node) -> int:
    if written_in_place(node):
        return 0
    if is_call(node, convert_element_type):
        return 2
    return 3 if is_call(node, *MOVERS, aten.clone.default) else 1


def _title(node: fx.Node, found: str) -> str:
    in_place = written_in_place(node)
    return f"{in_place}, an in-place op ({found})" if in_place and in_place != found else found


def _judge(node: fx.Node, goal: fx.Node, before: str, after: str) -> tuple[Reason, str, str | None]:
    """(reason, what explains it, what would mend it) of the obstacle to blame."""
    group = ops.of(node.target) is ops.all_reduce
    if group:
        return _other_group(node, goal, after)
    if written_in_place(node):
        return Reason.MUTATION, "", f"write in place before {before} or after {after}"
    if is_call(node, convert_element_type):
        source, target = (str(dtype_of(each)).removeprefix("torch.") for each in (node.args[0], node))
        return Reason.DTYPE, f": {source} is cast to {target}", f"cast to {target} before {before}, or not at all"
    if is_call(node, aten.clone.default):
        seen_through = ", or leave eliminate_noops on, which sees through it" if is_noop(node) else ""
        return Reason.LAYOUT, "", f"drop the copy{seen_through}"
    if is_call(node, *MOVERS):
        return _view(node, goal, before, after)
    sums = [each for each in node.all_input_nodes if ops.of(each.target) is ops.all_reduce]
    if is_call(node, *ADDS) and len(sums) > 1:
        return _sum_of_sums(sums, after)
    return Reason.OP, "", f"do it before {before} or after {after}, where the model allows"


def _view(node: fx.Node, goal: fx.Node, before: str, after: str) -> tuple[Reason, str, str | None]:
    readers = [user for user in goal.users if user is not node]
    if ops.of(goal.target) is ops.all_reduce and node in goal.users and readers:
        why = f", and can't be moved before it, since {op_name(readers[0])} ({readers[0].name}) reads {before} too"
        return Reason.OP, why, f"do it before {before}, or let nothing else read {before}"
    return Reason.OP, "", f"do it before {before} or after {after}, where the model allows"


def _other_group(node: fx.Node, goal: fx.Node, after: str) -> tuple[Reason, str, str | None]:
    mine, others = (str(each.args[1]) for each in (node, goal))
    if mine == others:
        return Reason.OP, ": what is reduced is reduced again", "reduce once"
    why = f": it reduces over group {mine!r}, and what it reads over group {others!r}"
    return Reason.GROUP, why, f"reduce once, over one group; only the last all_reduce is fused with {after}"


def _sum_of_sums(sums: Sequence[fx.Node], after: str) -> tuple[Reason, str, str | None]:
    groups = sorted({str(each.args[1]) for each in sums})
    if len(groups) > 1:
        why = f": it adds all_reduces over groups {' and '.join(map(repr, groups))}"
        return Reason.GROUP, why, f"reduce over one group, or fuse one of them with {after} alone"
    return Reason.OP, ": it adds two all_reduces", "add before the all_reduce, once, instead of after both"
