"""fp8 by a scale of each row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.providers.triton.epilogues import TritonEpilogue, code_constants, extremes, scale_bounds, scales_for
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import dynamic_scale, narrowed, quantized, within
from fuseplan.providers.triton.tuned import NORM_THREAD, Found


@triton.jit
def store_by_scale_of_row(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores the codes of rows, and the scale of each row."""
    y_ptr, scale_ptr, min_scale, max_scale, zero_scale, upper_ptr = arguments
    MOST: tl.constexpr = CONSTANTS[0]
    MULTIPLIES: tl.constexpr = CONSTANTS[1]
    ROUNDS_SCALED: tl.constexpr = CONSTANTS[2]
    ROUNDS: tl.constexpr = CONSTANTS[3]
    IS_BOUNDED: tl.constexpr = CONSTANTS[4]
    OVERFLOWS: tl.constexpr = CONSTANTS[5]
    UNDERFLOWS: tl.constexpr = CONSTANTS[6]
    column = first + tl.arange(0, y.shape[1])
    out = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = valid[:, None] & within(column, WIDTH)[None, :]
    y = narrowed(y, DTYPE, NVIDIA)
    scale = dynamic_scale(y, min_scale, max_scale, upper_ptr, MOST, ROUNDS, IS_BOUNDED, OVERFLOWS, NVIDIA)
    if UNDERFLOWS:
        scale = tl.where(scale == 0, zero_scale, scale)
    code: tl.constexpr = y_ptr.dtype.element_ty
    codes = quantized(y, scale[:, None], code, MOST, MULTIPLIES, ROUNDS_SCALED, DTYPE, OVERFLOWS, UNDERFLOWS, NVIDIA)
    tl.store(y_ptr + out, codes, mask=inside)
    tl.store(scale_ptr + row, scale, mask=valid)


@dataclass(frozen=True, kw_only=True)
class DynamicFp8(TritonEpilogue):
    """scale = clamp(min(amax(|y|, -1), scale_ub) / fp8_max, min_scale, max_scale) or zero_scale
    clamp(y / scale, -fp8_max, fp8_max).to(dtype)

    Attributes:
        dtype: dtype of the codes.
        min_scale: the least scale of a row.
        max_scale: the largest scale; 0 for none.
        zero_scale: the replacement for a scale of 0.
        scale_ub: the upper bound of the largest element; None: no bound.
        quant_rounding: how a scale is applied.
    """

    store: ClassVar[Any] = store_by_scale_of_row
    whole_row: ClassVar[bool] = True
    elements: ClassVar[Found] = NORM_THREAD["dynamic_fp8_quant"]
    dtype: torch.dtype
    min_scale: float
    max_scale: float
    zero_scale: float
    scale_ub: Tensor | None
    quant_rounding: str

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty codes and scales [..., 1] for activations x."""
        codes = x.new_empty(x.shape, dtype=self.dtype)
        return codes, scales_for(x, 1, self.quant_rounding)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(codes, scales, their bounds)"""
        return *results, *scale_bounds(self, results[1])

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        return *code_constants(self.dtype, self.quant_rounding), self.scale_ub is not None, *extremes(self)


EPILOGUE = DynamicFp8
