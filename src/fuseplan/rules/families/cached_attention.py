"""The fusions of a decode step's attention with what comes before it: rotary embedding, with QK norm before it or
without, and the writes of the new keys and values into the static caches that attention reads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import (
    AttentionRounding,
    RotaryRounding,
    Rounding,
    Sample,
    define,
    draw_near_one,
    random_tensor,
)
from fuseplan.record import Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.attention import unequal_lengths
from fuseplan.rules.families.cached_rotary import (
    CachedRule,
    NormedCachedRule,
    qk_norm_rope_cache,
    rope_cache,
)
from fuseplan.rules.families.linear import DEFAULT_ON
from fuseplan.rules.parts.attention import attention, repeat_heads
from fuseplan.rules.parts.attention.op import DRAWS as ATTENTION_DRAWS
from fuseplan.rules.parts.attention.op import ERROR_FACTOR, draw_keys, draw_mask
from fuseplan.rules.parts.cache_write import CACHES, cache_write
from fuseplan.rules.parts.cached_rotary import cached_rotary
from fuseplan.rules.parts.cached_rotary.op import DRAWS as CACHED_DRAWS
from fuseplan.rules.parts.cached_rotary.op import cached_sample
from fuseplan.rules.parts.eager_attention import eager_attention
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.rotary import rotary_embedding


def rope_cached_attention_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cache, v_cache = rope_cache(q, k, v, ...);  y = grouped_attention(q, k_cache, v_cache, mask, scale)

    Args:
        arguments: those of `rope_cache_reference`, then from the mask on those of `attention_reference`, whose keys and
            values are the caches, of `length`.

    Returns:
        (y, k_cache, v_cache): y [batch, q_heads, tokens, value_dim] in q's dtype, laid out as the kernel does of
        contiguous queries, and the caches as they are afterwards.

    Raises:
        IndexError: a position lies outside of the cache.
        KeyError: no kernel of that name is known.
        ValueError: `rotary_rounding` isn't one of `RotaryRounding`.
    """
    return _attending(rope_cache.reference, attention.reference, len(rope_cache.parameters), *arguments)


def qk_norm_rope_cached_attention_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """rope_cached_attention of rms_norm(q, q_weight) and rms_norm(k, k_weight), each as its own reference computes it.

    Args:
        arguments: those of `qk_norm_rope_cache_reference`, then as for `rope_cached_attention_reference`.

    Returns:
        As `rope_cached_attention_reference`.

    Raises:
        IndexError: a position lies outside of the cache.
        KeyError: no kernel of that name is known.
        ValueError: `rounding` or `rotary_rounding` isn't one of theirs.
    """
    return _attending(qk_norm_rope_cache.reference, attention.reference, len(qk_norm_rope_cache.parameters), *arguments)


def rope_cached_eager_attention_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cache, v_cache = rope_cache(q, k, v, ...);  y = eager_attention(q, k_cache, v_cache, mask, sinks, scale)

    Args:
        arguments: those of `rope_cache_reference`, then from the mask on those of `eager_attention_reference`, whose
            keys and values are the caches, of `length`.

    Returns:
        (y, k_cache, v_cache): y [batch, q_heads, tokens, value_dim] in q's dtype, contiguous, and the caches as they
        are afterwards.

    Raises:
        IndexError: a position lies outside of the cache.
        ValueError: `rotary_rounding` or `rounding` isn't one of theirs.
    """
    return _attending(rope_cache.reference, eager_attention.reference, len(rope_cache.parameters), *arguments)


def _attending(
    write: Callable[..., Any], attend: Callable[..., Tensor], count: int, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What attends to what is written, of which the first `count` arguments are."""
    written = write(*arguments[:count])
    return attend(*written, *arguments[count:]), *written[1:]


def _sample(cached: Sample, *, masked: bool, rounding: Rounding | None = None) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        *tensors, cos, sin, positions, rotary_rounding = cached.make(device, generator)
        q, length = tensors[0], tensors[3].shape[2]
        mask = None
        if masked:
            shape = (q.shape[0], 1, q.shape[2], length)
            mask = draw_mask(shape, torch.device("cpu"), generator).to(device=device, dtype=q.dtype)
        kernel = "cpu" if device.type == "cpu" else ("efficient" if masked else "flash")
        attended = (rotary_rounding, mask, q.shape[-1] ** -0.5, False, kernel)
        if rounding is None:
            return *tensors, cos, sin, positions, *attended
        noise = [random_tensor(q.shape[-1:], torch.float32, device, generator) for _ in range(2)]
        weights = [(1 + 0.1 * each).to(q.dtype) for each in noise]
        return *tensors, *weights, cos, sin, positions, 1e-6, rounding.value, *attended

    name = f"{cached.name}{'-masked' * masked}"
    return Sample(name=name if rounding is None else f"{name}-{rounding}", make=make)


