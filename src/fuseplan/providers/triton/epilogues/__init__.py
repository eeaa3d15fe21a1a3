"""What rows go through before they are stored, a file an epilogue.

A file has the device function and an `Epilogue`, which it binds to `EPILOGUE`. It is named after the suffix of its
fused ops, `none` where they have none. Nothing else names one.
"""

import importlib
import math
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import QuantRounding, empty_scales
from fuseplan.graph.facts import equal_size
from fuseplan.providers.triton.tuned import NORM_THREAD, ONE_ROW, Found
from fuseplan.record import Reason, Refusal


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """An epilogue as a fused op asks for it. Fields are the op's own arguments, by their names in its schema.

    Attributes:
        store: the device function, `store(y, arguments, row, first, valid, DTYPE, WIDTH, CONSTANTS, NVIDIA)`. It rounds
            a tile y [ROWS, BLOCK], float32 or DTYPE, 0 beyond WIDTH, to DTYPE, and stores what it makes of that. `row`
            [ROWS] are its rows, stored where they are `valid`, and `first` is its first column.
        whole_row: whether a tile must hold all of a row.
        elements: that a thread of a norm holds, by rows for each multiprocessor.
        rows: of a program of a norm without a residual, likewise.
    """

    store: ClassVar[Any]
    whole_row: ClassVar[bool] = False
    elements: ClassVar[Found] = NORM_THREAD["none"]
    rows: ClassVar[Found] = ONE_ROW

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """Why the device function doesn't take a fused op's arguments m, of activations x, or None."""
        return None

    @property
    def unit(self) -> int:
        """Elements of a row that a tile must hold together, a power of two: tiles take multiples of it."""
        return 1

    def width(self, width: int) -> int:
        """Of a row that is stored."""
        return width

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty results for activations x."""
        return (x.new_empty((*x.shape[:-1], self.width(x.shape[-1]))),)

    def part(self, results: tuple[Tensor, ...], start: int, stop: int) -> "tuple[Epilogue, tuple[Tensor, ...]]":
        """What stores some of the rows, and results of it."""
        return self, tuple(each.view(each.shape[:-1].numel(), -1)[start:stop] for each in results)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Tensors and floats that the device function is called with, `results` among them."""
        return results

    @property
    def constants(self) -> tuple[Any, ...]:
        """What the device function is compiled for."""
        return ()


SUFFIXES: frozenset[str | None] = frozenset(
    None if each.name == "none" else each.name for each in pkgutil.iter_modules(__path__)
)
"""Of fused ops, for which there is an epilogue; None: without one."""


@cache
def epilogue_of(suffix: str | None) -> type[Epilogue]:
    """The epilogue of the fused ops with that suffix."""
    found: type[Epilogue] = importlib.import_module(f"{__name__}.{suffix or 'none'}").EPILOGUE
    return found


def code_constants(dtype: torch.dtype, quant_rounding: str) -> tuple[float, bool, bool, bool]:
    """(the largest code, whether a scale is applied by its reciprocal, whether the quotient is rounded to the precision
    of the rows, as `rows.quantized` takes them, whether the scale is)
    """
    how = QuantRounding(quant_rounding)
    return torch.finfo(dtype).max, how.multiplies, how.rounds_scaled, how.rounds_scale


def refuse_groups(size: int, x: Tensor, *, least: int = 1) -> Refusal | None:
    """Why groups of so many elements are refused that no tile holds, or of which no row of x has a number of at least
    `least`, or None.
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
        expected=expected, found=f"group size {size}, hidden size {width}", mend="let another provider run it",
    )  # fmt: skip


def scales_for(x: Tensor, count: int, quant_rounding: str, layout: str = "rows") -> Tensor:
    """Memory for so many scales of each row of x."""
    dtype = x.dtype if QuantRounding(quant_rounding).rounds_scaled else torch.float32
    return empty_scales(x, count, dtype, layout)


def bytes_for(x: Tensor, size: int) -> Tensor:
    """Memory for a byte for so many elements of a row of x each."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // size), dtype=torch.uint8)


def scale_bounds(m: Any, scales: Tensor) -> tuple[Any, ...]:
    """(the least scale, the largest, what takes the place of 0, a pointer to the largest element that counts) of an
    epilogue m with scales.
    """
    return m.min_scale or -math.inf, m.max_scale or math.inf, m.zero_scale, scales if m.scale_ub is None else m.scale_ub


def extremes(m: Any) -> tuple[bool, bool]:
    """(whether elements over their scale may be beyond the largest code, whether a scale may be below 2^-85), by an
    epilogue m with scales.
    """
    return m.scale_ub is not None or bool(m.max_scale), not m.min_scale >= 2**-85
