"""Attention op by op, as in a model's plain PyTorch, optionally with a soft-cap of its scores and with sinks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import AttentionRounding, Sample, compute_dtype, define
from fuseplan.rules.parts.attention.op import (
    DRAWS,
    ERROR_FACTOR,
    draw_keys,
    draw_mask,
    exact_attention,
    repeat_heads_reference,
)


def eager_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None,
    rounding: str,
) -> Tensor:  # fmt: skip
    """y = softmax(cat(softcap * tanh(q @ k^T * scale / softcap) + mask, sinks))[..., :keys] @ v

    Args:
        q: [batch, q_heads, queries, head_dim].
        k: [batch, heads, keys, head_dim] in q's dtype; q_heads is a multiple of heads, and neighbouring query heads
            share one.
        v: [batch, heads, keys, value_dim] in q's dtype.
        mask: added to the scores, in q's dtype, broadcasts to [batch, q_heads, queries, keys]; None: no mask.
        sinks: [q_heads] in q's dtype: an additional logit for every query of a head, which takes weight and has no
            value; None: no sinks.
        scale: multiplies the scores.
        softcap: bounds the scores; None: no bound.
        rounding: one of `AttentionRounding`.

    Returns:
        [batch, q_heads, queries, value_dim] in q's dtype, contiguous.

    Raises:
        ValueError: `rounding` isn't one of `AttentionRounding`.
        RuntimeError: shapes don't fit; the message is eager mode's.
    """
    if AttentionRounding(rounding) is AttentionRounding.FLOAT32 and q.dtype != compute_dtype(q.dtype):
        q_wide, k, v = (each.float() for each in (q, k, v))
        mask, sinks = (None if each is None else each.float() for each in (mask, sinks))
        return eager_attention_reference(q_wide, k, v, mask, sinks, scale, softcap, rounding).to(q.dtype)
    if q.dtype is torch.float64:
        return exact_attention(q, k, v, mask, scale, softcap=softcap, sinks=sinks)
    k, v = (repeat_heads_reference(each, q.shape[1] // max(1, k.shape[1])) for each in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1, dtype=compute_dtype(q.dtype)).to(q.dtype)
    return weights[..., : k.shape[2]] @ v


def eager_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None,
    rounding: str,
) -> Tensor:  # fmt: skip
    """Shape, dtype and layout of `eager_attention_reference`."""
    return q.new_empty((*q.shape[:3], v.shape[3]))


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    batch: int
    heads: tuple[int, int]
    queries: int
    keys: int
    width: int
    masked: bool = True
    sinks: bool = False
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16

    def sample(self) -> Sample:
        """A sample; in narrow dtypes it rounds as eager mode does."""
        q_heads, heads = self.heads

        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            def drawn(*shape: int, draw: Any = draw_keys) -> Tensor:
                value: Tensor = draw(shape, torch.device("cpu"), generator)
                return value.to(device=device, dtype=self.dtype)

            q = drawn(self.batch, q_heads, self.queries, self.width)
            k, v = (drawn(self.batch, heads, self.keys, self.width) for _ in range(2))
            mask = drawn(self.batch, 1, self.queries, self.keys, draw=draw_mask) if self.masked else None
            sinks = drawn(q_heads) if self.sinks else None
            rounding = AttentionRounding.FLOAT32 if self.dtype is torch.float32 else AttentionRounding.EAGER
            return q, k, v, mask, sinks, self.width**-0.5, self.softcap, rounding.value

        parts = (self.batch, *self.heads, self.queries, self.keys, self.width, str(self.dtype).removeprefix("torch."))
        flags = "-masked" * self.masked + "-sinks" * self.sinks + "-capped" * (self.softcap is not None)
        return Sample(name=f"{'-'.join(map(str, parts))}{flags}", make=make)


SAMPLES = tuple(
    sizes.sample()
    for sizes in (
        _Sizes(batch=3, heads=(8, 2), queries=1, keys=33, width=16),
        _Sizes(batch=1, heads=(6, 2), queries=1, keys=40, width=32, softcap=2.0, dtype=torch.float16),
        _Sizes(batch=2, heads=(8, 1), queries=3, keys=40, width=64, sinks=True),
        _Sizes(batch=1, heads=(4, 4), queries=5, keys=24, width=24, masked=False, sinks=True, softcap=3.0),
        _Sizes(batch=2, heads=(4, 2), queries=7, keys=9, width=16, dtype=torch.float32),
    )
)
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, float? softcap, str rounding) -> Tensor"
)

eager_attention = define(
    "eager_attention",
    SCHEMA,
    reference=eager_attention_reference,
    fake=eager_attention_fake,
    samples=SAMPLES,
    error_factor=ERROR_FACTOR,
    draws={**DRAWS, "sinks": draw_keys},
)
