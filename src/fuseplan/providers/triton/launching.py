"""Shared by launchers of row kernels: arguments of the families, tiles, and options of launches."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fuseplan.dialect import Rounding
from fuseplan.graph.ops import compute_dtype
from fuseplan.providers.triton.tuned import L2_SHARE

INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The arguments of a norm.

    Attributes:
        weight: [hidden], the activations' dtype.
        eps: added to the mean square.
        rounding: the convention.
    """

    weight: Tensor
    eps: float
    rounding: Rounding

    def total_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the sum before the norm is yielded."""
        return x.dtype if self.rounding.rounds_residual else compute_dtype(x.dtype)

    @property
    def constants(self) -> Mapping[str, Any]:
        """The compile-time constants of a kernel."""
        convention = self.rounding
        return {
            "ROUNDS_SUM": convention.rounds_sum,
            "ROUNDS_NORMED": convention.rounds_normed,
            "ADDS_ONE": convention.adds_one,
        }


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The part that a program holds at a time: rows, elements of each row, and warps to hold them.

    Attributes:
        rows: rows of a tile.
        block: elements of each row, a power of two.
        warps: warps of a program.
        registers: the most registers of a thread; None: the compiler's choice.
    """

    rows: int
    block: int
    warps: int
    registers: int | None = None

    @classmethod
    def holding(
        cls, block: int, *, elements: int, registers: int | None = None, rows: int = 1, most_warps: int = 16
    ) -> "Tile":
        """A tile spread over as many warps as give each thread this many elements."""
        warps = max(1, min(most_warps, rows * block // (WARP * elements)))
        if registers is not None:
            registers = min(registers, REGISTERS // (warps * WARP))
        return cls(rows=rows, block=block, warps=warps, registers=registers)

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once."""
        assert self.registers is not None
        return REGISTERS // (self.warps * WARP * self.registers)

    def launch(self, x: Tensor) -> Mapping[str, Any]:
        """Options of a launch."""
        options: dict[str, Any] = {"LAUNCHES_EARLY": launches_early(x.device), "num_warps": self.warps}
        if launches_early(x.device):
            options["launch_pdl"] = True
        if self.registers is not None and is_nvidia(x.device):
            options["maxnreg"] = self.registers
        return options


WARP = 32
REGISTERS = 65536
"""Registers of a multiprocessor: 32 bits each, on every NVIDIA GPU since Kepler. AMD's have more."""


MOST_PROGRAMS = 65535
"""The most programs in the second or third dimension of a CUDA grid; for more work, a program takes several items."""


def block_of(width: int) -> int:
    """Elements of a tile's row: at least one for each thread of a program, or threads would see different values."""
    return max(64, int(triton.next_power_of_2(width)))


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def cache_bytes(device: torch.device) -> int:
    """The size of a device's L2; 0 where kernels are interpreted."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


AMD_SHARED = 65536
"""The least bytes of shared memory of a program on AMD's GPUs."""


@cache
def shared_bytes(device: torch.device) -> int:
    """The most bytes of shared memory of a program."""
    if not is_nvidia(device):
        return AMD_SHARED
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def eviction(*tensors: Tensor) -> str:
    """The eviction hint for loads of data that is read once.

    Args:
        tensors: all tensors that the kernel reads and writes.

    Returns:
        `evict_first` where all of them fit the L2: results then stay there for their readers. Beyond that the hint
        costs time, so it is empty.
    """
    most = L2_SHARE.value * cache_bytes(tensors[0].device)
    return "evict_first" if sum(each.nbytes for each in tensors) <= most else ""


def flattened(x: Tensor) -> Tensor:
    """x as [rows, width] with contiguous rows; copied only where the strides require it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before its predecessor has ended, and itself wait for it: NVIDIA's programmatic
    dependent launch, from compute capability 9.0 on.
    """
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def is_amd(device: torch.device) -> bool:
    """Whether kernels are compiled for an AMD GPU."""
    return device.type == "cuda" and torch.version.hip is not None and not INTERPRETED


def is_nvidia(device: torch.device) -> bool:
    """Whether kernels are compiled for an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.hip is None and not INTERPRETED
