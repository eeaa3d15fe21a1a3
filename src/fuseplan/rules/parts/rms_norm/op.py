"""RMSNorm, with and without a residual add."""

from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import Rounding, Sample, compute_dtype, define, draw_near_one, empty, random_tensor
from fuseplan.rules.parts import residual_add
from fuseplan.rules.parts.base import rows_of


def _normalize(total: Tensor, weight: Tensor, eps: float, rounding: Rounding, dtype: torch.dtype) -> Tensor:
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    if rounding.rounds_normed:
        return weight * normed.to(dtype)
    scale = weight.to(total.dtype)
    return (normed * (1.0 + scale if rounding.adds_one else scale)).to(dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    """y = x * rsqrt(mean(x^2, -1) + eps) * weight

    Args:
        x: [..., hidden], floating point.
        weight: [hidden].
        eps: added to the mean square.
        rounding: one of `Rounding`.

    Returns:
        [..., hidden], contiguous, in x's dtype (in the promoted dtype of x and weight where the convention multiplies
        by the weight in the weight's own dtype).

    Raises:
        ValueError: `rounding` isn't one of `Rounding`.
    """
    return _normalize(x.to(compute_dtype(x.dtype)), weight, eps, Rounding(rounding), x.dtype).contiguous()


def fused_add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor]:
    """residual_out = x + residual;  y = residual_out * rsqrt(mean(residual_out^2, -1) + eps) * weight

    Args:
        x: [..., hidden].
        residual: [..., hidden], x's dtype, or float32 under `vllm_fp32_residual`.
        weight: [hidden].
        eps: added to the mean square.
        rounding: one of `Rounding`; says whether the norm reads the rounded or the unrounded sum.

    Returns:
        (y, residual_out), both [..., hidden] and contiguous; residual_out in x's dtype, or float32 under
        `vllm_fp32_residual`.

    Raises:
        ValueError: `rounding` isn't one of `Rounding`.
    """
    convention = Rounding(rounding)
    total, residual_out = residual_add.reference(x, residual, convention, compute_dtype(x.dtype))
    y = _normalize(total, weight, eps, convention, x.dtype)
    return y.contiguous(), residual_out.contiguous()


def norm_dtype(x: Tensor, weight: Tensor, rounding: str) -> torch.dtype:
    """The dtype of y."""
    return torch.promote_types(x.dtype, weight.dtype) if Rounding(rounding).rounds_normed else x.dtype


def rms_norm_fake(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    """Shape and dtype of `rms_norm_reference`."""
    return empty(x, x.shape, norm_dtype(x, weight, rounding))


def fused_add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `fused_add_rms_norm_reference`."""
    dtype = x.dtype if Rounding(rounding).rounds_residual else compute_dtype(x.dtype)
    return rms_norm_fake(x, weight, eps, rounding), empty(x, x.shape, dtype)


SAMPLE_SHAPES = ((1, 64), (7, 320), (2, 5, 2880), (33, 257))
SAMPLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def norm_samples(residual: bool) -> list[Sample]:
    """Arguments of `rms_norm` or, with `residual`, of `fused_add_rms_norm`, for every shape, dtype and convention."""

    def sample(shape: tuple[int, ...], dtype: torch.dtype, rounding: Rounding) -> Sample:
        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            residual_dtype = dtype if rounding.rounds_residual else torch.float32
            dtypes = (dtype, residual_dtype) if residual else (dtype,)
            activations = [random_tensor(shape, each, device, generator) for each in dtypes]
            weight = 1 + 0.1 * random_tensor(shape[-1:], torch.float32, device, generator)
            return (*activations, weight.to(dtype), 1e-5, rounding.value)

        name = f"{rows_of(shape)}-{str(dtype).removeprefix('torch.')}-{rounding}"
        return Sample(name=name, make=make, width=shape[-1])

    conventions = tuple(Rounding) if residual else (Rounding.LLAMA, Rounding.GPT_OSS, Rounding.GEMMA)
    cases: list[tuple[tuple[int, ...], torch.dtype, Rounding]]
    cases = [(SAMPLE_SHAPES[0], dtype, conventions[0]) for dtype in SAMPLE_DTYPES]
    cases += [(shape, torch.bfloat16, conventions[0]) for shape in SAMPLE_SHAPES[1:]]
    cases += [(SAMPLE_SHAPES[1], torch.bfloat16, convention) for convention in conventions[1:]]
    return [sample(*case) for case in cases]


rms_norm = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, str rounding) -> Tensor",
    reference=rms_norm_reference,
    fake=rms_norm_fake,
    samples=norm_samples(residual=False),
    draws={"weight": draw_near_one},
)

fused_add_rms_norm = define(
    "fused_add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, str rounding) -> (Tensor, Tensor)",
    reference=fused_add_rms_norm_reference,
    fake=fused_add_rms_norm_fake,
    samples=norm_samples(residual=True),
    draws={"weight": draw_near_one},
)
