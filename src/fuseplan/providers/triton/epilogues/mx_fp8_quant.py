"""MXFP8: fp8 with a power of two for each group of elements of a row, stored as its exponent."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import MX_FP8_FORMATS, MxScaling
from fuseplan.providers.triton.epilogues import GroupBytes
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import codes_of, in_groups, scaled_by_exponents, store_bytes


@triton.jit
def store_by_exponents(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows as codes, and the exponents of their groups."""
    y_ptr, exponent_ptr, rows, first_row = arguments
    MOST: tl.constexpr = CONSTANTS[0]
    GROUP: tl.constexpr = CONSTANTS[1]
    SCALING: tl.constexpr = CONSTANTS[2]
    SWIZZLES: tl.constexpr = CONSTANTS[3]
    TOP: tl.constexpr = CONSTANTS[4]
    HALF: tl.constexpr = CONSTANTS[5]
    code: tl.constexpr = y_ptr.dtype.element_ty
    y, out, inside = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP, NVIDIA)
    scaled, exponent = scaled_by_exponents(y, MOST, TOP, HALF, SCALING, NVIDIA)
    tl.store(y_ptr + out, tl.reshape(codes_of(scaled, code, MOST, NVIDIA), out.shape), mask=inside)
    store_bytes(exponent, exponent_ptr, row, first, valid, rows, first_row, WIDTH, GROUP, SWIZZLES)


@dataclass(frozen=True, kw_only=True)
class MxFp8(GroupBytes):
    """For each group of elements of a row, a power of two from its largest element, and the elements scaled by it.

    Attributes:
        dtype: dtype of the codes: float8_e4m3fn or float8_e5m2.
        scaling: one of `MxScaling`.
    """

    store: ClassVar[Any] = store_by_exponents
    dtype: torch.dtype
    scaling: str

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty codes and exponents [..., width / group_size] for activations x."""
        return x.new_empty(x.shape, dtype=self.dtype), self.scales(x, torch.uint8)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(codes, exponents, number of all rows, index of the first one)"""
        return *results, *self.places(results[0])

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        how, codes = MxScaling(self.scaling).value, MX_FP8_FORMATS[self.dtype]
        return codes.most, self.group_size, how, self.swizzles, codes.top, codes.half


EPILOGUE = MxFp8
