"""fp8 quantisation by a scale of each group of elements of a row, which may be rounded up to a power of two (UE8M0)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import dtype_name, equal_size, item, tensor_of
from fuseplan.graph.ops import (
    Decoded,
    QuantRounding,
    Sample,
    ScaleLayout,
    compute_dtype,
    define,
    draw_positive,
    empty_scales,
    in_rows,
    lay_out,
)
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Stage, sample_of
from fuseplan.rules.parts.codes import SCALE_BYTES, GroupCodes, quantisation
from fuseplan.rules.parts.fp8 import Scaling, apply_scale, raise_computed, scale_dtype, scale_of, scalings
from fuseplan.rules.parts.fp8_engines import CODES, check_rows, engine_reader, lies_as, raise_call
from fuseplan.rules.parts.fp8_scales import ComputedScale, computed_scale, is_given, rounded_by_log2, seems_split
from fuseplan.rules.parts.scale_layouts import layout_of


def reference(
    x: Tensor, group_size: int, dtype: torch.dtype, min_scale: float, max_scale: float, ue8m0: bool, min_power: float,
    zero_scale: float, scale_ub: Tensor | None, rounding: str, layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale = clamp(min(amax(|x|), scale_ub) / fp8_max, min_scale, max_scale) or zero_scale, of each group
    q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        group_size: elements of a group; it divides hidden.
        dtype: one of `FP8_DTYPES`.
        min_scale: the smallest scale; 0 for none: a group of zeros then divides by zero.
        max_scale: the largest scale; 0 for none.
        ue8m0: whether scales are rounded up to powers of two. torch's own `exp2(ceil(log2(scale)))` gives the power
            below for a scale that is up to three units in the last place above it.
        min_power: the lower bound after that rounding, used as it is; 0 for none, and without that rounding.
        zero_scale: the replacement for a final scale of 0.
        scale_ub: the upper bound of a group's largest element, one element in any dtype; None for none.
        rounding: one of `QuantRounding`; says how the scale is rounded, before it is made a power of two, and how it is
            applied to x. The scale itself is always computed by a division.

        layout: the memory layout of scales, one of `ScaleLayout` except `SWIZZLED`.

    Returns:
        (q, scale): [..., hidden] in `dtype`, contiguous, and [..., hidden / group_size] in float32 (float64 for float64
        inputs, x's dtype by `divide_rounded`), in the shape that `layout` gives it.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`, or `layout` one of `ScaleLayout`.
        RuntimeError: `group_size` doesn't divide hidden.
    """
    groups, how = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size)), QuantRounding(rounding)
    scale = scale_of(groups, x.dtype, dtype, min_scale, max_scale, scale_ub, how)
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where((scale > 0) & scale.isfinite(), power, scale).clamp(min=min_power)
    if zero_scale:
        scale = torch.where(scale == 0, zero_scale, scale)
    codes = apply_scale(groups, scale, x.dtype, dtype, how)
    return codes.flatten(-2), lay_out(scale.squeeze(-1).to(scale_dtype(x.dtype, rounding)), layout)


def fake(
    x: Tensor, group_size: int, dtype: torch.dtype, min_scale: float, max_scale: float, ue8m0: bool, min_power: float,
    zero_scale: float, scale_ub: Tensor | None, rounding: str, layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes of `reference`."""
    scale = empty_scales(x, x.shape[-1] // group_size, scale_dtype(x.dtype, rounding), layout)
    return x.new_empty(x.shape, dtype=dtype), scale


def decode(
    codes: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype, min_scale: float, max_scale: float,
    ue8m0: bool, min_power: float, zero_scale: float, scale_ub: Tensor | None, rounding: str, layout: str,
) -> Decoded | None:  # fmt: skip
    """The numbers that codes and scales encode, where scales are powers of two."""
    if not ue8m0:
        return None
    own = in_rows(scales, codes.numel() // codes.shape[-1], codes.shape[-1] // group_size, layout)
    is_packed = layout == ScaleLayout.PACKED
    wide = torch.exp2((own - 127).double()) if is_packed else own.double()
    steps = own if is_packed else torch.frexp(wide).exponent
    return Decoded(scales=wide, steps=steps.int(), numbers=Tensor.double, most=torch.finfo(dtype).max)


SAMPLE_GROUP = 64


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """All arguments except x; vLLM's kernel bounds the largest element below by 1e-10 and divides it by 448."""
    how = QuantRounding.DIVIDE.value, ScaleLayout.ROWS.value
    return SAMPLE_GROUP, torch.float8_e4m3fn, 1e-10 / 448, 0.0, False, 0.0, 0.0, None, *how


def _sample(shape: tuple[int, ...], group_size: int, *, ue8m0: bool, layout: ScaleLayout = ScaleLayout.ROWS) -> Sample:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        _, dtype, min_scale, max_scale, _, *rest, _ = _sample_arguments(device)
        return group_size, dtype, min_scale, max_scale, ue8m0, *rest, layout.value

    return sample_of(shape, arguments, f"-{group_size}{'-ue8m0' * ue8m0}-{layout.value}")


per_token_group_fp8_quant = define(
    "per_token_group_fp8_quant",
    "(Tensor x, int group_size, ScalarType dtype, float min_scale, float max_scale, bool ue8m0, float min_power, "
    "float zero_scale, Tensor? scale_ub, str rounding, str layout) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[
        _sample((7, 320), 64, ue8m0=False),
        _sample((2, 3, 256), 128, ue8m0=True),
        *(_sample((7, 384), 64, ue8m0=True, layout=layout) for layout in ScaleLayout if layout != ScaleLayout.SWIZZLED),
    ],
    draws={"scale_ub": draw_positive},
    decode=decode,
)


