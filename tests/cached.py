"""Layers that rotate queries and keys and write keys and values into static caches, in the spellings that models have,
and near them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import randn
from tests.rotary import HEAD, K_HEADS, KW, Q_HEADS, QW, hugging_face, normed

BATCH, LENGTH = 2, 12
Layer = Callable[..., Any]
Write = Callable[[Tensor, Tensor, Tensor], None]


def index_copy(cache: Tensor, positions: Tensor, x: Tensor) -> None:
    """Transformers' `StaticLayer`."""
    cache.index_copy_(2, positions, x)


def assigned(cache: Tensor, positions: Tensor, x: Tensor) -> None:
    """Meta's, and transformers' where `index_copy_` isn't there."""
    cache[:, :, positions] = x


WRITES: dict[str, Write] = {"index_copy": index_copy, "assigned": assigned}


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return x


def layer(
    write: Write = index_copy, *, norm: Callable[..., Tensor] = plain, rotate: Callable[..., Tensor] = hugging_face,
    tokens_first: bool = True, read: Callable[[Tensor], Any] = torch.relu,
) -> Layer:  # fmt: skip
    """q, k, v [B, S, heads, D] of one layer; what reads the caches afterwards stands for attention. Heads are normed in
    this layout, or in [B, heads, S, D].
    """

    def function(
        q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
    ) -> tuple[Any, ...]:
        if tokens_first:
            q, k = norm(q, QW), norm(k, KW)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if not tokens_first:
            q, k = norm(q, QW), norm(k, KW)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        write(k_cache, positions, k)
        write(v_cache, positions, v)
        return q, read(k_cache), read(v_cache)

    return function


def attending(
    inner: Layer, *, repeats: int = 2, mix: Callable[..., tuple[Any, ...]] = lambda *given: given
) -> Layer:  # fmt: skip
    """A layer, of one that yields its caches as they are, whose queries attend to them; a mask comes last. `mix`
    changes what attention reads: queries, repeated keys, repeated values and the mask.
    """

    def function(*given: Tensor) -> Any:
        q, *caches = inner(*given[:8])
        keys, values = (each.repeat_interleave(repeats, dim=1) for each in caches)
        q, keys, values, *mask = mix(q, keys, values, *given[8:])
        return F.scaled_dot_product_attention(q, keys, values, *mask).transpose(1, 2)

    return function


def visible(first: int = 5, tokens: int = 1, *, length: int = LENGTH, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The mask [B, 1, S, length] of tokens from position `first` on, of which the second row is padded on the left."""
    place, key = torch.arange(first, first + tokens)[:, None] % length, torch.arange(length)
    seen = (key <= place) & (key >= torch.arange(BATCH)[:, None, None, None])
    return torch.zeros((), dtype=dtype).where(seen, -torch.inf)


def normed_layer(write: Write = index_copy, **how: Any) -> Layer:
    """The same with QK norm."""
    return layer(write, norm=normed, **how)


def arguments(
    tokens: int = 1, dtype: torch.dtype = torch.bfloat16, *, k_heads: int = K_HEADS, length: int = LENGTH,
    value_width: int = HEAD, first: int = 5,
) -> list[Tensor]:  # fmt: skip
    """Of a layer: the caches hold something, and are written from position `first` on."""
    q = randn(BATCH, tokens, Q_HEADS, HEAD, dtype=dtype, seed=1)
    k = randn(BATCH, tokens, k_heads, HEAD, dtype=dtype, seed=2)
    v = randn(BATCH, tokens, k_heads, value_width, dtype=dtype, seed=3)
    caches = [randn(BATCH, k_heads, length, width, dtype=dtype, seed=4 + width) for width in (HEAD, value_width)]
    turn = 6 * randn(BATCH, tokens, HEAD, dtype=torch.float32, seed=7)
    return [q, k, v, *caches, turn.cos().to(dtype), turn.sin().to(dtype), first + torch.arange(tokens)]


def on_copies(function: Callable[..., Any], given: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """(what a function yields, its arguments afterwards), on copies of the arguments."""
    own = [each.clone() for each in given]
    with torch.inference_mode():
        return function(*own), own
