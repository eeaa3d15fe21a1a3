"""[residual add ->] RMSNorm -> pad, static or dynamic fp8 quantisation, in one kernel.

total = x + residual;  y = epilogue(total * rsqrt(mean(total^2) + eps) * weight)

A program holds some rows and reads and writes each element once. The equivalent eager code is the composed reference of
the op, `fuseplan.families.compose`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.providers.triton.launching import (
    Finish,
    Norm,
    Tile,
    block_of,
    eviction,
    flattened,
    is_nvidia,
    multiprocessors,
)
from fuseplan.providers.triton.rows import normalized, rounded, store_finished, within
from fuseplan.providers.triton.tuned import NORM_THREAD


@triton.jit(do_not_specialize=["rows"])  # one compilation for all numbers of rows
def _norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, scale_ptr, scales_ptr,
    rows, x_row, residual_row, weight_dim, eps, min_scale,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
    ROUNDS_SUM: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, EPILOGUE: tl.constexpr,
    MOST: tl.constexpr, MULTIPLIES: tl.constexpr, EVICTION: tl.constexpr,
    LAUNCHES_EARLY: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(weight_ptr + column * weight_dim, mask=column < WIDTH, other=0.0).to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & within(column, WIDTH)[None, :]
    at = row.to(tl.int64)[:, None]
    total = tl.load(x_ptr + at * x_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    if ADDS:
        total += tl.load(
            residual_ptr + at * residual_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION
        ).to(tl.float32)
        tl.store(total_ptr + at * WIDTH + column[None, :], total.to(total_ptr.dtype.element_ty), mask=inside)
        if ROUNDS_SUM:
            total = rounded(total, dtype)
    y = normalized(total, weight, eps, dtype, WIDTH, ROUNDS_NORMED, ADDS_ONE)
    store_finished(
        y, y_ptr, scale_ptr, scales_ptr, row, column, row < rows, min_scale, dtype, WIDTH, OUT_WIDTH, EPILOGUE, MOST,
        MULTIPLIES, NVIDIA,
    )  # fmt: skip


def launch(x: Tensor, residual: Tensor | None, norm: Norm, finish: Finish) -> tuple[Tensor, ...]:
    """The family's op.

    Args:
        x: [..., hidden], any strides; bfloat16, float16 or float32.
        residual: the same, or float32; None: there is none.
        norm: weight, epsilon and rounding.
        finish: the epilogue.

    Returns:
        The epilogue's results, and x + residual where there is a residual.
    """
    flat = flattened(x)
    rows, width = flat.shape
    added = None if residual is None else flattened(residual)
    results = finish.results(x)
    totals = () if residual is None else (x.new_empty(x.shape, dtype=norm.total_dtype(x)),)
    if x.numel():
        elements = NORM_THREAD.get(finish.kind, NORM_THREAD["none"]).at(rows / multiprocessors(x.device))
        shape = Tile.holding(block_of(finish.width(width)), elements=elements)
        with torch.cuda.device_of(x):
            _norm[(triton.cdiv(rows, shape.rows),)](
                flat, flat if added is None else added, norm.weight, results[0], totals[0] if totals else results[0],
                *finish.pointers(results), rows, flat.stride(0), 0 if added is None else added.stride(0),
                norm.weight.stride(0), norm.eps, finish.min_scale,
                WIDTH=width, ROWS=shape.rows, BLOCK=shape.block, ADDS=residual is not None,
                EVICTION=eviction(x, *(() if residual is None else (residual,)), *results, *totals),
                **norm.constants, **finish.constants(width), **shape.launch(x), NVIDIA=is_nvidia(x.device),
            )  # fmt: skip
    return (*results, *totals)
