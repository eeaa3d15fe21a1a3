"""What quantisations to fp8 share: how a scale is applied, and how Inductor's post-grad graphs spell that in aten.

    x32 = convert(x, float32)
    q   = convert(clamp(x32 / scale, -fp8_max, fp8_max), fp8)              `divide`
        | convert(clamp(x32 * reciprocal(scale), -fp8_max, fp8_max), fp8)  `multiply`

Where the scale is from tells one quantisation from another; each is a part of its own.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.canonical import CanonicalGraph
from fuseplan.canonical.unraised import Unraised
from fuseplan.graph.facts import (
    MULS,
    Call,
    aten,
    convert_element_type,
    dtype_name,
    dtype_of,
    equal_size,
    is_call,
    tensor_of,
)
from fuseplan.ops import QuantRounding, Sample, random_tensor
from fuseplan.parts.base import rows_of
from fuseplan.record import Reason

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
"""`fn` on NVIDIA and AMD CDNA4, `fnuz` on AMD CDNA3. Their largest values, 448 and 240, come from `torch.finfo`."""

CODE_BYTES = 1
SCALE_BYTES = 4

CLAMPS = (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)
MOST_STEPS = 12
"""From a scale to what it is computed from."""


def apply_scale(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: QuantRounding) -> Tensor:
    """q = clamp(x / scale, -fp8_max, fp8_max).to(dtype), contiguous; x and the scale are in the dtype of arithmetic."""
    scaled = x / scale if rounding is QuantRounding.DIVIDE else x * scale.reciprocal()
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit).to(dtype).contiguous()


def sample_of(shape: tuple[int, ...], arguments: Callable[[torch.device], tuple[Any, ...]]) -> Sample:
    """Normal values to be quantised, in bfloat16, and the further arguments on a device."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), *arguments(device)

    return Sample(name=rows_of(shape), make=make)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """`x` scaled by `scale` and cast to fp8.

    Attributes:
        cast: the node that yields the codes.
        dtype: of the codes.
        x: what is scaled.
        scale: by what.
        rounding: how.
    """

    cast: fx.Node
    dtype: torch.dtype
    x: fx.Node
    scale: fx.Node
    rounding: QuantRounding

    @property
    def limit(self) -> float:
        """The largest value of the codes."""
        return torch.finfo(self.dtype).max

    @property
    def is_computed(self) -> bool:
        """Whether the scale is computed from the largest |x| in some way."""
        return _largest_of(self.scale) is self.x

    @property
    def is_given(self) -> bool:
        """Whether the scale is one number for all; that of a single row, as in decoding, is one number too."""
        scale = tensor_of(self.scale)
        assert scale is not None
        return equal_size(scale.numel(), 1) and not (self.is_computed and scale.dim() > 1)


def scalings(canonical: CanonicalGraph) -> Iterator[tuple[Call, Scaling | Unraised]]:
    """Every cast to fp8, and how what is cast was scaled, or why that isn't known."""
    for cast in canonical.calls(convert_element_type):
        dtype = cast.args[1]
        if dtype in FP8_DTYPES:
            assert isinstance(dtype, torch.dtype)
            try:
                yield cast, _read_scaling(_unclamped(cast, torch.finfo(dtype).max), cast, dtype)
            except Unraised as refused:
                yield cast, refused


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


def _read_scaling(scaled: fx.Node, cast: fx.Node, dtype: torch.dtype) -> Scaling:
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
    return Scaling(cast=cast, dtype=dtype, x=x, scale=scale, rounding=rounding)


def computed_min_scale(scaling: Scaling, rows: str) -> float:
    """min_scale of `max(amax(|x|, -1, keepdim) / limit, min_scale)`, which the scale is, of the same x.

    Args:
        scaling: whose scale isn't given.
        rows: what x has rows of, for a person.

    Raises:
        Unraised: it isn't.
    """
    scale, x, limit = scaling.scale, tensor_of(scaling.x), scaling.limit
    if x is None or not scaling.is_computed:
        raise Unraised(
            Reason.OP, f"the scale is neither one number nor computed from the largest of each {rows}", scale
        )
    quotient, min_scale = scale, None
    if is_call(scale, aten.clamp_min.default, aten.clamp.default) and len(scale.args) == 2:
        quotient, min_scale = scale.args
    if not isinstance(min_scale, float):
        where = "it has none, or before the division" if quotient is scale else f"it is {min_scale}"
        raise Unraised(Reason.OP, f"the scale has a minimum that is a float in the op, and here {where}", scale)
    if not is_call(quotient, aten.div.Tensor) or quotient.args[1] != limit:
        raise Unraised(Reason.OP, f"the largest of a {rows} isn't divided by {limit:g}", quotient)
    amax = uncast(quotient.args[0])
    assert isinstance(amax, fx.Node)
    value = tensor_of(scale)
    rows_agree = value is not None and value.dim() == x.dim() and equal_size(value.shape[-1], 1)
    if _kept_dims(amax) not in ([-1], [x.dim() - 1]) or not rows_agree:
        detail = f"the scale is computed by {amax.target}, not by amax over the last dimension, which is kept"
        raise Unraised(Reason.OP, detail, amax, "take x.abs().amax(-1, keepdim=True)")
    if not is_largest_of(amax, scaling.x):
        raise Unraised(Reason.OP, f"the largest is taken of something else than the magnitudes of a {rows}", amax)
    return min_scale


def is_largest_of(amax: fx.Node, x: fx.Node) -> bool:
    """Whether `amax`, or `max` by its values, is taken of |x| itself, and of nothing that is made of it."""
    reduced = amax.args[0] if not is_call(amax, operator.getitem) else _argument(amax.args[0])
    magnitude = uncast(reduced)
    return is_call(magnitude, aten.abs.default) and uncast(magnitude.args[0]) is x


def _argument(node: object) -> object:
    return node.args[0] if isinstance(node, fx.Node) else None


def _kept_dims(amax: fx.Node) -> list[int]:
    """The dimensions that `amax(x, dims, True)`, or `max(x, dim, True)` by its values alone, reduces to one."""
    if is_call(amax, operator.getitem) and is_call(amax.args[0], aten.max.dim) and amax.args[1] == 0:
        maximum = amax.args[0]
        return [maximum.args[1]] if maximum.args[2:] == (True,) and len(maximum.users) == 1 else []
    return list(amax.args[1]) if is_call(amax, aten.amax.default) and amax.args[2:] == (True,) else []


def _largest_of(scale: fx.Node) -> object:
    """x, if a scale is computed from the largest |x| in some way, or None."""
    node, first, is_reduced = scale, None, False
    for _ in range(MOST_STEPS):
        is_reduced |= is_call(node, aten.amax.default, aten.max.dim, aten.max.default)
        if is_call(node, aten.abs.default):
            first = first or uncast(node.args[0])
            if is_reduced:  # else it may be of the scale itself, before its logarithm
                return uncast(node.args[0])
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return first


def uncast(node: object) -> object:
    """Looks through a cast of low precision to float32, in which |x| and amax are as exact."""
    if not is_call(node, convert_element_type) or dtype_of(node) is not torch.float32:
        return node
    return node.args[0] if dtype_of(node.args[0]) in (torch.bfloat16, torch.float16) else node
