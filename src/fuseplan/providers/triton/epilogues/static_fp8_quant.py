"""fp8 by a given scale."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.providers.triton.epilogues import TritonEpilogue, code_constants
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import quantized, rounded, within
from fuseplan.providers.triton.tuned import NORM_THREAD, Found


@triton.jit
def store_by_given_scale(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores the codes of rows."""
    y_ptr, scale_ptr = arguments
    MOST: tl.constexpr = CONSTANTS[0]
    MULTIPLIES: tl.constexpr = CONSTANTS[1]
    ROUNDS_SCALED: tl.constexpr = CONSTANTS[2]
    code: tl.constexpr = y_ptr.dtype.element_ty
    column = first + tl.arange(0, y.shape[1])
    out = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = valid[:, None] & within(column, WIDTH)[None, :]
    y = rounded(y, DTYPE, NVIDIA)
    scale = tl.load(scale_ptr).to(tl.float32)
    codes = quantized(y, scale, code, MOST, MULTIPLIES, ROUNDS_SCALED, DTYPE, True, True, NVIDIA)
    tl.store(y_ptr + out, codes, mask=inside)


@dataclass(frozen=True, kw_only=True)
class StaticFp8(TritonEpilogue):
    """clamp(y / scale, -fp8_max, fp8_max).to(dtype)

    Attributes:
        scale: one element.
        dtype: dtype of the codes.
        quant_rounding: how the scale is applied.
    """

    store: ClassVar[Any] = store_by_given_scale
    elements: ClassVar[Found] = NORM_THREAD["static_fp8_quant"]
    scale: Tensor
    dtype: torch.dtype
    quant_rounding: str

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty codes for activations x."""
        return (x.new_empty(x.shape, dtype=self.dtype),)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(codes, scale)"""
        return *results, self.scale

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        return code_constants(self.dtype, self.quant_rounding)


EPILOGUE = StaticFp8
