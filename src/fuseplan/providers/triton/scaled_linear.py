"""Linear layers of a few rows in fp8 with row-wise scales, as in decoding: y_i = x @ w_i^T * s * s_i + b_i, for up to
three weights in one kernel.

As in `linear`, a program reads a tile of one weight's rows and multiplies it by all rows of x, and all layers' tiles
are in one grid. The weight is the left operand; Hopper's tensor cores take at least 64 rows of it at once in fp8. Where
that leaves processors without a tile, several programs share the width of one, and a second, small kernel sums their
parts in a fixed order. Scales are applied to the sums.

The equivalent eager code is `fuseplan.rules.parts.scaled_linear.scaled_linears_reference`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import ScaledLayers
from fuseplan.providers.triton.launching import Tile, flattened, multiprocessors, shared_bytes
from fuseplan.providers.triton.replay import run_kernel, scratch
from fuseplan.providers.triton.tuned import (
    SCALED_COMBINED,
    SCALED_FEATURES,
    SCALED_SPLITS,
    SCALED_STAGES,
    SCALED_WARPS,
    SCALED_WIDTH,
)

LEAST_ROWS = 16
"""The least rows of x that a tensor core multiplies."""
LEAST_WIDTH = 32
"""Columns that a tensor core takes at once."""


@triton.jit(do_not_specialize=["rows"])
def _scaled_linears(
    x_ptr, s_ptr, w0_ptr, w1_ptr, w2_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr,
    parts_ptr, rows, x_row, w0_row, w1_row, w2_row,
    WIDTH: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, IMPRECISE: tl.constexpr,
    EACH: tl.constexpr, FILLS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """FEATURES of one layer for all rows. Each of SPLITS programs takes a part of the width and stores its sums in
    float32. IMPRECISE: the number of products that tensor cores may accumulate before float32 does; 0: any. EACH: every
    feature has a scale; otherwise there is one a layer. FILLS: there are more programs than processors.
    """
    tile, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    SECOND: tl.constexpr = (N0 + FEATURES - 1) // FEATURES
    THIRD: tl.constexpr = SECOND + (N1 + FEATURES - 1) // FEATURES
    first, before, count, w_row, w_ptr, w_s_ptr, b_ptr, y_ptr = 0, 0, N0, w0_row, w0_ptr, s0_ptr, b0_ptr, y0_ptr
    if N1 > 0:  # noqa: SIM102 - settled when the kernel is compiled, as the next one
        if tile >= SECOND:
            first, before, count, w_row, w_ptr, w_s_ptr, b_ptr, y_ptr = (
                SECOND, N0, N1, w1_row, w1_ptr, s1_ptr, b1_ptr, y1_ptr
            )  # fmt: skip
    if N2 > 0:  # noqa: SIM102
        if tile >= THIRD:
            first, before, count, w_row, w_ptr, w_s_ptr, b_ptr, y_ptr = (
                THIRD, N0 + N1, N2, w2_row, w2_ptr, s2_ptr, b2_ptr, y2_ptr
            )  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    feature = (tile - first) * FEATURES + tl.arange(0, FEATURES)
    EVEN: tl.constexpr = N0 % FEATURES == 0 and N1 % FEATURES == 0 and N2 % FEATURES == 0
    # Beyond the last feature, a tile reads the last one again: loads without masks are copied in larger pieces.
    read = feature if EVEN else tl.minimum(feature, count - 1)
    w_tile = w_ptr + read.to(tl.int64)[:, None] * w_row + column[None, :]
    x_tile = x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :]
    is_row = row < rows
    STEPS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    begin, end = part * STEPS // SPLITS * COLUMNS, (part + 1) * STEPS // SPLITS * COLUMNS
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        if not FILLS:
            tl.extra.cuda.gdc_launch_dependents()
    y = tl.zeros((FEATURES, ROWS), tl.float32)
    for k in range(begin, end, COLUMNS):
        if WIDTH % COLUMNS == 0:
            w = tl.load(w_tile + k)
            x = tl.load(x_tile + k, mask=is_row[:, None], other=0.0)
        else:
            inside = (k + column < WIDTH)[None, :]
            w = tl.load(w_tile + k, mask=inside, other=0.0)
            x = tl.load(x_tile + k, mask=is_row[:, None] & inside, other=0.0)
        if IMPRECISE > 0:  # noqa: SIM108 - chosen when the kernel is compiled
            y = tl.dot(w, tl.trans(x), y, max_num_imprecise_acc=IMPRECISE)
        else:
            y = tl.dot(w, tl.trans(x), y)
    if LAUNCHES_EARLY and FILLS:
        # Launched any earlier, waiting programs would take the place of programs that could work.
        tl.extra.cuda.gdc_launch_dependents()
    is_own = is_row[None, :] & (feature < count)[:, None]
    if SPLITS > 1:
        at_row = (part * rows + row.to(tl.int64)) * (N0 + N1 + N2) + before
        tl.store(parts_ptr + at_row[None, :] + feature[:, None], y, mask=is_own)
    else:
        scale = tl.load(s_ptr + row, mask=is_row, other=0.0)
        y = y * scale[None, :] * tl.load(w_s_ptr + read * EACH)[:, None]
        if BIASED:
            y += tl.load(b_ptr + read).to(tl.float32)[:, None]
        at_row = row.to(tl.int64) * count
        tl.store(y_ptr + at_row[None, :] + feature[:, None], y.to(y_ptr.dtype.element_ty), mask=is_own)


@triton.jit(do_not_specialize=["rows"])
def _combine(
    parts_ptr, s_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, rows,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    BIASED: tl.constexpr, EACH: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK features of one row: sums their parts in order. EACH: as above."""
    tile, row = tl.program_id(0), tl.program_id(1)
    SECOND: tl.constexpr = (N0 + BLOCK - 1) // BLOCK
    THIRD: tl.constexpr = SECOND + (N1 + BLOCK - 1) // BLOCK
    first, before, count, w_s_ptr, b_ptr, y_ptr = 0, 0, N0, s0_ptr, b0_ptr, y0_ptr
    if N1 > 0:  # noqa: SIM102
        if tile >= SECOND:
            first, before, count, w_s_ptr, b_ptr, y_ptr = SECOND, N0, N1, s1_ptr, b1_ptr, y1_ptr
    if N2 > 0:  # noqa: SIM102
        if tile >= THIRD:
            first, before, count, w_s_ptr, b_ptr, y_ptr = THIRD, N0 + N1, N2, s2_ptr, b2_ptr, y2_ptr
    feature = (tile - first) * BLOCK + tl.arange(0, BLOCK)
    is_own = feature < count
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        at_row = (part * rows + row).to(tl.int64) * (N0 + N1 + N2) + before
        y += tl.load(parts_ptr + at_row + feature, mask=is_own, other=0.0)
    y = y * tl.load(s_ptr + row) * tl.load(w_s_ptr + feature * EACH, mask=is_own, other=0.0)
    if BIASED:
        y += tl.load(b_ptr + feature, mask=is_own, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * count + feature, y.to(y_ptr.dtype.element_ty), mask=is_own)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The distribution of weights over programs.

    Attributes:
        columns: columns of a tile of weights that are loaded at a time.
        stages: loads in flight to a program.
        splits: programs that share the width of a tile.
    """

    columns: int
    stages: int
    splits: int

    @classmethod
    def of(cls, tiles: int, width: int, rows: int, processors: int, shared: int) -> "Shares":
        """The distribution for a problem size.

        Args:
            tiles: tiles of the features of all layers.
            width: width of a row.
            rows: rows of x, padded.
            processors: multiprocessors of the device.
            shared: the most bytes of shared memory of a program.
        """
        columns = max(LEAST_WIDTH, min(SCALED_WIDTH.value, int(triton.next_power_of_2(width))))
        splits = max(1, min(processors // tiles, SCALED_SPLITS.value, triton.cdiv(width, columns)))
        stages = min(
            SCALED_STAGES.at(tiles * splits / processors), shared // ((SCALED_FEATURES.value + rows) * columns)
        )
        return cls(columns=columns, stages=stages, splits=splits)


IMPRECISE = 128
"""Products that tensor cores accumulate before float32 does where a graph doesn't allow any number, as in cuBLAS."""


