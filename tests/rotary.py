"""QK norm and rotary embedding in the spellings that models have, and near them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers import llama, randn

Q_HEADS, K_HEADS, HEAD = 4, 2, 16
QW, KW = (1 + 0.1 * randn(HEAD, dtype=torch.float32, seed=seed) for seed in (8, 9))


def rotate_half(x: Tensor) -> Tensor:
    """Hugging Face's."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    """Hugging Face's for GLM and Cohere: neighbours."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def hugging_face(
    x: Tensor, cos: Tensor, sin: Tensor, rotated: int = HEAD, turn: Callable[[Tensor], Tensor] = rotate_half
) -> Tensor:
    """x [B, heads, S, head_dim], cos [B, S, rotated]"""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if rotated == x.shape[-1]:
        return x * cos + turn(x) * sin
    part, rest = x[..., :rotated], x[..., rotated:]
    return torch.cat((part * cos + turn(part) * sin, rest), dim=-1)


def broadcast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, S, head_dim], cos of any shape that broadcasts to it"""
    return x * cos + rotate_half(x) * sin


def vllm(x: Tensor, cos: Tensor, sin: Tensor, rotated: int = HEAD, neox: bool = True, wide: bool = False) -> Tensor:
    """x [tokens, heads * head_dim], cos [tokens, rotated / 2]"""
    shape = x.shape
    x = x.view(shape[0], -1, HEAD)
    part, rest = x[..., :rotated], x[..., rotated:]
    part = part.float() if wide else part
    cos, sin = cos.unsqueeze(-2).to(part.dtype), sin.unsqueeze(-2).to(part.dtype)
    x1, x2 = torch.chunk(part, 2, dim=-1) if neox else (part[..., ::2], part[..., 1::2])
    o1, o2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    part = torch.cat((o1, o2), dim=-1) if neox else torch.stack((o1, o2), dim=-1).flatten(-2)
    return torch.cat((part.to(x.dtype), rest), dim=-1).reshape(shape)


def hugging_face_in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return hugging_face(x.float(), cos.float(), sin.float()).to(x.dtype)


def vllm_in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return vllm(x, cos, sin, wide=True)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return llama(x, None, weight.to(x.dtype))[0]


def heads_first(rotate: Callable[..., Tensor] = hugging_face, norm: Callable[..., Tensor] = normed) -> Any:
    """A layer's queries and keys in Hugging Face's layout: normed as [B, S, heads, D], rotated as [B, heads, S, D]."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (norm(x, weight).transpose(1, 2) for x, weight in ((q, QW), (k, KW)))
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return function


def heads_last(rotate: Callable[..., Tensor] = vllm, norm: Callable[..., Tensor] = normed) -> Any:
    """In vLLM's: normed as [tokens, heads, D], rotated as [tokens, heads * D]."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (norm(x.view(x.shape[0], -1, HEAD), weight).view(x.shape) for x, weight in ((q, QW), (k, KW)))
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return function


def angles(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    turn = 6 * randn(*shape, dtype=torch.float32, seed=7)
    return turn.cos().to(dtype), turn.sin().to(dtype)


def batched(dtype: torch.dtype = torch.bfloat16, rotated: int = HEAD) -> tuple[Tensor, ...]:
    """Arguments of `heads_first`."""
    q, k = (randn(2, 5, heads, HEAD, dtype=dtype, seed=heads) for heads in (Q_HEADS, K_HEADS))
    return q, k, *angles(1, 5, rotated, dtype=dtype)


def flat(dtype: torch.dtype = torch.bfloat16, rotated: int = HEAD) -> tuple[Tensor, ...]:
    """Arguments of `heads_last`."""
    q, k = (randn(7, heads * HEAD, dtype=dtype, seed=heads) for heads in (Q_HEADS, K_HEADS))
    return q, k, *angles(7, rotated // 2, dtype=dtype)
