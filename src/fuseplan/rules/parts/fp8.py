"""Shared by quantisations to fp8: applying a scale, and its spellings in aten in Inductor's post-grad graphs.

    x32 = convert(x, float32)                                              optional: a float32 scale promotes x
    q   = convert(clamp(x32 / scale, -fp8_max, fp8_max), fp8)              `divide`
        | convert(clamp(x32 * reciprocal(scale), -fp8_max, fp8_max), fp8)  `multiply`
        | convert(clamp(x / scale, -fp8_max, fp8_max), fp8)                `divide_rounded`: all in x's dtype

The source of the scale tells one quantisation from another; each is a separate part. `fp8_scales` reads a scale that is
computed from the quantised tensor itself; a quantisation by such a scale may lack the clamp.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import (
    LOW_PRECISION,
    MULS,
    ORDER_KEEPING,
    Call,
    aten,
    convert_element_type,
    dtype_name,
    dtype_of,
    equal_shape,
    equal_size,
    fill_of,
    is_call,
    tensor_of,
)
from fuseplan.graph.ops import DialectOp, QuantRounding, compute_dtype
from fuseplan.record import Reason

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
"""Dtypes of codes: `fn` on NVIDIA and AMD CDNA4, `fnuz` on AMD CDNA3, and `e5m2`, which trades a mantissa bit for the
range of float16. Their largest values, 448, 240 and 57344, come from `torch.finfo`.
"""

CLAMPS = (
    aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
    aten.clamp.Tensor,
)  # fmt: skip


def apply_scale(x: Tensor, scale: Tensor, own: torch.dtype, dtype: torch.dtype, rounding: QuantRounding) -> Tensor:
    """q = clamp(x / scale, -fp8_max, fp8_max).to(dtype), contiguous. x and the scale are in the dtype of arithmetic,
    which is at least as wide as x's `own` dtype.
    """
    scaled = x * scale.reciprocal() if rounding.multiplies else x / scale
    if rounding.rounds_scaled:
        scaled = scaled.to(own).to(x.dtype)
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit).to(dtype).contiguous()


def scale_of(
    wide: Tensor, own: torch.dtype, dtype: torch.dtype, min_scale: float, max_scale: float, scale_ub: Tensor | None,
    rounding: QuantRounding,
) -> Tensor:  # fmt: skip
    """clamp(min(amax(|x|, -1), scale_ub) / fp8_max, min_scale, max_scale); the quotient may be rounded to x's dtype.

    Args:
        wide: [..., size], x in the dtype of arithmetic.
        own: the dtype of x.
        dtype: the dtype of the codes.
        min_scale: 0 for none.
        max_scale: 0 for none.
        scale_ub: one element; None: no bound.
        rounding: says whether the quotient is rounded.

    Returns:
        [..., 1] in the dtype of arithmetic.
    """
    largest = wide.abs().amax(-1, keepdim=True)
    if scale_ub is not None:
        largest = torch.minimum(largest, scale_ub.to(wide.dtype))
    scale = largest / torch.finfo(dtype).max
    scale = scale.to(own).to(wide.dtype) if rounding.rounds_scale else scale
    return scale.clamp(min_scale or -math.inf, max_scale or math.inf)  # a tensor may bound it below 0


def scale_dtype(own: torch.dtype, rounding: str) -> torch.dtype:
    """The dtype of the scales of x, which has the dtype `own`."""
    return own if QuantRounding(rounding).rounds_scaled else compute_dtype(own)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """`x` scaled by `scale` and cast to fp8.

    Attributes:
        cast: the node that yields the codes.
        dtype: the dtype of the codes.
        x: the tensor to scale.
        factor: the divisor of x, or its multiplier.
        scale: the scale: the factor itself, or the value whose reciprocal is the factor.
        rounding: how x is scaled and rounded.
        is_clamped: whether the operand of the cast is clamped to the range of the codes.
    """

    cast: fx.Node
    dtype: torch.dtype
    x: fx.Node
    factor: fx.Node
    scale: fx.Node
    rounding: QuantRounding
    is_clamped: bool

    @property
    def limit(self) -> float:
        """The largest value of the codes."""
        return torch.finfo(self.dtype).max

    @property
    def unclamped(self) -> Unraised:
        """The error for a missing clamp."""
        return Unraised(Reason.OP, f"the value cast isn't clamped to +-{self.limit:g}", self.cast)


def scalings(canonical: CanonicalGraph) -> Iterator[tuple[Call, Scaling | Unraised]]:
    """Every cast to fp8 with the scaling of its operand, or with an error where the scaling isn't recognised."""
    for cast in canonical.calls(convert_element_type):
        dtype = cast.args[1]
        if dtype in FP8_DTYPES and not _is_constant(cast):
            assert isinstance(dtype, torch.dtype)
            try:
                yield cast, _read_scaling(cast, dtype)
            except Unraised as refused:
                yield cast, refused


