"""Rotary embedding, cache writes and attention of one token in one Triton kernel, beside the two that do it apart.

PYTHONPATH=src:. python benchmarks/cached_attention.py [--write]
"""

import argparse
import itertools
import math
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.split_attention import BYTES, keep, microseconds, sets_of
from fuseplan.dialect import RotaryRounding, ops
from fuseplan.providers.triton import attention, cached_rotary
from fuseplan.providers.triton.cached_attention import Token

Q_HEADS, HEADS, WIDTH = 32, 8, 128
BATCHES = (1, 8, 32)
LENGTHS = ((1280, 1000), (8192, 2000), (8192, 8000))
"""Keys that a cache has room for, and how many of them the mask shows."""
REPEATS = 5
ROUNDING = RotaryRounding.PRODUCTS
WHAT = (
    "microseconds a call, the median of five repeats of a CUDA graph that rotates among sets of arguments larger than "
    "the L2; 32 heads of queries, 8 of keys and values, of 128; bfloat16, one token; two kernels: rope_cache, then "
    "grouped_attention; one kernel: rope_cached_attention; attention: grouped_attention alone; the results and caches "
    "of both are bit-equal"
)
Arguments: TypeAlias = tuple[Tensor, ...]


def arguments_of(batch: int, keys: int, valid: int) -> Arguments:
    """q, k and v of the token, both caches, cosines, sines, the position and a mask."""
    q, k, v = (
        torch.randn(batch, 1, heads, WIDTH, device="cuda").bfloat16().transpose(1, 2)
        for heads in (Q_HEADS, HEADS, HEADS)
    )
    k_cache, v_cache = (torch.randn(batch, HEADS, keys, WIDTH, device="cuda").bfloat16() for _ in range(2))
    cos, sin = (torch.rand(1, 1, 1, WIDTH, device="cuda").bfloat16() for _ in range(2))
    mask = torch.full((batch, 1, 1, keys), -math.inf, dtype=q.dtype, device="cuda")
    mask[..., :valid] = 0.0
    return q, k, v, k_cache, v_cache, cos, sin, torch.tensor([valid - 1], device="cuda"), mask


def attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Tensor:
    """Of what the caches hold."""
    return attention.launch(q, k_cache, v_cache, rest[-1], WIDTH**-0.5, "cudnn")


def apart(q: Tensor, *rest: Tensor) -> Tensor:
    """By two kernels."""
    named = dict(zip(ops.rope_cache.arguments, (q, *rest[:-1], ROUNDING.value), strict=True))
    return attend(cached_rotary.launch(SimpleNamespace(**named)), *rest)


def joint(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    mask: Tensor,
) -> Tensor:  # fmt: skip
    """By one."""
    token = Token(k=k, v=v, cos=cos, sin=sin, positions=positions, rotary_rounding=ROUNDING)
    return attention.launch(q, k_cache, v_cache, mask, WIDTH**-0.5, "cudnn", written=token)


def measure(batch: int, keys: int, valid: int) -> dict[str, Any]:
    """All three, of one size, whose results are compared first."""
    sets = sets_of(lambda: arguments_of(batch, keys, valid), batch * HEADS * valid * WIDTH * BYTES)
    ours, theirs = ([each.clone() for each in sets[0]] for _ in range(2))
    assert torch.equal(joint(*ours), apart(*theirs))
    assert all(map(torch.equal, ours, theirs))
    return {
        "batch": batch, "keys": keys, "valid": valid, "two kernels": microseconds(apart, sets, REPEATS),
        "attention": microseconds(attend, sets, REPEATS), "one kernel": microseconds(joint, sets, REPEATS),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed results of this GPU")
    write = parser.parse_args().write
    rows = []
    for batch, (keys, valid) in itertools.product(BATCHES, LENGTHS):
        rows.append(measure(batch, keys, valid))
        print(rows[-1], flush=True)
    keep("cached_attention", WHAT, rows, write=write)


if __name__ == "__main__":
    main()
