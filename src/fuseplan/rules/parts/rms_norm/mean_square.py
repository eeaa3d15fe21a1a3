"""`rsqrt(mean(x ** 2, -1, keepdim=True) + eps)`, the heart of an RMSNorm, and its lookalikes.

The root may be written as a power of -0.5, which has the dtype and the rounding of `rsqrt`.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch._dynamo import config as dynamo_config

from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import (
    ADDS,
    LOW_PRECISION,
    MULS,
    RESHAPES,
    aten,
    convert_element_type,
    dtype_name,
    is_call,
    tensor_of,
)
from fuseplan.record import Reason

ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
MINIMA = (aten.clamp_min.default, aten.clamp.default, aten.maximum.default)
STEPS = (
    *ADDS, *MULS, *QUOTIENTS, *MINIMA, *RESHAPES, aten.unsqueeze.default, aten.expand.default, convert_element_type,
)  # fmt: skip
"""Ops that may be between the root and the mean in something like a norm."""
MOST_STEPS = 4

CONSTANT_EPSILON = "make epsilon a Python float"
DYNAMIC_EPSILON = (
    "dynamic=True makes Python floats dynamic: mark sizes with torch._dynamo.mark_dynamic instead, or set "
    "torch._dynamo.config.specialize_float = True"
)
AUTOMATIC_EPSILON = (
    "a Python float that differs between calls, or between models of one class, becomes dynamic: set "
    "torch._dynamo.config.specialize_float = True, which compiles once for each value"
)


@dataclass(frozen=True, kw_only=True)
class MeanSquare:
    """A root of a mean square, or of a lookalike.

    Attributes:
        total: the tensor to square.
        eps: the number added to the mean; 0 without one.
        interior: every node from `total`, exclusive, to the root.
        deviations: differences from a root of a mean square; empty where it is one.
        dynamic_eps: the input that Dynamo made of a Python float, if epsilon is just that.
    """

    total: fx.Node
    eps: float
    interior: tuple[fx.Node, ...]
    deviations: tuple[Unraised, ...]
    dynamic_eps: fx.Node | None = None

    @property
    def lacks_epsilon(self) -> bool:
        """Whether a constant epsilon is all that it lacks. (False where the user asked for dynamic floats.)"""
        return [each.fix for each in self.deviations] == [AUTOMATIC_EPSILON]

    @property
    def deviation(self) -> Unraised:
        """All deviations as one error, at the node of the first."""
        first = self.deviations[0]
        fixes = [each.fix for each in self.deviations]
        fix = None if None in fixes else "; ".join(filter(None, fixes))
        return Unraised(first.reason, "; ".join(each.detail for each in self.deviations), first.node, fix)

    @property
    def normalised(self) -> list[fx.Node]:
        """`total`, and the operand of the cast that yields it."""
        total = self.total
        return [total, total.args[0]] if is_call(total, convert_element_type) else [total]


def mean_squares(graph: fx.Graph) -> list[tuple[fx.Node, MeanSquare]]:
    """(root, mean square) of each value in a graph that is or looks like the heart of a norm over rows."""
    roots = [node for target in ROOTS for node in graph.find_nodes(op="call_function", target=target)]
    found = ((root, _read(root)) for root in sorted(roots))
    return [(root, mean_square) for root, mean_square in found if mean_square is not None]


def _read(root: fx.Node) -> MeanSquare | None:
    deviations = _of_the_root(root)
    if deviations is None:
        return None
    steps: list[fx.Node] = []
    node = root.args[0]
    while is_call(node, *STEPS) and len(steps) < MOST_STEPS:
        steps.append(node)
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node):
        return None
    reduced = _mean_of_squares(node, steps) or _variance(node)
    if reduced is None:
        return None
    total, inner, further = reduced
    eps = next((step.args[1] for step in steps if is_call(step, *ADDS)), 0.0)
    deviations += [*_of_the_steps(steps), *further]
    constant = float(eps) if isinstance(eps, (int, float)) else 0.0
    return MeanSquare(
        total=total, eps=constant, interior=(*inner, *reversed(steps), root), deviations=tuple(deviations),
        dynamic_eps=_dynamic_float(eps) if isinstance(eps, fx.Node) else None,
    )  # fmt: skip


def _of_the_root(root: fx.Node) -> list[Unraised] | None:
    """Deviations of the root itself; None where it isn't the root of a norm."""
    if root.target is aten.rsqrt.default:
        return []
    if is_call(root, aten.pow.Tensor_Scalar):
        return [] if root.args[1] == -0.5 else None
    quotient = next((user for user in root.users if is_call(user, *QUOTIENTS, aten.reciprocal.default)), None)
    if quotient is None or (quotient.target is aten.div.Tensor and quotient.args[1] is not root):
        return None
    return [Unraised(Reason.OP, "it divides by the root", quotient, "multiply by torch.rsqrt instead")]


