"""[residual add ->] RMSNorm -> an epilogue, in one kernel, which may also store the epilogue's input.

total = x + residual;  y = epilogue(total * rsqrt(mean(total^2) + eps) * weight)

A program holds some rows and reads and writes each element once. The equivalent eager code is the composed reference of
the op, `fuseplan.rules.families.compose`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.providers.triton.epilogues import TritonEpilogue
from fuseplan.providers.triton.hooks import names_functions
from fuseplan.providers.triton.launching import Norm, Tile, block_of, eviction, flattened, is_nvidia, multiprocessors
from fuseplan.providers.triton.replay import run_kernel
from fuseplan.providers.triton.rows import narrowed, normalized, rounded, widened, within


@names_functions
@triton.jit(do_not_specialize=["rows"])  # one compilation for all numbers of rows
def _norm(
    x_ptr, residual_ptr, weight_ptr, arguments, y_ptr, total_ptr, rows, x_row, residual_row, weight_dim, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, ROUNDS_SUM: tl.constexpr,
    ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr, STORE: tl.constexpr, CONSTANTS: tl.constexpr,
    KEEPS: tl.constexpr, PARTS: tl.constexpr, EVICTION: tl.constexpr,
    LAUNCHES_EARLY: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Some rows; x is the sum of PARTS, rounded."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty if PARTS == 1 else weight_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(weight_ptr + column * weight_dim, mask=column < WIDTH, other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & within(column, WIDTH)[None, :]
    at = row.to(tl.int64)[:, None]
    total = tl.load(x_ptr + at * x_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION)
    total = widened(total, NVIDIA)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x_ptr + (part * rows + at) * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if PARTS > 1:
        total = rounded(total, dtype, NVIDIA)
    if ADDS:
        residual = tl.load(
            residual_ptr + at * residual_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION
        )
        total += widened(residual, NVIDIA)
        tl.store(
            total_ptr + at * WIDTH + column[None, :], narrowed(total, total_ptr.dtype.element_ty, NVIDIA), mask=inside
        )
        if ROUNDS_SUM:
            total = rounded(total, dtype, NVIDIA)
    y = normalized(total, weight, eps, dtype, WIDTH, ROUNDS_NORMED, ADDS_ONE, NVIDIA)
    if KEEPS:
        tl.store(y_ptr + at * WIDTH + column[None, :], narrowed(y, dtype, NVIDIA), mask=inside)
    STORE(y, arguments, row, 0, row < rows, dtype, WIDTH, CONSTANTS, NVIDIA)


def launch(
    x: Tensor, residual: Tensor | None, norm: Norm, epilogue: TritonEpilogue, parts: Tensor | None = None, *,
    keeps: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The family's op.

    Args:
        x: [..., hidden], any strides; bfloat16, float16 or float32.
        residual: like x, or float32; None: no residual.
        norm: weight, epsilon and rounding.
        epilogue: the epilogue of rows before they are stored.
        parts: [parts, ..., hidden], float32 and contiguous: their sum, rounded to x's dtype, is normalised instead of
            x, which isn't read. None: x is normalised.
        keeps: whether the norm is yielded as well.

    Returns:
        The epilogue's results, the norm in x's dtype if it is kept, and x + residual if there is a residual.
    """
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    flat = flattened(x) if parts is None else parts.view(-1, width)
    added = None if residual is None else flattened(residual)
    results = epilogue.results(x)
    kept = (x.new_empty(x.shape),) if keeps else ()
    totals = () if residual is None else (x.new_empty(x.shape, dtype=norm.total_dtype(x)),)
    if x.numel():
        turns = rows / multiprocessors(x.device)
        held = epilogue.rows.at(turns) if residual is None else 1
        shape = Tile.holding(block_of(epilogue.width(width)), elements=epilogue.elements.at(turns), rows=held)
        with torch.cuda.device_of(x):
            run_kernel(
                _norm, (triton.cdiv(rows, shape.rows),),
                flat, flat if added is None else added, norm.weight, epilogue.arguments(results),
                kept[0] if kept else results[0], totals[0] if totals else results[0],
                rows, flat.stride(0), 0 if added is None else added.stride(0), norm.weight.stride(0), norm.eps,
                WIDTH=width, ROWS=shape.rows, BLOCK=shape.block, ADDS=residual is not None,
                PARTS=1 if parts is None else parts.shape[0], KEEPS=keeps,
                EVICTION=eviction(x, *(() if residual is None else (residual,)), *results, *kept, *totals),
                STORE=epilogue.store, CONSTANTS=epilogue.constants, **norm.constants, **shape.launch(x),
                NVIDIA=is_nvidia(x.device),
            )  # fmt: skip
    return (*results, *kept, *totals)