def _eager_sample(attended: Sample, *, softcap: float | None) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        *written, mask, scale, _, _ = attended.make(device, generator)
        q = written[0]
        sinks = None if softcap is not None else random_tensor(q.shape[1:2], q.dtype, device, generator)
        rounding = AttentionRounding.FLOAT32 if q.dtype is torch.float32 else AttentionRounding.EAGER
        return *written, mask, sinks, scale, softcap, rounding.value

    return Sample(name=f"{attended.name}-{'sinks' if softcap is None else 'capped'}", make=make)


_CACHED = (
    cached_sample(3, (8, 2), 1, (16, 16), 33, (3, 16), torch.bfloat16, RotaryRounding.PRODUCTS),
    cached_sample(1, (6, 2), 1, (32, 32), 40, (1, 16), torch.float16, RotaryRounding.FP32),
    cached_sample(2, (4, 1), 1, (24, 24), 1, (2, 24), torch.bfloat16, RotaryRounding.PRODUCTS),
    cached_sample(2, (4, 2), 3, (16, 16), 9, (1, 8), torch.float32, RotaryRounding.PRODUCTS),
)
"""Of the third the caches are as long as there are tokens."""

_MASKED = (True, True, False, True)
_DRAWS = {**CACHED_DRAWS, **ATTENTION_DRAWS, "k_cache": draw_keys}

rope_cached_attention = define(
    "rope_cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor positions, "
    "str rotary_rounding, Tensor? mask, float scale, bool is_causal, str kernel) -> (Tensor, Tensor, Tensor)",
    reference=rope_cached_attention_reference,
    fake=partial(_attending, rope_cache.fake, attention.fake, len(rope_cache.parameters)),
    samples=[_sample(each, masked=masked) for each, masked in zip(_CACHED, _MASKED, strict=True)],
    fused=True,
    error_factor=ERROR_FACTOR,
    draws=_DRAWS,
    writes=CACHES,
)

qk_norm_rope_cached_attention = define(
    "qk_norm_rope_cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor q_weight, Tensor k_weight, Tensor cos, "
    "Tensor sin, Tensor positions, float eps, str rounding, str rotary_rounding, Tensor? mask, float scale, "
    "bool is_causal, str kernel) -> (Tensor, Tensor, Tensor)",
    reference=qk_norm_rope_cached_attention_reference,
    fake=partial(_attending, qk_norm_rope_cache.fake, attention.fake, len(qk_norm_rope_cache.parameters)),
    samples=[
        _sample(each, masked=masked, rounding=rounding)
        for each, masked, rounding in zip(
            _CACHED, _MASKED, (Rounding.LLAMA, Rounding.GPT_OSS, Rounding.GEMMA, Rounding.LLAMA), strict=True
        )
    ],
    fused=True,
    error_factor=ERROR_FACTOR,
    draws={**_DRAWS, "q_weight": draw_near_one, "k_weight": draw_near_one},
    writes=CACHES,
)


rope_cached_eager_attention = define(
    "rope_cached_eager_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cos, Tensor sin, Tensor positions, "
    "str rotary_rounding, Tensor? mask, Tensor? sinks, float scale, float? softcap, str rounding) -> "
    "(Tensor, Tensor, Tensor)",
    reference=rope_cached_eager_attention_reference,
    fake=partial(_attending, rope_cache.fake, eager_attention.fake, len(rope_cache.parameters)),
    samples=[
        _eager_sample(each, softcap=softcap)
        for each, softcap in zip(rope_cached_attention.samples, (None, 2.0, 3.0, None), strict=True)
    ],
    fused=True,
    error_factor=eager_attention.error_factor,
    draws={**_DRAWS, "sinks": draw_keys},
    writes=CACHES,
)


