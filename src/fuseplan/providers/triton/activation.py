"""silu(gate) * up -> static or dynamic fp8 quantisation, in one kernel.

The equivalent eager code is the composed reference of the op, `fuseplan.dialect.fused`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import ActivationRounding
from fuseplan.providers.triton.launching import (
    Finish,
    Tile,
    block_of,
    eviction,
    flattened,
    is_nvidia,
    multiprocessors,
)
from fuseplan.providers.triton.rows import rounded, store_finished


@triton.jit(do_not_specialize=["rows"])  # one compilation for all numbers of rows
def _silu_and_mul(
    gate_ptr, up_ptr, y_ptr, scale_ptr, scales_ptr, rows, gate_row, up_row, min_scale,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ROUNDS_ACTIVATED: tl.constexpr, EPILOGUE: tl.constexpr, MOST: tl.constexpr, MULTIPLIES: tl.constexpr,
    EVICTION: tl.constexpr, LAUNCHES_EARLY: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS x BLOCK; a row may take several of them, side by side, where its scale is given."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Programs that follow each other read what follows each other in memory.
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None]
    gate = tl.load(gate_ptr + at * gate_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    up = tl.load(up_ptr + at * up_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    if dtype == tl.float32:
        activated = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    else:
        # Off by two units in the last place of float32, which narrower results hardly ever show.
        if NVIDIA:
            # Without care for denormal numbers, which costs more than the rest: exp(-gate) beyond 2**126 gives 0.
            exp = tl.extra.cuda.libdevice.fast_expf(-gate)
            activated = tl.extra.cuda.libdevice.fast_dividef(gate, 1.0 + exp)
        else:
            activated = gate / (1.0 + tl.exp(-gate))
    if ROUNDS_ACTIVATED:
        activated = rounded(activated, dtype)
    store_finished(
        activated * up, y_ptr, scale_ptr, scales_ptr, row, column, row < rows, min_scale, dtype, WIDTH, OUT_WIDTH,
        EPILOGUE, MOST, MULTIPLIES, NVIDIA,
    )  # fmt: skip


FEW_ROWS, SMALL_PART, PART = 8, 512, 1024
"""Up to that many rows, and beyond: elements of a row that a program takes, where others may take the rest."""


def launch(gate: Tensor, up: Tensor, rounding: str, finish: Finish) -> tuple[Tensor, ...]:
    """The family's op.

    Args:
        gate: [..., intermediate], any strides; bfloat16, float16 or float32.
        up: the same.
        rounding: one of `ActivationRounding`.
        finish: the epilogue.

    Returns:
        The epilogue's results.
    """
    gates, ups = flattened(gate), flattened(up)
    rows, width = gates.shape
    results = finish.results(gate)
    if gate.numel():
        if finish.kind == "dynamic_fp8_quant":
            # A row of 14,336 elements wants few threads as long as every multiprocessor has one row at most. Not all
            # of AMD's GPUs take 32 warps, which have 64 threads there.
            wide = is_nvidia(gate.device) and rows > multiprocessors(gate.device)
            shape = Tile.holding(block_of(width), elements=16, most_warps=32 if wide else 16)
        else:
            shape = Tile.holding(block_of(min(width, SMALL_PART if rows <= FEW_ROWS else PART)), elements=4)
        with torch.cuda.device_of(gate):
            _silu_and_mul[(triton.cdiv(width, shape.block), triton.cdiv(rows, shape.rows))](
                gates, ups, results[0], *finish.pointers(results), rows, gates.stride(0), ups.stride(0),
                finish.min_scale,
                WIDTH=width, ROWS=shape.rows, BLOCK=shape.block,
                ROUNDS_ACTIVATED=ActivationRounding(rounding) is ActivationRounding.LLAMA,
                EVICTION=eviction(gate, up, *results), **finish.constants(width), **shape.launch(gate),
                NVIDIA=is_nvidia(gate.device),
            )  # fmt: skip
    return results
