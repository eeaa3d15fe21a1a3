"""Attention with sinks as one opaque op, as serving engines have it, so that the compiler's graph has one node a layer.

Shapes: B batch, S sequence, L positions attended to, Q query heads, K kv heads, G = Q/K query heads per kv head,
D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def causal_mask(queries: Tensor, keys: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """`0 where 0 <= query - key (< window), else -inf`: positions [B, S] and [B, L] -> [B, 1, 1, S, L].

    A window of 0 is none.
    """
    distance = queries[:, None, None, :, None] - keys[:, None, None, None, :]
    unseen = (distance < 0) | (distance >= window) if window else distance < 0
    return torch.zeros_like(distance, dtype=dtype).masked_fill(unseen, -math.inf)


@torch.library.custom_op("gpt_oss::attention", mutates_args=())
def attention(
    q_BSQD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, sinks_Q: Tensor, queries: Tensor, keys: Tensor, window: int
) -> Tensor:
    """`softmax([q k^T / sqrt(D) + causal_mask, sink])[:-1] v`, head by head.

    The sink is a logit per head that takes probability and gives no value. The softmax is in float32.

    Args:
        q_BSQD: [B, S, Q, D], any float dtype; head q reads kv head q // G.
        k_BLKD: [B, L, K, D] of the same dtype.
        v_BLKD: [B, L, K, D] of the same dtype.
        sinks_Q: [Q] of the same dtype.
        queries: Positions of the queries, [B or 1, S] int64.
        keys: Positions of the keys, [B or 1, L] int64.
        window: How many positions back a query sees, itself included; 0 for all.

    Returns:
        [B, S, Q, D] in the dtype of `q_BSQD`.
    """
    (B, S, Q, D), K = q_BSQD.shape, k_BLKD.shape[2]
    q_BSKGD = q_BSQD.unflatten(2, (K, Q // K))
    scores_BKGSL = torch.einsum("bskgd,blkd->bkgsl", q_BSKGD, k_BLKD) * D**-0.5
    scores_BKGSL = scores_BKGSL + causal_mask(queries, keys, window, scores_BKGSL.dtype)
    sinks = sinks_Q.view(K, Q // K, 1, 1).expand(B, K, Q // K, S, 1)
    weights_BKGSL = torch.cat((scores_BKGSL, sinks), -1).softmax(-1, dtype=torch.float32)[..., :-1]
    out_BSKGD = torch.einsum("bkgsl,blkd->bskgd", weights_BKGSL.to(v_BLKD.dtype), v_BLKD)
    return out_BSKGD.reshape(B, S, Q, D).contiguous()


@attention.register_fake
def _(
    q_BSQD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, sinks_Q: Tensor, queries: Tensor, keys: Tensor, window: int
) -> Tensor:
    return q_BSQD.new_empty(q_BSQD.shape)


@register_flop_formula(torch.ops.gpt_oss.attention)
def _operations(q_BSQD: torch.Size, k_BLKD: torch.Size, *others: object, **more: object) -> int:
    """Two products of every query with every position."""
    return 4 * q_BSQD.numel() * k_BLKD[1]
