"""Attention of one query token over a static cache that its own key and value are written into by the same kernel, with
rotary embedding, and an RMSNorm before it, of query and key.

q, key = rotary(norm(q)), rotary(norm(k));  k_cache[:, :, position] = key,  v_cache[:, :, position] = v
y = softmax(q @ repeat(k_cache)^T * scale + mask) @ repeat(v_cache)

`fuseplan.providers.triton.attention` runs it. Of the programs that share the keys of a head, the one whose tile of keys
the position lies in writes there, whatever the mask says, and starts with the new key, which it takes from registers:
no program reads what another one writes, and what the cache held at the position is read by none. As in
`fuseplan.providers.triton.cached_rotary`, nothing is written at a position that the caches don't have.

The equivalent eager code is `fuseplan.families.cached_attention.qk_norm_rope_cached_attention_reference`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import RotaryRounding, Rounding
from fuseplan.providers.triton.cached_rotary import QkNorm, broadcast, place_of
from fuseplan.providers.triton.qk_norm_rope import rotated_rows


@triton.jit
def arrived(
    token, q_rows, q_dim, is_row, batch, head, column, is_column, value_column, is_value, keys, dtype: tl.constexpr,
    HALF: tl.constexpr, SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr, ROUNDS_NORMED: tl.constexpr,
    ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """The rotated queries at the pointers `q_rows` [ROWS], a head's new key [1, COLUMNS] and value [1, VALUE_COLUMNS],
    where these belong, and whether the cache has that place; `token` is `Token.arguments`.
    """
    k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr, q_weight_ptr, k_weight_ptr, steps, eps = token
    k, v, cos, sin, q_weight_dim, k_weight_dim = steps
    position, is_there = place_of(positions_ptr, 0, 0, keys)
    cosines, sines = cos_ptr + batch * cos[0], sin_ptr + batch * sin[0]
    q = rotated_rows(
        q_rows, q_dim, is_row, q_weight_ptr, q_weight_dim, cosines, cos[2], sines, sin[2], eps, column, is_column,
        dtype, HALF, SHARED_ANGLES, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS,
    )  # fmt: skip
    one = tl.zeros((1,), tl.int64)
    key = rotated_rows(
        k_ptr + batch * k[0] + head * k[1] + one, k[3], one == 0, k_weight_ptr, k_weight_dim, cosines, cos[2], sines,
        sin[2], eps, column, is_column, dtype, HALF, SHARED_ANGLES, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS,
    )  # fmt: skip
    value = tl.load(
        v_ptr + batch * v[0] + head * v[1] + value_column[None, :] * v[3], mask=is_value[None, :], other=0.0
    )
    return q, key, value, position, is_there


@dataclass(frozen=True, kw_only=True)
class Token:
    """What is written into the caches before a query reads them.

    Attributes:
        k: [batch, heads, 1, head_dim], which isn't rotated, as the queries.
        v: [batch, heads, 1, value_dim].
        cos: [batch or 1, 1, 1, head_dim], or half of head_dim.
        sin: cos's shape.
        positions: [1], an integer; where the caches don't have it, nothing is written.
        rotary_rounding: of the rotation.
        norm: of queries and keys; None: there is none.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    rotary_rounding: RotaryRounding
    norm: QkNorm | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `arrived`: tensors, strides and the norms' eps."""
        norm = self.norm
        weights = (self.cos, self.cos) if norm is None else (norm.q_weight, norm.k_weight)
        steps = (
            self.k.stride(), self.v.stride(), broadcast(self.cos), broadcast(self.sin),
            *(weight.stride(-1) for weight in weights),
        )  # fmt: skip
        eps = 0.0 if norm is None else norm.eps
        return self.k, self.v, self.cos, self.sin, self.positions, *weights, steps, eps

    def constants(self, width: int) -> Mapping[str, Any]:
        """What a kernel is compiled for, of heads of a width."""
        convention = Rounding.LLAMA if self.norm is None else self.norm.rounding
        return {
            "SHARED_ANGLES": self.cos.shape[-1] == width // 2,
            "NORMS": self.norm is not None,
            "ROUNDS_NORMED": convention.rounds_normed,
            "ADDS_ONE": convention.adds_one,
            "ROUNDS_PRODUCTS": self.rotary_rounding is RotaryRounding.PRODUCTS,
        }


NO_TOKEN: Mapping[str, Any] = dict.fromkeys(
    ("SHARED_ANGLES", "NORMS", "ROUNDS_NORMED", "ADDS_ONE", "ROUNDS_PRODUCTS"), False
)
"""`Token.constants` where nothing is written."""
