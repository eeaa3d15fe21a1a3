"""MXFP8: fp8 by a power of two of each group of elements of a row, which is kept as its exponent."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import MxScaling
from fuseplan.providers.triton.epilogues import Epilogue, bytes_for, refuse_groups
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import codes_of, in_groups, scaled_by_exponents, store_bytes
from fuseplan.providers.triton.tuned import NORM_THREAD, Found
from fuseplan.record import Refusal


@triton.jit
def store_by_exponents(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows as codes, and the exponents of their groups."""
    y_ptr, exponent_ptr = arguments
    MOST: tl.constexpr = CONSTANTS[0]
    GROUP: tl.constexpr = CONSTANTS[1]
    SCALING: tl.constexpr = CONSTANTS[2]
    TOP: tl.constexpr = 8
    HALF: tl.constexpr = 0x80000
    code: tl.constexpr = y_ptr.dtype.element_ty
    y, out, inside = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP)
    scaled, exponent = scaled_by_exponents(y, MOST, TOP, HALF, SCALING)
    tl.store(y_ptr + out, tl.reshape(codes_of(scaled, code, MOST, NVIDIA), out.shape), mask=inside)
    store_bytes(exponent, exponent_ptr, row, first, valid, WIDTH, GROUP)


@dataclass(frozen=True, kw_only=True)
class MxFp8(Epilogue):
    """Of each group of elements of a row, the power of two by its largest element, and what that scales.

    Attributes:
        group_size: elements of a group, a power of two; rows are whole groups.
        dtype: of the codes: float8_e4m3fn.
        scaling: one of `MxScaling`.
    """

    store: ClassVar[Any] = store_by_exponents
    elements: ClassVar[Found] = replace(NORM_THREAD["dynamic_fp8_quant"], source="as with a scale a row; not measured")
    group_size: int
    dtype: torch.dtype
    scaling: str

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """Why groups are refused that no tile holds, or that don't divide a row."""
        return refuse_groups(m.group_size, x)

    @property
    def unit(self) -> int:
        """Elements of a group."""
        return self.group_size

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty codes and exponents [..., width / group_size] for activations x."""
        return x.new_empty(x.shape, dtype=self.dtype), bytes_for(x, self.group_size)

    @property
    def constants(self) -> tuple[Any, ...]:
        """What the device function is compiled for."""
        return torch.finfo(self.dtype).max, self.group_size, MxScaling(self.scaling).value


EPILOGUE = MxFp8
