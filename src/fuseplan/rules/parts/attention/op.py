"""Scaled dot-product attention as torch's own kernels compute it, with heads of keys and values that queries share.

SDPA fixes no order of accumulation, and each of torch's kernels has its own. So a fused op is compared with the kernel
that the graph calls, run on repeated heads: the reference in a narrow dtype runs that kernel, and the reference in
float64 is plain PyTorch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import Sample, define, draw_activations
from fuseplan.rules.parts.attention.kernels import KERNELS

MOST_SCORES = 2**26
"""The most scores that an exact reference holds at a time."""


def repeat_heads_reference(x: Tensor, groups: int) -> Tensor:
    """y = x.repeat_interleave(groups, dim=1)

    Args:
        x: [batch, heads, length, head_dim].
        groups: copies of each head, next to each other.

    Returns:
        [batch, heads * groups, length, head_dim] in x's dtype, contiguous.
    """
    batch, heads, length, width = x.shape
    return x.unsqueeze(2).expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def repeat_heads_fake(x: Tensor, groups: int) -> Tensor:
    """Shape and dtype of `repeat_heads_reference`."""
    batch, heads, length, width = x.shape
    return x.new_empty((batch, heads * groups, length, width))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, kernel: str
) -> Tensor:
    """y = softmax(q @ k^T * scale + mask) @ v, by the named kernel; in float64 by plain PyTorch.

    Args:
        q: [batch, q_heads, queries, head_dim].
        k: [batch, heads, keys, head_dim]; q_heads is a multiple of heads, and neighbouring query heads share one.
        v: [batch, heads, keys, value_dim].
        mask: added to the scores, broadcasts to [batch, q_heads, queries, keys]; None: no mask.
        scale: multiplies the scores.
        is_causal: query i sees only keys 0 to i.
        kernel: one of `KERNELS`.

    Returns:
        [batch, q_heads, queries, value_dim] in q's dtype and in the kernel's layout, which follows q's.

    Raises:
        KeyError: no kernel of that name is known.
    """
    if q.dtype is torch.float64 or 0 in (*q.shape, *k.shape):  # some of torch's kernels refuse empty tensors
        return exact_attention(q, k, v, mask, scale, is_causal=is_causal)
    groups = q.shape[1] // k.shape[1]
    k, v = (each if groups == 1 else repeat_heads_reference(each, groups) for each in (k, v))
    result: Tensor = KERNELS[kernel].run(q, k, v, mask, scale, is_causal)[0]
    return result


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention without casts, some queries of one batch element at a time.

    Args:
        q: see `attention_reference`.
        k: see there.
        v: see there.
        mask: see there.
        scale: see there.
        is_causal: see there.
        softcap: c of `c * tanh(scores / c)`, before the mask is added; None: no softcap.
        sinks: [q_heads], an additional logit without a value for every query of a head; None: no sinks.
    """
    batch, heads, queries, _ = q.shape
    groups, keys = heads // k.shape[1], k.shape[2]
    full = None if mask is None else mask.expand(batch, heads, queries, keys)
    result = q.new_empty((batch, heads, queries, v.shape[-1]))
    step = max(1, MOST_SCORES // max(1, heads * keys))
    for row in range(batch):
        own_k, own_v = (repeat_heads_reference(each[row : row + 1], groups)[0] for each in (k, v))
        for first in range(0, queries, step):
            last = min(first + step, queries)
            scores = q[row, :, first:last] @ own_k.mT * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if full is not None:
                scores += full[row, :, first:last]
            if is_causal:
                seen = torch.ones((last - first, keys), dtype=torch.bool, device=q.device).tril(first)
                scores.masked_fill_(~seen, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(-1, last - first, 1)], -1)
            result[row, :, first:last] = scores.softmax(-1)[..., :keys] @ own_v
    return result


def attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, kernel: str
) -> Tensor:
    """Shape, dtype and layout of `attention_reference`, by torch's own fake implementation of the kernel."""
    result: Tensor = KERNELS[kernel].run(q, k, v, mask, scale, is_causal)[0]
    return q.new_empty_strided(result.shape, result.stride(), dtype=result.dtype)


def draw_mask(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal values, one in four of them minus infinity; every query sees the first key."""
    values = torch.randn(shape, device=device, generator=generator)
    hidden = torch.rand(shape, device=device, generator=generator) < 0.25
    hidden[..., :1] = False
    return values.masked_fill_(hidden, -torch.inf)


def draw_keys(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal values, so that the softmax neither picks a single key nor averages all of them."""
    return torch.randn(shape, device=device, generator=generator)


def _repeat_sample(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype), groups

    return Sample(name=f"{'x'.join(map(str, shape))}x{groups}-{str(dtype).removeprefix('torch.')}", make=make)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    batch: int
    heads: tuple[int, int]
    queries: int
    keys: int
    width: int
    masked: bool
    is_causal: bool = False
    dtype: torch.dtype = torch.bfloat16

    def sample(self, *, shared: bool) -> Sample:
        """A sample whose keys and values have fewer heads than the queries (`shared`), or as many."""
        q_heads, heads = self.heads if shared else (self.heads[0],) * 2

        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            cpu = torch.device("cpu")
            q, k, v = (
                draw((self.batch, count, length, self.width), cpu, generator).to(device=device, dtype=self.dtype)
                for draw, count, length in (
                    (draw_keys, q_heads, self.queries), (draw_keys, heads, self.keys),
                    (draw_activations, heads, self.keys),
                )
            )  # fmt: skip
            shape = (self.batch, 1, self.queries, self.keys)
            mask = draw_mask(shape, cpu, generator).to(device=device, dtype=self.dtype) if self.masked else None
            kernel = "cpu" if device.type == "cpu" else ("efficient" if self.masked else "flash")
            return q, k, v, mask, self.width**-0.5, self.is_causal, kernel

        parts = (self.batch, *self.heads, self.queries, self.keys, self.width, str(self.dtype).removeprefix("torch."))
        flags = "-masked" * self.masked + "-causal" * self.is_causal
        return Sample(name=f"{'-'.join(map(str, parts))}{flags}", make=make)


SIZES = (
    _Sizes(batch=3, heads=(8, 2), queries=1, keys=33, width=16, masked=True),
    _Sizes(batch=1, heads=(6, 2), queries=1, keys=40, width=32, masked=True, dtype=torch.float16),
    _Sizes(batch=2, heads=(4, 4), queries=7, keys=7, width=16, masked=False, is_causal=True),
    _Sizes(batch=2, heads=(4, 1), queries=5, keys=24, width=24, masked=True, dtype=torch.float32),
)
SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, str kernel) -> Tensor"
ERROR_FACTOR = 8.0
"""Allows for another order of accumulation in float32: over the few elements of a head, the reference's own worst error
may be small by luck.
"""

DRAWS = {"q": draw_keys, "k": draw_keys, "mask": draw_mask}

repeat_heads = define(
    "repeat_heads",
    "(Tensor x, int groups) -> Tensor",
    reference=repeat_heads_reference,
    fake=repeat_heads_fake,
    samples=[_repeat_sample((3, 2, 5, 16), 4, torch.bfloat16), _repeat_sample((1, 3, 7, 8), 2, torch.float32)],
)

attention = define(
    "attention",
    SCHEMA,
    reference=attention_reference,
    fake=attention_fake,
    samples=[sizes.sample(shared=False) for sizes in SIZES],
    error_factor=ERROR_FACTOR,
    draws=DRAWS,
)
