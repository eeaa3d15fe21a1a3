"""What launchers of row kernels share: arguments of the families, tiles, and how kernels are launched."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fuseplan.dialect import QuantRounding, Rounding
from fuseplan.dialect.norm import compute_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True)
class Norm:
    """How rows are normalised.

    Attributes:
        weight: [hidden], the activations' dtype.
        eps: added to the mean square.
        rounding: the convention.
    """

    weight: Tensor
    eps: float
    rounding: Rounding

    def total_dtype(self, x: Tensor) -> torch.dtype:
        """Of the sum that is normalised, as it is yielded."""
        return x.dtype if self.rounding.rounds_residual else compute_dtype(x.dtype)

    @property
    def constants(self) -> Mapping[str, Any]:
        """What a kernel is compiled for."""
        convention = self.rounding
        return {
            "ROUNDS_SUM": convention.rounds_sum,
            "ROUNDS_NORMED": convention.rounds_normed,
            "ADDS_ONE": convention.adds_one,
        }


@dataclass(frozen=True, kw_only=True)
class Finish:
    """An epilogue and its arguments; nothing by default.

    Attributes:
        kind: `none`, `pad`, `static_fp8_quant` or `dynamic_fp8_quant`.
        right: zeros behind each row.
        scale: one float32 element.
        dtype: of fp8 codes.
        min_scale: the least scale of a row.
        quant_rounding: how a scale is applied.
    """

    kind: str = "none"
    right: int = 0
    scale: Tensor | None = None
    dtype: torch.dtype | None = None
    min_scale: float = 0.0
    quant_rounding: str = QuantRounding.DIVIDE.value

    @classmethod
    def of(cls, suffix: str | None, arguments: tuple[Any, ...]) -> "Finish":
        """From a fused op's own arguments, in their order; `suffix` is its epilogue's."""
        names = {
            None: (),
            "pad": ("right",),
            "static_fp8_quant": ("scale", "dtype", "quant_rounding"),
            "dynamic_fp8_quant": ("dtype", "min_scale", "quant_rounding"),
        }[suffix]
        return cls(kind=suffix or "none", **dict(zip(names, arguments, strict=True)))

    def width(self, width: int) -> int:
        """Of a row that is stored."""
        return width + self.right

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty results for activations x."""
        y = x.new_empty((*x.shape[:-1], self.width(x.shape[-1])), dtype=self.dtype or x.dtype)
        if self.kind != "dynamic_fp8_quant":
            return (y,)
        return y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    def pointers(self, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(scale to read, scales to write); y where there are none, which is not touched."""
        return results[0] if self.scale is None else self.scale, results[-1]

    def constants(self, width: int) -> Mapping[str, Any]:
        """What a kernel is compiled for."""
        return {
            "OUT_WIDTH": self.width(width),
            "EPILOGUE": ("none", "pad", "static_fp8_quant", "dynamic_fp8_quant").index(self.kind),
            "MOST": 0.0 if self.dtype is None else torch.finfo(self.dtype).max,
            "MULTIPLIES": QuantRounding(self.quant_rounding) is QuantRounding.MULTIPLY,
            "INTERPRETED": INTERPRETED,
        }


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds at a time: rows, elements of each, and warps to hold them."""

    rows: int
    block: int
    warps: int

    def launch(self, x: Tensor) -> Mapping[str, Any]:
        """Options of a launch."""
        early = launches_early(x.device)
        options = {"launch_pdl": True} if early else {}
        return {"LAUNCHES_EARLY": early, "num_warps": self.warps, **options}


def tile(width: int, rows: int) -> Tile:
    """The tile of rows that are `width` elements long. Not tuned."""
    block = max(16, triton.next_power_of_2(width))
    held = max(1, min(4096 // block, triton.next_power_of_2(rows)))
    return Tile(rows=held, block=block, warps=max(1, min(16, held * block // 512)))


def programs_of(x: Tensor, blocks: int, shape: Tile) -> int:
    """Programs to launch for that many tiles."""
    return blocks


def flattened(x: Tensor) -> Tensor:
    """x as [rows, width] with elements of a row side by side; copied only where strides ask for it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before its predecessor has ended, to wait for it by itself: NVIDIA's
    programmatic dependent launch, from compute capability 9.0 on.
    """
    if device.type != "cuda" or torch.version.hip or INTERPRETED:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
