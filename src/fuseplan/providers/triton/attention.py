"""Attention of a few query tokens over a long cache, with the keys split among programs: split-KV decoding.

y = softmax(q @ repeat(k)^T * scale + mask) @ repeat(v)        over tiles of keys;  y = sum(w * part) / sum(w)

Scores may be capped before the mask is added, softcap * tanh(x / softcap), and may have a sink: a logit of each head
that takes weight and has no value. The first part of a query includes it.

The queries that share a head, and their tokens, are the rows of one tile, so keys and values are read once. A program
takes every n-th tile of keys, which balances the work at any length. It reads the mask first: for tiles that are masked
in all rows it loads neither keys nor values, so the unused part of a static cache costs nothing, and one captured CUDA
graph serves all lengths. A second kernel combines the parts.

A key is masked at minus infinity, and also at -60,000 or less if its row has keys above that: from a boolean mask,
torch before 2.12 makes -65,504 for cuDNN. Weights of such keys are zero in float32 unless scores of one row are 29,000
apart.

The equivalent eager code is `fuseplan.rules.parts.attention.op.attention_reference`, and with soft-cap and sinks
`fuseplan.rules.parts.eager_attention.op.eager_attention_reference`. A query without keys, or with all keys masked by
minus infinity, gets zeros and not NaN, as in torch's own kernels on the CPU and its math implementation.
"""

import math
from functools import lru_cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import ATTENTION_KERNELS
from fuseplan.providers.triton.cached_attention import NO_TOKEN, Token, loaded_queries, write_token
from fuseplan.providers.triton.cached_rotary import assert_place, place_of
from fuseplan.providers.triton.launching import Tile, multiprocessors, shared_bytes
from fuseplan.providers.triton.qk_norm_rope import rotated_rows
from fuseplan.providers.triton.replay import run_kernel, scratch
from fuseplan.providers.triton.rows import within
from fuseplan.providers.triton.split import LEAST_SIDE, MOST_ROWS, Split
from fuseplan.providers.triton.tuned import COMBINED_THREAD

TILES = 32
"""Tiles whose masks a program reads at a time, as bits of a number. Masks with separate rows are held side by side, so
there are fewer tiles, but at least `LEAST_TILES`.
"""
LEAST_TILES = 4

MASKED_FROM, SHOWN_FROM = -60000.0, -30000.0
"""The most that a mask has for a key hidden by a finite number, and the least for a key that isn't hidden."""

SAMPLED = 1024
"""Keys sampled all over the cache, to see whether a row of a mask shows any."""

LOG2_E = math.log2(math.e)

ASSERTS: Final = {"debug": True, "sanitize_overflow": False}
"""Compiler options of a kernel that writes: with its own assertion, without those that Triton adds."""


@triton.jit
def _capped(scores, cap, CAPPED: tl.constexpr):
    return cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0)) if CAPPED else scores  # cap * tanh(x), of exp(2x)


@triton.jit
def _finite(bias):
    """Keeps the lowest numbers finite when multiplied by log2(e): a row hidden entirely by them sees all keys."""
    return tl.where((bias < -2e38) & (bias > float("-inf")), -2e38, bias)


