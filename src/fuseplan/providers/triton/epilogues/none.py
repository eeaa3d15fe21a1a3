"""Rows without an epilogue."""

from dataclasses import dataclass
from typing import Any, ClassVar

from fuseplan.providers.triton.epilogues import TritonEpilogue
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import within


@triton.jit
def store_rows(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows in DTYPE."""
    y_ptr = arguments[0]
    column = first + tl.arange(0, y.shape[1])
    out = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(y_ptr + out, y.to(DTYPE), mask=valid[:, None] & within(column, WIDTH)[None, :])


@dataclass(frozen=True, kw_only=True)
class Rows(TritonEpilogue):
    """y"""

    store: ClassVar[Any] = store_rows


EPILOGUE = Rows