def _is_constant(node: fx.Node) -> bool:
    """Whether it is computed from a constant alone, as zero points are."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "call_function" and not node.all_input_nodes


def _unclamped(cast: fx.Node, limit: float) -> tuple[fx.Node, bool]:
    """x of `convert(clamp(x, -limit, limit), fp8)`, the clamp in one op or two, or of `convert(x, fp8)`, and whether it
    is clamped.
    """
    low = high = None
    node = cast.args[0]
    narrowed = node if is_call(node, convert_element_type) else None
    if narrowed is not None:
        node = narrowed.args[0]
    while is_call(node, *CLAMPS):
        x, *bounds = node.args
        if any(isinstance(bound, fx.Node) and number_of(bound) is None for bound in bounds):
            break
        bounds = [number_of(bound) for bound in bounds]
        if is_call(node, aten.clamp_max.default, aten.clamp_max.Tensor):
            bounds = [None, *bounds]
        minimum, maximum = (*bounds, None, None)[:2]
        if node.kwargs or (minimum is not None and low is not None) or (maximum is not None and high is not None):
            break  # the model's own clamp, inside the clamp to the range of fp8
        low, high = minimum if low is None else low, maximum if high is None else high
        node = x
    is_clamped = low == -limit and high == limit
    if not isinstance(node, fx.Node) or not (is_clamped or (low is None and high is None)):
        raise Unraised(Reason.OP, f"the value cast isn't clamped to +-{limit:g}", cast)
    inner = uncast(node)
    if narrowed is not None and is_clamped and dtype_of(inner) is dtype_of(narrowed):
        assert isinstance(inner, fx.Node)
        return inner, True  # its range contains that of fp8: the clamp gives the same in either dtype
    if narrowed is not None and is_clamped:
        detail = f"the value cast is scaled or clamped in {dtype_name(narrowed)}"
        raise Unraised(Reason.DTYPE, detail, narrowed)
    return (node, True) if is_clamped else (cast.all_input_nodes[0], False)


def _read_scaling(cast: fx.Node, dtype: torch.dtype) -> Scaling:
    limit = torch.finfo(dtype).max
    scaled, is_clamped = _unclamped(cast, limit)
    found = _operands(scaled)
    if found is None:
        if not is_clamped:
            raise Unraised(Reason.OP, f"the value cast isn't clamped to +-{limit:g}", cast)
        if is_call(scaled, aten.add.Tensor) and _operands(scaled.args[0]) is not None:
            detail = f"a zero point ({scaled.args[1]}) is added to the scaled value, and the op has none"
            raise Unraised(Reason.OP, detail, scaled, "quantise symmetrically, without a zero point")
        if is_call(scaled, *MULS):
            raise Unraised(Reason.OP, "the clamped value isn't multiplied by 1 / scale", scaled)
        raise Unraised(Reason.OP, "the clamped value isn't x / scale", scaled, expected=aten.div.Tensor)
    wide, factor, scale, rounding = found
    if not isinstance(wide, fx.Node) or not isinstance(factor, fx.Node) or not isinstance(scale, fx.Node):
        detail = f"the scale is a constant, {scale}, and the op takes a tensor"
        raise Unraised(Reason.ATTRIBUTE, detail, scaled, "make the scale a float32 tensor of one element")
    own = dtype_of(scaled)
    x = uncast(wide) if own is torch.float32 else wide
    if own in LOW_PRECISION and rounding is QuantRounding.DIVIDE and own is dtype_of(scale) is dtype_of(x):
        rounding = QuantRounding.DIVIDE_ROUNDED
    elif dtype_of(scale) is not torch.float32:
        raise Unraised(Reason.DTYPE, f"the scale is {dtype_name(scale)}, and the op takes float32", scaled)
    elif own is not torch.float32:
        raise Unraised(Reason.DTYPE, f"the value cast is scaled in {dtype_name(scaled)}", scaled)
    if not isinstance(x, fx.Node) or dtype_of(x) not in (torch.float32, *LOW_PRECISION):
        raise Unraised(Reason.DTYPE, f"the scaled value is {dtype_name(x)}", scaled)
    return Scaling(
        cast=cast, dtype=dtype, x=x, factor=factor, scale=scale, rounding=rounding, is_clamped=is_clamped
    )  # fmt: skip


def _operands(scaled: object) -> tuple[object, object, object, QuantRounding] | None:
    """(x, factor, scale, rounding) of `x / scale` and of `x * (1 / scale)`.

    Raises:
        Unraised: for `x * (a / b)`, which differs from `x / (b / a)` in its rounding.
    """
    if is_call(scaled, aten.div.Tensor):
        x, scale = scaled.args
        return x, scale, scale, QuantRounding.DIVIDE
    if not is_call(scaled, *MULS):
        return None
    for x, factor in (scaled.args, reversed(scaled.args)):
        inverse = reordered(factor)
        if is_call(inverse, *MULS) and inverse.args[1] == 1:  # as torch writes 1.0 / scale
            inverse = inverse.args[0]
        if is_call(inverse, aten.reciprocal.default):
            return x, factor, inverse.args[0], QuantRounding.MULTIPLY
        number = None
        if is_call(inverse, *MULS) and is_call(inverse.args[0], aten.reciprocal.default):
            number = inverse.args[1]
        elif is_call(inverse, aten.div.Tensor):
            number = number_of(inverse.args[0])
        if isinstance(number, (int, float)) and isinstance(inverse, fx.Node):
            detail = f"x is multiplied by {number:g} / amax, which rounds otherwise than by 1 / (amax / {number:g})"
            raise Unraised(Reason.OP, detail, inverse, "multiply by 1 / scale, or divide by the scale")
    return None


def raise_computed(
    canonical: CanonicalGraph, cast: fx.Node, scale: fx.Node, op: DialectOp, args: tuple[Any, ...]
) -> None:
    """Replaces codes and scales by the results of one op, each in its shape in the graph.

    Args:
        canonical: the graph.
        cast: the node that holds the codes.
        scale: the node that holds the scales.
        op: the op that computes both.
        args: its arguments; the first is the rows.
    """
    rows = tensor_of(args[0])
    fakes = op.fake(rows, *args[1:])
    old = (cast, scale)
    if all(_is_alike(tensor_of(node), value) for node, value in zip(old, fakes, strict=True)):
        canonical.raise_op(op, args, old)
        return
    claimed, place = canonical.claims(old), min(old)
    sizes = [_sizes(canonical, node) for node in old]
    node = canonical.insert_before(place, op.overload, args, fakes)
    canonical.interior[node] = claimed
    results = [canonical.insert_before(place, operator.getitem, (node, index), fakes[index]) for index in range(2)]
    for index, (each, result) in enumerate(zip(old, results, strict=True)):
        value = tensor_of(each)
        assert value is not None
        if value.dtype is not fakes[index].dtype:  # the same bytes, under another dtype
            dtype = value.dtype
            result = results[index] = canonical.insert_before(
                place, aten.view.dtype, (result, dtype), fakes[index].view(dtype)
            )
        if not equal_shape(value, fakes[index]):
            args = (result, sizes[index])
            results[index] = canonical.insert_before(place, aten.reshape.default, args, tensor_of(each))
    for each, result in zip(old, results, strict=True):  # which may erase the place
        canonical.replace(each, result)


def _is_alike(value: Tensor | None, like: Tensor) -> bool:
    return value is not None and value.dtype is like.dtype and equal_shape(value, like)


def _sizes(canonical: CanonicalGraph, node: fx.Node) -> list[Any]:
    """The sizes of a node's value, as arguments of `reshape`."""
    value = tensor_of(node)
    assert value is not None
    sizes: list[Any] = list(value.shape)
    symbolic = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    if len(symbolic) == 1:
        sizes[symbolic[0]] = -1
        return sizes
    for dim in symbolic:
        values = [(each, each.meta.get("val")) for each in canonical.graph.nodes if each < node]
        found = [each for each, size in values if isinstance(size, torch.SymInt) and equal_size(size, sizes[dim])]
        if not found:
            detail = f"size {dim} of {[*value.shape]} is no value in the graph"
            raise Unraised(Reason.SIZE, detail, node, "reshape to fewer dimensions of unknown size")
        sizes[dim] = found[0]
    return sizes


def reordered(node: object) -> object:
    """Looks through views that keep the order of the elements."""
    while is_call(node, *ORDER_KEEPING):
        node = node.args[0]
    return node


def source_of(node: object) -> object:
    """Looks through views that keep the order of the elements, and through casts that change no value."""
    while is_call(node, *ORDER_KEEPING) or uncast(node) is not node:
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return node


def uncast(node: object) -> object:
    """Looks through a cast from low precision to float32, which changes neither |x| nor amax."""
    if not is_call(node, convert_element_type) or dtype_of(node) is not torch.float32:
        return node
    return node.args[0] if dtype_of(node.args[0]) in LOW_PRECISION else node


def number_of(node: object) -> float | None:
    """A number, given as it is or as a tensor filled with it; rounded if the tensor's dtype has low precision."""
    if isinstance(node, (int, float)):
        return node
    number, dtype = fill_of(node), dtype_of(node)
    return number if number is None or dtype not in LOW_PRECISION else torch.tensor(number, dtype=dtype).item()
