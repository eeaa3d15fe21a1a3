"""What all kernels of the norm and activation families share: rows in registers, normalised, finished and stored."""

import triton
import triton.language as tl

NONE, PAD, STATIC, DYNAMIC = (tl.constexpr(kind) for kind in range(4))
"""Epilogues: none, zeros behind each row, fp8 by a given scale, fp8 by a scale of each row."""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as `dtype` holds it, in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def within(column, WIDTH: tl.constexpr):
    """column < WIDTH, of a tile's columns; a constant, by which the compiler drops masks, where tiles divide a row."""
    if WIDTH // column.shape[0] * column.shape[0] == WIDTH:  # the interpreter's shapes have no remainder
        inside = tl.full(column.shape, True, tl.int1)
    else:
        inside = column < WIDTH
    return inside


@triton.jit
def quantized(y, scale, dtype: tl.constexpr, MOST: tl.constexpr, MULTIPLIES: tl.constexpr, NVIDIA: tl.constexpr):
    """clamp(y / scale, -MOST, MOST) as `dtype`; NaN stays NaN."""
    if MULTIPLIES:  # noqa: SIM108 - chosen when the kernel is compiled
        scaled = y * tl.div_rn(1.0, scale)
    else:
        scaled = tl.div_rn(y, scale)
    if not NVIDIA:  # whose conversion instructions clamp
        scaled = tl.where(scaled > MOST, MOST, scaled)
        scaled = tl.where(scaled < -MOST, -MOST, scaled)
    return scaled.to(dtype)


@triton.jit
def dynamic_scale(y, min_scale, MOST: tl.constexpr):
    """max(amax(|y|) / MOST, min_scale) of each row of y [ROWS, BLOCK], NaN where y has one."""
    scale = tl.div_rn(tl.max(tl.abs(y), axis=1), MOST)
    scale = tl.where(scale < min_scale, min_scale, scale)
    return tl.where(tl.max((y != y).to(tl.int32), axis=1) > 0, float("nan"), scale)


@triton.jit
def store_finished(
    y, y_ptr, scale_ptr, scales_ptr, row, column, valid, min_scale,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, EPILOGUE: tl.constexpr, MOST: tl.constexpr,
    MULTIPLIES: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows y [ROWS, BLOCK], float32, 0 beyond WIDTH: rounded to DTYPE and then through the epilogue."""
    out = row.to(tl.int64)[:, None] * OUT_WIDTH + column[None, :]
    inside = valid[:, None] & within(column, WIDTH)[None, :]
    if EPILOGUE == NONE:
        tl.store(y_ptr + out, y.to(DTYPE), mask=inside)
    elif EPILOGUE == PAD:
        # A row of which something is infinite or NaN is NaN also beyond its end.
        padded = tl.where(within(column, WIDTH)[None, :], y, 0.0)
        tl.store(y_ptr + out, padded.to(DTYPE), mask=valid[:, None] & within(column, OUT_WIDTH)[None, :])
    else:
        y = rounded(y, DTYPE)
        code: tl.constexpr = y_ptr.dtype.element_ty
        if EPILOGUE == STATIC:
            scale = tl.load(scale_ptr).to(tl.float32)
            tl.store(y_ptr + out, quantized(y, scale, code, MOST, MULTIPLIES, NVIDIA), mask=inside)
        else:
            scale = dynamic_scale(tl.where(inside, y, 0.0), min_scale, MOST)
            codes = quantized(y, scale[:, None], code, MOST, MULTIPLIES, NVIDIA)
            tl.store(y_ptr + out, codes, mask=inside)
            tl.store(scales_ptr + row, scale, mask=valid)


@triton.jit
def normalized(
    total, weight, eps, DTYPE: tl.constexpr, WIDTH: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr,
):  # fmt: skip
    """total * rsqrt(mean(total^2) + eps) * weight of rows [ROWS, BLOCK], float32, 0 beyond WIDTH."""
    mean = tl.sum(total * total, axis=1) / WIDTH
    # To the nearest: the instruction for reciprocal square roots is off by up to two units in the last place.
    y = total * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    if ROUNDS_NORMED:
        y = rounded(y, DTYPE)
    if ADDS_ONE:
        weight = weight + 1.0
    return y * weight[None, :]