def launch(layers: ScaledLayers, shares: Shares | None = None) -> tuple[Tensor, ...]:
    """The layers.

    Args:
        layers: the arguments; in all up to `MOST_LINEAR_ROWS` rows, with contiguous rows and scales.
        shares: the distribution of weights over programs; None: by sizes.

    Returns:
        [..., features_i] in bfloat16 of each, contiguous.
    """
    x, width = flattened(layers.x), layers.x.shape[-1]
    features = [weight.shape[0] for weight in layers.weights]
    results = tuple(x.new_empty((*layers.x.shape[:-1], each), dtype=torch.bfloat16) for each in features)
    rows, total = x.shape[0], sum(features)
    if 0 in (rows, total):
        return results
    tile_rows, size = max(LEAST_ROWS, int(triton.next_power_of_2(rows))), SCALED_FEATURES.value
    tiles, processors = sum(triton.cdiv(each, size) for each in features), multiprocessors(x.device)
    if shares is None:
        shares = Shares.of(tiles, width, tile_rows, processors, shared_bytes(x.device))
    is_biased = any(bias is not None for bias in layers.biases)
    biases = [_full(bias, x, count, is_biased) for bias, count in zip(layers.biases, features, strict=True)]
    scale = layers.x_scale.reshape(-1).contiguous()
    parts = results[0]
    if shares.splits > 1:
        parts = scratch(x.new_empty((shares.splits, rows, total), dtype=torch.float32))
    each, own = _scales(layers.scales, features)
    ws, scales, bs, ys = (_padded(values) for values in (layers.weights, own, biases, results))
    counts = [*features, *[0] * (len(ws) - len(features))]
    sizes = {"N0": counts[0], "N1": counts[1], "N2": counts[2], "SPLITS": shares.splits, "BIASED": is_biased}
    sizes["EACH"] = int(each)
    tile = Tile(rows=tile_rows, block=size, warps=SCALED_WARPS.value)
    behind = Tile(rows=1, block=SCALED_COMBINED.value, warps=SCALED_WARPS.value)
    with torch.cuda.device_of(x):
        run_kernel(
            _scaled_linears, (tiles * shares.splits,),
            x, scale, *ws, *scales, *bs, *ys, parts, rows, x.stride(0), *(weight.stride(0) for weight in ws),
            WIDTH=width, ROWS=tile.rows, FEATURES=tile.block, COLUMNS=shares.columns, **sizes,
            IMPRECISE=0 if layers.use_fast_accum else min(IMPRECISE, shares.columns),
            FILLS=tiles * shares.splits > processors, num_stages=shares.stages, **tile.launch(x),
        )  # fmt: skip
        if shares.splits > 1:
            run_kernel(
                _combine, (sum(triton.cdiv(each, behind.block) for each in features), rows),
                parts, scale, *scales, *bs, *ys, rows, BLOCK=behind.block, **sizes, **behind.launch(x),
            )  # fmt: skip
    return results


def _scales(scales: Sequence[Tensor], features: Sequence[int]) -> tuple[bool, Sequence[Tensor]]:
    """Whether every feature has a scale, and the scales, contiguous."""
    pairs = list(zip(scales, features, strict=True))
    if all(scale.numel() == 1 for scale, _ in pairs):
        return False, scales
    full = [scale.expand(1, count).contiguous() if scale.numel() == 1 else scale for scale, count in pairs]
    return True, full


def _full(bias: Tensor | None, x: Tensor, count: int, is_biased: bool) -> Tensor:
    """A bias or a placeholder: zeros if other layers have a bias, otherwise any tensor."""
    if bias is not None:
        return bias.contiguous()
    return x.new_zeros(count, dtype=torch.bfloat16) if is_biased else x


def _padded(values: Sequence[Any]) -> list[Any]:
    """The values, padded to the most layers of an op."""
    return [*values, *[values[0]] * (3 - len(values))]