class CachedAttention(CachedRule):
    """cached_rotary(q, k, v, k_cache, v_cache) -> repeat_heads of both -> attention  =>  one op that writes in place.

    k_cache[:, :, positions] = rotary(k), and v;   y = softmax(rotary(q) @ repeat(k_cache)^T * scale + mask) @
    repeat(v_cache)
    """

    name, flags = "cached_attention", ("fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
    opt_in, default_on = "fuse_cached_attention", DEFAULT_ON
    op, core = rope_cached_attention, attention

    def pattern(
        self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, cos: Any, sin: Any, positions: Any,
        rotary_rounding: Any, groups: Any, mask: Any, scale: Any, is_causal: Any, kernel: Any,
    ) -> Any:  # fmt: skip
        rotated, *caches = _items(cached_rotary(q, k, v, k_cache, v_cache, cos, sin, positions, rotary_rounding))
        return _attended(rotated, caches, groups, mask, scale, is_causal, kernel)

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses what `rope_cache` and `grouped_attention` do."""
        return super().check(m) or _unequal_masks(m)


class CachedEagerAttention(CachedRule):
    """cached_rotary(q, k, v, k_cache, v_cache) -> eager_attention  =>  one op that writes in place.

    As `CachedAttention`, of attention that is spelled out: scores may have a soft-cap, and heads a sink.
    """

    name, flags = "cached_eager_attention", ("fuse_cached_attention", "fuse_eager_attention", "fuse_rope_cache")
    opt_in = "fuse_cached_attention"
    op, core = rope_cached_eager_attention, eager_attention

    def pattern(
        self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, cos: Any, sin: Any, positions: Any,
        rotary_rounding: Any, mask: Any, sinks: Any, scale: Any, softcap: Any, rounding: Any,
    ) -> Any:  # fmt: skip
        written = _items(cached_rotary(q, k, v, k_cache, v_cache, cos, sin, positions, rotary_rounding))
        return eager_attention(*written, mask, sinks, scale, softcap, rounding), *written[1:]

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses what `rope_cache` and `eager_attention` do."""
        return super().check(m) or _unequal_masks(m)


class QkNormCachedAttention(NormedCachedRule):
    """rms_norm(q), rms_norm(k) (-> transpose) -> rotary_embedding -> cache_write -> repeat_heads -> attention  =>  one
    op that writes in place.

    As `CachedAttention`, of n = rms_norm(x) * weight for q and k.
    """

    name = "qk_norm_cached_attention"
    flags = ("enable_qk_norm_rope_fusion", "fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
    opt_in, default_on = "fuse_cached_attention", DEFAULT_ON
    op, core = qk_norm_rope_cached_attention, attention

    def pattern(
        self, q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any,
        positions: Any, eps: Any, rounding: Any, rotary_rounding: Any, groups: Any, mask: Any, scale: Any,
        is_causal: Any, kernel: Any,
    ) -> Any:  # fmt: skip
        q = self._moved(rms_norm(q, q_weight, eps, rounding))
        k = self._moved(rms_norm(k, k_weight, eps, rounding))
        rotated = rotary_embedding(q, k, cos, sin, rotary_rounding)
        written = cache_write(rotated[1], v, k_cache, v_cache, positions)
        return _attended(rotated[0], (written[0], written[1]), groups, mask, scale, is_causal, kernel)

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses what `qk_norm_rope_cache` and `grouped_attention` do."""
        return super().check(m) or _unequal_masks(m)


def _items(results: Any) -> tuple[Any, Any, Any]:
    return results[0], results[1], results[2]


def _attended(
    q: Any, caches: Any, groups: Any, mask: Any, scale: Any, is_causal: Any, kernel: Any
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Attention over both caches, whose heads are repeated, and the caches."""
    k_cache, v_cache = caches
    shared = repeat_heads(k_cache, groups), repeat_heads(v_cache, groups)
    return attention(q, *shared, mask, scale, is_causal, kernel), k_cache, v_cache


def _unequal_masks(m: Bindings) -> Refusal | None:
    """What attention refuses of the lengths of the caches and the mask."""
    read = {"k": m.values["k_cache"], "v": m.values["v_cache"], "mask": m.values["mask"]}
    return unequal_lengths(Bindings(m.rule, read))


CACHED_ATTENTION_RULES: tuple[Rule, ...] = (
    CachedAttention(),
    CachedEagerAttention(),
    QkNormCachedAttention(tokens_first=False),
    QkNormCachedAttention(tokens_first=True),
)
