"""fp8 quantisation as Inductor's post-grad graphs spell it in aten.

    x32 = convert(x, float32)
    q   = convert(clamp(x32 / scale, -fp8_max, fp8_max), fp8)              `divide`
        | convert(clamp(x32 * reciprocal(scale), -fp8_max, fp8_max), fp8)  `multiply`

with a given scale (static), or with `scale = max(amax(|x|, -1) / fp8_max, min_scale)` (dynamic, one a row).
"""

from dataclasses import dataclass

import torch
from torch import fx

from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import FP8_DTYPES, QuantRounding, ops
from fuseplan.graph.facts import MULS, aten, convert_element_type, dtype_of, equal_size, is_call, tensor_of
from fuseplan.record import Reason

CLAMPS = (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)


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
        limit = torch.finfo(dtype).max
        scaled = _unclamped(cast.args[0], limit)
        scaling = _read_scaling(scaled) if scaled is not None else None
        why = f"what is cast isn't clamped to +-{limit:g}" if scaled is None else "what is clamped isn't x / scale"
        if scaling is None or not _raise(canonical, cast, dtype, scaling):
            why = why if scaling is None else "the scale is neither one number nor the largest of each row"
            canonical.refuse(
                ops.static_scaled_fp8_quant, [cast], Reason.OP, f"fp8 quantisation not recognised: {why}", node=cast,
                place=cast,
            )  # fmt: skip


def _unclamped(node: object, limit: float) -> fx.Node | None:
    """x of `clamp(x, -limit, limit)`, in one op or two."""
    low = high = None
    while is_call(node, *CLAMPS):
        x, *bounds = node.args
        if node.target is aten.clamp_max.default:
            bounds = [None, *bounds]
        minimum, maximum = (*bounds, None, None)[:2]
        low, high = minimum if low is None else low, maximum if high is None else high
        node = x
    return node if isinstance(node, fx.Node) and low == -limit and high == limit else None


def _read_scaling(scaled: fx.Node) -> _Scaling | None:
    rounding = QuantRounding.DIVIDE
    if is_call(scaled, aten.div.Tensor):
        wide, scale = scaled.args
    elif is_call(scaled, *MULS):
        rounding = QuantRounding.MULTIPLY
        wide, factor = scaled.args
        if is_call(wide, aten.reciprocal.default):
            wide, factor = factor, wide
        if not is_call(factor, aten.reciprocal.default):
            return None
        scale = factor.args[0]
    else:
        return None
    if not isinstance(wide, fx.Node) or not isinstance(scale, fx.Node) or dtype_of(scale) is not torch.float32:
        return None
    x = wide.args[0] if is_call(wide, convert_element_type) else wide
    if dtype_of(wide) is not torch.float32 or not isinstance(x, fx.Node):
        return None
    return _Scaling(x=x, scale=scale, rounding=rounding)


def _raise(canonical: CanonicalGraph, cast: fx.Node, dtype: torch.dtype, scaling: _Scaling) -> bool:
    scale = tensor_of(scaling.scale)
    args: tuple[object, ...]
    assert scale is not None
    if scale.numel() == 1 and scale.dim() <= 1:
        args = (scaling.x, scaling.scale, dtype, scaling.rounding.value)
        canonical.raise_op(ops.static_scaled_fp8_quant, args, (cast,))
        return True
    min_scale = _dynamic_min_scale(scaling, torch.finfo(dtype).max)
    if min_scale is None:
        return False
    args = (scaling.x, dtype, min_scale, scaling.rounding.value)
    canonical.raise_op(ops.dynamic_per_token_scaled_fp8_quant, args, (cast, scaling.scale))
    return True


def _dynamic_min_scale(scaling: _Scaling, limit: float) -> float | None:
    """min_scale, if the scale is `max(amax(|x|, -1, keepdim) / limit, min_scale)` of the same x."""
    clamped, x = scaling.scale, tensor_of(scaling.x)
    if x is None or not is_call(clamped, aten.clamp_min.default, aten.clamp.default) or len(clamped.args) != 2:
        return None
    quotient, min_scale = clamped.args
    if not isinstance(min_scale, float) or not is_call(quotient, aten.div.Tensor) or quotient.args[1] != limit:
        return None
    amax = _uncast(quotient.args[0])
    if not is_call(amax, aten.amax.default) or not list(amax.args[1:]) or amax.args[2:] != (True,):
        return None
    dims = list(amax.args[1])
    magnitude = _uncast(amax.args[0])
    value = tensor_of(scaling.scale)
    rows_agree = value is not None and value.dim() == x.dim() and equal_size(value.shape[-1], 1)
    if dims not in ([-1], [x.dim() - 1]) or not is_call(magnitude, aten.abs.default) or not rows_agree:
        return None
    return min_scale if _uncast(magnitude.args[0]) is scaling.x else None


def _uncast(node: object) -> object:
    """Looks through a cast to float32; |x| and amax are exact in either dtype."""
    return node.args[0] if is_call(node, convert_element_type) and dtype_of(node) is torch.float32 else node
