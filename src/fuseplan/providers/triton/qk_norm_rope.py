"""RMSNorm and rotary embedding of queries and keys, in one kernel.

n = rms_norm(x, weight);  y = n * cos + cat(-n2, n1) * sin        for x of q and of k

A program holds some heads of a token's q, or k, as two halves of `head_dim`, and reads and writes each element once.
The equivalent eager code is `ops.qk_norm_rope.reference`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import RotaryRounding, Rounding
from fuseplan.providers.triton.launching import MOST_PROGRAMS, Tile, eviction
from fuseplan.providers.triton.replay import run_kernel
from fuseplan.providers.triton.rows import within
from fuseplan.providers.triton.tuned import HEADS, HEADS_THREAD


@triton.jit
def _weighted(x, mean, weight, eps, dtype: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr):
    """Elements of heads, normed by the `mean` of their squares, times `weight`, rounded, in float32."""
    n = x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    if ROUNDS_NORMED:
        n = n.to(dtype).to(tl.float32)
    if ADDS_ONE:
        weight = weight + 1.0
    return (n * weight[None, :]).to(dtype).to(tl.float32)


@triton.jit
def rotated_heads(
    low, x_dim, inside, weight_ptr, weight_dim, cosines, cos_dim, sines, sin_dim, eps, column, is_column,
    dtype: tl.constexpr, HALF: tl.constexpr, SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The two halves of rotated heads [ROWS, WIDTH], first normed if NORMS. `low` and `cosines` are pointers to the
    first halves, `column` are indices in a half.
    """
    x1 = tl.load(low, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    x2 = tl.load(low + HALF * x_dim, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    c1 = tl.load(cosines, mask=is_column, other=0.0).to(tl.float32)
    s1 = tl.load(sines, mask=is_column, other=0.0).to(tl.float32)
    c2, s2 = c1, s1
    if not SHARED_ANGLES:
        c2 = tl.load(cosines + HALF * cos_dim, mask=is_column, other=0.0).to(tl.float32)
        s2 = tl.load(sines + HALF * sin_dim, mask=is_column, other=0.0).to(tl.float32)
    n1, n2 = x1, x2
    if NORMS:
        w1 = tl.load(weight_ptr + column * weight_dim, mask=is_column, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + (column + HALF) * weight_dim, mask=is_column, other=0.0).to(tl.float32)
        mean = tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF)
        n1 = _weighted(x1, mean, w1, eps, dtype, ROUNDS_NORMED, ADDS_ONE)
        n2 = _weighted(x2, mean, w2, eps, dtype, ROUNDS_NORMED, ADDS_ONE)
    a1, b1, a2, b2 = n1 * c1[None, :], n2 * s1[None, :], n2 * c2[None, :], n1 * s2[None, :]
    if ROUNDS_PRODUCTS:
        a1, b1 = a1.to(dtype).to(tl.float32), b1.to(dtype).to(tl.float32)
        a2, b2 = a2.to(dtype).to(tl.float32), b2.to(dtype).to(tl.float32)
    return (a1 - b1).to(dtype), (a2 + b2).to(dtype)


@triton.jit
def loaded_rows(
    rows, x_dim, is_row, weight_ptr, weight_dim, cosines, cos_dim, sines, sin_dim, column, is_column,
    HALF: tl.constexpr, SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """The operands of `rotated_rows`: whole rows [ROWS, COLUMNS] at the pointers `rows`, in order and with their halves
    swapped, cosines and sines, and weights in both orders; `column` are indices in a row.
    """
    is_low = column < HALF
    other = tl.where(is_low, column + HALF, column - HALF)
    angle = tl.where(is_low, column, other) if SHARED_ANGLES else column
    inside = is_row[:, None] & is_column[None, :]
    x = tl.load(rows[:, None] + column[None, :] * x_dim, mask=inside, other=0.0)
    swapped = tl.load(rows[:, None] + other[None, :] * x_dim, mask=inside, other=0.0)
    c = tl.load(cosines + angle * cos_dim, mask=is_column, other=0.0)
    s = tl.load(sines + angle * sin_dim, mask=is_column, other=0.0)
    w, swapped_w = c, s
    if NORMS:
        w = tl.load(weight_ptr + column * weight_dim, mask=is_column, other=0.0)
        swapped_w = tl.load(weight_ptr + other * weight_dim, mask=is_column, other=0.0)
    return x, swapped, c, s, w, swapped_w


@triton.jit
def rotated_rows(
    loaded, eps, column, zero, dtype: tl.constexpr, HALF: tl.constexpr, NORMS: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Rotated heads [ROWS, COLUMNS], first normed if NORMS, from the operands that `loaded_rows` yields.

    `zero` is 0, unknown to the compiler: a product whose bits are combined with it must be rounded, so it can't become
    part of a fused multiply-add, while the rest of the kernel may use these.
    """
    x, swapped, c, s, w, swapped_w = loaded
    x, swapped, c, s = x.to(tl.float32), swapped.to(tl.float32), c.to(tl.float32), s.to(tl.float32)
    if NORMS:
        mean = tl.sum(x * x, axis=1) / (2 * HALF)
        x = _weighted(x, mean, w.to(tl.float32), eps, dtype, ROUNDS_NORMED, ADDS_ONE)
        swapped = _weighted(swapped, mean, swapped_w.to(tl.float32), eps, dtype, ROUNDS_NORMED, ADDS_ONE)
    a, b = x * c[None, :], swapped * tl.where(column < HALF, -s, s)[None, :]
    a = (a.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)
    b = (b.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)
    if ROUNDS_PRODUCTS:
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    return (a + b).to(dtype)


@triton.jit
def rotate(
    x_ptr, x, y_ptr, y, is_there, weight_ptr, weight_dim, cosines, cos_dim, sines, sin_dim, eps, first_head,
    HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SHARED_ANGLES: tl.constexpr,
    NORMS: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """Rotates ROWS heads of a token from `x_ptr` to `y_ptr`, with the strides (head, element) `x` and `y`."""
    head, column = first_head + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_column = within(column, HALF)
    inside = within(head, HEADS)[:, None] & is_column[None, :]
    heads = head.to(tl.int64)[:, None]
    y1, y2 = rotated_heads(
        x_ptr + heads * x[0] + column[None, :] * x[1], x[1], inside, weight_ptr, weight_dim, cosines + column * cos_dim,
        cos_dim, sines + column * sin_dim, sin_dim, eps, column, is_column, y_ptr.dtype.element_ty,
        HALF, SHARED_ANGLES, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
    )  # fmt: skip
    out = y_ptr + heads * y[0] + column[None, :] * y[1]
    tl.store(out, y1, mask=inside & is_there)
    tl.store(out + HALF * y[1], y2, mask=inside & is_there)


@triton.jit
def _token(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    batch, position, seq, part, q_parts, q, k, q_weight_dim, k_weight_dim, cos, sin, eps,
    HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SHARED_ANGLES: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A part of a token: the first `q_parts` are queries, the rest keys."""
    zero = tl.zeros((), tl.int64)
    batch, position = zero + batch, zero + position
    cosines = cos_ptr + batch * cos[0] + position * cos[1]
    sines = sin_ptr + batch * sin[0] + position * sin[1]
    first = (batch * seq + position) * (2 * HALF)
    if part < q_parts:
        rotate(
            q_ptr + batch * q[0] + position * q[1], (q[2], q[3]), q_out_ptr + first * Q_HEADS, (2 * HALF, 1), True,
            q_weight_ptr, q_weight_dim, cosines, cos[2], sines, sin[2], eps, part * Q_ROWS,
            HALF, Q_HEADS, Q_ROWS, WIDTH, SHARED_ANGLES, True, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
        )  # fmt: skip
    else:
        rotate(
            k_ptr + batch * k[0] + position * k[1], (k[2], k[3]), k_out_ptr + first * K_HEADS, (2 * HALF, 1), True,
            k_weight_ptr, k_weight_dim, cosines, cos[2], sines, sin[2], eps, (part - q_parts) * K_ROWS,
            HALF, K_HEADS, K_ROWS, WIDTH, SHARED_ANGLES, True, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seq", "batches"])  # one compilation for all numbers of tokens
def _qk_norm_rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    q_parts, seq, batches, q, k, q_weight_dim, k_weight_dim, cos, sin, eps,
    HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SHARED_ANGLES: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr,
    LOOPS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes one part of a token, which costs no division, and if it LOOPS, then parts of tokens that no other
    program takes.
    """
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part, first, first_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LOOPS:
        for batch in range(first_batch, batches, tl.num_programs(2)):
            for position in range(first, seq, tl.num_programs(1)):
                _token(
                    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
                    batch, position, seq, part, q_parts,
                    q, k, q_weight_dim, k_weight_dim, cos, sin, eps,
                    HALF, Q_HEADS, K_HEADS, Q_ROWS, K_ROWS, WIDTH, SHARED_ANGLES, ROUNDS_NORMED, ADDS_ONE,
                    ROUNDS_PRODUCTS, EVICTION,
                )  # fmt: skip
    else:
        _token(
            q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
            first_batch, first, seq, part, q_parts,
            q, k, q_weight_dim, k_weight_dim, cos, sin, eps,
            HALF, Q_HEADS, K_HEADS, Q_ROWS, K_ROWS, WIDTH, SHARED_ANGLES, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS,
            EVICTION,
        )  # fmt: skip


def _steps(value: Tensor, dims: tuple[int, ...], swapped: bool) -> tuple[int, ...]:
    """Strides of [batch, seq, ...], the first two optionally `swapped`: 0 for a missing or broadcast dimension."""
    leading = [0 if value.shape[dim] == 1 else value.stride(dim) for dim in range(value.dim() - 2)]
    leading = [0] * (2 - len(leading)) + leading
    return (*(reversed(leading) if swapped else leading), *(value.stride(dim) for dim in dims))


def launch(m: Any) -> tuple[Tensor, Tensor]:
    """`ops.qk_norm_rope.reference`.

    Args:
        m: the op's arguments by name: tensors with any strides, in bfloat16, float16 or float32, q in
            [B, S, q_heads, head_dim], [tokens, q_heads, head_dim] or [q_heads, head_dim].

    Returns:
        (q_out, k_out), contiguous.
    """
    q, k, q_weight, k_weight, cos, sin = m.q, m.k, m.q_weight, m.k_weight, m.cos, m.sin
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    *leading, q_heads, head_dim = q.shape
    k_heads, half = k.shape[-2], head_dim // 2
    batches, seq = (1, 1, *leading)[-2:]
    swapped = seq == 1  # a single dimension of tokens is taken for a sequence
    if swapped:
        batches, seq = seq, batches
    width = triton.next_power_of_2(half)
    most = max(1, HEADS.value // width)
    q_rows, k_rows = (min(most, triton.next_power_of_2(heads)) for heads in (q_heads, k_heads))
    q_parts, k_parts = triton.cdiv(q_heads, q_rows), triton.cdiv(k_heads, k_rows)
    if batches * seq * (q_parts + k_parts) == 0:
        return q_out, k_out
    shape = Tile.holding(width, rows=max(q_rows, k_rows), elements=HEADS_THREAD.value)
    convention = Rounding(m.rounding)
    with torch.cuda.device_of(q):
        run_kernel(
            _qk_norm_rope, (q_parts + k_parts, min(seq, MOST_PROGRAMS), min(batches, MOST_PROGRAMS)),
            q, k, q_out, k_out, q_weight, k_weight, cos, sin,
            q_parts, seq, batches,
            _steps(q, (-2, -1), swapped), _steps(k, (-2, -1), swapped), q_weight.stride(0), k_weight.stride(0),
            _steps(cos, (-1,), swapped), _steps(sin, (-1,), swapped), m.eps,
            HALF=half, Q_HEADS=q_heads, K_HEADS=k_heads, Q_ROWS=q_rows, K_ROWS=k_rows, WIDTH=width,
            SHARED_ANGLES=cos.shape[-1] == half,
            ROUNDS_NORMED=convention.rounds_normed, ADDS_ONE=convention.adds_one,
            ROUNDS_PRODUCTS=RotaryRounding(m.rotary_rounding) is RotaryRounding.PRODUCTS,
            EVICTION=eviction(q, k, q_out, k_out), LOOPS=max(seq, batches) > MOST_PROGRAMS, **shape.launch(q),
            enable_fp_fusion=False,  # a fused multiply-add doesn't round the product
        )  # fmt: skip
    return q_out, k_out
