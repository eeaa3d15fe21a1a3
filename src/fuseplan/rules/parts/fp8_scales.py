"""Scales computed from the quantised tensor itself, as graphs spell them: a scale a row, or a scale a group.

    scale = max(power(clamp(min(amax(|x|), scale_ub) / fp8_max, min_scale, max_scale)), min_power) or zero_scale

`power` rounds up to a power of two, or is absent, and amax(|x|) may be the larger of -amin(x) and amax(x). Between the
steps values may be reshaped, as long as the order of the elements stays, and cast where a cast changes no value: |x|
and amax are in float32 or in the dtype of x, and in the latter case bounds before the division are rounded to it. The
division is in float32, as in the ops, or in the dtype of x, which rounds the quotient.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import (
    LOW_PRECISION,
    MULS,
    ORDER_KEEPING,
    aten,
    convert_element_type,
    dtype_name,
    dtype_of,
    equal_shape,
    equal_size,
    equal_sizes,
    is_call,
    tensor_of,
)
from fuseplan.graph.ops import QuantRounding
from fuseplan.record import Reason
from fuseplan.rules.parts.fp8 import Scaling, number_of, source_of, uncast
from fuseplan.rules.parts.fp8_bounds import UPPER_BOUNDS, Bounds, bounded, joined

NORMAL = torch.finfo(torch.float32).tiny
MOST_STEPS = 16
"""The most ops from a scale back to the amax it is computed from."""


@dataclass(frozen=True, kw_only=True)
class ComputedScale:
    """A scale of every `size` consecutive elements of `rows`.

    Attributes:
        node: the node that holds the scales.
        rows: x in its own precision, in rows of whole groups or of one group each.
        size: elements of a group; None: a group is a row.
        min_scale: the lower bound before rounding to a power of two; 0 for none.
        max_scale: the upper bound before rounding to a power of two; 0 for none.
        scale_ub: the node that bounds the largest element; None: it has no bound.
        is_power: whether it is rounded up to a power of two.
        min_power: the lower bound after that rounding; 0 for none.
        zero_scale: the replacement for a final scale of 0.
        rounding: whether the scale is rounded to the dtype of x, and how it is applied.
    """

    node: fx.Node
    rows: fx.Node
    size: int | None
    min_scale: float
    max_scale: float
    scale_ub: fx.Node | None
    is_power: bool
    min_power: float
    zero_scale: float
    rounding: QuantRounding


def is_computed(scaling: Scaling) -> bool:
    """Whether the scale is computed from amax(|x|), in whatever way."""
    return _largest_of(scaling.scale) is source_of(scaling.x)


def is_given(scaling: Scaling) -> bool:
    """Whether the scale is one number for all rows; the scale of a single row, as in decoding, is one number too."""
    factor = tensor_of(scaling.factor)
    assert factor is not None
    return equal_size(factor.numel(), 1) and not (is_computed(scaling) and factor.dim() > 1)


def seems_split(x: fx.Node) -> bool:
    """Whether x is a view of rows split into groups."""
    chain = list(_views(x))
    widths = [_width(node) for node in chain]
    return any(width > widths[0] for width in widths[1:])


def computed_scale(scaling: Scaling) -> ComputedScale:
    """Reads how the scale is computed.

    Raises:
        Unraised: it isn't computed as described above.
    """
    _check_same(scaling)
    node, size = _spread(scaling)
    last, zero_scale = _zero(node)
    amax, bounds, is_power, min_power, is_rounded = _bounds(last, scaling)
    is_bounded = bounds.upper is not None or bounds.most < math.inf
    reduced = tensor_of(_reduced(amax))
    assert reduced is not None
    if not equal_size(reduced.shape[-1], size):
        detail = f"the scale is of {reduced.shape[-1]} elements each, and is applied to {size}"
        raise Unraised(Reason.SIZE, detail, amax)
    if not scaling.is_clamped and (is_rounded or is_bounded or max(bounds.least, min_power) < NORMAL):
        raise scaling.unclamped  # with a rounded scale, x / scale may be beyond the range of fp8
    rows, is_split = rows_in_groups(scaling.x, size)
    rounding = scaling.rounding
    if is_rounded and not rounding.rounds_scaled:
        rounding = QuantRounding.DIVIDE_BY_ROUNDED
    return ComputedScale(
        node=node, rows=rows, size=int(size) if is_split else None, min_scale=bounds.least,
        max_scale=0.0 if bounds.most == math.inf else bounds.most, scale_ub=bounds.upper, is_power=is_power,
        min_power=min_power, zero_scale=zero_scale, rounding=rounding,
    )  # fmt: skip


def _largest_of(scale: fx.Node) -> object:
    """x, if a scale is computed from amax(|x|) in whatever way, or None."""
    node, first, is_reduced = scale, None, False
    for _ in range(MOST_STEPS):
        both = _extremes(node)
        if both is not None:
            return source_of(both[0])
        is_reduced |= is_call(node, aten.amax.default, aten.max.dim, aten.max.default)
        if is_call(node, aten.abs.default):
            first = first or source_of(node.args[0])
            if is_reduced:  # otherwise it may be the |scale| inside a logarithm
                return source_of(node.args[0])
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return first


def _check_same(scaling: Scaling) -> None:
    """Checks that the scale is computed from the tensor that it scales."""
    largest, x = _largest_of(scaling.scale), source_of(scaling.x)
    if largest is x:
        return
    if is_call(largest, convert_element_type) and source_of(largest.args[0]) is x:
        detail = f"the scale is computed from values rounded to {dtype_name(largest)}, and the scaled ones aren't"
        raise Unraised(Reason.DTYPE, detail, largest)
    if is_call(x, convert_element_type) and source_of(x.args[0]) is largest:
        detail = f"the scaled value is rounded to {dtype_name(x)}, and the scale is computed from unrounded values"
        raise Unraised(Reason.DTYPE, detail, x)
    detail = "the scale is neither one number nor computed from the largest value it scales"
    raise Unraised(Reason.OP, detail, scaling.scale)


def _spread(scaling: Scaling) -> tuple[fx.Node, Any]:
    """(the node that holds a scale for each group, elements of a group), read from the factor of x."""
    x, factor = tensor_of(scaling.x), tensor_of(scaling.factor)
    assert x is not None and factor is not None
    node, size, is_inverse = scaling.factor, None, scaling.rounding is QuantRounding.MULTIPLY
    while True:
        if is_call(node, aten.expand.default) and size is None and _repeats_last(node):
            value = tensor_of(node)
            assert value is not None
            size = value.shape[-1]
        elif is_inverse and is_call(node, aten.reciprocal.default):
            is_inverse = False
        elif not is_call(node, *ORDER_KEEPING) and not (is_inverse and is_call(node, *MULS)):
            break
        node = node.all_input_nodes[0]
    if size is None and x.dim() == factor.dim() and equal_size(factor.shape[-1], 1):
        size = x.shape[-1]
        fits = equal_sizes(x.shape[:-1], factor.shape[:-1])
    else:
        fits = equal_shape(x, factor)
    if equal_size(factor.numel(), 1) and not equal_size(x.numel(), x.shape[-1]):
        raise one_of_all(scaling.factor)
    if not fits or size is None:
        detail = f"the scale has the shape {[*factor.shape]}, and the values it scales {[*x.shape]}"
        raise Unraised(Reason.SIZE, detail, scaling.factor, "compute one scale for each row")
    return node, size


def one_of_all(scale: fx.Node) -> Unraised:
    """The error for a scale of a whole tensor."""
    detail = "the scale is computed from all rows at once, and the ops take one a row or a given one"
    return Unraised(Reason.OP, detail, scale)


def _repeats_last(expand: fx.Node) -> bool:
    """Whether an `expand` repeats along the last dimension alone."""
    few, many = tensor_of(expand.args[0]), tensor_of(expand)
    if few is None or many is None or few.dim() != many.dim() or not equal_size(few.shape[-1], 1):
        return False
    return equal_sizes(few.shape[:-1], many.shape[:-1])


def _bounds(scale: fx.Node, scaling: Scaling) -> tuple[fx.Node, Bounds, bool, float, bool]:
    """(amax, bounds of the scale, is_power, min_power, whether it is rounded to the dtype of x), read from the scale
    back to amax.
    """
    own = dtype_of(source_of(scaling.x))
    node, outer = bounded(scale, own=own if scaling.rounding.rounds_scaled else None)
    power = _power(node)
    if power is not None and own is torch.float32:
        raise rounded_by_log2(node)
    if power is not None and outer.most < math.inf:
        raise Unraised(Reason.OP, f"the power of two has an upper bound ({scale.target}), and the op's has none", scale)
    quotient, bounds = (node, outer) if power is None else bounded(power)
    is_rounded = own in LOW_PRECISION and is_call(quotient, convert_element_type) and dtype_of(quotient.args[0]) is own
    is_rounded |= own in LOW_PRECISION and dtype_of(quotient) is own
    if is_rounded and dtype_of(quotient) is not own and power is None and not scaling.rounding.multiplies:
        quotient, inner = bounded(quotient.all_input_nodes[0], own=own)
        bounds = joined(bounds, inner, quotient)
    if not is_call(quotient, aten.div.Tensor) or number_of(quotient.args[1]) != scaling.limit:
        raise _unknown(quotient, scaling.limit)
    amax, before = bounded(quotient.all_input_nodes[0], own=own, is_largest=True)
    # Division with rounding to nearest is monotonic, so bounds may apply before or after it.
    least, most = (torch.tensor(bound, dtype=torch.float32) / scaling.limit for bound in (before.least, before.most))
    if is_rounded:
        least, most = (bound.to(own) for bound in (least, most))
    bounds = joined(bounds, Bounds(least=float(least), most=float(most), upper=before.upper), quotient)
    if power is not None:
        _check_powers(bounds, node)
    return amax, bounds, power is not None, 0.0 if power is None else outer.least, is_rounded


def rounded_by_log2(scale: fx.Node) -> Unraised:
    """The error for log2 of a scale of float32 rows. In low precision no quotient is that close to a power of two."""
    detail = "log2 rounds a scale just above a power of two down to it, and the op rounds it up, of float32 rows"
    return Unraised(Reason.ROUNDING, detail, scale)


def _check_powers(bounds: Bounds, node: fx.Node) -> None:
    """Checks that no bound is so close above a power of two that log2 rounds it down to that power."""
    if bounds.upper is not None and dtype_of(bounds.upper) not in LOW_PRECISION:
        detail = "log2 rounds an upper bound just above a power of two down to it, and the op rounds it up"
        raise Unraised(Reason.ROUNDING, detail, node)
    for name, bound in (("smallest", bounds.least), ("largest", bounds.most)):
        scale = torch.tensor(bound, dtype=torch.float32)
        if bound < math.inf and torch.exp2(torch.ceil(torch.log2(scale))) < scale:
            raise Unraised(Reason.ROUNDING, f"log2 rounds the {name} scale, {scale:g}, down to a power of two", node)


def _zero(scale: fx.Node) -> tuple[fx.Node, float]:
    """(s, number) of `where(s == 0, number, s)`; (the scale, 0) of any other scale."""
    condition, number, other = scale.args if is_call(scale, aten.where.self) else (None, None, None)
    found = number_of(number)
    if not is_call(condition, aten.eq.Scalar) or condition.args != (other, 0) or found is None:
        return scale, 0.0
    assert isinstance(other, fx.Node)
    return other, float(found)


def _extremes(largest: object) -> tuple[fx.Node, object] | None:
    """(x, dims) of `maximum(|minimum(amin(x, dims), 0)|, |maximum(amax(x, dims), 0)|)`, which is amax(|x|, dims)."""
    if not is_call(largest, aten.maximum.default):
        return None
    found = []
    bounds = ((aten.minimum.default, aten.amin.default), (aten.maximum.default, aten.amax.default))
    for side, (bound, reduction) in zip(largest.args, bounds, strict=True):
        bounded = side.args[0] if is_call(side, aten.abs.default) else None
        if not is_call(bounded, bound) or number_of(bounded.args[1]) != 0 or not is_call(bounded.args[0], reduction):
            return None
        found.append(bounded.args[0].args)
    (x, *dims), others = found
    return (x, dims[0] if dims else []) if found[0] == tuple(others) and isinstance(x, fx.Node) else None


def _power(scale: fx.Node) -> fx.Node | None:
    """s of `exp2(ceil(log2(s)))` or `pow(2, ceil(log2(abs(s))))`."""
    exponent = _exponent(scale)
    logarithm = exponent.args[0] if is_call(exponent, aten.ceil.default) else None
    if not is_call(logarithm, aten.log2.default):
        return None
    inner = logarithm.args[0]
    inner = inner.args[0] if is_call(inner, aten.abs.default) else inner
    return inner if isinstance(inner, fx.Node) else None


def _exponent(scale: fx.Node) -> object:
    if is_call(scale, aten.exp2.default):
        return scale.args[0]
    return scale.args[1] if is_call(scale, aten.pow.Scalar) and scale.args[0] == 2 else None


def _unknown(node: fx.Node, limit: float) -> Unraised:
    """The error for an op in place of the division of amax by the largest fp8 value."""
    exponent = _exponent(node)
    number = number_of(node.args[1]) if len(node.args) > 1 else None
    if is_call(node, aten.div.Tensor) and number is not None:
        detail = f"the largest isn't divided by {limit:g} but by {number:g}"
    elif is_call(node, *MULS) and number is not None:
        detail = f"the largest isn't divided by {limit:g} but multiplied by {number:g}, which rounds otherwise"
    elif isinstance(exponent, fx.Node):
        detail = f"the scale's exponent is taken by {exponent.target}, and the op rounds it up, by {aten.ceil.default}"
    elif is_call(node, aten.view.dtype):
        detail = "the scale is rounded by its bits, which makes an infinite one finite, and by the op it stays infinite"
    elif is_call(node, *UPPER_BOUNDS):
        detail = f"the upper bound of the scale ({node.target}) is neither a number nor one of the largest element"
    elif is_call(node, aten.clamp_min.Tensor, aten.maximum.default):
        detail = f"the smallest scale is a tensor ({node.target}), and the op takes a number"
    elif is_call(node, convert_element_type):
        detail = f"the scale is computed in {dtype_name(node.args[0])}, and the op computes it in float32"
    else:
        detail = f"the largest isn't divided by {limit:g}: the scale is computed by {node.target}"
    return Unraised(Reason.OP, detail, node)


def _reduced(amax: fx.Node) -> fx.Node:
    """|x| of `amax(|x|, -1)` and of `max(|x|, -1)` by its values, whether or not the dimension is kept."""
    if is_call(amax, *UPPER_BOUNDS):
        detail = f"the upper bound of the largest ({amax.target}) isn't one element in its dtype"
        raise Unraised(Reason.OP, detail, amax)
    largest, dims = amax, None
    both = _extremes(amax)
    if both is not None and both[1] in ([-1], [_dims(both[0]) - 1]):
        return both[0]
    if is_call(amax, aten.amax.default):
        dims = list(amax.args[1]) if len(amax.args) > 1 else []
    elif is_call(amax, operator.getitem) and is_call(amax.args[0], aten.max.dim) and amax.args[1] == 0:
        largest = amax.args[0]
        dims = [largest.args[1]]
        if len(largest.users) > 1:
            raise Unraised(Reason.USERS, "the indices of the largest are read, too", largest)
    magnitudes = largest.all_input_nodes[0] if largest.all_input_nodes else None
    value = tensor_of(magnitudes)
    if dims is None or value is None or dims not in ([-1], [value.dim() - 1]):
        detail = f"the scale is computed by {amax.target}, not by amax over the last dimension"
        raise Unraised(Reason.OP, detail, amax, "take x.abs().amax(-1, keepdim=True)")
    assert magnitudes is not None
    if not is_call(source_of(magnitudes), aten.abs.default):
        raise Unraised(Reason.OP, "the largest is taken of something else than magnitudes", amax)
    return magnitudes


def rows_in_groups(x: fx.Node, size: Any) -> tuple[fx.Node, bool]:
    """(rows, whether a row has several groups), where x views the rows in groups of this size: the earliest value in a
    chain of views that has such rows, in its own dtype.
    """
    chain = list(_views(x))
    widths = [_width(node) for node in chain]
    split = [width for width in widths if isinstance(size, int) and width > size and width % size == 0]
    of_width = [equal_size(_last(node), split[0] if split else size) for node in chain]
    if not any(of_width):
        raise Unraised(Reason.SIZE, f"a scale is of {size} elements each, which are no parts of rows of {_last(x)}", x)
    first = of_width.index(True)
    last = first + [*of_width[first:], False].index(False) - 1
    return chain[last], bool(split)


def _views(x: fx.Node) -> Iterator[fx.Node]:
    """A node and the values it is a view or an exact cast of, back to the base."""
    yield x
    while is_call(x, *ORDER_KEEPING) or uncast(x) is not x:
        x = x.all_input_nodes[0]
        yield x


def _dims(node: fx.Node) -> int:
    """The number of dimensions."""
    value = tensor_of(node)
    return value.dim() if value is not None else 0


def _last(node: fx.Node) -> Any:
    """The size of the last dimension."""
    value = tensor_of(node)
    return value.shape[-1] if value is not None and value.dim() else None


def _width(node: fx.Node) -> int:
    """The size of the last dimension; 0 where it isn't known."""
    size = _last(node)
    return size if isinstance(size, int) else 0
