"""Zeros behind each row."""

from dataclasses import dataclass
from typing import Any, ClassVar

from fuseplan.providers.triton.epilogues import TritonEpilogue
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import within


@triton.jit
def store_padded(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows in DTYPE, and CONSTANTS[0] zeros behind each row."""
    y_ptr = arguments[0]
    OUT_WIDTH: tl.constexpr = WIDTH + CONSTANTS[0]
    column = first + tl.arange(0, y.shape[1])
    out = row.to(tl.int64)[:, None] * OUT_WIDTH + column[None, :]
    # In a row with infinity or NaN, values beyond its end are NaN as well.
    padded = tl.where(within(column, WIDTH)[None, :], y, 0.0)
    tl.store(y_ptr + out, padded.to(DTYPE), mask=valid[:, None] & within(column, OUT_WIDTH)[None, :])


@dataclass(frozen=True, kw_only=True)
class Pad(TritonEpilogue):
    """pad(y, (0, right))

    Attributes:
        right: zeros behind each row.
    """

    store: ClassVar[Any] = store_padded
    right: int

    def width(self, width: int) -> int:
        """The width of a stored row."""
        return width + self.right

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        return (self.right,)


EPILOGUE = Pad
