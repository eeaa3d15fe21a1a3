"""fuseplan's split-KV attention on one GPU: every tile, number of warps, stages and parts, beside torch's kernels.

PYTHONPATH=src:. python benchmarks/split_attention.py [--write]
"""

import argparse
import datetime
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.graphs import Captured
from fuseplan.providers.attention import packed_attention, shared_attention
from fuseplan.providers.triton.attention import launch
from fuseplan.providers.triton.split import Split

MODELS = {"llama": (32, 8, 128), "gpt-oss": (64, 8, 64), "gemma3": (8, 4, 256)}
"""By the model whose they are: heads of queries, of keys and values, and their size."""
BATCHES = (1, 8, 32)
LENGTHS = ((1280, 1000), (8192, 8000), (8192, 2000))
"""Keys that a cache has room for, and how many of them the mask shows."""
BLOCKS, WARPS, STAGES, COUNTS = (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 4, 8, 16, 32)
BYTES = 2
"""Of an element."""
CACHE_BYTES = 250e6
"""What the sets of arguments have together, at least: several times the L2 of any GPU."""
WHAT = (
    "microseconds a call, the median of three repeats of a CUDA graph that rotates among sets of arguments larger than "
    "the L2; bfloat16, one query token; grid: [keys of a tile, warps, stages, parts, microseconds], the fastest first"
)
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, float]


def arguments_of(model: str, batch: int, keys: int, valid: int) -> Arguments:
    """q, k, v, a mask and the scale."""
    q_heads, heads, width = MODELS[model]
    q, k, v = (
        torch.randn(batch, count, length, width, device="cuda").bfloat16()
        for count, length in ((q_heads, 1), (heads, keys), (heads, keys))
    )
    mask = torch.full((batch, 1, 1, keys), -math.inf, dtype=q.dtype, device="cuda")
    mask[..., :valid] = 0.0
    return q, k, v, mask, width**-0.5


def microseconds(call: Callable[..., Tensor], sets: Sequence[tuple[Any, ...]], repeats: int = 3) -> float:
    """A call's, in a graph of calls on one set after the other."""
    graph = Captured(lambda number: call(*sets[number]), len(sets), max(10, len(sets)))
    return round(statistics.median(graph.replay(4) for _ in range(repeats)), 2)


def sets_of(make: Callable[[], Any], valid_bytes: int) -> list[Any]:
    """Sets of arguments, at least two, that are larger than the L2 together.

    Args:
        make: a set.
        valid_bytes: of the keys of a set that the mask shows, and of its values.
    """
    return [make() for _ in range(1 + max(1, min(63, math.ceil(CACHE_BYTES / (2 * valid_bytes)))))]


def keep(name: str, what: str, rows: list[dict[str, Any]], *, write: bool) -> None:
    """Writes the results of `benchmarks/NAME.py` on this GPU, where asked."""
    device = torch.cuda.get_device_name()
    found = {
        "what": what, "device": device, "versions": f"torch {torch.__version__}, triton {triton.__version__}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"PYTHONPATH=src:. python benchmarks/{name}.py --write", "rows": rows,
    }  # fmt: skip
    if write:
        path = Path(__file__).parent / "results" / f"{name}_{device.split()[1].lower()}.json"
        first = f'{{"{next(iter(rows[0]))}"'
        path.write_text(json.dumps(found, separators=(",", ":")).replace(first, f"\n{first}") + "\n")


def split_as(split: Split | None) -> Callable[..., Tensor]:
    """The kernel with keys shared out in a way; None: in its own."""
    return lambda q, k, v, mask, scale: launch(q, k, v, mask, scale, "cudnn", split)


def measure(model: str, batch: int, keys: int, valid: int) -> dict[str, Any]:
    """All of one size; what needs more shared memory than there is is left out."""
    heads, width = MODELS[model][1:]
    sets = sets_of(lambda: arguments_of(model, batch, keys, valid), batch * heads * valid * width * BYTES)
    grid = []
    for block, warps, stages, parts in itertools.product(BLOCKS, WARPS, STAGES, COUNTS):
        try:
            took = microseconds(split_as(Split(count=parts, block=block, warps=warps, stages=stages)), sets)
        except triton.runtime.errors.OutOfResources:
            continue
        grid.append([block, warps, stages, parts, took])
    return {
        "model": model, "batch": batch, "keys": keys, "valid": valid,
        "cudnn": microseconds(lambda *each: shared_attention(*each, False, "cudnn"), sets),
        "efficient, packed": microseconds(lambda *each: packed_attention(*each, False, "efficient"), sets),
        "chosen": microseconds(split_as(None), sets),
        "grid": sorted(grid, key=lambda each: each[-1]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed results of this GPU")
    write = parser.parse_args().write
    rows = []
    for model, batch, (keys, valid) in itertools.product(MODELS, BATCHES, LENGTHS):
        rows.append(measure(model, batch, keys, valid))
        print({**rows[-1], "grid": rows[-1]["grid"][:5]}, flush=True)
    keep("split_attention", WHAT, rows, write=write)


if __name__ == "__main__":
    main()
