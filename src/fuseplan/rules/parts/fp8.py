"""What quantisations to fp8 share: how a scale is applied, and how Inductor's post-grad graphs spell that in aten.

    x32 = convert(x, float32)                                              or not: a float32 scale promotes x
    q   = convert(clamp(x32 / scale, -fp8_max, fp8_max), fp8)              `divide`
        | convert(clamp(x32 * reciprocal(scale), -fp8_max, fp8_max), fp8)  `multiply`

Where the scale is from tells one quantisation from another; each is a part of its own. A scale that is computed from
what is quantised is read in `fp8_scales`, and such a quantisation may go without the clamp.
"""

import operator
from collections.abc import Callable, Iterator
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
from fuseplan.graph.ops import DialectOp, QuantRounding, Sample, random_tensor
from fuseplan.record import Reason
from fuseplan.rules.parts.base import rows_of

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
"""`fn` on NVIDIA and AMD CDNA4, `fnuz` on AMD CDNA3. Their largest values, 448 and 240, come from `torch.finfo`."""

CODE_BYTES = 1
SCALE_BYTES = 4

CLAMPS = (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)


def apply_scale(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: QuantRounding) -> Tensor:
    """q = clamp(x / scale, -fp8_max, fp8_max).to(dtype), contiguous; x and the scale are in the dtype of arithmetic."""
    scaled = x * scale.reciprocal() if rounding.multiplies else x / scale
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit).to(dtype).contiguous()


def scale_of(wide: Tensor, own: torch.dtype, dtype: torch.dtype, rounding: QuantRounding) -> Tensor:
    """amax(|x|, -1) / fp8_max, rounded to x's precision or not.

    Args:
        wide: [..., size], x in the dtype of arithmetic.
        own: the dtype of x.
        dtype: of the codes.
        rounding: what says so.

    Returns:
        [..., 1] in the dtype of arithmetic.
    """
    scale = wide.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max
    return scale.to(own).to(wide.dtype) if rounding.rounds_scale else scale


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
        factor: what x is divided by, or multiplied by.
        scale: by what it is scaled: the factor, or what the factor is the reciprocal of.
        rounding: how.
        is_clamped: whether what is cast is clamped to what the codes hold.
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
        """That it isn't."""
        return Unraised(Reason.OP, f"the value cast isn't clamped to +-{self.limit:g}", self.cast)


def scalings(canonical: CanonicalGraph) -> Iterator[tuple[Call, Scaling | Unraised]]:
    """Every cast to fp8, and how what is cast was scaled, or why that isn't known."""
    for cast in canonical.calls(convert_element_type):
        dtype = cast.args[1]
        if dtype in FP8_DTYPES:
            assert isinstance(dtype, torch.dtype)
            try:
                yield cast, _read_scaling(cast, dtype)
            except Unraised as refused:
                yield cast, refused


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
        if node.target is aten.clamp_max.default:
            bounds = [None, *bounds]
        minimum, maximum = (*bounds, None, None)[:2]
        if node.kwargs or (minimum is not None and low is not None) or (maximum is not None and high is not None):
            break  # a clamp of the model's own, inside the one to the range of fp8
        low, high = minimum if low is None else low, maximum if high is None else high
        node = x
    is_clamped = low == -limit and high == limit
    if not isinstance(node, fx.Node) or not (is_clamped or (low is None and high is None)):
        raise Unraised(Reason.OP, f"the value cast isn't clamped to +-{limit:g}", cast)
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
        if is_call(scaled, *MULS):
            raise Unraised(Reason.OP, "the clamped value isn't multiplied by 1 / scale", scaled)
        raise Unraised(Reason.OP, "the clamped value isn't x / scale", scaled, expected=aten.div.Tensor)
    wide, factor, scale, rounding = found
    if not isinstance(wide, fx.Node) or not isinstance(factor, fx.Node) or not isinstance(scale, fx.Node):
        detail = f"the scale is a constant, {scale}, and the op takes a tensor"
        raise Unraised(Reason.ATTRIBUTE, detail, scaled, "make the scale a float32 tensor of one element")
    if dtype_of(scale) is not torch.float32:
        raise Unraised(Reason.DTYPE, f"the scale is {dtype_name(scale)}, and the op takes float32", scaled)
    x = uncast(wide)
    if dtype_of(scaled) is not torch.float32:
        raise Unraised(Reason.DTYPE, f"the value cast is scaled in {dtype_name(scaled)}", scaled)
    if not isinstance(x, fx.Node) or dtype_of(x) not in (torch.float32, *LOW_PRECISION):
        raise Unraised(Reason.DTYPE, f"the scaled value is {dtype_name(x)}", scaled)
    return Scaling(
        cast=cast, dtype=dtype, x=x, factor=factor, scale=scale, rounding=rounding, is_clamped=is_clamped
    )  # fmt: skip


def _operands(scaled: fx.Node) -> tuple[object, object, object, QuantRounding] | None:
    """(x, factor, scale, rounding) of `x / scale` and of `x * (1 / scale)`.

    Raises:
        Unraised: of `x * (a / b)`, which is `x / (b / a)` but for its rounding.
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
    canonical: CanonicalGraph, scaling: Scaling, scale: fx.Node, op: DialectOp, args: tuple[Any, ...]
) -> None:
    """Puts an op that yields codes and scales in the place of both: each in the shape that it has in the graph.

    Args:
        canonical: the graph.
        scaling: of which the codes are.
        scale: the node that holds the scales.
        op: what computes both.
        args: its arguments, of which the first are the rows.
    """
    rows = tensor_of(args[0])
    fakes = op.fake(rows, *args[1:])
    old = (scaling.cast, scale)
    if all(equal_shape(tensor_of(node), value) for node, value in zip(old, fakes, strict=True)):
        canonical.raise_op(op, args, old)
        return
    claimed, place = canonical.claims(old), min(old)
    sizes = [_sizes(canonical, node) for node in old]
    node = canonical.insert_before(place, op.overload, args, fakes)
    canonical.interior[node] = claimed
    for index, each in enumerate(old):
        result = canonical.insert_before(place, operator.getitem, (node, index), fakes[index])
        reshaped = canonical.insert_before(place, aten.reshape.default, (result, sizes[index]), tensor_of(each))
        canonical.replace(each, reshaped)


def _sizes(canonical: CanonicalGraph, node: fx.Node) -> list[Any]:
    """The sizes of a node's value as `reshape` takes them."""
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
    """Looks through such views, and through casts that change no value."""
    while is_call(node, *ORDER_KEEPING) or uncast(node) is not node:
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return node


def uncast(node: object) -> object:
    """Looks through a cast of low precision to float32, in which |x| and amax are as exact."""
    if not is_call(node, convert_element_type) or dtype_of(node) is not torch.float32:
        return node
    return node.args[0] if dtype_of(node.args[0]) in LOW_PRECISION else node


def number_of(node: object) -> float | None:
    """A number, as it is or as a tensor that holds nothing else: of low precision, as that holds it."""
    if isinstance(node, (int, float)):
        return node
    number, dtype = fill_of(node), dtype_of(node)
    return number if number is None or dtype not in LOW_PRECISION else torch.tensor(number, dtype=dtype).item()
