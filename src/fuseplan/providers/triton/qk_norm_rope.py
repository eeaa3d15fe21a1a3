"""RMSNorm and rotary embedding of queries and keys, in one kernel.

n = rms_norm(x, weight);  y = n * cos + cat(-n2, n1) * sin        for x of q and of k

A program holds some heads of a token's q, or k, as two halves of `head_dim`, and reads and writes each element once.
The equivalent eager code is `fuseplan.dialect.rotary.qk_norm_rope_reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import RotaryRounding, Rounding
from fuseplan.providers.triton.launching import Tile, eviction

ELEMENTS = 512
"""Elements of one half that a program holds: 4 for each of 128 threads."""


@triton.jit
def _norm_and_rotate(
    x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr,
    token, first_head, seq, heads, x_batch, x_seq, x_head, x_dim, weight_dim,
    cos_batch, cos_seq, cos_dim, sin_batch, sin_seq, sin_dim, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SHARED_ANGLES: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token of x [tokens, heads, 2 * HALF], tokens being [batch, seq]."""
    dtype = y_ptr.dtype.element_ty
    # Tokens are counted in 32 bits, elements in 64.
    batch, position = (token // seq).to(tl.int64), (token % seq).to(tl.int64)
    head, column = first_head + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    is_column = column < HALF
    inside = (head < heads)[:, None] & is_column[None, :]
    low = x_ptr + batch * x_batch + position * x_seq
    low += head.to(tl.int64)[:, None] * x_head + column[None, :] * x_dim
    x1 = tl.load(low, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    x2 = tl.load(low + HALF * x_dim, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)

    w1 = tl.load(weight_ptr + column * weight_dim, mask=is_column, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + (column + HALF) * weight_dim, mask=is_column, other=0.0).to(tl.float32)
    cosines = cos_ptr + batch * cos_batch + position * cos_seq + column * cos_dim
    sines = sin_ptr + batch * sin_batch + position * sin_seq + column * sin_dim
    c1 = tl.load(cosines, mask=is_column, other=0.0).to(tl.float32)
    s1 = tl.load(sines, mask=is_column, other=0.0).to(tl.float32)
    c2, s2 = c1, s1
    if not SHARED_ANGLES:
        c2 = tl.load(cosines + HALF * cos_dim, mask=is_column, other=0.0).to(tl.float32)
        s2 = tl.load(sines + HALF * sin_dim, mask=is_column, other=0.0).to(tl.float32)

    mean = (tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF)
    root = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    n1, n2 = x1 * root, x2 * root
    if ROUNDS_NORMED:
        n1, n2 = n1.to(dtype).to(tl.float32), n2.to(dtype).to(tl.float32)
    if ADDS_ONE:
        w1, w2 = w1 + 1.0, w2 + 1.0
    n1, n2 = (n1 * w1[None, :]).to(dtype).to(tl.float32), (n2 * w2[None, :]).to(dtype).to(tl.float32)
    a1, b1, a2, b2 = n1 * c1[None, :], n2 * s1[None, :], n2 * c2[None, :], n1 * s2[None, :]
    if ROUNDS_PRODUCTS:
        a1, b1 = a1.to(dtype).to(tl.float32), b1.to(dtype).to(tl.float32)
        a2, b2 = a2.to(dtype).to(tl.float32), b2.to(dtype).to(tl.float32)
    out = y_ptr + (token.to(tl.int64) * heads + head)[:, None] * (2 * HALF) + column[None, :]
    tl.store(out, (a1 - b1).to(dtype), mask=inside)
    tl.store(out + HALF, (a2 + b2).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["seq"])  # one compilation for all numbers of tokens
def _qk_norm_rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    q_parts, parts, seq, q_heads, k_heads,
    q_batch, q_seq, q_head, q_dim, k_batch, k_seq, k_head, k_dim, q_weight_dim, k_weight_dim,
    cos_batch, cos_seq, cos_dim, sin_batch, sin_seq, sin_dim, eps,
    HALF: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, WIDTH: tl.constexpr, SHARED_ANGLES: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_PRODUCTS: tl.constexpr, EVICTION: tl.constexpr,
    LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Of the programs of a token, the first `q_parts` take queries, the others keys."""
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    if part < q_parts:
        _norm_and_rotate(
            q_ptr, q_out_ptr, q_weight_ptr, cos_ptr, sin_ptr,
            token, part * Q_ROWS, seq, q_heads, q_batch, q_seq, q_head, q_dim, q_weight_dim,
            cos_batch, cos_seq, cos_dim, sin_batch, sin_seq, sin_dim, eps,
            HALF, Q_ROWS, WIDTH, SHARED_ANGLES, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
        )  # fmt: skip
    else:
        _norm_and_rotate(
            k_ptr, k_out_ptr, k_weight_ptr, cos_ptr, sin_ptr,
            token, (part - q_parts) * K_ROWS, seq, k_heads, k_batch, k_seq, k_head, k_dim, k_weight_dim,
            cos_batch, cos_seq, cos_dim, sin_batch, sin_seq, sin_dim, eps,
            HALF, K_ROWS, WIDTH, SHARED_ANGLES, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS, EVICTION,
        )  # fmt: skip


def _steps(value: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of [batch, seq, ...]: 0 for a leading dimension that isn't there or is broadcast."""
    leading = [0 if value.shape[dim] == 1 else value.stride(dim) for dim in range(value.dim() - 2)]
    return (*(0,) * (2 - len(leading)), *leading, *(value.stride(dim) for dim in dims))


def launch(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rounding: str,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fuseplan.dialect.rotary.qk_norm_rope_reference`; any strides.

    Args:
        q: [B, S, q_heads, head_dim], [tokens, q_heads, head_dim] or [q_heads, head_dim]; bfloat16, float16 or float32.
        k: the same with k_heads.
        q_weight: [head_dim].
        k_weight: [head_dim].
        cos: [..., 1, head_dim] or [..., 1, head_dim / 2], leading dimensions q's or 1.
        sin: cos's shape.
        eps: added to the mean squares.
        rounding: of the norms.
        rotary_rounding: of the rotation.

    Returns:
        (q_out, k_out), contiguous.
    """
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    *leading, q_heads, head_dim = q.shape
    k_heads, half = k.shape[-2], head_dim // 2
    seq = leading[-1] if leading else 1
    tokens = leading[0] * seq if len(leading) == 2 else seq
    width = triton.next_power_of_2(half)
    most = max(1, ELEMENTS // width)
    q_rows, k_rows = (min(most, triton.next_power_of_2(heads)) for heads in (q_heads, k_heads))
    q_parts, k_parts = triton.cdiv(q_heads, q_rows), triton.cdiv(k_heads, k_rows)
    if tokens * (q_parts + k_parts) == 0:
        return q_out, k_out
    shape = Tile.holding(width, rows=max(q_rows, k_rows), elements=4)
    convention = Rounding(rounding)
    with torch.cuda.device_of(q):
        _qk_norm_rope[(tokens * (q_parts + k_parts),)](
            q, k, q_out, k_out, q_weight, k_weight, cos, sin,
            q_parts, q_parts + k_parts, seq, q_heads, k_heads,
            *_steps(q, (-2, -1)), *_steps(k, (-2, -1)), q_weight.stride(0), k_weight.stride(0),
            *_steps(cos, (-1,)), *_steps(sin, (-1,)), eps,
            HALF=half, Q_ROWS=q_rows, K_ROWS=k_rows, WIDTH=width, SHARED_ANGLES=cos.shape[-1] == half,
            ROUNDS_NORMED=convention.rounds_normed, ADDS_ONE=convention.adds_one,
            ROUNDS_PRODUCTS=RotaryRounding(rotary_rounding) is RotaryRounding.PRODUCTS,
            EVICTION=eviction(q, k, q_out, k_out), **shape.launch(q),
            enable_fp_fusion=False,  # a fused multiply-add doesn't round the product
        )  # fmt: skip
    return q_out, k_out
