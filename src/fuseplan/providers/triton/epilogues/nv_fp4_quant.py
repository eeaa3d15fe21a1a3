"""NVFP4: e2m1, two codes a byte, with an fp8 scale for each group of elements of a row, and maybe a global scale."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fuseplan.providers.triton.epilogues import GroupBytes, bytes_for
from fuseplan.providers.triton.language import tl, triton
from fuseplan.providers.triton.rows import e2m1_of, e4m3_of, in_groups, largest_bits, store_bytes, store_pairs, widened


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
    y, _, _ = in_groups(y, row, first, valid, DTYPE, WIDTH, GROUP, NVIDIA)
    scale = tl.div_rn(largest_bits(y, NVIDIA).to(tl.float32, bitcast=True), 6.0)
    inverse = 1.0
    if IS_GLOBAL:
        whole = tl.load(global_ptr).to(tl.float32)
        scale = tl.div_rn(scale, tl.broadcast_to(whole, scale.shape))
        inverse = tl.div_rn(1.0, whole)
    scale = tl.where(scale < min_scale, min_scale, scale)
    scale, code = e4m3_of(tl.where(scale > 448.0, 448.0, scale))
    scaled = widened(y, NVIDIA) * tl.div_rn(tl.broadcast_to(inverse, scale.shape), scale)[:, :, None]
    scaled = tl.where(scaled > 6.0, 6.0, scaled)
    store_pairs(e2m1_of(tl.where(scaled < -6.0, -6.0, scaled)), y_ptr, row, first, valid, WIDTH, BLOCK)
    store_bytes(code, scale_ptr, row, first, valid, rows, first_row, WIDTH, GROUP, SWIZZLES)


@dataclass(frozen=True, kw_only=True)
class NvFp4(GroupBytes):
    """For each group of elements of a row:

    scale = clamp(amax(|y|) / 6 / global_scale, min_scale, 448).to(float8_e4m3fn)
    e2m1(clamp(y * ((1 / global_scale) / scale), -6, 6))

    Attributes:
        global_scale: one element, float32; None: 1 in its place.
        min_scale: the smallest scale of a group.
    """

    store: ClassVar[Any] = store_pairs_by_scales
    global_scale: Tensor | None
    min_scale: float

    def results(self, x: Tensor) -> tuple[Tensor, ...]:
        """Empty pairs of codes [..., width / 2] and scales [..., width / group_size] for activations x."""
        return bytes_for(x, 2), self.scales(x, torch.float8_e4m3fn)

    def arguments(self, results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """(pairs of codes, scales, the global scale, the smallest scale, number of all rows, index of the first one)"""
        codes, scales = results
        whole = codes if self.global_scale is None else self.global_scale
        # The kernel stores bytes, since not every GPU has fp8.
        return codes, scales.view(torch.uint8), whole, self.min_scale, *self.places(codes)

    @property
    def constants(self) -> tuple[Any, ...]:
        """The compile-time constants of the device function."""
        return self.group_size, self.global_scale is not None, self.swizzles


EPILOGUE = NvFp4
