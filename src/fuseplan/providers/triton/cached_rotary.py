"""Rotary embedding of queries and keys, with or without an RMSNorm before it, and the writes of keys and values into a
static cache, in one kernel.

y = x * cos + cat(-x2, x1) * sin        of q, which is yielded, and of k
k_cache[:, :, positions] = y,   v_cache[:, :, positions] = v

A program holds some heads of a token's q, k or v, and reads and writes each element once. It writes at no position
outside of the caches: on the GPU, an assertion fails for such a position and ends the process's kernels, as in
Inductor's own code. The equivalent eager code is `ops.qk_norm_rope_cache.reference`.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import RotaryRounding, Rounding
from fuseplan.providers.triton.launching import MOST_PROGRAMS, Tile, eviction
from fuseplan.providers.triton.qk_norm_rope import rotate
from fuseplan.providers.triton.replay import run_kernel
from fuseplan.providers.triton.rows import within
from fuseplan.providers.triton.tuned import HEADS, HEADS_THREAD


@triton.jit
def place_of(positions_ptr, token, step, length):
    """The position that a token is written to, and whether it is within the cache, for `assert_place`."""
    position = tl.load(positions_ptr + token * step).to(tl.int64)
    position = tl.where(position < 0, position + length, position)
    return position, (position >= 0) & (position < length)


@triton.jit
def assert_place(is_there):
    """Asserts that the position is within the cache."""
    tl.device_assert(is_there, "index out of bounds: the cache has no such position")


@triton.jit
def _token(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    positions_ptr, batch, token, seq, part, q_parts, k_parts, length,
    q, k, v, k_cache, v_cache, cos, sin, q_weight_dim, k_weight_dim, positions_step, eps,
    HALF: tl.constexpr, VALUE_DIM: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr, V_ROWS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr,
    ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A part of a token: the first `q_parts` are queries, the next `k_parts` keys, the rest values."""
    zero = tl.zeros((), tl.int64)
    batch, token = zero + batch, zero + token
    cosines = cos_ptr + batch * cos[0] + token * cos[1]
    sines = sin_ptr + batch * sin[0] + token * sin[1]
    if part < q_parts:
        rotate(
            q_ptr + batch * q[0] + token * q[2], (q[1], q[3]),
            q_out_ptr + (batch * Q_HEADS * seq + token) * (2 * HALF), (zero + seq * (2 * HALF), 1), True,
            q_weight_ptr, q_weight_dim, cosines, cos[2], sines, sin[2], eps, part * Q_ROWS,
            HALF, Q_HEADS, Q_ROWS, WIDTH, SHARED_ANGLES, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
        )  # fmt: skip
    else:
        place, is_there = place_of(positions_ptr, token, positions_step, length)
        assert_place(is_there)
        if part < q_parts + k_parts:
            rotate(
                k_ptr + batch * k[0] + token * k[2], (k[1], k[3]),
                k_cache_ptr + batch * k_cache[0] + place * k_cache[2], (k_cache[1], k_cache[3]), is_there,
                k_weight_ptr, k_weight_dim, cosines, cos[2], sines, sin[2], eps, (part - q_parts) * K_ROWS,
                HALF, K_HEADS, K_ROWS, WIDTH, SHARED_ANGLES, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
            )  # fmt: skip
        else:
            head = (part - q_parts - k_parts) * V_ROWS + tl.arange(0, V_ROWS)
            column = tl.arange(0, V_WIDTH)
            inside = within(head, K_HEADS)[:, None] & within(column, VALUE_DIM)[None, :]
            heads = head.to(tl.int64)[:, None]
            source = v_ptr + batch * v[0] + token * v[2] + heads * v[1] + column[None, :] * v[3]
            value = tl.load(source, mask=inside, other=0.0, eviction_policy=EVICTION)
            out = v_cache_ptr + batch * v_cache[0] + place * v_cache[2]
            out += heads * v_cache[1] + column[None, :] * v_cache[3]
            tl.store(out, value, mask=inside & is_there)


