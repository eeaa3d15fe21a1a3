"""Rotary embedding of queries and keys, and the writes of keys and values into a static cache."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import Draw, Indices, RotaryRounding, Sample, define, random_tensor
from fuseplan.rules.parts.base import rows_of
from fuseplan.rules.parts.cache_write import DRAWS as POSITIONS
from fuseplan.rules.parts.cache_write import cache_write_fake, cache_write_reference
from fuseplan.rules.parts.rotary.op import DRAWS as ANGLES
from fuseplan.rules.parts.rotary.op import rotary_embedding_reference


def rope_cache_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q_out, k = rotary_embedding(q, k, cos, sin);  cache[:, :, positions] = k, and v, on copies of the caches

    Args:
        q: [batch, q_heads, tokens, head_dim].
        k: [batch, heads, tokens, head_dim], q's dtype.
        v: [batch, heads, tokens, value_dim], q's dtype.
        k_cache: [batch, heads, length, head_dim], q's dtype.
        v_cache: [batch, heads, length, value_dim], q's dtype.
        cos: [batch or 1, 1, tokens or 1, head_dim], or half of head_dim where both halves share it.
        sin: the same shape as cos.
        positions: [tokens], integers; negative ones count from the end. Which of several equal ones wins is undefined.
        rotary_rounding: one of `RotaryRounding`.

    Returns:
        (q_out, k_cache, v_cache): rotated queries in the shape and dtype of q, contiguous, and the updated caches.

    Raises:
        IndexError: a position lies outside of the cache.
        ValueError: `rotary_rounding` isn't one of `RotaryRounding`.
    """
    q_out, k_out = rotary_embedding_reference(q, k, cos, sin, rotary_rounding)
    return q_out, *cache_write_reference(k_out, v, k_cache, v_cache, positions)


def rope_cache_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes, dtypes and layouts of `rope_cache_reference`."""
    return q.new_empty(q.shape), *cache_write_fake(k, v, k_cache, v_cache, positions)


def cached_sample(
    batch: int, heads: tuple[int, int], tokens: int, widths: tuple[int, int], length: int, angles: tuple[int, int],
    dtype: torch.dtype, rounding: RotaryRounding,
) -> Sample:  # fmt: skip
    """A sample for `rope_cache_reference`.

    Args:
        batch: rows of the batch.
        heads: heads of queries, and of keys and values.
        tokens: tokens of a row.
        widths: head dimensions of keys and of values.
        length: length of the caches.
        angles: rows of the batch with their own angles, and angles of a head.
        dtype: dtype of activations and caches.
        rounding: rounding of the rotation.
    """
    q_heads, kv_heads = heads
    width, value_width = widths

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        shapes = (
            (batch, q_heads, tokens, width), (batch, kv_heads, tokens, width), (batch, kv_heads, tokens, value_width),
            (batch, kv_heads, length, width), (batch, kv_heads, length, value_width),
        )  # fmt: skip
        tensors = [random_tensor(shape, dtype, device, generator) for shape in shapes]
        turn = torch.rand((angles[0], 1, tokens, angles[1]), generator=generator) * 2 * torch.pi
        cos, sin = (part.to(device=device, dtype=dtype) for part in (turn.cos(), turn.sin()))
        positions = torch.randperm(length, generator=generator)[:tokens].to(device)
        return *tensors, cos, sin, positions, rounding.value

    sizes = rows_of((batch, tokens, *heads, *widths, length, *angles))
    return Sample(name=f"{sizes}-{str(dtype).removeprefix('torch.')}-{rounding}", make=make)


CACHED_SAMPLES = (
    cached_sample(2, (4, 2), 1, (16, 16), 1, (2, 16), torch.bfloat16, RotaryRounding.PRODUCTS),
    cached_sample(3, (6, 2), 1, (16, 16), 7, (1, 8), torch.float16, RotaryRounding.PRODUCTS),
    cached_sample(1, (3, 1), 5, (6, 10), 11, (1, 6), torch.float32, RotaryRounding.PRODUCTS),
    cached_sample(2, (4, 4), 3, (128, 64), 5, (2, 64), torch.bfloat16, RotaryRounding.FP32),
)
"""In the first sample, the caches are as long as there are tokens."""

DRAWS: Mapping[str, Draw | Indices] = {**ANGLES, **POSITIONS}
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor positions, "
    "str rotary_rounding) -> (Tensor, Tensor, Tensor)"
)


cached_rotary = define(
    "cached_rotary",
    SCHEMA,
    reference=rope_cache_reference,
    fake=rope_cache_fake,
    samples=CACHED_SAMPLES,
    draws=DRAWS,
)
