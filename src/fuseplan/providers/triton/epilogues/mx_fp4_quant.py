"""MXFP4: e2m1, two codes a byte, by a power of two of each group of elements of a row, kept as its exponent."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fuseplan.dialect import MxScaling
from fuseplan.providers.triton.epilogues import Epilogue, bytes_for, refuse_groups
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import e2m1_of, in_groups, scaled_by_exponents, store_bytes, store_pairs
from fuseplan.providers.triton.tuned import NORM_THREAD, Found
from fuseplan.record import Refusal


@triton.jit
def store_pairs_by_exponents(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows as pairs of codes, and the exponents of their groups."""
    y_ptr, exponent_ptr = arguments
    GROUP: tl.constexpr = CONSTANTS[0]
    SCALING: tl.constexpr = CONSTANTS[1]
    BLOCK: tl.constexpr = y.shape[1]
    y, _, _ = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP)
    scaled, exponent = scaled_by_exponents(y, 6.0, 2, 0x200000, SCALING)
    store_pairs(e2m1_of(scaled), y_ptr, row, first, valid, WIDTH, BLOCK)
    store_bytes(exponent, exponent_ptr, row, first, valid, WIDTH, GROUP)


@dataclass(frozen=True, kw_only=True)
class MxFp4(Epilogue):
    """Of each group of elements of a row, the power of two by its largest element, and what that scales.

    Attributes:
        group_size: elements of a group, a power of two; rows are whole groups.
        scaling: one of `MxScaling`.
    """

    store: ClassVar[Any] = store_pairs_by_exponents
    elements: ClassVar[Found] = replace(NORM_THREAD["dynamic_fp8_quant"], source="as with a scale a row; not measured")
    group_size: int
    scaling: str

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """Why groups are refused that no tile holds, or that don't divide a row."""
        return refuse_groups(m.group_size, x)

    @property
    def unit(self) -> int:
        """Elements of a group, or of a byte."""
        return max(self.group_size, 2)

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty pairs of codes [..., width / 2] and exponents [..., width / group_size] for activations x."""
        return bytes_for(x, 2), bytes_for(x, self.group_size)

    @property
    def constants(self) -> tuple[Any, ...]:
        """What the device function is compiled for."""
        return self.group_size, MxScaling(self.scaling).value


EPILOGUE = MxFp4
