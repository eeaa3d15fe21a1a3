"""Attention of one query token over a static cache that its own key and value are written into by the same kernel, with
rotary embedding, and an RMSNorm before it, of query and key.

q, key = rotary(norm(q)), rotary(norm(k));  k_cache[:, :, position] = key,  v_cache[:, :, position] = v
y = softmax(q @ repeat(k_cache)^T * scale + mask) @ repeat(v_cache)

`fuseplan.providers.triton.attention` runs it. Of the programs that share the keys of a head, the one whose tile of keys
the position lies in writes there, whatever the mask says, before it reads the tile: no program reads what another one
writes, but the same, and what the cache held at the position is read by none. As in
`fuseplan.providers.triton.cached_rotary`, nothing is written at a position that the caches don't have.

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
    """For `rotated_rows`, the queries at the pointers `q_rows` [ROWS]; `token` is `Token.arguments`."""
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
    """Puts the rotated key of a head and its value where they belong, and waits until the whole program sees them."""
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

    @classmethod
    def of(cls, m: Any) -> Self:
        """That of a fused op's arguments, by their names."""
        return cls(
            k=m.k, v=m.v, cos=m.cos, sin=m.sin, positions=m.positions,
            rotary_rounding=RotaryRounding(m.rotary_rounding), norm=QkNorm.of(m),
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of kernels: tensors, strides and the norms' eps."""
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