# One compilation for all lengths.
@triton.jit(do_not_specialize=["keys", "splits", "mask_batch", "mask_head", "mask_token"])
def _attend(
    q_ptr, k_ptr, v_ptr, mask_ptr, sinks_ptr, y_ptr, parts_ptr, sums_ptr, written, keys, splits, scale, cap,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    mask_batch, mask_head, mask_token, mask_key, y_batch, y_head, y_token, y_dim,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, ROW_TILES: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr, MASK_HEADS: tl.constexpr,
    MASK_TOKENS: tl.constexpr, MASKED_FROM: tl.constexpr, SHOWN_FROM: tl.constexpr, SAMPLED: tl.constexpr,
    WHOLE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, WRITES: tl.constexpr,
    SHARED_ANGLES: tl.constexpr, NORMS: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr,
    ROUNDS_PRODUCTS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """One of `splits` parts of the attention of ROWS queries of a head; WHOLE: all of it. WRITES: first writes
    `written`, the key and the value of the queries' own token, into the cache.
    """
    split = tl.program_id(0) % splits
    place = tl.program_id(0) // splits
    first_row = place % ROW_TILES * ROWS
    pair = (place // ROW_TILES).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS

    row, column, value_column = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    is_row = within(row, GROUPS * QUERIES) if ROW_TILES == 1 else row < GROUPS * QUERIES
    is_column, is_value = within(column, WIDTH), within(value_column, VALUE_WIDTH)
    own_head, token = row // QUERIES, row % QUERIES
    q_head_of = (head * GROUPS + own_head).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    far, wide, wide_value = offset.to(tl.int64), column.to(tl.int64), value_column.to(tl.int64)
    k_tile = k_ptr + batch * k_batch + head * k_head + far[:, None] * k_token + wide[None, :] * k_dim
    v_tile = v_ptr + batch * v_batch + head * v_head + far[:, None] * v_token + wide_value[None, :] * v_dim
    mask_rows = mask_ptr + batch * mask_batch + head * GROUPS * mask_head
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, VALUE_COLUMNS), tl.float32)
    if WRITES:
        position, is_there = place_of(written[4], 0, 0, keys)
        unrotated = loaded_queries(
            written, q_ptr + batch * q_batch + q_head_of * q_head, q_dim, is_row, batch, wide, is_column,
            WIDTH // 2, SHARED_ANGLES, NORMS,
        )  # fmt: skip
    else:
        q = tl.load(
            q_ptr + batch * q_batch + q_head_of[:, None] * q_head + token[:, None] * q_token + wide[None, :] * q_dim,
            mask=is_row[:, None] & is_column[None, :], other=0.0,
        )  # fmt: skip
    hidden = float("-inf")
    if MASKED:
        # Keys hidden by a finite number count, relative to each other, in rows that have no other keys.
        sample = tl.arange(0, SAMPLED) * tl.cdiv(keys, SAMPLED)
        shows = 1
        for one_head in tl.static_range(MASK_HEADS):
            for one_token in tl.static_range(MASK_TOKENS):
                sampled = tl.load(
                    mask_rows + one_head * mask_head + one_token * mask_token + sample.to(tl.int64) * mask_key,
                    mask=sample < keys, other=float("-inf"),
                )  # fmt: skip
                shows &= tl.max((sampled > SHOWN_FROM).to(tl.int32), axis=0)
        hidden = tl.where(shows > 0, MASKED_FROM, float("-inf"))
    if WRITES:  # its loads came before the mask's
        zero = keys >> 31
        q = rotated_rows(
            unrotated, written[8], column, zero, q_ptr.dtype.element_ty, WIDTH // 2, NORMS, ROUNDS_NORMED, ADDS_ONE,
            ROUNDS_PRODUCTS,
        )  # fmt: skip
        if is_there & ((position // BLOCK).to(tl.int32) % splits == split):
            write_token(
                written, k_ptr + batch * k_batch + head * k_head + position * k_token, k_dim,
                v_ptr + batch * v_batch + head * v_head + position * v_token, v_dim, batch, head, wide, is_column,
                wide_value, is_value, zero, k_ptr.dtype.element_ty,
                WIDTH // 2, SHARED_ANGLES, NORMS, ROUNDS_NORMED, ADDS_ONE, ROUNDS_PRODUCTS,
            )  # fmt: skip
        assert_place(is_there)  # behind the loop, it would slow the loop down by 3 %
    mine = tl.cdiv(tl.cdiv(keys, BLOCK) - split, splits)
    for chunk in range(0, mine, TILES):
        index = tl.arange(0, TILES)
        first, last, live = 0, tl.minimum(mine - chunk, TILES), -1
        if MASKED:
            key = ((split + (chunk + index) * splits) * BLOCK)[:, None] + offset[None, :]
            seen = tl.zeros((TILES, BLOCK), tl.int32)
            # Unrolled: from the results of a loop, the compiler can't infer the alignment of the next one's loads.
            for one_head in tl.static_range(MASK_HEADS):
                for one_token in tl.static_range(MASK_TOKENS):
                    masks = tl.load(
                        mask_rows + one_head * mask_head + one_token * mask_token + key.to(tl.int64) * mask_key,
                        mask=key < keys, other=float("-inf"),
                    )  # fmt: skip
                    seen |= 1 - (masks <= hidden).to(tl.int32)  # NaN is seen
            is_live = tl.max(seen, axis=1)
            live = tl.sum(is_live << index, axis=0)
            first = tl.min(tl.where(is_live > 0, index, TILES), axis=0)
            last = tl.max(tl.where(is_live > 0, index + 1, 0), axis=0)
        for tile in range(first, last):
            start = (split + (chunk + tile) * splits) * BLOCK
            inside = start + offset < keys
            at = start.to(tl.int64)
            if MASKED:
                shown = (start + offset).to(tl.int64) * mask_key
                if MASK_HEADS == 1 and MASK_TOKENS == 1:
                    bias = tl.load(mask_rows + shown, mask=inside, other=float("-inf")).to(tl.float32)[None, :]
                else:
                    bias = tl.load(
                        mask_rows + own_head[:, None] * mask_head + token[:, None] * mask_token + shown[None, :],
                        mask=is_row[:, None] & inside[None, :], other=float("-inf"),
                    ).to(tl.float32)  # fmt: skip
                bias = _finite(bias)
                read = inside & ((live >> tile) & 1 != 0)
            else:
                bias = tl.where(inside, 0.0, float("-inf"))[None, :]
                read = inside
            k = tl.load(k_tile + at * k_token, mask=read[:, None] & is_column[None, :], other=0.0)
            v = tl.load(v_tile + at * v_token, mask=read[:, None] & is_value[None, :], other=0.0)
            scores = _capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, cap, CAPPED)
            scores += bias * 1.4426950408889634
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(scores - base[:, None])
            fade = tl.exp2(top - base)
            total = total * fade + tl.sum(weight, axis=1)
            y = tl.dot(weight.to(v.dtype), v, y * fade[:, None], input_precision="ieee")
            top = higher

    if SINKS:
        sink = tl.load(sinks_ptr + q_head_of, mask=is_row & (split == 0), other=float("-inf")).to(tl.float32)
        sink *= 1.4426950408889634
        higher = tl.maximum(top, sink)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(top - base)
        total = total * fade + tl.exp2(sink - base)
        y *= fade[:, None]
        top = higher
    is_seen = total != 0.0
    total = tl.where(is_seen, total, 1.0)
    y = y / total[:, None]
    if WHOLE:
        tl.store(
            y_ptr + batch * y_batch + q_head_of[:, None] * y_head + token[:, None] * y_token
            + value_column[None, :] * y_dim,
            y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_value[None, :],
        )  # fmt: skip
    else:
        slot = (pair * splits + split) * (GROUPS * QUERIES) + row
        tl.store(sums_ptr + slot * 2, top, mask=is_row)  # separately: added to a mask's -1e9, a logarithm would be lost
        tl.store(sums_ptr + slot * 2 + 1, total, mask=is_row)
        tl.store(
            parts_ptr + slot[:, None] * VALUE_WIDTH + value_column[None, :], y,
            mask=(is_row & is_seen)[:, None] & is_value[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _combine(
    parts_ptr, sums_ptr, y_ptr, splits, y_batch, y_head, y_token, y_dim,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Combines one query from up to SPLITS parts."""
    pair, row = (tl.program_id(0) // (GROUPS * QUERIES)).to(tl.int64), tl.program_id(0) % (GROUPS * QUERIES)
    batch, head = pair // HEADS, pair % HEADS * GROUPS + row // QUERIES
    split, column = tl.arange(0, SPLITS), tl.arange(0, COLUMNS)
    is_column = within(column, VALUE_WIDTH)
    slot = (pair * splits + split) * (GROUPS * QUERIES) + row
    if LAUNCHES_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tops = tl.load(sums_ptr + slot * 2, mask=split < splits, other=float("-inf"))
    totals = tl.load(sums_ptr + slot * 2 + 1, mask=split < splits, other=0.0)
    top = tl.max(tops, axis=0)
    weight = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top)) * totals
    parts = tl.load(
        parts_ptr + slot[:, None] * VALUE_WIDTH + column[None, :],
        mask=(tops != float("-inf"))[:, None] & is_column[None, :], other=0.0,
    )  # fmt: skip
    total = tl.sum(weight, axis=0)
    y = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        y_ptr + batch * y_batch + head * y_head + row % QUERIES * y_token + column * y_dim,
        y.to(y_ptr.dtype.element_ty), mask=is_column,
    )  # fmt: skip


def launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str | None, split: Split | None = None,
    *, sinks: Tensor | None = None, softcap: float | None = None, written: Token | None = None,
) -> Tensor:  # fmt: skip
    """See `attention_reference` with is_causal=False, and `eager_attention_reference`; with `written`, the compositions
    in `fuseplan.rules.families.cached_attention`. Tensors may have any strides.

    Args:
        q: [batch, q_heads, queries, head_dim]; bfloat16, float16 or float32.
        k: [batch, heads, keys, head_dim], q's dtype; q_heads is a multiple of heads.
        v: [batch, heads, keys, value_dim], q's dtype.
        mask: added to the scores, broadcasts to [batch, q_heads, queries, keys]; any floating dtype; None: no mask.
        scale: multiplies the scores.
        kernel: the kernel of torch whose result layout to use; None: contiguous.
        split: how keys are split among programs; None: by sizes.
        sinks: [q_heads], any floating dtype; None: no sinks.
        softcap: bounds the scores; None: no bound.
        written: the key and the value of a single query, to write into k and v first; None: these are complete.

    Returns:
        [batch, q_heads, queries, value_dim] in q's dtype.
    """
    batch, q_heads, queries, width = q.shape
    heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    shape = (batch, q_heads, queries, value_width)
    if kernel is None:
        y = q.new_empty(shape)
    else:
        # In the unfused graph, torch's kernel reads rotated queries, which are contiguous.
        read = q.stride() if written is None else (q_heads * width, width, width, 1)
        strides = result_strides(kernel, q.dtype, q.shape, read, heads, value_width)
        y = torch.empty_strided(shape, strides, dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    rows = q_heads // heads * queries
    tile_rows = min(MOST_ROWS, max(LEAST_SIDE, triton.next_power_of_2(rows)))
    row_tiles = triton.cdiv(rows, tile_rows)
    columns, value_columns = (max(LEAST_SIDE, triton.next_power_of_2(each)) for each in (width, value_width))
    places = batch * heads * row_tiles
    key_bytes = max(columns, value_columns) * q.element_size()
    if split is None:
        shared = shared_bytes(q.device)
        split = Split.of(keys, key_bytes, places, multiprocessors(q.device))
        split = split.fitting(shared, tile_rows, key_bytes, q.element_size())
    shown = None if mask is None else mask.expand(batch, q_heads, queries, keys)
    mask_steps = (0,) * 4 if shown is None else _steps(shown)
    mask_heads, mask_tokens = 1 if mask_steps[1] == 0 else q_heads // heads, 1 if mask_steps[2] == 0 else queries
    is_whole = split.count == 1
    if is_whole:
        sums = parts = y
    else:
        count = batch * heads * split.count * rows
        sums, parts = (scratch(q.new_empty(count * each, dtype=torch.float32)) for each in (2, value_width))
    sizes = {"HEADS": heads, "GROUPS": q_heads // heads, "QUERIES": queries, "VALUE_WIDTH": value_width}
    tile = Tile(rows=tile_rows, block=split.block, warps=split.warps)
    # The kernel uses powers of two.
    factors = (scale * LOG2_E, 0.0) if softcap is None else (2 * scale * LOG2_E / softcap, softcap * LOG2_E)
    with torch.cuda.device_of(q):
        run_kernel(
            _attend, (places * split.count,),
            q, k, v, q if shown is None else shown, q if sinks is None else sinks.contiguous(), y, parts, sums,
            None if written is None else written.arguments, keys, split.count, *factors,
            *_steps(q), *_steps(k), *_steps(v), *mask_steps, *_steps(y),
            **sizes, WIDTH=width, ROWS=tile.rows, ROW_TILES=row_tiles, COLUMNS=columns, VALUE_COLUMNS=value_columns,
            BLOCK=tile.block, TILES=max(LEAST_TILES, TILES // triton.next_power_of_2(mask_heads * mask_tokens)),
            MASKED=shown is not None, MASK_HEADS=mask_heads, MASK_TOKENS=mask_tokens,
            MASKED_FROM=MASKED_FROM, SHOWN_FROM=SHOWN_FROM, SAMPLED=SAMPLED, WHOLE=is_whole,
            CAPPED=softcap is not None, SINKS=sinks is not None, WRITES=written is not None,
            **(NO_TOKEN if written is None else {**written.constants(width), **ASSERTS}),
            num_stages=split.stages, **tile.launch(q),
        )  # fmt: skip
        if not is_whole:
            most = triton.next_power_of_2(split.count)
            run_kernel(
                _combine, (batch * heads * rows,),
                parts, sums, y, split.count, *_steps(y), **sizes, COLUMNS=value_columns, SPLITS=most,
                **Tile.holding(value_columns, rows=most, elements=COMBINED_THREAD.value).launch(q),
            )  # fmt: skip
    return y


def _steps(value: Tensor) -> tuple[int, ...]:
    """Strides, with 0 for dimensions of one element, where strides are arbitrary."""
    return tuple(0 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True))


@lru_cache(maxsize=256)
def result_strides(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], heads: int, value_width: int
) -> tuple[int, ...]:
    """The strides of the result of torch's kernel, by its meta implementation.

    Args:
        kernel: name of the kernel.
        dtype: dtype of the queries.
        shape: shape of the queries.
        strides: strides of the queries.
        heads: heads of keys and values.
        value_width: head dimension of the values.
    """
    q = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    k, v = (q.new_empty((shape[0], heads, 1, width)) for width in (shape[3], value_width))
    result: Tensor = ATTENTION_KERNELS[kernel].run(q, k, v, None, 1.0, False)[0]
    return result.stride()
