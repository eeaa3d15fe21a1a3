"""What a user can do about an obstacle: only what leaves the result as it is, but for the order of additions."""

from torch import fx

from fuseplan.canonical.noops import is_noop
from fuseplan.canonical.view import is_dialect
from fuseplan.dialect import ops
from fuseplan.graph.facts import (
    ADDS,
    MULS,
    RESHAPES,
    aten,
    convert_element_type,
    equal_shape,
    is_call,
    tensor_of,
)
from fuseplan.matching.candidates import op_name

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


SCALES = (*MULS, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
"""Ops that are linear in their first operand, where the second is the same on all ranks."""

KEEPS_ZERO = (
    *SCALES, convert_element_type, aten.abs.default, aten.gelu.default, aten.neg.default, aten.relu.default,
    aten.sign.default, aten.silu.default, aten.sin.default, aten.sqrt.default, aten.tanh.default,
)  # fmt: skip
"""Ops of one tensor, and at most one number, that yield zero for zero: they commute with a pad by zeros."""


def hint(node: fx.Node, goal: fx.Node, consumer: fx.Node) -> str | None:
    """What puts an obstacle elsewhere, or None where nothing that computes the same is known.

    Args:
        node: the obstacle.
        goal: the op before it, an all-reduce or what an epilogue should read.
        consumer: the op after it.
    """
    if is_call(node, aten.clone.default):
        return f"drop the copy{', or leave eliminate_noops on, which sees through it' if is_noop(node) else ''}"
    if is_dialect(goal, ops.all_reduce):
        return _around_a_sum(node, goal, op_name(consumer))
    if is_dialect(consumer, ops.pad) and is_call(node, *KEEPS_ZERO) and len(node.all_input_nodes) == 1:
        return f"do it after {op_name(consumer)}" if len(node.users) == 1 else None
    return None


def sums_all_reduces(node: fx.Node) -> bool:
    """Whether an op adds two all-reduces over one group."""
    reduced = [each for each in node.all_input_nodes if is_dialect(each, ops.all_reduce)]
    return is_call(node, *ADDS) and len(reduced) == 2 and reduced[0].args[1] == reduced[1].args[1] and not node.kwargs


def _around_a_sum(node: fx.Node, goal: fx.Node, after: str) -> str | None:
    before = op_name(goal)
    if is_call(node, *MOVERS):
        return f"do it before {before}"
    if is_call(node, *SCALES):
        return _scaled(node, before)
    if is_call(node, *ADDS):
        return _added(node, goal, before, after)
    return None


def _scaled(node: fx.Node, before: str) -> str | None:
    if is_call(node, aten.neg.default):
        return f"negate before {before}"
    factor = node.args[1]
    if not isinstance(factor, fx.Node):
        return f"scale before {before}"
    return f"scale before {before}, if all ranks have the same factor" if is_call(node, *MULS) else None


def _added(node: fx.Node, goal: fx.Node, before: str, after: str) -> str | None:
    if sums_all_reduces(node):
        return f"add before the {before}, once, instead of after both"
    left, right = node.args
    if node.kwargs:
        return f"scale before {before}" if right is goal else "scale the residual in an op of its own"
    other = right if left is goal else left
    if equal_shape(tensor_of(other), tensor_of(node)) or not isinstance(other, fx.Node):
        return "add it to the residual" if after == ops.fused_add_rms_norm.name else None
    value = tensor_of(other)
    if value is not None and value.dim() <= 1:
        return f"add the bias before {before}, on one rank alone"
    return "expand the residual first" if equal_shape(tensor_of(goal), tensor_of(node)) else None
