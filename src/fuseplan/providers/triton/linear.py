"""Linear layers of a few rows, as in decoding: y_i = x @ w_i^T + b_i, for up to three weights in one kernel.

Such a layer is bound by the reads of its weights. A program reads a tile of one weight's rows, at their full width, and
multiplies it by all rows of x, which stay in the L2; the weight is the left operand, so that tensor cores pad x's rows
to 16 and not to 64. The order of sums is fixed. All layers' tiles are in one grid, so a small layer's don't wait for a
large one's. With SiLU-and-mul a tile has as many rows of gate as of up. If a norm follows a layer with fewer tiles than
processors, several programs share a tile's width, and the norm's kernel sums their parts as it reads them, again in a
fixed order.

The equivalent eager code is `fuseplan.rules.parts.linear.linears_reference`,
`fuseplan.rules.families.linear.gated_reference` and
`fuseplan.rules.families.linear_norm.linear_add_rms_norm_reference`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import ActivationRounding
from fuseplan.providers.triton import norm as norms
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.providers.triton.launching import Norm, Tile, flattened, is_amd, is_nvidia, multiprocessors, shared_bytes
from fuseplan.providers.triton.replay import run_kernel, scratch
from fuseplan.providers.triton.rows import rounded, silu
from fuseplan.providers.triton.tuned import (
    LINEAR_FEATURES,
    LINEAR_SPLITS,
    LINEAR_STAGES,
    LINEAR_WARPS,
    LINEAR_WIDTH,
)

LEAST_ROWS = 16
"""The least rows of x that a tensor core multiplies."""


@triton.jit
def _biased(y, bias_ptr, feature, is_feature, BIASED: tl.constexpr):
    """y + bias, in float32 like y."""
    if BIASED:
        y += tl.load(bias_ptr + feature, mask=is_feature, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit(do_not_specialize=["rows"])
def _linears(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y0_ptr, y1_ptr, y2_ptr, rows,
    x_row, w0_row, w1_row, w2_row,
    WIDTH: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr,
    ROUNDS_ACTIVATED: tl.constexpr, FILLS: tl.constexpr, APART: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """FEATURES of one layer for all rows; GATED: half as many of gate and of up, and silu(gate) * up. Each of SPLITS
    programs takes a part of the width and stores its sums in float32. FILLS: there are more programs than processors.
    APART: gate and up are read one after the other, since Triton for AMD can't select between pointers.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    OWN: tl.constexpr = FEATURES // 2 if GATED else FEATURES
    SECOND: tl.constexpr = (N0 + OWN - 1) // OWN
    THIRD: tl.constexpr = SECOND + (0 if GATED else (N1 + OWN - 1) // OWN)
    first, count, w_row, w_ptr, b_ptr, y_ptr = 0, N0, w0_row, w0_ptr, b0_ptr, y0_ptr
    if N1 > 0 and not GATED:  # noqa: SIM102 - settled when the kernel is compiled, as the next one
        if tile >= SECOND:
            first, count, w_row, w_ptr, b_ptr, y_ptr = SECOND, N1, w1_row, w1_ptr, b1_ptr, y1_ptr
    if N2 > 0:  # noqa: SIM102
        if tile >= THIRD:
            first, count, w_row, w_ptr, b_ptr, y_ptr = THIRD, N2, w2_row, w2_ptr, b2_ptr, y2_ptr
    start = (tile - first) * OWN
    lane, row, column = tl.arange(0, FEATURES), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    feature = start + lane % OWN
    EVEN: tl.constexpr = N0 % OWN == 0 and (GATED or N1 % OWN == 0) and N2 % OWN == 0
    # Beyond the last feature, a tile reads the last one again: loads without masks are copied in larger pieces.
    read = feature if EVEN else tl.minimum(feature, count - 1)
    at = read.to(tl.int64)[:, None]
    is_first = (lane < OWN)[:, None]
    other_tile = w1_ptr + at * w1_row + column[None, :]
    if GATED and not APART:
        w_tile = tl.where(is_first, w0_ptr + at * w0_row, w1_ptr + at * w1_row) + column[None, :]
    else:
        w_tile = w_ptr + at * w_row + column[None, :]
    x_tile = x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :]
    is_row = (row < rows)[:, None]
    PART: tl.constexpr = WIDTH // SPLITS
    if SPLITS > 1:
        w_tile += part * PART
        x_tile += part * PART
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        if not FILLS:
            tl.extra.cuda.gdc_launch_dependents()
    y = tl.zeros((FEATURES, ROWS), tl.float32)
    for k in range(0, PART, COLUMNS):
        if APART:
            inside = (k + column < WIDTH)[None, :]
            first_tile = tl.load(w_tile + k, mask=is_first & inside, other=0.0)
            w = tl.where(is_first, first_tile, tl.load(other_tile + k, mask=(is_first == 0) & inside, other=0.0))
            x = tl.load(x_tile + k, mask=is_row & inside, other=0.0)
        elif WIDTH % COLUMNS == 0:
            w = tl.load(w_tile + k)
            x = tl.load(x_tile + k, mask=is_row, other=0.0)
        else:
            inside = (k + column < WIDTH)[None, :]
            w = tl.load(w_tile + k, mask=inside, other=0.0)
            x = tl.load(x_tile + k, mask=is_row & inside, other=0.0)
        y = tl.dot(w, tl.trans(x), y)
    if LAUNCHES_EARLY and FILLS:
        # Launched any earlier, waiting programs would take the place of programs that could work.
        tl.extra.cuda.gdc_launch_dependents()
    if GATED:
        if BIASED:
            is_gate = lane < OWN
            gate_bias = tl.load(b0_ptr + read, mask=is_gate, other=0.0).to(tl.float32)
            y += (gate_bias + tl.load(b1_ptr + read, mask=is_gate == 0, other=0.0).to(tl.float32))[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(rounded(y, dtype, NVIDIA), (2, OWN, ROWS)), (1, 2, 0)))
        activated = silu(gate, NVIDIA)
        if ROUNDS_ACTIVATED:
            activated = rounded(activated, dtype)
        own = start + tl.arange(0, OWN)
        tl.store(
            y0_ptr + row.to(tl.int64)[None, :] * N0 + own[:, None], (activated * up).to(dtype),
            mask=(row < rows)[None, :] & (own < N0)[:, None],
        )  # fmt: skip
    else:
        y = _biased(y, b_ptr, read, (feature < count) & (part == 0), BIASED)
        at_row = part * rows + row.to(tl.int64)
        tl.store(
            y_ptr + at_row[None, :] * count + feature[:, None], y.to(y_ptr.dtype.element_ty),
            mask=(row < rows)[None, :] & (feature < count)[:, None],
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The distribution of weights over programs.

    Attributes:
        features: rows of weights of a tile.
        columns: columns of a tile that are loaded at a time.
        warps: warps of a program.
        stages: loads in flight to a program.
        splits: programs that share the width of a tile.
    """

    features: int
    columns: int
    warps: int
    stages: int
    splits: int = 1

    @classmethod
    def of(cls, features: int, rows: int, processors: int) -> "Shares":
        """The distribution for a problem size.

        Args:
            features: features of all layers.
            rows: rows of x, padded.
            processors: multiprocessors of the device.
        """
        each = features / processors
        # With more rows, smaller tiles of weights would reread x too often.
        size = each if rows <= LEAST_ROWS else math.inf
        return cls(
            features=LINEAR_FEATURES.at(size), columns=LINEAR_WIDTH.at(size), warps=LINEAR_WARPS.value,
            stages=LINEAR_STAGES.at(each),
        )  # fmt: skip

    @classmethod
    def shared(cls, features: int, width: int, rows: int, processors: int) -> "Shares":
        """The distribution where programs may share the width; with one program a tile where sharing doesn't pay.

        Args:
            features: features of the layer.
            width: width of a row.
            rows: rows of x, padded.
            processors: multiprocessors of the device.
        """
        tile, columns = LINEAR_FEATURES.at(math.inf), LINEAR_WIDTH.at(math.inf)
        splits = min(processors // max(1, triton.cdiv(features, tile)), LINEAR_SPLITS.value)
        while splits > 1 and width % (splits * columns):
            splits -= 1
        if splits <= 1:
            return cls.of(features, rows, processors)
        return cls(
            features=tile, columns=columns, warps=LINEAR_WARPS.value, stages=LINEAR_STAGES.at(features / processors),
            splits=splits,
        )  # fmt: skip

    def fitting(self, shared: int, rows: int, itemsize: int) -> "Shares":
        """The distribution with fewer loads in flight where a program lacks the shared memory for them.

        Args:
            shared: the most bytes of a program.
            rows: rows of x, padded.
            itemsize: bytes of an element.
        """
        if self.stages * (self.features + rows) * self.columns * itemsize <= shared:
            return self
        fewer = replace(self, stages=self.stages - 1) if self.stages > 2 else replace(self, columns=self.columns // 2)
        return fewer.fitting(shared, rows, itemsize)


def launch_normed(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Norm) -> tuple[Tensor, ...]:
    """A layer, and the residual add and the norm behind it in a second kernel.

    Args:
        x: [..., width], bfloat16 or float16, in all up to `MOST_LINEAR_ROWS` rows.
        weight: [features, width], x's dtype, with contiguous rows.
        bias: [features] or None.
        residual: [..., features], x's dtype, or float32.
        norm: weight, epsilon and rounding.

    Returns:
        (y, residual_out), both [..., features].
    """
    tile_rows = _padded(x.numel() // max(1, x.shape[-1]))
    shares = Shares.shared(weight.shape[0], x.shape[-1], tile_rows, multiprocessors(x.device))
    shares = shares.fitting(shared_bytes(x.device), tile_rows, x.element_size())
    projected = scratch(launch(x, [weight], [bias], shares=shares)[0])
    if shares.splits == 1:
        return norms.launch(projected, residual, norm, epilogue_of(None)())
    like = residual if residual.dtype is x.dtype else scratch(x.new_empty(residual.shape))
    return norms.launch(like, residual, norm, epilogue_of(None)(), projected)


def _padded(rows: int) -> int:
    return max(LEAST_ROWS, int(triton.next_power_of_2(rows)))


def launch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], rounding: str | None = None,
    shares: Shares | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The layers, or SiLU-and-mul of two.

    Args:
        x: [..., width], bfloat16 or float16, in all up to `MOST_LINEAR_ROWS` rows.
        weights: [features_i, width], x's dtype, with contiguous rows.
        biases: [features_i] or None for each weight; added before the result is rounded.
        rounding: one of `ActivationRounding`: the result is silu(first) * second; None: all results.
        shares: the distribution of weights over programs; None: by sizes.

    Returns:
        [..., features_i] in x's dtype of each layer, contiguous; where programs share the width of a single layer,
        [splits, ..., features] in float32, whose sum is the result.
    """
    flat, width, gated = flattened(x), x.shape[-1], rounding is not None
    features = [weight.shape[0] for weight in weights]
    splits = 1 if shares is None else shares.splits
    kind: dict[str, Any] = {"dtype": torch.float32} if splits > 1 else {}
    shape = (*((splits,) if splits > 1 else ()), *x.shape[:-1])
    results = tuple(x.new_empty((*shape, each), **kind) for each in (features[:1] if gated else features))
    rows = flat.shape[0]
    if 0 in (rows, sum(features)):
        return results
    tile_rows = _padded(rows)
    if shares is None:
        shares = Shares.of(sum(features), tile_rows, multiprocessors(x.device))
        shares = shares.fitting(shared_bytes(x.device), tile_rows, x.element_size())
    own = shares.features // 2 if gated else shares.features
    programs = splits * sum(triton.cdiv(each, own) for each in (features[:1] if gated else features))
    is_biased = any(bias is not None for bias in biases)
    full = [
        weight.new_zeros(count) if bias is None and is_biased else (x if bias is None else bias.contiguous())
        for bias, weight, count in zip(biases, weights, features, strict=True)
    ]
    spare = 3 - len(features)
    ws, bs = [*weights, *[weights[0]] * spare], [*full, *[full[0]] * spare]
    ys = [*results, *[results[0]] * (3 - len(results))]
    counts = [*features, *[0] * spare]
    tile = Tile(rows=tile_rows, block=shares.features, warps=shares.warps)
    with torch.cuda.device_of(x):
        run_kernel(
            _linears, (programs,),
            flat, *ws, *bs, *ys, rows, flat.stride(0), *(each.stride(0) for each in ws),
            WIDTH=width, N0=counts[0], N1=counts[1], N2=counts[2], ROWS=tile.rows, FEATURES=tile.block,
            COLUMNS=shares.columns, SPLITS=splits, BIASED=is_biased, GATED=gated,
            FILLS=programs > multiprocessors(x.device), APART=gated and is_amd(x.device),
            ROUNDS_ACTIVATED=rounding is not None and ActivationRounding(rounding) is ActivationRounding.LLAMA,
            NVIDIA=is_nvidia(x.device), num_stages=shares.stages, **tile.launch(x),
        )  # fmt: skip
    return results