def raise_groups(canonical: CanonicalGraph) -> None:
    """Raises every quantisation by a scale of each group, with several groups in a row."""
    for cast, found in scalings(canonical):
        if isinstance(found, Unraised) or is_given(found):
            continue
        try:
            _raise(canonical, found, computed_scale(found))
        except Unraised as refused:
            if seems_split(found.x):
                refused.tell(canonical, per_token_group_fp8_quant, "fp8 quantisation", at=[cast], place=cast)
    canonical.merge_equal(per_token_group_fp8_quant)


def _raise(canonical: CanonicalGraph, scaling: Scaling, scale: ComputedScale) -> None:
    if scale.size is None:
        return
    bounds = scale.min_scale, scale.max_scale, scale.is_power, scale.min_power, scale.zero_scale, scale.scale_ub
    groups = _width(scale.rows) // scale.size
    layout, last = layout_of(scale.node, scaling, scale.rows, groups)
    args = (scale.rows, scale.size, scaling.dtype, *bounds, scale.rounding.value, layout.value)
    raise_computed(canonical, scaling.cast, last, per_token_group_fp8_quant, args)


def _width(rows: fx.Node) -> int:
    value = tensor_of(rows)
    assert value is not None
    return int(value.shape[-1])


VLLM_LEAST = 1e-10
"""The lower bound of scales before they are made powers of two, in vLLM's kernels."""


def _read_groups(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any]) -> None:
    """`_C::per_token_group_fp8_quant(input, output_q!, output_s!, group_size, eps, fp8_min, fp8_max, scale_ue8m0)`,
    where the strides of `output_s` tell the layout of scales, and `_packed(input, output_q!, output_s_packed!,
    group_size, eps, fp8_min, fp8_max)`, with powers of two as scales.

    scale = max(amax(|x|), eps) / fp8_max, of each group; q = x / scale
    """
    x, size = values["input"], values["group_size"]
    check_rows(node, x, values["output_q"])
    packs, limit = "output_s_packed" in values, torch.finfo(CODES).max
    least, most = (values[f"{end}_8bit" if f"{end}_8bit" in values else f"fp8_{end}"] for end in ("min", "max"))
    if (least, most) != (-limit, limit):
        detail = f"codes are between {least:g} and {most:g}, and the op's between {-limit:g} and {limit:g}"
        raise Unraised(Reason.ATTRIBUTE, detail, node)
    rows, is_power = tensor_of(x), packs or bool(values["scale_ue8m0"])
    assert rows is not None
    if not equal_size(rows.shape[-1] % size, 0):
        raise Unraised(Reason.SIZE, f"rows of {rows.shape[-1]} aren't whole groups of {size}", node)
    if is_power and rows.dtype is torch.float32:
        raise rounded_by_log2(node)
    smallest = torch.tensor(values["eps"], dtype=torch.float32) / limit
    min_scale = max(float(smallest), float(torch.tensor(VLLM_LEAST))) if is_power else float(smallest)
    layout = ScaleLayout.PACKED if packs else _layout_of(node, values["output_s"], rows, rows.shape[-1] // size)
    rounding = QuantRounding.DIVIDE.value
    args = (x, size, CODES, min_scale, 0.0, is_power, 0.0, 0.0, None, rounding, layout.value)
    raise_call(canonical, node, per_token_group_fp8_quant, args, (item(node, 1), item(node, 2)))


def _layout_of(node: fx.Node, scales: fx.Node, rows: Tensor, groups: Any) -> ScaleLayout:
    """The layout of scales in the memory allocated for them."""
    value = tensor_of(scales)
    assert value is not None
    for layout in (ScaleLayout.ROWS, ScaleLayout.COLUMNS, ScaleLayout.ALIGNED):
        if lies_as(value, empty_scales(rows, groups, torch.float32, layout)):
            return layout
    detail = f"scales are {dtype_name(scales)}{[*value.shape]} with strides {value.stride()}, which no layout has"
    raise Unraised(Reason.LAYOUT, detail, node)


class GroupFp8(GroupCodes):
    """The quantisation at a site."""

    name, eager_kernels, scale_bytes = "group_fp8_quant", 30, SCALE_BYTES


PART = quantisation(
    per_token_group_fp8_quant, GroupFp8, Stage.GROUPED_EPILOGUES, raise_groups, _sample_arguments, unit=SAMPLE_GROUP,
    engine_ops={
        name: engine_reader(per_token_group_fp8_quant, "fp8 quantisation", _read_groups)
        for name in ("_C::per_token_group_fp8_quant", "_C::per_token_group_fp8_quant_packed")
    },
)  # fmt: skip
