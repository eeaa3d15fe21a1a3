"""fp8 quantisation by a scale of each row, its largest element over the largest of fp8."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.ops import QuantRounding, compute_dtype, define
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Kind, RowEpilogue, Stage
from fuseplan.rules.parts.fp8 import (
    CODE_BYTES,
    SCALE_BYTES,
    Scaling,
    apply_scale,
    raise_computed,
    sample_of,
    scale_of,
    scalings,
)
from fuseplan.rules.parts.fp8_scales import computed_scale, is_given
from fuseplan.rules.parts.traffic import Region, Tail


def reference(x: Tensor, dtype: torch.dtype, min_scale: float, rounding: str) -> tuple[Tensor, Tensor]:
    """scale = max(amax(|x|, -1) / fp8_max, min_scale);  q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        dtype: one of `FP8_DTYPES`.
        min_scale: the smallest scale, so that a row of zeros doesn't divide by zero; 0 for none.
        rounding: one of `QuantRounding`; it says how the scale is rounded, and applied to x. The scale itself is always
            a division.

    Returns:
        (q, scale): [..., hidden] in `dtype` and [..., 1] in float32 (float64 for float64 inputs), contiguous.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`.
    """
    wide, how = x.to(compute_dtype(x.dtype)), QuantRounding(rounding)
    scale = scale_of(wide, x.dtype, dtype, how).clamp(min=min_scale)
    return apply_scale(wide, scale, dtype, how), scale.contiguous()


def fake(x: Tensor, dtype: torch.dtype, min_scale: float, rounding: str) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), scale


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """(dtype, min_scale, rounding); 1 / (448 * 512) is the smallest scale that vLLM's `QuantFP8` uses."""
    return torch.float8_e4m3fn, 1 / (448 * 512), QuantRounding.MULTIPLY.value


dynamic_per_token_scaled_fp8_quant = define(
    "dynamic_per_token_scaled_fp8_quant",
    "(Tensor x, ScalarType dtype, float min_scale, str rounding) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[
        *(sample_of(shape, _sample_arguments) for shape in ((7, 320), (2, 3, 64))),
        sample_of((5, 96), lambda device: (torch.float8_e4m3fn, 0.0, QuantRounding.DIVIDE_BY_ROUNDED.value)),
    ],
)


def raise_dynamic(canonical: CanonicalGraph) -> None:
    """Raises every quantisation by a scale of each row."""
    for cast, found in scalings(canonical):
        if isinstance(found, Unraised) or is_given(found):
            continue
        try:
            _raise(canonical, found)
        except Unraised as refused:
            if cast not in canonical.unraised:  # by what is more like it
                refused.tell(canonical, dynamic_per_token_scaled_fp8_quant, "fp8 quantisation", at=[cast], place=cast)
    canonical.merge_equal(dynamic_per_token_scaled_fp8_quant)


def _raise(canonical: CanonicalGraph, scaling: Scaling) -> None:
    scale = computed_scale(scaling)
    if scale.is_power:
        detail = "the scale is rounded up to a power of two, and the op's of whole rows isn't"
        raise Unraised(Reason.ATTRIBUTE, detail, scale.node)
    args = (scale.rows, scaling.dtype, scale.min_scale, scale.rounding.value)
    raise_computed(canonical, scaling, scale.node, dynamic_per_token_scaled_fp8_quant, args)


@dataclass(frozen=True, kw_only=True)
class DynamicFp8(Tail):
    """It at a site: the largest of a row is a reduction over it."""

    name, reduces_rows, eager_kernels = "dynamic_fp8_quant", True, 10

    def result_bytes(self, region: Region) -> int:
        """The codes, and a scale a row."""
        return region.tokens * (region.width * CODE_BYTES + SCALE_BYTES)


PART = RowEpilogue(
    name="dynamic_fp8_quant",
    kind=Kind.QUANTISATION,
    suffix="dynamic_fp8_quant",
    ops=(dynamic_per_token_scaled_fp8_quant,),
    parameters=("ScalarType dtype", "float min_scale", "str quant_rounding"),
    results=2,
    sample=_sample_arguments,
    cores=frozenset({"rms_norm", "silu_and_mul"}),
    raising=((Stage.EPILOGUES, raise_dynamic),),
    traffic=DynamicFp8,
    tail=lambda node, core: DynamicFp8(),
)
