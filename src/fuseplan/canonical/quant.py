"""fp8 quantisation as Inductor's post-grad graphs spell it in aten.

    x32 = convert(x, float32)
    q   = convert(clamp(x32 / scale, -fp8_max, fp8_max), fp8)              `divide`
        | convert(clamp(x32 * reciprocal(scale), -fp8_max, fp8_max), fp8)  `multiply`

with a given scale (static), or with `scale = max(amax(|x|, -1) / fp8_max, min_scale)` (dynamic, one a row).
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from fuseplan.canonical.unraised import Unraised
from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import FP8_DTYPES, QuantRounding, ops
from fuseplan.graph.facts import MULS, aten, convert_element_type, dtype_name, dtype_of, equal_size, is_call, tensor_of
from fuseplan.record import Reason

CLAMPS = (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)
MOST_STEPS = 8
"""From a scale to what it is computed from."""


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    """`x` scaled by `scale`, before the clamp."""

    x: fx.Node
    scale: fx.Node
    rounding: QuantRounding


def raise_quants(canonical: CanonicalGraph) -> None:
    """Raises every static per-tensor and dynamic per-token quantisation to fp8."""
    for cast in canonical.calls(convert_element_type):
        dtype = cast.args[1]
        if dtype not in FP8_DTYPES:
            continue
        assert isinstance(dtype, torch.dtype)
        try:
            _raise(canonical, cast, dtype, _read_scaling(_unclamped(cast, torch.finfo(dtype).max)))
        except Unraised as refused:
            refused.tell(canonical, ops.static_scaled_fp8_quant, "fp8 quantisation", at=[cast], place=cast)


def _unclamped(cast: fx.Node, limit: float) -> fx.Node:
    """x of `convert(clamp(x, -limit, limit), fp8)`, the clamp in one op or two."""
    low = high = None
    node = cast.args[0]
    narrowed = node if is_call(node, convert_element_type) else None
    if narrowed is not None:
        node = narrowed.args[0]
    while is_call(node, *CLAMPS):
        x, *bounds = node.args
        if node.target is aten.clamp_max.default:
            bounds = [None, *bounds]
        minimum, maximum = (*bounds, None, None)[:2]
        if node.kwargs or (minimum is not None and low is not None) or (maximum is not None and high is not None):
            break  # a clamp of the model's own, inside the one to the range of fp8
        low, high = minimum if low is None else low, maximum if high is None else high
        node = x
    if not isinstance(node, fx.Node) or low != -limit or high != limit:
        raise Unraised(Reason.OP, f"what is cast isn't clamped to +-{limit:g}", cast)
    if narrowed is not None:
        detail = f"what is cast is scaled or clamped in {dtype_name(narrowed)}"
        raise Unraised(Reason.DTYPE, detail, narrowed)
    return node


def _read_scaling(scaled: fx.Node) -> _Scaling:
    rounding = QuantRounding.DIVIDE
    if is_call(scaled, aten.div.Tensor):
        wide, scale = scaled.args
    elif is_call(scaled, *MULS):
        rounding = QuantRounding.MULTIPLY
        wide, factor = scaled.args
        if is_call(wide, aten.reciprocal.default):
            wide, factor = factor, wide
        if not is_call(factor, aten.reciprocal.default):
            raise Unraised(Reason.OP, "what is clamped is multiplied by something else than 1 / scale", scaled)
        scale = factor.args[0]
    else:
        raise Unraised(Reason.OP, "what is clamped isn't x / scale", scaled, expected=aten.div.Tensor)
    if not isinstance(wide, fx.Node) or not isinstance(scale, fx.Node):
        detail = f"the scale is a constant, {scale}, and the op takes a tensor"
        raise Unraised(Reason.ATTRIBUTE, detail, scaled, "make the scale a float32 tensor of one element")
    if dtype_of(scale) is not torch.float32:
        detail = f"the scale is {dtype_name(scale)}, and the op takes float32"
        raise Unraised(Reason.DTYPE, detail, scaled)
    x = wide.args[0] if is_call(wide, convert_element_type) else wide
    if dtype_of(wide) is not torch.float32 or not isinstance(x, fx.Node):
        raise Unraised(Reason.DTYPE, f"what is clamped is scaled in {dtype_name(wide)}", scaled)
    return _Scaling(x=x, scale=scale, rounding=rounding)


def _raise(canonical: CanonicalGraph, cast: fx.Node, dtype: torch.dtype, scaling: _Scaling) -> None:
    scale = tensor_of(scaling.scale)
    args: tuple[object, ...]
    assert scale is not None
    is_computed = _largest_of(scaling.scale) is scaling.x
    # Of a single row, as in decoding, the scale is one number too.
    if equal_size(scale.numel(), 1) and not (is_computed and scale.dim() > 1):
        if scale.dim() > 1:
            detail = f"the scale has the shape {[*scale.shape]}, and the op takes one number"
            raise Unraised(Reason.SIZE, detail, scaling.scale, "scale.reshape(1)")
        if is_computed:
            detail = "the scale is computed from all rows at once, and the ops take one a row or a given one"
            raise Unraised(Reason.OP, detail, scaling.scale)
        args = (scaling.x, scaling.scale, dtype, scaling.rounding.value)
        canonical.raise_op(ops.static_scaled_fp8_quant, args, (cast,))
        return
    min_scale = _dynamic_min_scale(scaling, torch.finfo(dtype).max)
    args = (scaling.x, dtype, min_scale, scaling.rounding.value)
    canonical.raise_op(ops.dynamic_per_token_scaled_fp8_quant, args, (cast, scaling.scale))


def _dynamic_min_scale(scaling: _Scaling, limit: float) -> float:
    """min_scale of `max(amax(|x|, -1, keepdim) / limit, min_scale)`, which the scale is, of the same x."""
    scale, x = scaling.scale, tensor_of(scaling.x)
    if x is None or _largest_of(scale) is not scaling.x:
        raise Unraised(Reason.OP, "the scale is neither one number nor computed from the largest of each row", scale)
    quotient, min_scale = scale, None
    if is_call(scale, aten.clamp_min.default, aten.clamp.default) and len(scale.args) == 2:
        quotient, min_scale = scale.args
    if not isinstance(min_scale, float):
        where = "it has none, or before the division" if quotient is scale else f"it is {min_scale}"
        raise Unraised(Reason.OP, f"the scale has a minimum that is a float in the op, and here {where}", scale)
    if not is_call(quotient, aten.div.Tensor) or quotient.args[1] != limit:
        raise Unraised(Reason.OP, f"the largest of a row isn't divided by {limit:g}", quotient)
    amax = _uncast(quotient.args[0])
    assert isinstance(amax, fx.Node)
    value = tensor_of(scale)
    rows_agree = value is not None and value.dim() == x.dim() and equal_size(value.shape[-1], 1)
    dims = _kept_dims(amax)
    if dims not in ([-1], [x.dim() - 1]) or not rows_agree:
        detail = f"the scale is computed by {amax.target}, not by amax over the last dimension, which is kept"
        raise Unraised(Reason.OP, detail, amax, "take x.abs().amax(-1, keepdim=True)")
    return min_scale


def _kept_dims(amax: fx.Node) -> list[int]:
    """The dimensions that `amax(x, dims, True)`, or `max(x, dim, True)` by its values alone, reduces to one."""
    if is_call(amax, operator.getitem) and is_call(amax.args[0], aten.max.dim) and amax.args[1] == 0:
        maximum = amax.args[0]
        return [maximum.args[1]] if maximum.args[2:] == (True,) and len(maximum.users) == 1 else []
    return list(amax.args[1]) if is_call(amax, aten.amax.default) and amax.args[2:] == (True,) else []


def _largest_of(scale: fx.Node) -> object:
    """x, if a scale is computed from the largest |x| in some way, or None."""
    node: object = scale
    for _ in range(MOST_STEPS):
        if not isinstance(node, fx.Node) or not node.all_input_nodes:
            return None
        if is_call(node, aten.abs.default):
            return _uncast(node.args[0])
        node = node.all_input_nodes[0]
    return None


def _uncast(node: object) -> object:
    """Looks through a cast to float32; |x| and amax are exact in either dtype."""
    return node.args[0] if is_call(node, convert_element_type) and dtype_of(node) is torch.float32 else node
