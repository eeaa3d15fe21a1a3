"""Bounds on fp8 scales in graphs, and on the amax that a scale is computed from."""

import math
from dataclasses import dataclass

import torch
from torch import fx

from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import (
    LOW_PRECISION,
    ORDER_KEEPING,
    aten,
    convert_element_type,
    dtype_name,
    dtype_of,
    equal_size,
    is_call,
    tensor_of,
)
from fuseplan.record import Reason
from fuseplan.rules.parts.fp8 import number_of

UPPER_BOUNDS = (aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default, aten.clamp.Tensor)
LOWER_BOUNDS = (aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The bounds of a value.

    Attributes:
        least: the lower bound; 0 for none.
        most: the upper bound, a number.
        upper: the node of an upper bound that is a tensor of one element; None: there is none.
    """

    least: float = 0.0
    most: float = math.inf
    upper: fx.Node | None = None


def joined(outer: Bounds, inner: Bounds, node: fx.Node) -> Bounds:
    """The bounds of a value that is bounded twice: the op applies the larger lower bound, then the smaller upper one.

    Raises:
        Unraised: the op would compute something else.
    """
    if outer.least > inner.most or (outer.upper is not None and inner.least):
        raise Unraised(Reason.OP, "the scale has a least bound above its upper one", node)
    if outer.upper is not None and inner.upper is not None:
        raise Unraised(Reason.OP, "two tensors bound the scale, and the op takes one", node)
    least, most = max(outer.least, inner.least), min(outer.most, inner.most)
    if most <= 0.0:
        raise Unraised(Reason.OP, f"the scale has an upper bound of {most:g}, and that of the op is positive", node)
    return Bounds(least=least, most=most, upper=outer.upper or inner.upper)


def bounded(node: fx.Node, *, own: torch.dtype | None = None, is_largest: bool = False) -> tuple[fx.Node, Bounds]:
    """(x, bounds) of a value between bounds, where x may be viewed in other shapes.

    Args:
        node: the value.
        own: a dtype besides float32 that holds x exactly and that x may have.
        is_largest: whether the value is an amax, which a tensor may bound as well.
    """
    found, held = Bounds(), torch.float32
    while True:
        dtype = dtype_of(node)
        if dtype is not torch.float32:
            if own is None:
                detail = f"the scale is computed in {dtype_name(node)}, and the op computes it in float32"
                raise Unraised(Reason.DTYPE, detail, node, "cast the largest to float32 before it is divided")
            if dtype is not own:
                raise Unraised(Reason.DTYPE, f"the largest is rounded to {dtype_name(node)} on the way", node)
            held = own
        bounded = _bound(node)
        upper = _upper(node) if is_largest and bounded is None else None
        if bounded is not None:
            node, (least, most) = bounded
            if held is own:
                least, most = (float(torch.tensor(bound, dtype=held)) for bound in (least, most))
            found = joined(found, Bounds(least=least, most=most), node)
        elif upper is not None:
            found = joined(found, Bounds(upper=upper[1]), node)
            node = upper[0]
        elif is_call(node, *ORDER_KEEPING) or (own is not None and is_call(node, convert_element_type)):
            node = node.args[0]
        else:
            return node, found


def _bound(node: fx.Node) -> tuple[fx.Node, tuple[float, float]] | None:
    """(x, (least, most)) of `clamp(x, least, most)`, and of other ops that bound x by numbers."""
    if node.kwargs or not is_call(node, *LOWER_BOUNDS, *UPPER_BOUNDS, aten.clamp.default):
        return None
    x, *bounds = node.args
    if is_call(node, aten.maximum.default, aten.minimum.default) and number_of(x) is not None:
        x, bounds = bounds[0], [x]
    if is_call(node, *UPPER_BOUNDS) and len(bounds) == 1:
        bounds = [None, *bounds]
    least, most = (*bounds, None)[:2]
    numbers = [limit if bound is None else number_of(bound) for bound, limit in ((least, 0.0), (most, math.inf))]
    low, high = numbers
    if not isinstance(x, fx.Node) or low is None or high is None or not low <= high:
        return None
    return x, (float(low), float(high))


def _upper(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, bound) of `minimum(x, bound)`, where the bound is a tensor of one element in a dtype that x's can hold."""
    if not is_call(node, *UPPER_BOUNDS):
        return None
    x, *bounds = node.args
    bound = bounds[-1] if len(bounds) == 1 or bounds[0] is None else None
    value, of = tensor_of(bound), tensor_of(x)
    if not isinstance(bound, fx.Node) or not isinstance(x, fx.Node) or value is None or of is None:
        return None
    fits = equal_size(value.numel(), 1) and value.dim() <= 1 and value.device == of.device
    exact = value.dtype is of.dtype or (of.dtype is torch.float32 and value.dtype in LOW_PRECISION)
    return (x, bound) if fits and exact else None
