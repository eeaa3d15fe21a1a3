"""How the scales of groups lie in memory: products read them by loads of 16 bytes, down the rows."""

import math
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

ALIGNED_ROWS = 4
"""A column of scales takes a multiple of 16 bytes: this many scales of four bytes each."""
PACKED = 4
"""Exponents of an int32."""
TILE_ROWS, TILE_GROUPS, SWIZZLED_ROWS = 128, 4, 32
"""The rows and groups of a tile that Blackwell's products read, and the rows of it that lie 16 bytes apart."""


class ScaleLayout(StrEnum):
    """`rows`: contiguous. `columns`: of a matrix, one column after the other. `aligned`: the same, each column padded
    to a multiple of four rows with undefined values. `packed`: the same, of the exponents of four scales that are
    powers of two in an int32, the first in its lowest byte, and 0 for groups that aren't there (UE8M0). `swizzled`: of
    bytes, tiles of 128 rows and 4 groups one after the other, along groups first; of a tile, each of its first 32 rows
    takes 16 bytes: four of itself, and of the rows that are 32, 64 and 96 behind it. Bytes without a scale are 0.
    """

    ROWS = "rows"
    COLUMNS = "columns"
    ALIGNED = "aligned"
    PACKED = "packed"
    SWIZZLED = "swizzled"


def lay_out(scale: Tensor, layout: str) -> Tensor:
    """Scales of a dtype in a layout.

    Args:
        scale: [..., groups].
        layout: one of `ScaleLayout`.

    Returns:
        The same values, or, whatever dimensions rows have, a matrix: [rows, groups], packed [rows, groups / 4, rounded
        up] in int32, swizzled [32 * tiles of rows, 16 * tiles of groups].

    Raises:
        ValueError: `layout` isn't one of `ScaleLayout`, or is `swizzled`, and scales take more than a byte.
    """
    how = ScaleLayout(layout)
    if how is ScaleLayout.ROWS:
        return scale.contiguous()
    if how is ScaleLayout.SWIZZLED and scale.element_size() > 1:
        raise ValueError(f"scales in {scale.dtype} have no layout '{how}', which is of bytes: give another one")
    scale = scale.reshape(-1, scale.shape[-1])
    if how is ScaleLayout.SWIZZLED:
        return _swizzled(scale)
    if how is ScaleLayout.PACKED:
        exponents = (scale.float().view(torch.int32) >> 23) & 0xFF
        padded = torch.nn.functional.pad(exponents, (0, -scale.shape[-1] % PACKED)).unflatten(-1, (-1, PACKED))
        shifts = torch.arange(0, 8 * PACKED, 8, dtype=torch.int32, device=scale.device)
        scale = (padded << shifts).sum(-1, dtype=torch.int32)
    return _columns(scale, len(scale), scale.shape[-1], scale.dtype, how).copy_(scale)


def _swizzled(scale: Tensor) -> Tensor:
    rows, groups = scale.shape
    padding = (0, -groups % TILE_GROUPS, 0, -rows % TILE_ROWS)
    tiles = torch.nn.functional.pad(scale.view(torch.uint8), padding)
    tiles = tiles.unflatten(0, (-1, TILE_ROWS)).unflatten(-1, (-1, TILE_GROUPS)).transpose(1, 2)
    across = tiles.unflatten(2, (-1, SWIZZLED_ROWS)).transpose(2, 3)  # [tiles of rows, of groups, 32, 4, 4]
    return torch.reshape(across, (len(tiles) * SWIZZLED_ROWS, -1)).view(scale.dtype)


def in_rows(scale: Tensor, rows: int, groups: int, layout: str) -> Tensor:
    """Scales that `lay_out` arranged, as [rows, groups]; the exponents of packed ones."""
    how = ScaleLayout(layout)
    if how is ScaleLayout.PACKED:
        bytes_of = torch.stack([scale >> shift & 0xFF for shift in range(0, 8 * PACKED, 8)], -1)
        return bytes_of.flatten(-2)[:, :groups]
    if how is not ScaleLayout.SWIZZLED:
        return scale.reshape(rows, groups)
    across = scale.reshape(len(scale) // SWIZZLED_ROWS, -1, SWIZZLED_ROWS, TILE_ROWS // SWIZZLED_ROWS, TILE_GROUPS)
    return across.permute(0, 3, 2, 1, 4).reshape(len(across) * TILE_ROWS, -1)[:rows, :groups]


def empty_scales(x: Tensor, groups: Any, dtype: torch.dtype, layout: str) -> Tensor:
    """Memory for so many scales of each row of x, as `lay_out` yields them."""
    how = ScaleLayout(layout)
    if how is ScaleLayout.ROWS:
        return x.new_empty((*x.shape[:-1], groups), dtype=dtype)
    rows = math.prod(x.shape[:-1])
    if how is ScaleLayout.SWIZZLED:
        across = SWIZZLED_ROWS * ((rows + TILE_ROWS - 1) // TILE_ROWS)
        along = TILE_ROWS // SWIZZLED_ROWS * TILE_GROUPS * ((groups + TILE_GROUPS - 1) // TILE_GROUPS)
        return x.new_empty((across, along), dtype=dtype)
    if how is ScaleLayout.PACKED:
        groups, dtype = (groups + PACKED - 1) // PACKED, torch.int32
    return _columns(x, rows, groups, dtype, how)


def _columns(x: Tensor, rows: Any, groups: Any, dtype: torch.dtype, how: ScaleLayout) -> Tensor:
    height = rows if how is ScaleLayout.COLUMNS else (rows + ALIGNED_ROWS - 1) // ALIGNED_ROWS * ALIGNED_ROWS
    return x.new_empty((groups, height), dtype=dtype).mT[:rows]
