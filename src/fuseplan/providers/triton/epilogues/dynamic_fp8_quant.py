"""fp8 by a scale of each row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.providers.triton.epilogues import Epilogue, code_constants
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import dynamic_scale, quantized, rounded, within
from fuseplan.providers.triton.tuned import NORM_THREAD, Found


@triton.jit
def store_by_scale_of_row(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows as codes, and the scale of each."""
    y_ptr, scale_ptr, min_scale = arguments
    MOST: tl.constexpr = CONSTANTS[0]
    MULTIPLIES: tl.constexpr = CONSTANTS[1]
    ROUNDS: tl.constexpr = CONSTANTS[2]
    column = first + tl.arange(0, y.shape[1])
    out = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = valid[:, None] & within(column, WIDTH)[None, :]
    y = rounded(y, DTYPE)
    scale = dynamic_scale(tl.where(inside, y, 0.0), min_scale, MOST, ROUNDS, DTYPE)
    codes = quantized(y, scale[:, None], y_ptr.dtype.element_ty, MOST, MULTIPLIES, NVIDIA)
    tl.store(y_ptr + out, codes, mask=inside)
    tl.store(scale_ptr + row, scale, mask=valid)


@dataclass(frozen=True, kw_only=True)
class DynamicFp8(Epilogue):
    """scale = max(amax(|y|, -1) / fp8_max, min_scale);  clamp(y / scale, -fp8_max, fp8_max).to(dtype)

    Attributes:
        dtype: of the codes.
        min_scale: the least scale of a row.
        quant_rounding: how a scale is applied.
    """

    store: ClassVar[Any] = store_by_scale_of_row
    whole_row: ClassVar[bool] = True
    elements: ClassVar[Found] = NORM_THREAD["dynamic_fp8_quant"]
    dtype: torch.dtype
    min_scale: float
    quant_rounding: str

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty codes and scales [..., 1] for activations x."""
        codes = x.new_empty(x.shape, dtype=self.dtype)
        return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(codes, scales, the least scale)"""
        return *results, self.min_scale

    @property
    def constants(self) -> tuple[Any, ...]:
        """What the device function is compiled for."""
        return code_constants(self.dtype, self.quant_rounding)


EPILOGUE = DynamicFp8
