"""MXFP4: e2m1, two codes a byte, with a power of two for each group of elements of a row, stored as its exponent."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import MxScaling
from fuseplan.providers.triton.epilogues import GroupBytes, bytes_for
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import e2m1_of, in_groups, scaled_by_exponents, store_bytes, store_pairs


@triton.jit
def store_pairs_by_exponents(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows as pairs of codes, and the exponents of their groups."""
    y_ptr, exponent_ptr, rows, first_row = arguments
    GROUP: tl.constexpr = CONSTANTS[0]
    SCALING: tl.constexpr = CONSTANTS[1]
    SWIZZLES: tl.constexpr = CONSTANTS[2]
    BLOCK: tl.constexpr = y.shape[1]
    y, _, _ = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP, NVIDIA)
    scaled, exponent = scaled_by_exponents(y, 6.0, 2, 0x200000, SCALING, NVIDIA)
    store_pairs(e2m1_of(scaled), y_ptr, row, first, valid, WIDTH, BLOCK)
    store_bytes(exponent, exponent_ptr, row, first, valid, rows, first_row, WIDTH, GROUP, SWIZZLES)


@dataclass(frozen=True, kw_only=True)
class MxFp4(GroupBytes):
    """For each group of elements of a row, a power of two from its largest element, and the elements scaled by it.

    Attributes:
        scaling: one of `MxScaling`.
    """

    store: ClassVar[Any] = store_pairs_by_exponents
    scaling: str

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty pairs of codes [..., width / 2] and exponents [..., width / group_size] for activations x."""
        return bytes_for(x, 2), self.scales(x, torch.uint8)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(pairs of codes, exponents, number of all rows, index of the first one)"""
        return *results, *self.places(results[0])

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        return self.group_size, MxScaling(self.scaling).value, self.swizzles


EPILOGUE = MxFp4
