"""fp8 by a scale of each group of elements of a row."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fuseplan.dialect import PACKED, ScaleLayout
from fuseplan.providers.triton.epilogues import code_constants, extremes, refuse_groups, scale_bounds, scales_for
from fuseplan.providers.triton.epilogues.dynamic_fp8_quant import DynamicFp8
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import dynamic_scale, in_groups, quantized, within
from fuseplan.providers.triton.tuned import GROUPED_ROWS, NORM_THREAD, Found
from fuseplan.record import Refusal


@triton.jit
def store_by_scales_of_groups(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores the codes of rows, and the scales of their groups."""
    y_ptr, scale_ptr, min_scale, max_scale, zero_scale, upper_ptr, min_power, scale_row, scale_column = arguments
    MOST: tl.constexpr = CONSTANTS[0]
    MULTIPLIES: tl.constexpr = CONSTANTS[1]
    ROUNDS_SCALED: tl.constexpr = CONSTANTS[2]
    ROUNDS: tl.constexpr = CONSTANTS[3]
    IS_BOUNDED: tl.constexpr = CONSTANTS[4]
    GROUP: tl.constexpr = CONSTANTS[5]
    UE8M0: tl.constexpr = CONSTANTS[6]
    PACKED: tl.constexpr = CONSTANTS[7]
    OVERFLOWS: tl.constexpr = CONSTANTS[8]
    UNDERFLOWS: tl.constexpr = CONSTANTS[9]
    GROUPS: tl.constexpr = WIDTH // GROUP
    y, out, inside = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP, NVIDIA)
    # Where several programs share a row, memory is the limit. Shorter code, with more programs at once, was slower
    # there: 575 us instead of 537 for 32,768 rows of 14,336 elements on an H200.
    SHORT: tl.constexpr = NVIDIA and out.shape[1] >= WIDTH
    scale = dynamic_scale(y, min_scale, max_scale, upper_ptr, MOST, ROUNDS, IS_BOUNDED, OVERFLOWS, SHORT)
    if UE8M0:
        scale = power_of_two_from(scale)
        scale = tl.where(scale < min_power, min_power, scale)
    if UNDERFLOWS:
        scale = tl.where(scale == 0, zero_scale, scale)
    code: tl.constexpr = y_ptr.dtype.element_ty
    codes = quantized(
        y, scale[:, :, None], code, MOST, MULTIPLIES, ROUNDS_SCALED, DTYPE, OVERFLOWS, UNDERFLOWS, NVIDIA, SHORT
    )
    tl.store(y_ptr + out, tl.reshape(codes, out.shape), mask=inside)
    group = first // GROUP + tl.arange(0, y.shape[1])
    if PACKED > 1:
        exponents = tl.where((group < GROUPS)[None, :], scale.to(tl.int32, bitcast=True) >> 23 & 0xFF, 0)
        exponents = tl.reshape(exponents, [y.shape[0], y.shape[1] // PACKED, PACKED])
        words = tl.sum(exponents << (8 * tl.arange(0, PACKED)), axis=2)
        column = first // (GROUP * PACKED) + tl.arange(0, y.shape[1] // PACKED)
        at = row.to(tl.int64)[:, None] * scale_row + column[None, :].to(tl.int64) * scale_column
        inside = column < (GROUPS + PACKED - 1) // PACKED
        tl.store(scale_ptr + at, words, mask=valid[:, None] & inside[None, :])
    else:
        at = row.to(tl.int64)[:, None] * scale_row + group[None, :].to(tl.int64) * scale_column
        tl.store(scale_ptr + at, scale, mask=valid[:, None] & within(group, GROUPS)[None, :])


@triton.jit
def power_of_two_from(x):
    """2^ceil(log2(x)) of positive x, float32; 0, infinity and NaN stay."""
    bits = x.to(tl.int32, bitcast=True)
    # Below 2^-126 a number's bits are the number, in units of 2^-149: the power is all bits below the highest, plus 1.
    below = bits - 1
    for shift in tl.static_range(5):
        below |= below >> (1 << shift)
    up = tl.where(bits < 0x800000, below + 1, (bits + 0x7FFFFF) & 0x7F800000)
    return tl.where(x == x, up.to(tl.float32, bitcast=True), x)


@dataclass(frozen=True, kw_only=True)
class GroupFp8(DynamicFp8):
    """`DynamicFp8` for each group of elements of a row.

    Attributes:
        group_size: elements of a group, a power of two; rows are whole groups.
        ue8m0: whether scales are rounded up to powers of two.
        min_power: the least scale of a group after that rounding.
        layout: one of `ScaleLayout`.
    """

    store: ClassVar[Any] = store_by_scales_of_groups
    whole_row: ClassVar[bool] = False
    elements: ClassVar[Found] = NORM_THREAD["group_fp8_quant"]
    rows: ClassVar[Found] = GROUPED_ROWS
    group_size: int
    ue8m0: bool
    min_power: float
    layout: str

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """The refusal of groups that no tile holds or that don't divide a row, or None."""
        return refuse_groups(m.group_size, x, least=3 if m.values.get("layout") == ScaleLayout.PACKED else 1)

    @property
    def unit(self) -> int:
        """Elements of a group, or of the groups whose scales are packed together."""
        return self.group_size * self._packed

    @property
    def _packed(self) -> int:
        return PACKED if self.layout == ScaleLayout.PACKED else 1

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty codes and scales [..., width / group_size] for activations x."""
        codes = x.new_empty(x.shape, dtype=self.dtype)
        return codes, scales_for(x, x.shape[-1] // self.group_size, self.quant_rounding, self.layout)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(codes, scales, their bounds, the least power of two, strides of rows and columns of scales)"""
        scales = results[1]
        return *results, *scale_bounds(self, scales), self.min_power, scales.stride(-2), scales.stride(-1)

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        constants = code_constants(self.dtype, self.quant_rounding)
        return *constants, self.scale_ub is not None, self.group_size, self.ue8m0, self._packed, *extremes(self)


EPILOGUE = GroupFp8
