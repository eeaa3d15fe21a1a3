"""Rotary position embedding of queries and keys, alone and after an RMSNorm of each head (QK norm)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect.norm import compute_dtype, random_tensor, rms_norm_fake, rms_norm_reference
from fuseplan.dialect.registry import Sample, define, draw_near_one
from fuseplan.dialect.rounding import RotaryRounding, Rounding


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rounding: str) -> Tensor:
    wide = compute_dtype(x.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    straight = x.to(wide) * cos.to(wide)
    turned = torch.cat((-second, first), dim=-1) * sin.to(wide)
    if RotaryRounding(rounding) is RotaryRounding.PRODUCTS:
        straight, turned = straight.to(x.dtype).to(wide), turned.to(x.dtype).to(wide)
    return (straight + turned).to(x.dtype).contiguous()


def rotary_embedding_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """y = x * cos + cat(-x2, x1) * sin of q and of k, where x1 and x2 are the halves of x's last dimension

    All of `head_dim` is rotated, and halves against each other (GPT-NeoX), not neighbours (GPT-J).

    Args:
        q: [..., head_dim], head_dim even.
        k: [..., head_dim], q's dtype; another number of heads than q, as a rule.
        cos: [..., head_dim], or [..., head_dim / 2] where both halves share it; broadcasts to q and to k.
        sin: cos's shape.
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


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rounding: str,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rotary_embedding(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin), each as its own reference computes it.

    Args:
        q: [..., q_heads, head_dim].
        k: [..., k_heads, head_dim], q's dtype and leading dimensions.
        q_weight: [head_dim].
        k_weight: [head_dim].
        cos: [..., 1, head_dim] or [..., 1, head_dim / 2], leading dimensions q's or 1.
        sin: cos's shape.
        eps: added to the mean squares.
        rounding: one of `Rounding`, of both norms.
        rotary_rounding: one of `RotaryRounding`.

    Returns:
        (q_out, k_out) in the shapes and the dtype of q and k, contiguous.

    Raises:
        ValueError: `rounding` or `rotary_rounding` isn't one of theirs.
    """
    normed = rms_norm_reference(q, q_weight, eps, rounding), rms_norm_reference(k, k_weight, eps, rounding)
    return rotary_embedding_reference(*normed, cos, sin, rotary_rounding)


def qk_norm_rope_fake(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rounding: str,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes of `qk_norm_rope_reference`."""
    return rms_norm_fake(q, q_weight, eps, rounding), rms_norm_fake(k, k_weight, eps, rounding)


def draw_angles(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Uniform between -1 and 1, as sines and cosines are."""
    return 2 * torch.rand(shape, device=device, generator=generator) - 1


HEADS = (4, 2)
"""Of queries and of keys, in samples."""


def _rotary_sample(
    leading: tuple[int, ...], head_dim: int, angles: int, dtype: torch.dtype, rounding: RotaryRounding
) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        q, k = (random_tensor((*leading, heads, head_dim), dtype, device, generator) for heads in HEADS)
        turn = torch.rand((*leading, 1, angles), generator=generator) * 2 * torch.pi
        cos, sin = (part.to(device=device, dtype=dtype) for part in (turn.cos(), turn.sin()))
        return q, k, cos, sin, rounding.value

    name = f"{'x'.join(map(str, leading))}-{head_dim}-{angles}-{str(dtype).removeprefix('torch.')}-{rounding}"
    return Sample(name=name, make=make)


def _fused_sample(rotary: Sample, rounding: Rounding) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        q, k, cos, sin, rotary_rounding = rotary.make(device, generator)
        noise = [random_tensor(q.shape[-1:], torch.float32, device, generator) for _ in HEADS]
        q_weight, k_weight = ((1 + 0.1 * each).to(q.dtype) for each in noise)
        return q, k, q_weight, k_weight, cos, sin, 1e-6, rounding.value, rotary_rounding

    return Sample(name=f"{rotary.name}-{rounding}", make=make)


ROTARY_SAMPLES = (
    _rotary_sample((7,), 16, 16, torch.bfloat16, RotaryRounding.PRODUCTS),
    _rotary_sample((7,), 16, 8, torch.float16, RotaryRounding.PRODUCTS),
    _rotary_sample((2, 5), 6, 3, torch.float32, RotaryRounding.PRODUCTS),
    _rotary_sample((3, 11), 128, 64, torch.bfloat16, RotaryRounding.FP32),
)

_DRAWS: dict[str, Callable[..., Tensor]] = {"cos": draw_angles, "sin": draw_angles}

rotary_embedding = define(
    "rotary_embedding",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, str rounding) -> (Tensor, Tensor)",
    reference=rotary_embedding_reference,
    fake=rotary_embedding_fake,
    samples=ROTARY_SAMPLES,
    draws=_DRAWS,
)

qk_norm_rope = define(
    "qk_norm_rope",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, str rounding, "
    "str rotary_rounding) -> (Tensor, Tensor)",
    reference=qk_norm_rope_reference,
    fake=qk_norm_rope_fake,
    samples=[
        *(_fused_sample(each, Rounding.LLAMA) for each in ROTARY_SAMPLES),
        *(_fused_sample(ROTARY_SAMPLES[0], each) for each in (Rounding.GPT_OSS, Rounding.GEMMA)),
    ],
    fused=True,
    draws={**_DRAWS, "q_weight": draw_near_one, "k_weight": draw_near_one},
)
