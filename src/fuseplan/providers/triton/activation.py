"""silu(gate) * up -> an epilogue, in one kernel, which may store what the epilogue reads, too.

The equivalent eager code is the composed reference of the op, `fuseplan.rules.families.compose`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import ActivationRounding
from fuseplan.providers.triton.epilogues import Epilogue
from fuseplan.providers.triton.hooks import names_functions
from fuseplan.providers.triton.launching import (
    MOST_PROGRAMS,
    Tile,
    block_of,
    eviction,
    flattened,
    is_nvidia,
    multiprocessors,
    shared_bytes,
)
from fuseplan.providers.triton.replay import run_kernel
from fuseplan.providers.triton.rows import rounded, silu, within
from fuseplan.providers.triton.tuned import MANY_TURNS, PART, PART_THREAD, ROW_THREAD, ROW_WARPS, STAGES


@triton.jit
def part_of_row(
    gate_ptr, up_ptr, arguments, y_ptr, row, first, gate_row, up_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUNDS_ACTIVATED: tl.constexpr, STORE: tl.constexpr,
    CONSTANTS: tl.constexpr, KEEPS: tl.constexpr, EVICTION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row, from the first on."""
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
    y = activated * up
    if KEEPS:
        tl.store(y_ptr + at * WIDTH + column[None, :], y.to(dtype), mask=inside)
    STORE(y, arguments, row, first, tl.full((1,), True, tl.int1), dtype, WIDTH, CONSTANTS, NVIDIA)


@names_functions
@triton.jit(do_not_specialize=["rows"])  # one compilation for all numbers of rows
def _silu_and_mul(
    gate_ptr, up_ptr, arguments, y_ptr, rows, gate_row, up_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUNDS_ACTIVATED: tl.constexpr, STORE: tl.constexpr,
    CONSTANTS: tl.constexpr, KEEPS: tl.constexpr, LOOPS: tl.constexpr, STAGES: tl.constexpr, EVICTION: tl.constexpr,
    LAUNCHES_EARLY: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK elements of a row, all of it where the epilogue asks for that, and, where it LOOPS, then of
    the next that nobody takes; up to STAGES rows are on their way to it.
    """
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Programs that follow each other read what follows each other in memory.
    first = tl.program_id(0) * BLOCK
    if LOOPS:
        for row in tl.range(tl.program_id(1), rows, tl.num_programs(1), num_stages=STAGES):
            part_of_row(
                gate_ptr, up_ptr, arguments, y_ptr, row, first, gate_row, up_row, WIDTH, BLOCK, ROUNDS_ACTIVATED,
                STORE, CONSTANTS, KEEPS, EVICTION, NVIDIA,
            )  # fmt: skip
    else:
        part_of_row(
            gate_ptr, up_ptr, arguments, y_ptr, tl.program_id(1), first, gate_row, up_row, WIDTH, BLOCK,
            ROUNDS_ACTIVATED, STORE, CONSTANTS, KEEPS, EVICTION, NVIDIA,
        )  # fmt: skip


def launch(gate: Tensor, up: Tensor, rounding: str, epilogue: Epilogue, *, keeps: bool = False) -> tuple[Tensor, ...]:
    """The family's op.

    Args:
        gate: [..., intermediate], any strides; bfloat16, float16 or float32.
        up: the same.
        rounding: one of `ActivationRounding`.
        epilogue: what is done to rows before they are stored.
        keeps: whether the activation is yielded, too.

    Returns:
        The epilogue's results, and the activation as gate's dtype holds it where it is kept.
    """
    gates, ups = flattened(gate), flattened(up)
    rows, width = gates.shape
    results = epilogue.results(gate)
    kept = (gate.new_empty(gate.shape),) if keeps else ()
    if gate.numel():
        processors, stages = multiprocessors(gate.device), 1
        turns, programs = rows / processors, min(rows, MOST_PROGRAMS)
        if not epilogue.whole_row:
            part = max(epilogue.unit, min(width, PART.at(rows)))
            shape = Tile.holding(block_of(part), elements=PART_THREAD.value)
        elif is_nvidia(gate.device):
            shape = Tile.holding(block_of(width), elements=ROW_THREAD.at(turns), most_warps=ROW_WARPS.at(turns))
            ahead = STAGES.value * 2 * shape.block * gate.element_size()
            resident = shared_bytes(gate.device) // ahead if turns > MANY_TURNS.value else 0
            if resident:
                stages, programs = STAGES.value, min(rows, processors * resident)
        else:
            shape = Tile.holding(block_of(width), elements=ROW_THREAD.at(0))
        with torch.cuda.device_of(gate):
            run_kernel(
                _silu_and_mul, (triton.cdiv(width, shape.block), programs),
                gates, ups, epilogue.arguments(results), kept[0] if kept else results[0], rows,
                gates.stride(0), ups.stride(0),
                WIDTH=width, BLOCK=shape.block, LOOPS=programs < rows, STAGES=stages,
                EVICTION=eviction(gate, up, *results, *kept), KEEPS=keeps,
                ROUNDS_ACTIVATED=ActivationRounding(rounding) is ActivationRounding.LLAMA,
                STORE=epilogue.store, CONSTANTS=epilogue.constants, NVIDIA=is_nvidia(gate.device), **shape.launch(gate),
            )  # fmt: skip
    return (*results, *kept)
