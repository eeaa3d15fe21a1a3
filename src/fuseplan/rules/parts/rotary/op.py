"""Rotary position embedding of queries and keys."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import Draw, RotaryRounding, Sample, compute_dtype, define, random_tensor
from fuseplan.rules.parts.base import rows_of


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rounding: str) -> Tensor:
    wide = compute_dtype(x.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    straight = x.to(wide) * cos.to(wide)
    rotated = torch.cat((-second, first), dim=-1) * sin.to(wide)
    if RotaryRounding(rounding) is RotaryRounding.PRODUCTS:
        straight, rotated = straight.to(x.dtype).to(wide), rotated.to(x.dtype).to(wide)
    return (straight + rotated).to(x.dtype).contiguous()


def rotary_embedding_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """y = x * cos + cat(-x2, x1) * sin of q and of k, where x1 and x2 are the halves of x's last dimension

    All of `head_dim` is rotated, and halves against each other (GPT-NeoX), not neighbours (GPT-J).

    Args:
        q: [..., head_dim], head_dim even.
        k: [..., head_dim], q's dtype; usually with another number of heads.
        cos: [..., head_dim], or [..., head_dim / 2] where both halves share it; broadcasts to q and to k.
        sin: the same shape as cos.
        rounding: one of `RotaryRounding`.

    Returns:
        (q_out, k_out) in the shapes and the dtype of q and k, contiguous.

    Raises:
        ValueError: `rounding` isn't one of `RotaryRounding`.
    """
    return _rotate(q, cos, sin, rounding), _rotate(k, cos, sin, rounding)


def rotary_embedding_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `rotary_embedding_reference`."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


def draw_angles(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Uniform between -1 and 1, as sines and cosines are."""
    return 2 * torch.rand(shape, device=device, generator=generator) - 1


HEADS = (4, 2)
"""Numbers of heads of queries and of keys in samples."""


def _rotary_sample(
    leading: tuple[int, ...], head_dim: int, angles: int, dtype: torch.dtype, rounding: RotaryRounding
) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        q, k = (random_tensor((*leading, heads, head_dim), dtype, device, generator) for heads in HEADS)
        angle = torch.rand((*leading, 1, angles), generator=generator) * 2 * torch.pi
        cos, sin = (part.to(device=device, dtype=dtype) for part in (angle.cos(), angle.sin()))
        return q, k, cos, sin, rounding.value

    name = f"{rows_of(leading)}-{head_dim}-{angles}-{str(dtype).removeprefix('torch.')}-{rounding}"
    return Sample(name=name, make=make)


ROTARY_SAMPLES = (
    _rotary_sample((7,), 16, 16, torch.bfloat16, RotaryRounding.PRODUCTS),
    _rotary_sample((7,), 16, 8, torch.float16, RotaryRounding.PRODUCTS),
    _rotary_sample((2, 5), 6, 3, torch.float32, RotaryRounding.PRODUCTS),
    _rotary_sample((3, 11), 128, 64, torch.bfloat16, RotaryRounding.FP32),
)

DRAWS: Mapping[str, Draw] = {"cos": draw_angles, "sin": draw_angles}

rotary_embedding = define(
    "rotary_embedding",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, str rounding) -> (Tensor, Tensor)",
    reference=rotary_embedding_reference,
    fake=rotary_embedding_fake,
    samples=ROTARY_SAMPLES,
    draws=DRAWS,
)
