"""The fusions of a decode step's attention with the ops before it: rotary embedding, with or without QK norm, and the
writes of the new keys and values into the static caches that attention reads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import (
    AttentionRounding,
    DialectOp,
    RotaryRounding,
    Rounding,
    Sample,
    define,
    random_tensor,
)
from fuseplan.record import Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.attention import unequal_lengths
from fuseplan.rules.families.cached_rotary import CachedRule, NormedCachedRule, rope_cache
from fuseplan.rules.families.linear import DEFAULT_ON
from fuseplan.rules.families.rotary import normed
from fuseplan.rules.parts.attention import attention, repeat_heads
from fuseplan.rules.parts.attention.op import draw_keys, draw_mask
from fuseplan.rules.parts.cache_write import CACHES
from fuseplan.rules.parts.cached_rotary import cached_rotary
from fuseplan.rules.parts.cached_rotary.op import cached_sample
from fuseplan.rules.parts.eager_attention import eager_attention


def _attending(attend: DialectOp, samples: Sequence[Sample]) -> DialectOp:
    """Defines the fused op that writes the caches and attends to them.

    q, k_cache, v_cache = rope_cache(q, k, v, ...);  y = attend(q, k_cache, v_cache, ...), each as its own reference
    computes it. It takes the arguments of `rope_cache`, then those of `attend` from the mask on; the caches are the
    keys and values. It yields (y, k_cache, v_cache): y as `attend` yields it for contiguous queries, and the updated
    caches. It raises the errors of both.

    Args:
        attend: `attention`, with at least as many heads of queries as of keys, or `eager_attention`.
        samples: samples of the fused op.
    """
    count, own = len(rope_cache.parameters), [*rope_cache.parameters, *attend.parameters[3:]]

    def run(kind: str, arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        written = getattr(rope_cache, kind)(*arguments[:count])
        return getattr(attend, kind)(*written, *arguments[count:]), *written[1:]

    def reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run("reference", arguments)

    def fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run("fake", arguments)

    reference.__doc__ = f"rope_cache -> {attend.name}, each as its own reference computes it."
    return define(
        f"rope_cached_{attend.name}",
        f"({', '.join(own)}) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        samples=samples,
        fused=True,
        error_factor=attend.error_factor,
        draws={**rope_cache.draws, **attend.draws, "k_cache": draw_keys},
        writes=CACHES,
    )


def _sample(cached: Sample, *, masked: bool) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        written = cached.make(device, generator)
        q, mask = written[0], None
        if masked:
            shape = (q.shape[0], 1, q.shape[2], written[3].shape[2])
            mask = draw_mask(shape, torch.device("cpu"), generator).to(device=device, dtype=q.dtype)
        kernel = "cpu" if device.type == "cpu" else ("efficient" if masked else "flash")
        return *written, mask, q.shape[-1] ** -0.5, False, kernel

    return Sample(name=f"{cached.name}{'-masked' * masked}", make=make)


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
"""In the third sample, the caches are as long as there are tokens."""

_SAMPLES = [_sample(each, masked=masked) for each, masked in zip(_CACHED, (True, True, False, True), strict=True)]
_NORMS = (Rounding.LLAMA, Rounding.GPT_OSS, Rounding.GEMMA, Rounding.LLAMA)
_CAPS = (None, 2.0, 3.0, None)

rope_cached_attention = _attending(attention, _SAMPLES)
qk_norm_rope_cached_attention = normed(
    rope_cached_attention, "qk_norm_rope_cached_attention", [*zip(_SAMPLES, _NORMS, strict=True)]
)
rope_cached_eager_attention = _attending(
    eager_attention, [_eager_sample(each, softcap=softcap) for each, softcap in zip(_SAMPLES, _CAPS, strict=True)]
)


class _AttendingRule(CachedRule):
    """The refusals of rules that write caches and attend to them."""

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses matches that the rules of either part refuse."""
        read = {"k": m.values["k_cache"], "v": m.values["v_cache"], "mask": m.values["mask"]}
        return super().check(m) or unequal_lengths(Bindings(m.rule, read))


class CachedAttention(_AttendingRule):
    """cached_rotary(q, k, v, k_cache, v_cache) -> repeat_heads of both -> attention  =>  one op that writes in place.

    k_cache[:, :, positions] = rotary(k), and v;   y = softmax(rotary(q) @ repeat(k_cache)^T * scale + mask) @
    repeat(v_cache)
    """

    name, flags = "cached_attention", ("fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
    opt_in, default_on = "fuse_cached_attention", DEFAULT_ON
    op, core = rope_cached_attention, attention

    def pattern(self, groups: Any, **bound: Any) -> Any:
        q_out, *caches = _items(cached_rotary(*(bound[name] for name in cached_rotary.arguments)))
        return _attended(q_out, caches, groups, *(bound[name] for name in attention.arguments[3:]))


class CachedEagerAttention(_AttendingRule):
    """cached_rotary(q, k, v, k_cache, v_cache) -> eager_attention  =>  one op that writes in place.

    Like `CachedAttention`, for spelled-out attention: scores may have a soft-cap, and heads a sink.
    """

    name, flags = "cached_eager_attention", ("fuse_cached_attention", "fuse_eager_attention", "fuse_rope_cache")
    opt_in = "fuse_cached_attention"
    op, core = rope_cached_eager_attention, eager_attention

    def pattern(self, **bound: Any) -> Any:
        written = _items(cached_rotary(*(bound[name] for name in cached_rotary.arguments)))
        return eager_attention(*written, *(bound[name] for name in eager_attention.arguments[3:])), *written[1:]


class QkNormCachedAttention(NormedCachedRule, _AttendingRule):
    """rms_norm(q), rms_norm(k) (-> transpose) -> rotary_embedding -> cache_write -> repeat_heads -> attention  =>  one
    op that writes in place.

    Like `CachedAttention`, with n = rms_norm(x) * weight for q and k.
    """

    name = "qk_norm_cached_attention"
    flags = ("enable_qk_norm_rope_fusion", "fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
    opt_in, default_on = "fuse_cached_attention", DEFAULT_ON
    op, core = qk_norm_rope_cached_attention, attention

    def pattern(self, groups: Any, **bound: Any) -> Any:
        how = (bound[name] for name in attention.arguments[3:])
        return _attended(*self._written(bound), groups, *how)


def _items(results: Any) -> tuple[Any, Any, Any]:
    return results[0], results[1], results[2]


def _attended(q: Any, caches: Any, groups: Any, *how: Any) -> tuple[Any, ...]:
    """Attention over both caches with repeated heads, and the caches."""
    return attention(q, *(repeat_heads(each, groups) for each in caches), *how), *caches


CACHED_ATTENTION_RULES: tuple[Rule, ...] = (
    CachedAttention(),
    CachedEagerAttention(),
    QkNormCachedAttention(transposes=False),
    QkNormCachedAttention(transposes=True),
)
