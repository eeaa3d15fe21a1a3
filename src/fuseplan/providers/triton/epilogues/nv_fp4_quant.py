"""NVFP4: e2m1, two codes a byte, by a scale in fp8 of each group of elements of a row, and a global scale or none."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.dialect import TILE_GROUPS, ScaleLayout, empty_scales
from fuseplan.providers.triton.epilogues import Epilogue, bytes_for, refuse_groups
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import (
    e2m1_of,
    e4m3_of,
    in_groups,
    largest_bits,
    store_bytes,
    store_pairs,
    store_tiles,
)
from fuseplan.providers.triton.tuned import NORM_THREAD, Found
from fuseplan.record import Refusal


@triton.jit
def store_pairs_by_scales(
    y, arguments, row, first, valid,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, CONSTANTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Stores rows as pairs of codes, and the scales of their groups."""
    y_ptr, scale_ptr, global_ptr, min_scale, rows, first_row = arguments
    GROUP: tl.constexpr = CONSTANTS[0]
    IS_GLOBAL: tl.constexpr = CONSTANTS[1]
    SWIZZLES: tl.constexpr = CONSTANTS[2]
    BLOCK: tl.constexpr = y.shape[1]
    y, _, _ = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP)
    scale = tl.div_rn(largest_bits(y).to(tl.float32, bitcast=True), 6.0)
    inverse = 1.0
    if IS_GLOBAL:
        whole = tl.load(global_ptr).to(tl.float32)
        scale = tl.div_rn(scale, tl.broadcast_to(whole, scale.shape))
        inverse = tl.div_rn(1.0, whole)
    scale = tl.where(scale < min_scale, min_scale, scale)
    scale, code = e4m3_of(tl.where(scale > 448.0, 448.0, scale))
    scaled = y * tl.div_rn(tl.broadcast_to(inverse, scale.shape), scale)[:, :, None]
    scaled = tl.where(scaled > 6.0, 6.0, scaled)
    store_pairs(e2m1_of(tl.where(scaled < -6.0, -6.0, scaled)), y_ptr, row, first, valid, WIDTH, BLOCK)
    if SWIZZLES:
        store_tiles(code, scale_ptr, row + first_row, first, valid, rows, WIDTH, GROUP)
    else:
        store_bytes(code, scale_ptr, row, first, valid, WIDTH, GROUP)


@dataclass(frozen=True, kw_only=True)
class NvFp4(Epilogue):
    """Of each group of elements of a row:

    scale = clamp(amax(|y|) / 6 / global_scale, min_scale, 448).to(float8_e4m3fn)
    e2m1(clamp(y * ((1 / global_scale) / scale), -6, 6))

    Attributes:
        group_size: elements of a group, a power of two; rows are whole groups.
        global_scale: one element, float32; None: 1 in its place.
        min_scale: the smallest scale of a group.
        layout: of the scales: `ScaleLayout.ROWS` or `ScaleLayout.SWIZZLED`.
        first_row: which of all rows is the first of a launch.
        all_rows: how many there are; 0: as many as codes.
    """

    store: ClassVar[Any] = store_pairs_by_scales
    elements: ClassVar[Found] = replace(NORM_THREAD["dynamic_fp8_quant"], source="as with a scale a row; not measured")
    group_size: int
    global_scale: Tensor | None
    min_scale: float
    layout: str
    first_row: int = 0
    all_rows: int = 0

    @classmethod
    def refuse(cls, x: Tensor, m: Any) -> Refusal | None:
        """Why groups are refused that no tile holds, or that don't divide a row."""
        return refuse_groups(m.group_size, x)

    @property
    def unit(self) -> int:
        """Elements of a group, of a byte, or of a tile of scales."""
        return max(self.group_size * (TILE_GROUPS if self._swizzles else 1), 2)

    @property
    def _swizzles(self) -> bool:
        return self.layout == ScaleLayout.SWIZZLED

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty pairs of codes [..., width / 2] and scales [..., width / group_size] for activations x."""
        return bytes_for(x, 2), empty_scales(x, x.shape[-1] // self.group_size, torch.float8_e4m3fn, self.layout)

    def part(self, results: tuple[Tensor, ...], start: int, stop: int) -> "tuple[NvFp4, tuple[Tensor, ...]]":
        """Of tiles all of them, since rows aren't apart in them."""
        codes, scales = results
        if not self._swizzles:
            return super().part(results, start, stop)  # type: ignore[return-value]
        (own,) = super().part((codes,), start, stop)[1]
        return replace(self, first_row=start, all_rows=codes.shape[:-1].numel()), (own, scales)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(pairs of codes, scales, the global scale, the smallest one, all rows, which of them is the first)"""
        codes, scales = results
        whole, rows = codes if self.global_scale is None else self.global_scale, codes.shape[:-1].numel()
        # The kernel stores bytes, since fp8 isn't a type of every GPU.
        return (
            codes,
            scales.view(torch.uint8),
            whole,
            self.min_scale,
            (self.all_rows or rows) * self._swizzles,
            self.first_row,
        )

    @property
    def constants(self) -> tuple[Any, ...]:
        """What the device function is compiled for."""
        return self.group_size, self.global_scale is not None, self._swizzles


EPILOGUE = NvFp4
