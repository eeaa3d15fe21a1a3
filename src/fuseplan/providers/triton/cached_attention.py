"""Attention of one query token over a static cache, in one kernel with the write of the token's key and value into the
cache, and with rotary embedding and optionally an RMSNorm of query and key.

q, key = rotary(norm(q)), rotary(norm(k));  k_cache[:, :, position] = key,  v_cache[:, :, position] = v
y = softmax(q @ repeat(k_cache)^T * scale + mask) @ repeat(v_cache)

`fuseplan.providers.triton.attention` runs it. Among the programs that share the keys of a head, the one whose tile
contains the position writes there, regardless of the mask, before it reads the tile. So no program reads another one's
write, except of the same values, and none reads the cache's former content at the position. As in
`fuseplan.providers.triton.cached_rotary`, nothing is written at a position outside of the caches.

The equivalent eager code is `ops.qk_norm_rope_cached_attention.reference`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import RotaryRounding, Rounding
from fuseplan.providers.triton.cached_rotary import QkNorm, broadcast
from fuseplan.providers.triton.qk_norm_rope import loaded_rows, rotated_rows


@triton.jit
def loaded_queries(
    token, q_rows, q_dim, is_row, batch, column, is_column,
    HALF: tl.constexpr, SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """The queries at the pointers `q_rows` [ROWS], loaded for `rotated_rows`; `token` is `Token.arguments`."""
    _, _, cos_ptr, sin_ptr, _, weight_ptr, _, steps, _ = token
    _, _, cos, sin, weight_dim, _ = steps
    return loaded_rows(
        q_rows, q_dim, is_row, weight_ptr, weight_dim, cos_ptr + batch * cos[0], cos[2], sin_ptr + batch * sin[0],
        sin[2], column, is_column, HALF, SHARED_ANGLES, NORMS,
    )  # fmt: skip


@triton.jit
def write_token(
    token, k_place, k_dim, v_place, v_dim, batch, head, column, is_column, value_column, is_value, zero,
    dtype: tl.constexpr, HALF: tl.constexpr, SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Writes a head's rotated key and its value into the caches, and waits until the whole program sees them."""
    k_ptr, v_ptr, cos_ptr, sin_ptr, _, _, weight_ptr, steps, eps = token
    k, v, cos, sin, _, weight_dim = steps
    one = tl.zeros((1,), tl.int64)
    loaded = loaded_rows(
        k_ptr + batch * k[0] + head * k[1] + one, k[3], one == 0, weight_ptr, weight_dim, cos_ptr + batch * cos[0],
        cos[2], sin_ptr + batch * sin[0], sin[2], column, is_column, HALF, SHARED_ANGLES, NORMS,
    )  # fmt: skip
    value = tl.load(v_ptr + batch * v[0] + head * v[1] + value_column * v[3], mask=is_value, other=0.0)
    key = rotated_rows(loaded, eps, column, zero, dtype, HALF, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS)
    tl.store(k_place + column[None, :] * k_dim, key, mask=is_column[None, :])
    tl.store(v_place + value_column * v_dim, value, mask=is_value)
    tl.debug_barrier()


@dataclass(frozen=True, kw_only=True)
class Token:
    """The token that is written into the caches before its query reads them.

    Attributes:
        k: [batch, heads, 1, head_dim], not rotated yet, like the queries.
        v: [batch, heads, 1, value_dim].
        cos: [batch or 1, 1, 1, head_dim], or half of head_dim.
        sin: the same shape as cos.
        positions: [1], an integer; nothing is written at a position outside of the caches.
        rotary_rounding: rounding of the rotation.
        norm: the norm of queries and keys; None: no norm.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    rotary_rounding: RotaryRounding
    norm: QkNorm | None = None

    @classmethod
    def of(cls, m: Any) -> Self:
        """The token in a fused op's arguments, which are given by name."""
        return cls(
            k=m.k, v=m.v, cos=m.cos, sin=m.sin, positions=m.positions,
            rotary_rounding=RotaryRounding(m.rotary_rounding), norm=QkNorm.of(m),
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Its kernel arguments: tensors, strides and the norms' eps."""
        norm = self.norm
        weights = (self.cos, self.cos) if norm is None else (norm.q_weight, norm.k_weight)
        steps = (
            self.k.stride(), self.v.stride(), broadcast(self.cos), broadcast(self.sin),
            *(weight.stride(-1) for weight in weights),
        )  # fmt: skip
        eps = 0.0 if norm is None else norm.eps
        return self.k, self.v, self.cos, self.sin, self.positions, *weights, steps, eps

    def constants(self, width: int) -> Mapping[str, Any]:
        """The compile-time constants of a kernel, for a head dimension."""
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
"""`Token.constants` for a kernel that writes nothing."""
