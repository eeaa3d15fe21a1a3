"""Quantisation to fp8: static per-tensor and dynamic per-token scales."""

from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect.norm import compute_dtype, random_tensor
from fuseplan.dialect.registry import Sample, define, draw_positive
from fuseplan.dialect.rounding import QuantRounding

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
"""`fn` on NVIDIA and AMD CDNA4, `fnuz` on AMD CDNA3. Their largest values, 448 and 240, come from `torch.finfo`."""


def _apply(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: QuantRounding) -> Tensor:
    scaled = x / scale if rounding is QuantRounding.DIVIDE else x * scale.reciprocal()
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit).to(dtype).contiguous()


def static_scaled_fp8_quant_reference(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    """q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        scale: one float32 element.
        dtype: one of `FP8_DTYPES`.
        rounding: one of `QuantRounding`.

    Returns:
        [..., hidden] in `dtype`, contiguous.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`.
    """
    wide = compute_dtype(x.dtype)
    return _apply(x.to(wide), scale.to(wide), dtype, QuantRounding(rounding))


def static_scaled_fp8_quant_fake(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    """Shape and dtype of `static_scaled_fp8_quant_reference`."""
    return x.new_empty(x.shape, dtype=dtype)


def dynamic_per_token_scaled_fp8_quant_reference(
    x: Tensor, dtype: torch.dtype, min_scale: float, rounding: str
) -> tuple[Tensor, Tensor]:
    """scale = max(amax(|x|, -1) / fp8_max, min_scale);  q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        dtype: one of `FP8_DTYPES`.
        min_scale: the smallest scale, so that a row of zeros doesn't divide by zero.
        rounding: one of `QuantRounding`; it says how the scale is applied to x. The scale itself is always a division.

    Returns:
        (q, scale): [..., hidden] in `dtype` and [..., 1] in float32 (float64 for float64 inputs), contiguous.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`.
    """
    wide = x.to(compute_dtype(x.dtype))
    scale = (wide.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).clamp(min=min_scale)
    return _apply(wide, scale, dtype, QuantRounding(rounding)), scale.contiguous()


def dynamic_per_token_scaled_fp8_quant_fake(
    x: Tensor, dtype: torch.dtype, min_scale: float, rounding: str
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `dynamic_per_token_scaled_fp8_quant_reference`."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), scale


def static_sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """(scale, dtype, rounding)"""
    return torch.tensor([0.02], device=device), torch.float8_e4m3fn, QuantRounding.DIVIDE.value


def dynamic_sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """(dtype, min_scale, rounding); 1 / (448 * 512) is the smallest scale that vLLM's `QuantFP8` uses."""
    return torch.float8_e4m3fn, 1 / (448 * 512), QuantRounding.MULTIPLY.value


def _static_sample(shape: tuple[int, ...]) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), *static_sample_arguments(device)

    return Sample(name="x".join(map(str, shape)), make=make)


def _dynamic_sample(shape: tuple[int, ...]) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), *dynamic_sample_arguments(device)

    return Sample(name="x".join(map(str, shape)), make=make)


static_scaled_fp8_quant = define(
    "static_scaled_fp8_quant",
    "(Tensor x, Tensor scale, ScalarType dtype, str rounding) -> Tensor",
    reference=static_scaled_fp8_quant_reference,
    fake=static_scaled_fp8_quant_fake,
    samples=[_static_sample((7, 320)), _static_sample((2, 3, 64))],
    draws={"scale": draw_positive},
)

dynamic_per_token_scaled_fp8_quant = define(
    "dynamic_per_token_scaled_fp8_quant",
    "(Tensor x, ScalarType dtype, float min_scale, str rounding) -> (Tensor, Tensor)",
    reference=dynamic_per_token_scaled_fp8_quant_reference,
    fake=dynamic_per_token_scaled_fp8_quant_fake,
    samples=[_dynamic_sample((7, 320)), _dynamic_sample((2, 3, 64))],
)
