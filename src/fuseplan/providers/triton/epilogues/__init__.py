"""Epilogues of rows before they are stored, a file each.

A file has the device function and an `Epilogue`, which it binds to `EPILOGUE`. It is named after the suffix of its
fused ops, or `none` for ops without a suffix. No other file names an epilogue.
"""

import importlib
import math
import pkgutil
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import TILE_GROUPS, QuantRounding, ScaleLayout, empty_scales
from fuseplan.graph.facts import equal_size
from fuseplan.providers.triton.tuned import NORM_THREAD, ONE_ROW, Found
from fuseplan.record import Reason, Refusal


@dataclass(frozen=True, kw_only=True)
class TritonEpilogue:
    """An epilogue with its arguments. Fields are the fused op's own arguments, named as in its schema.

    Attributes:
        store: the device function, `store(y, arguments, row, first, valid, DTYPE, WIDTH, CONSTANTS, NVIDIA)`. It rounds
            a tile y [ROWS, BLOCK], float32 or DTYPE, 0 beyond WIDTH, to DTYPE, and stores the epilogue of it. `row`
            [ROWS] are its rows, stored where they are `valid`, and `first` is its first column.
        whole_row: whether a tile must hold a whole row.
        elements: elements that a thread of a norm holds, by rows for each multiprocessor.
        rows: rows of a program of a norm without a residual, by rows for each multiprocessor.
    """

    store: ClassVar[Any]
    whole_row: ClassVar[bool] = False
    elements: ClassVar[Found] = NORM_THREAD["none"]
    rows: ClassVar[Found] = ONE_ROW

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """The refusal of a fused op's arguments m, with activations x, by the device function, or None."""
        return None

    @property
    def unit(self) -> int:
        """Elements of a row that must be in the same tile, a power of two: tiles take multiples of it."""
        return 1

    def width(self, width: int) -> int:
        """The width of a stored row."""
        return width

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty results for activations x."""
        return (x.new_empty((*x.shape[:-1], self.width(x.shape[-1]))),)

    def part(self, results: tuple[Tensor, ...], start: int, stop: int) -> "tuple[TritonEpilogue, tuple[Tensor, ...]]":
        """The epilogue for some of the rows, and its results."""
        return self, tuple(each.view(each.shape[:-1].numel(), -1)[start:stop] for each in results)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Arguments of the device function, tensors and floats, `results` among them."""
        return results

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        return ()


SUFFIXES: frozenset[str | None] = frozenset(
    None if each.name == "none" else each.name for each in pkgutil.iter_modules(__path__)
)
"""Suffixes of fused ops that have an epilogue here; None: ops without a suffix."""


@cache
def epilogue_of(suffix: str | None) -> type[TritonEpilogue]:
    """The epilogue of the fused ops with that suffix."""
    found: type[TritonEpilogue] = importlib.import_module(f"{__name__}.{suffix or 'none'}").EPILOGUE
    return found


@dataclass(frozen=True, kw_only=True)
class GroupBytes(TritonEpilogue):
    """An epilogue that stores a byte for each group of elements of a row, in rows or in tiles.

    Attributes:
        group_size: elements of a group, a power of two; rows are whole groups.
        layout: layout of these bytes, `ScaleLayout.ROWS` or `ScaleLayout.SWIZZLED`.
        first_row: the index of a launch's first row among all rows.
        all_rows: the number of all rows; 0: as many as rows of codes.
    """

    elements: ClassVar[Found] = replace(NORM_THREAD["none"], source="as without an epilogue; not measured")
    group_size: int
    layout: str
    first_row: int = 0
    all_rows: int = 0

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """The refusal of groups that no tile holds or that don't divide a row, or None."""
        return refuse_groups(m.group_size, x)

    @property
    def unit(self) -> int:
        """Elements of a group, of a byte of codes, or of a tile of scales."""
        return max(self.group_size * (TILE_GROUPS if self.swizzles else 1), 2)

    @property
    def swizzles(self) -> bool:
        """Whether bytes are stored in tiles."""
        return self.layout == ScaleLayout.SWIZZLED

    def scales(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the bytes of activations x, in a dtype."""
        return empty_scales(x, x.shape[-1] // self.group_size, dtype, self.layout)

    def part(self, results: tuple[Tensor, ...], start: int, stop: int) -> tuple[TritonEpilogue, tuple[Tensor, ...]]:
        """See `Epilogue.part`; for tiles, all of them are results, since tiles don't separate rows."""
        codes, scales = results
        if not self.swizzles:
            return super().part(results, start, stop)
        (own,) = super().part((codes,), start, stop)[1]
        return replace(self, first_row=start, all_rows=codes.shape[:-1].numel()), (own, scales)

    def places(self, codes: Tensor) -> tuple[int, int]:
        """(number of all rows, or 0 where bytes are stored in rows; index of the first row of these codes)"""
        return (self.all_rows or codes.shape[:-1].numel()) * self.swizzles, self.first_row


def code_constants(dtype: torch.dtype, quant_rounding: str) -> tuple[float, bool, bool, bool]:
    """(the largest code, whether a scale is applied by its reciprocal, whether the quotient is rounded to the dtype of
    the rows, all for `rows.quantized`; whether the scale is rounded to it)
    """
    how = QuantRounding(quant_rounding)
    return torch.finfo(dtype).max, how.multiplies, how.rounds_scaled, how.rounds_scale


def refuse_groups(size: int, x: Tensor, *, least: int = 1) -> Refusal | None:
    """The refusal of a group size that no tile holds or that doesn't divide rows of x into at least `least` groups; or
    None.
    """
    width = x.shape[-1]
    if size < 1 or size & (size - 1):
        expected = "a group size that is a power of two"
    elif not equal_size(width % size, 0):
        expected = f"a hidden size that is a multiple of {size}"
    elif isinstance(width, int) and width < least * size:
        expected = f"a hidden size of at least {least} groups where scales are packed"
    else:
        return None
    return Refusal(
        reason=Reason.SIZE,
        detail=f"fuseplan's Triton kernels take {expected}, not groups of {size} in rows of {width}",
        expected=expected, found=f"group size {size}, hidden size {width}", fix="let another provider run it",
    )  # fmt: skip


def scales_for(x: Tensor, count: int, quant_rounding: str, layout: str = "rows") -> Tensor:
    """Memory for `count` scales of each row of x."""
    dtype = x.dtype if QuantRounding(quant_rounding).rounds_scaled else torch.float32
    return empty_scales(x, count, dtype, layout)


def bytes_for(x: Tensor, size: int) -> Tensor:
    """Memory for a byte for every `size` elements of a row of x."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // size), dtype=torch.uint8)


def scale_bounds(m: Any, scales: Tensor) -> tuple[Any, ...]:
    """(the least scale, the largest scale, the replacement for 0, a pointer to the upper bound of amax) of an epilogue
    m with scales.
    """
    return m.min_scale or -math.inf, m.max_scale or math.inf, m.zero_scale, scales if m.scale_ub is None else m.scale_ub


def extremes(m: Any) -> tuple[bool, bool]:
    """(whether elements over their scale may be beyond the largest code, whether a scale may be below 2^-85), by an
    epilogue m with scales.
    """
    return m.scale_ub is not None or bool(m.max_scale), not m.min_scale >= 2**-85
