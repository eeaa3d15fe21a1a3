"""MXFP8: fp8 by a power of two of each group of elements of a row, which is kept as its exponent."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import MxScaling
from fuseplan.providers.triton.epilogues import Epilogue, refuse_groups
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import codes_of, in_groups, largest_bits, within
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
    GROUPS: tl.constexpr = WIDTH // GROUP
    code: tl.constexpr = y_ptr.dtype.element_ty
    y, out, inside = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP)
    bits = largest_bits(y)
    if SCALING == "rceil":
        wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), MOST).to(tl.int32, bitcast=True)
        # 2^-127 has no exponent of its own, nor has what is below it.
        exponent = tl.where(wanted <= 0x400000, 0, (wanted + 0x7FFFFF) >> 23)
        exponent = tl.where(exponent > 254, 254, exponent)
        factor = tl.where(exponent == 254, 0x400000, (254 - exponent) << 23)
        factor = tl.where(exponent == 0, 0x3F800000, factor)
        factor = tl.where(bits > 0x7F800000, bits, factor)
        scaled = y * factor.to(tl.float32, bitcast=True)[:, :, None]
    else:
        top = bits
        if SCALING == "even":
            top = bits + 0x80000
        exponent = (top >> 23) - 8
        if SCALING == "ceil":
            exponent = tl.where((bits & 0x7FFFFF) > 0, exponent + 1, exponent)
        exponent = tl.where(exponent < 0, 0, exponent)
        exponent = tl.where(bits > 0x7F800000, 255, exponent)
        scale = tl.where(exponent == 0, 0x800000, exponent << 23).to(tl.float32, bitcast=True)
        scaled = tl.div_rn(y, tl.broadcast_to(scale[:, :, None], y.shape))
    exponent = tl.where(bits > 0x7F800000, 255, exponent)
    tl.store(y_ptr + out, tl.reshape(codes_of(scaled, code, MOST, NVIDIA), out.shape), mask=inside)
    group = first // GROUP + tl.arange(0, y.shape[1])
    at = row.to(tl.int64)[:, None] * GROUPS + group[None, :]
    tl.store(exponent_ptr + at, exponent.to(tl.uint8), mask=valid[:, None] & within(group, GROUPS)[None, :])


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
        exponents = x.new_empty((*x.shape[:-1], x.shape[-1] // self.group_size), dtype=torch.uint8)
        return x.new_empty(x.shape, dtype=self.dtype), exponents

    @property
    def constants(self) -> tuple[Any, ...]:
        """What the device function is compiled for."""
        return torch.finfo(self.dtype).max, self.group_size, MxScaling(self.scaling).value


EPILOGUE = MxFp8
