"""fp8 quantisation by a scale of each row: its largest element divided by the largest fp8 value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import item
from fuseplan.graph.ops import QuantRounding, compute_dtype, define, draw_positive
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Stage, sample_of
from fuseplan.rules.parts.codes import CODE_BYTES, SCALE_BYTES, Codes, quantisation
from fuseplan.rules.parts.fp8 import Scaling, apply_scale, raise_computed, scale_dtype, scale_of, scalings
from fuseplan.rules.parts.fp8_engines import CODES, check_rows, engine_reader, one_number, raise_call
from fuseplan.rules.parts.fp8_scales import computed_scale, is_given
from fuseplan.rules.parts.traffic import Region


def reference(
    x: Tensor, dtype: torch.dtype, min_scale: float, max_scale: float, zero_scale: float, scale_ub: Tensor | None,
    rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale = clamp(min(amax(|x|, -1), scale_ub) / fp8_max, min_scale, max_scale) or zero_scale
    q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        dtype: one of `FP8_DTYPES`.
        min_scale: the smallest scale, so that a row of zeros doesn't divide by zero; 0 for none.
        max_scale: the largest scale; 0 for none.
        zero_scale: the replacement for a scale of 0.
        scale_ub: the upper bound of a row's largest element, one element in any dtype; None for none.
        rounding: one of `QuantRounding`; says how the scale is rounded and applied to x. The scale itself is always
            computed by a division.

    Returns:
        (q, scale): [..., hidden] in `dtype` and [..., 1] in float32 (float64 for float64 inputs, x's dtype by
        `divide_rounded`), contiguous.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`.
    """
    wide, how = x.to(compute_dtype(x.dtype)), QuantRounding(rounding)
    scale = scale_of(wide, x.dtype, dtype, min_scale, max_scale, scale_ub, how)
    if zero_scale:
        scale = torch.where(scale == 0, zero_scale, scale)
    return apply_scale(wide, scale, x.dtype, dtype, how), scale.to(scale_dtype(x.dtype, rounding)).contiguous()


def fake(
    x: Tensor, dtype: torch.dtype, min_scale: float, max_scale: float, zero_scale: float, scale_ub: Tensor | None,
    rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes of `reference`."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=scale_dtype(x.dtype, rounding))
    return x.new_empty(x.shape, dtype=dtype), scale


VLLM_MIN_SCALE = 1 / (448 * 512)
"""The smallest scale of vLLM's `QuantFP8`, and of its kernels."""


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """All arguments except x."""
    return torch.float8_e4m3fn, VLLM_MIN_SCALE, 0.0, 0.0, None, QuantRounding.MULTIPLY.value


def _rounded_arguments(device: torch.device) -> tuple[Any, ...]:
    """The arguments of compressed-tensors in bfloat16."""
    zero = torch.finfo(torch.bfloat16).eps
    return torch.float8_e4m3fn, 0.0, 0.0, zero, None, QuantRounding.DIVIDE_ROUNDED.value


def _bounded_arguments(device: torch.device) -> tuple[Any, ...]:
    bound = torch.tensor([1.5], device=device)
    return torch.float8_e4m3fn, 0.0, 2.0, 0.0, bound, QuantRounding.DIVIDE_BY_ROUNDED.value


dynamic_per_token_scaled_fp8_quant = define(
    "dynamic_per_token_scaled_fp8_quant",
    "(Tensor x, ScalarType dtype, float min_scale, float max_scale, float zero_scale, Tensor? scale_ub, str rounding)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[
        *(sample_of(shape, _sample_arguments) for shape in ((7, 320), (2, 3, 64))),
        sample_of((5, 96), _bounded_arguments),
        sample_of((4, 160), _rounded_arguments),
    ],
    draws={"scale_ub": draw_positive},
)


def raise_dynamic(canonical: CanonicalGraph) -> None:
    """Raises every quantisation by a scale of each row."""
    for cast, found in scalings(canonical):
        if isinstance(found, Unraised) or is_given(found):
            continue
        try:
            _raise(canonical, found)
        except Unraised as refused:
            if cast not in canonical.unraised:  # a closer lookalike recorded it
                refused.tell(canonical, dynamic_per_token_scaled_fp8_quant, "fp8 quantisation", at=[cast], place=cast)
    canonical.merge_equal(dynamic_per_token_scaled_fp8_quant)


def _raise(canonical: CanonicalGraph, scaling: Scaling) -> None:
    scale = computed_scale(scaling)
    if scale.is_power:
        detail = "the scale is rounded up to a power of two, and the op's of whole rows isn't"
        raise Unraised(Reason.ATTRIBUTE, detail, scale.node)
    bounds = scale.min_scale, scale.max_scale, scale.zero_scale, scale.scale_ub
    args = (scale.rows, scaling.dtype, *bounds, scale.rounding.value)
    raise_computed(canonical, scaling.cast, scale.node, dynamic_per_token_scaled_fp8_quant, args)


def _read_rows(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any]) -> None:
    """`_C::dynamic_per_token_scaled_fp8_quant(result!, input, scale!, scale_ub)`: it divides by the scale."""
    x, bound = values["input"], values["scale_ub"]
    check_rows(node, x, values["result"])
    if bound is not None:
        bound = one_number(canonical, node, bound, x, "the upper bound")
    args = (x, CODES, VLLM_MIN_SCALE, 0.0, 0.0, bound, QuantRounding.DIVIDE.value)
    raise_call(canonical, node, dynamic_per_token_scaled_fp8_quant, args, (item(node, 1), item(node, 2)))


@dataclass(frozen=True, kw_only=True)
class DynamicFp8(Codes):
    """The quantisation at a site: the largest element of a row is a reduction over it."""

    name, reduces_rows, eager_kernels = "dynamic_fp8_quant", True, 10

    def result_bytes(self, region: Region) -> int:
        """Bytes of the codes and of a scale a row."""
        return region.tokens * (region.width * CODE_BYTES + SCALE_BYTES)


PART = quantisation(
    dynamic_per_token_scaled_fp8_quant, DynamicFp8, Stage.EPILOGUES, raise_dynamic, _sample_arguments,
    engine_ops={
        "_C::dynamic_per_token_scaled_fp8_quant": engine_reader(
            dynamic_per_token_scaled_fp8_quant, "fp8 quantisation", _read_rows
        ),
    },
)  # fmt: skip