@triton.jit(do_not_specialize=["seq", "batches"])  # one compilation for all numbers of tokens
def _cached_rotary(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    positions_ptr, q_parts, k_parts, seq, batches, length,
    q, k, v, k_cache, v_cache, cos, sin, q_weight_dim, k_weight_dim, positions_step, eps,
    HALF: tl.constexpr, VALUE_DIM: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr, V_ROWS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr,
    ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes one part of a token, then of tokens that no other program takes. Strides are for
    [batch, heads, tokens, head_dim], for angles [batch, tokens, head_dim].
    """
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for batch in range(tl.program_id(2), batches, tl.num_programs(2)):
        for token in range(tl.program_id(1), seq, tl.num_programs(1)):
            _token(
                q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
                positions_ptr, batch, token, seq, tl.program_id(0), q_parts, k_parts, length,
                q, k, v, k_cache, v_cache, cos, sin, q_weight_dim, k_weight_dim, positions_step, eps,
                HALF, VALUE_DIM, Q_HEADS, K_HEADS, Q_ROWS, K_ROWS, V_ROWS, WIDTH, V_WIDTH, SHARED_ANGLES, NORMS,
                ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QkNorm:
    """The norms of queries and keys before their rotation.

    Attributes:
        q_weight: [head_dim], the queries' dtype.
        k_weight: [head_dim], the queries' dtype.
        eps: added to the mean squares.
        rounding: rounding of the norms.
    """

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    rounding: Rounding

    @classmethod
    def of(cls, m: Any) -> Self | None:
        """The norms in a fused op's arguments, which are given by name; None for an op without a norm."""
        if "q_weight" not in vars(m):
            return None
        return cls(q_weight=m.q_weight, k_weight=m.k_weight, eps=m.eps, rounding=Rounding(m.rounding))


def broadcast(value: Tensor) -> tuple[int, ...]:
    """Strides of batch, tokens and elements of angles: 0 for a dimension that is broadcast."""
    return (*(0 if value.shape[dim] == 1 else value.stride(dim) for dim in (0, 2)), value.stride(3))


def launch(m: Any) -> Tensor:
    """`ops.qk_norm_rope_cache.reference`, or without a norm `ops.rope_cache.reference`; it writes to the caches.

    Args:
        m: the op's arguments by name: tensors with any strides, in bfloat16, float16 or float32; nothing is written at
            positions outside of the caches.

    Returns:
        The rotated queries, [batch, q_heads, tokens, head_dim], contiguous.
    """
    q, k, v, k_cache, v_cache, cos, sin, positions = (
        m.q, m.k, m.v, m.k_cache, m.v_cache, m.cos, m.sin, m.positions
    )  # fmt: skip
    norm = QkNorm.of(m)
    q_out: Tensor = q.new_empty(q.shape)
    batches, q_heads, seq, head_dim = q.shape
    k_heads, half, value_dim = k.shape[1], head_dim // 2, v.shape[3]
    width, value_width = triton.next_power_of_2(half), triton.next_power_of_2(value_dim)
    q_rows, k_rows = (_rows(heads, HEADS.value // width) for heads in (q_heads, k_heads))
    v_rows = _rows(k_heads, 2 * HEADS.value // value_width)
    q_parts, k_parts, v_parts = (
        triton.cdiv(heads, rows) for heads, rows in ((q_heads, q_rows), (k_heads, k_rows), (k_heads, v_rows))
    )
    if batches * seq * (q_parts + k_parts + v_parts) == 0:
        return q_out
    shape = Tile.holding(width, rows=max(q_rows, k_rows), elements=HEADS_THREAD.value)
    convention = norm.rounding if norm is not None else Rounding.LLAMA
    q_weight, k_weight = (norm.q_weight, norm.k_weight) if norm is not None else (cos, cos)
    with torch.cuda.device_of(q):
        run_kernel(
            _cached_rotary, (q_parts + k_parts + v_parts, min(seq, MOST_PROGRAMS), min(batches, MOST_PROGRAMS)),
            q, k, v, q_out, k_cache, v_cache, q_weight, k_weight, cos, sin, positions,
            q_parts, k_parts, seq, batches, k_cache.shape[2],
            *(each.stride() for each in (q, k, v, k_cache, v_cache)), broadcast(cos), broadcast(sin),
            q_weight.stride(-1), k_weight.stride(-1), positions.stride(0), norm.eps if norm is not None else 0.0,
            HALF=half, VALUE_DIM=value_dim, Q_HEADS=q_heads, K_HEADS=k_heads, Q_ROWS=q_rows, K_ROWS=k_rows,
            V_ROWS=v_rows, WIDTH=width, V_WIDTH=value_width, SHARED_ANGLES=cos.shape[-1] == half,
            NORMS=norm is not None, ROUNDS_NORMED=convention.rounds_normed, ADDS_ONE=convention.adds_one,
            ROUNDS_PRODUCTS=RotaryRounding(m.rotary_rounding) is RotaryRounding.PRODUCTS,
            EVICTION=eviction(q, k, v, q_out), **shape.launch(q),
            enable_fp_fusion=False,  # a fused multiply-add doesn't round the product
            debug=True, sanitize_overflow=False,  # assertions, and none that Triton adds
        )  # fmt: skip
    return q_out


def _rows(heads: int, most: int) -> int:
    return int(min(max(1, most), triton.next_power_of_2(heads)))
