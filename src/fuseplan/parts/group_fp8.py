"""fp8 quantisation by a scale of each group of elements of a row, which may be rounded up to a power of two (UE8M0)."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.canonical import CanonicalGraph
from fuseplan.canonical.unraised import Unraised
from fuseplan.graph.facts import RESHAPES, aten, equal_size, is_call, tensor_of
from fuseplan.ops import QuantRounding, Sample, compute_dtype, define, random_tensor
from fuseplan.parts.base import Kind, RowEpilogue, Stage, rows_of
from fuseplan.parts.fp8 import CODE_BYTES, SCALE_BYTES, Scaling, apply_scale, is_largest_of, scalings, uncast
from fuseplan.parts.traffic import Middle, Region, Tail
from fuseplan.record import Reason


def reference(
    x: Tensor, group_size: int, dtype: torch.dtype, min_scale: float, ue8m0: bool, rounding: str
) -> tuple[Tensor, Tensor]:
    """scale = max(amax(|x|) / fp8_max, min_scale) of each group;  q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        group_size: elements of a group; it divides hidden.
        dtype: one of `FP8_DTYPES`.
        min_scale: the smallest scale; 0 for none: a group of zeros then divides by zero.
        ue8m0: whether scales are rounded up to powers of two. torch's own `exp2(ceil(log2(scale)))` gives the power
            below for a scale that is up to three units in the last place above it.
        rounding: one of `QuantRounding`; it says how the scale is applied to x. The scale itself is always a division.

    Returns:
        (q, scale): [..., hidden] in `dtype` and [..., hidden / group_size] in float32 (float64 for float64 inputs),
        contiguous.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`.
        RuntimeError: `group_size` doesn't divide hidden.
    """
    groups = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).clamp(min=min_scale)
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where((scale > 0) & scale.isfinite(), power, scale)
    codes = apply_scale(groups, scale, dtype, QuantRounding(rounding))
    return codes.flatten(-2), scale.squeeze(-1).contiguous()


def fake(
    x: Tensor, group_size: int, dtype: torch.dtype, min_scale: float, ue8m0: bool, rounding: str
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), scale


SAMPLE_GROUP = 64


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """(group_size, dtype, min_scale, ue8m0, rounding); vLLM divides a largest element of at least 1e-10 by 448."""
    return SAMPLE_GROUP, torch.float8_e4m3fn, 1e-10 / 448, False, QuantRounding.DIVIDE.value


def _sample(shape: tuple[int, ...], group_size: int, *, ue8m0: bool) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        _, dtype, min_scale, _, rounding = _sample_arguments(device)
        return random_tensor(shape, torch.bfloat16, device, generator), group_size, dtype, min_scale, ue8m0, rounding

    return Sample(name=f"{rows_of(shape)}-{group_size}{'-ue8m0' * ue8m0}", make=make)


per_token_group_fp8_quant = define(
    "per_token_group_fp8_quant",
    "(Tensor x, int group_size, ScalarType dtype, float min_scale, bool ue8m0, str rounding) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[_sample((7, 320), 64, ue8m0=False), _sample((2, 3, 256), 128, ue8m0=True)],
)


def raise_groups(canonical: CanonicalGraph) -> None:
    """Raises every quantisation whose x is a view of rows as groups, and whose scale is of each group."""
    for cast, found in scalings(canonical):
        if isinstance(found, Unraised) or not found.is_computed or not _is_split(found.x):
            continue
        try:
            _raise(canonical, found, *_scale_of(found))
        except Unraised as refused:
            refused.tell(canonical, per_token_group_fp8_quant, "fp8 quantisation", at=[cast], place=cast)


def _is_split(view: fx.Node) -> bool:
    """Whether a node is a view of rows of n x m elements as n rows of m."""
    if not is_call(view, *RESHAPES):
        return False
    rows, groups = tensor_of(view.args[0]), tensor_of(view)
    if rows is None or groups is None or groups.dim() != rows.dim() + 1 or not isinstance(groups.shape[-1], int):
        return False
    kept = all(equal_size(a, b) for a, b in zip(rows.shape[:-1], groups.shape[:-2], strict=True))
    return kept and isinstance(rows.shape[-1], int) and groups.shape[-2] > 1


def _raise(canonical: CanonicalGraph, scaling: Scaling, min_scale: float, ue8m0: bool) -> None:
    view = scaling.x
    rows, groups = view.args[0], tensor_of(view)
    assert isinstance(rows, fx.Node) and groups is not None
    args = (rows, groups.shape[-1], scaling.dtype, min_scale, ue8m0, scaling.rounding.value)
    fakes = fake(tensor_of(rows), *args[1:])  # type: ignore[arg-type]
    claimed = canonical.claims([scaling.cast, scaling.scale])
    place = min(scaling.cast, scaling.scale)
    op = canonical.insert_before(place, per_token_group_fp8_quant.overload, args, fakes)
    canonical.interior[op] = claimed
    sizes = [*view.args[1]]  # type: ignore[misc]
    for index, (old, shape) in enumerate(((scaling.cast, sizes), (scaling.scale, [*sizes[:-1], 1]))):
        value = tensor_of(old)
        result = canonical.insert_before(place, operator.getitem, (op, index), fakes[index])
        canonical.replace(old, canonical.insert_before(place, aten.reshape.default, (result, shape), value))


def _scale_of(scaling: Scaling) -> tuple[float, bool]:
    """(min_scale, whether it is rounded up to a power of two) of a scale, the least before or behind the division."""
    scale, limit = scaling.scale, scaling.limit
    power = _logarithm(scale)
    node, least = _clamped(power or scale)
    if not is_call(node, aten.div.Tensor) or node.args[1] != limit:
        raise Unraised(Reason.OP, f"the largest of a group isn't divided by {limit:g}", node)
    wide, before = _clamped(node.args[0])
    amax = uncast(wide)
    assert isinstance(amax, fx.Node)
    if least is not None and before is not None:
        raise Unraised(Reason.OP, "the scale has two minima", node)
    if not is_call(amax, aten.amax.default) or list(amax.args[1]) not in ([-1], [_dims(amax) - 1]):
        raise Unraised(Reason.OP, "the scale isn't computed by amax over the last dimension", amax)
    if amax.args[2:] != (True,):
        detail = "the scale is computed by an amax that doesn't keep the last dimension"
        raise Unraised(Reason.OP, detail, amax, "take x.abs().amax(-1, keepdim=True)")
    if not is_largest_of(amax, scaling.x):
        raise Unraised(Reason.OP, "the largest is taken of something else than the magnitudes of a group", amax)
    # A division that is rounded to the nearest keeps the order, so the least may be taken of either side of it.
    divided = float(torch.tensor(before, dtype=torch.float32) / limit) if before is not None else 0.0
    return (divided if least is None else least), power is not None


def _logarithm(scale: fx.Node) -> fx.Node | None:
    """s of `exp2(ceil(log2(s)))` or `pow(2, ceil(log2(abs(s))))`."""
    exponent = None
    if is_call(scale, aten.exp2.default):
        exponent = scale.args[0]
    elif is_call(scale, aten.pow.Scalar) and scale.args[0] == 2:
        exponent = scale.args[1]
    logarithm = exponent.args[0] if is_call(exponent, aten.ceil.default) else None
    if not is_call(logarithm, aten.log2.default):
        return None
    inner = logarithm.args[0]
    inner = inner.args[0] if is_call(inner, aten.abs.default) else inner
    return inner if isinstance(inner, fx.Node) else None


def _clamped(node: object) -> tuple[fx.Node, float | None]:
    """(x, least) of `clamp(x, least)`; of anything else itself, and None."""
    assert isinstance(node, fx.Node)
    if is_call(node, aten.clamp_min.default, aten.clamp.default) and len(node.args) == 2:
        inner, least = node.args
        if isinstance(inner, fx.Node) and isinstance(least, (int, float)):
            return inner, float(least)
    return node, None


def _dims(amax: fx.Node) -> int:
    value = tensor_of(amax.args[0])
    assert value is not None
    return value.dim()


@dataclass(frozen=True, kw_only=True)
class GroupFp8(Tail):
    """It at a site.

    Attributes:
        group_size: elements of a group.
    """

    group_size: int

    name, reduces_rows, eager_kernels = "group_fp8_quant", True, 22

    @classmethod
    def stands_alone(cls, core: Middle) -> bool:
        """Behind what reduces rows: a reduction over groups is another one."""
        return core.reduces_rows

    def text(self, width: int) -> str:
        """`group_fp8_quant 128`"""
        return f"{self.name} {self.group_size}"

    def result_bytes(self, region: Region) -> int:
        """The codes, and a scale a group."""
        return region.tokens * (region.width * CODE_BYTES + region.width // self.group_size * SCALE_BYTES)


def _tail(node: fx.Node, core: fx.Node) -> GroupFp8:
    size = node.args[1]
    assert isinstance(size, int)
    return GroupFp8(group_size=size)


PART = RowEpilogue(
    name="group_fp8_quant",
    kind=Kind.QUANTISATION,
    suffix="group_fp8_quant",
    ops=(per_token_group_fp8_quant,),
    parameters=(
        "int group_size", "ScalarType dtype", "float min_scale", "bool ue8m0", "str quant_rounding",
    ),
    results=2,
    sample=_sample_arguments,
    unit=SAMPLE_GROUP,
    cores=frozenset({"rms_norm", "silu_and_mul"}),
    raising=((Stage.GROUPED_EPILOGUES, raise_groups),),
    traffic=GroupFp8,
    tail=_tail,
)  # fmt: skip