def _of_the_steps(steps: list[fx.Node]) -> list[Unraised]:
    found = []
    added = [step for step in steps if is_call(step, *ADDS)]
    for step in steps:
        if is_call(step, *ADDS) and isinstance(step.args[1], fx.Node):
            dynamic = AUTOMATIC_EPSILON if dynamo_config.assume_static_by_default else DYNAMIC_EPSILON
            fix = dynamic if _dynamic_float(step.args[1]) is not None else CONSTANT_EPSILON
            detail = "epsilon is a value of the graph, and the op takes a constant"
            found.append(Unraised(Reason.ATTRIBUTE, detail, step.args[1], fix))
        elif is_call(step, *ADDS) and (step.kwargs or step is not added[0]):
            detail = "epsilon is scaled" if step.kwargs else "something is added to the mean square twice"
            found.append(Unraised(Reason.OP, detail, step, "add one epsilon"))
        elif is_call(step, *MINIMA):
            found.append(Unraised(Reason.OP, "the mean square has a minimum where epsilon is added", step))
        elif is_call(step, convert_element_type):
            found.append(Unraised(Reason.DTYPE, f"the mean square is cast to {dtype_name(step)}", step))
    return found


def _dynamic_float(node: fx.Node) -> fx.Node | None:
    """The input that Dynamo made of a Python float, a float64 tensor without dimensions, if the value is just that."""
    source = node.args[0] if is_call(node, convert_element_type) else node
    value = tensor_of(source)
    is_float = value is not None and value.dim() == 0 and value.dtype is torch.float64
    return source if isinstance(source, fx.Node) and source.op == "placeholder" and is_float else None


def _mean_of_squares(node: fx.Node, steps: list[fx.Node]) -> tuple[fx.Node, tuple[fx.Node, ...], list[Unraised]] | None:
    """(the squared tensor, the nodes from the square to the mean, deviations); None for any other value."""
    if not is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        return None
    square, dims, keepdim = (*node.args, None, None)[:3]
    value = tensor_of(square)
    power = is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
    product = is_call(square, *MULS) and square.args[0] is square.args[1]
    if value is None or not (power or product):
        return None
    scaled = [step for step in steps if is_call(step, *QUOTIENTS, *MULS)]
    deviations = []
    if is_call(node, aten.sum.dim_IntList):
        if not scaled:
            return None  # the norm of a vector
        deviations.append(Unraised(Reason.OP, "its mean is a sum divided by the size", node, "take x.pow(2).mean()"))
    elif scaled:
        deviations.append(Unraised(Reason.OP, "the mean square is scaled", scaled[0]))
    if list(dims or ()) not in ([-1], [value.dim() - 1]):
        detail = f"the mean is over dimensions {list(dims or ())}, not over the last alone"
        deviations.append(Unraised(Reason.LAYOUT, detail, node))
    elif not keepdim or any(is_call(step, aten.unsqueeze.default, aten.expand.default, *RESHAPES) for step in steps):
        detail = "the mean loses its dimension, and gets it back later"
        deviations.append(Unraised(Reason.OP, detail, node, "take the mean with keepdim=True"))
    if value.dtype in LOW_PRECISION:
        detail = f"x is squared in {dtype_name(square)}"
        deviations.append(Unraised(Reason.DTYPE, detail, square))
    elif node.kwargs.get("dtype", value.dtype) is not value.dtype:
        deviations.append(
            Unraised(Reason.DTYPE, f"squares in {dtype_name(square)} are averaged as {dtype_name(node)}", node)
        )
    total = square.args[0]
    assert isinstance(total, fx.Node)
    if is_call(total, aten.sub.Tensor) and any(is_call(each, aten.mean.dim) for each in total.all_input_nodes):
        deviations.append(_layer_norm(total))
    return total, (square, node), deviations


def _variance(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], list[Unraised]] | None:
    """The same for the variance of rows, as in LayerNorm."""
    variance = node.args[0] if is_call(node, operator.getitem) and node.args[1] == 0 else node
    if not is_call(variance, aten.var_mean.correction, aten.var.correction):
        return None
    total, value = variance.args[0], tensor_of(variance.args[0])
    if value is None or list((*variance.args, None)[1] or ()) not in ([-1], [value.dim() - 1]):
        return None  # a variance of channels, groups or batches
    return total, (variance, node), [_layer_norm(node)]


def _layer_norm(node: fx.Node) -> Unraised:
    return Unraised(Reason.OP, "it subtracts the mean of the row, as LayerNorm does, and RMSNorm doesn't", node)
