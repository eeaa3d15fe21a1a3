"""silu(gate) * up -> an epilogue, in one kernel, which may also store the epilogue's input.

The equivalent eager code is the composed reference of the op, `fuseplan.rules.families.compose`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import ActivationRounding
from fuseplan.providers.triton.epilogues import TritonEpilogue
from fuseplan.providers.triton.hooks import names_functions
from fuseplan.providers.triton.launching import Tile, block_of, eviction, flattened, is_nvidia
from fuseplan.providers.triton.replay import run_kernel
from fuseplan.providers.triton.rows import rounded, silu, within
from fuseplan.providers.triton.tuned import PART, PART_THREAD, ROW_THREAD, ROW_WARPS


@names_functions
@triton.jit
def _silu_and_mul(
    gate_ptr, up_ptr, arguments, y_ptr, gate_row, up_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUNDS_ACTIVATED: tl.constexpr, STORE: tl.constexpr,
    CONSTANTS: tl.constexpr, KEEPS: tl.constexpr, EVICTION: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK elements of a row, or the whole row where the epilogue requires it."""
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Consecutive programs read consecutive memory.
    PARTS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row, first = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * BLOCK
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    row, column = row + tl.arange(0, 1), first + tl.arange(0, BLOCK)
    inside = within(column, WIDTH)[None, :]
    at = row.to(tl.int64)[:, None]
    gate = tl.load(gate_ptr + at * gate_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    up = tl.load(up_ptr + at * up_row + column[None, :], mask=inside, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    if dtype == tl.float32:  # noqa: SIM108 - chosen when the kernel is compiled
        activated = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    else:
        activated = silu(gate, NVIDIA)
    if ROUNDS_ACTIVATED:
        activated = rounded(activated, dtype)
    # Rounded here, where the compiler multiplies two numbers of 16 bits at a time.
    y, valid = (activated * up).to(dtype), tl.full((1,), True, tl.int1)
    if KEEPS:
        tl.store(y_ptr + at * WIDTH + column[None, :], y, mask=inside)
    STORE(y, arguments, row, first, valid, dtype, WIDTH, CONSTANTS, NVIDIA)


def launch(
    gate: Tensor, up: Tensor, rounding: str, epilogue: TritonEpilogue, *, keeps: bool = False
) -> tuple[Tensor, ...]:
    """The family's op.

    Args:
        gate: [..., intermediate], any strides; bfloat16, float16 or float32.
        up: like gate.
        rounding: one of `ActivationRounding`.
        epilogue: the epilogue of rows before they are stored.
        keeps: whether the activation is yielded as well.

    Returns:
        The epilogue's results, and if it is kept the activation, rounded to gate's dtype.
    """
    gates, ups = flattened(gate), flattened(up)
    rows, width = gates.shape
    results = epilogue.results(gate)
    kept = (gate.new_empty(gate.shape),) if keeps else ()
    if gate.numel():
        if not epilogue.whole_row:
            part = max(epilogue.unit, min(width, PART.at(rows)))
            shape = Tile.holding(block_of(part), elements=PART_THREAD.at(rows))
        else:
            most = ROW_WARPS.value if is_nvidia(gate.device) else 16
            shape = Tile.holding(block_of(width), elements=ROW_THREAD.value, most_warps=most)
        with torch.cuda.device_of(gate):
            run_kernel(
                _silu_and_mul, (rows * triton.cdiv(width, shape.block),),
                gates, ups, epilogue.arguments(results), kept[0] if kept else results[0],
                gates.stride(0), ups.stride(0),
                WIDTH=width, BLOCK=shape.block, KEEPS=keeps, EVICTION=eviction(gate, up, *results, *kept),
                ROUNDS_ACTIVATED=ActivationRounding(rounding) is ActivationRounding.LLAMA,
                STORE=epilogue.store, CONSTANTS=epilogue.constants, NVIDIA=is_nvidia(gate.device), **shape.launch(gate),
            )  # fmt: skip
    return (*results, *kept)
