"""Linear layers of few rows on one GPU: fuseplan's kernel, however it shares weights out, beside torch's products, and
beside one product with the weights laid next to each other.

python -m benchmarks.skinny_linear [--only "q, k, v"] [--write]
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

from benchmarks.graphs import Captured, versions
from fuseplan.providers.triton.linear import Shares, launch

LAYERS = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "gate, up": (4096, (14336, 14336)),
    "gate, up, SiLU-mul": (4096, (14336, 14336)),
    "o": (4096, (4096,)),
    "down": (14336, (4096,)),
}
"""Width and features, of Llama-3.1-8B."""
ROWS = (1, 8, 16, 32)
FEATURES, COLUMNS, STAGES = (32, 64, 128), (128, 256), (3, 4, 6)
WEIGHT_BYTES = 400e6
"""What the sets of weights have together, at least: several times the L2 of any GPU."""
WHAT = (
    "microseconds a call, the median of three repeats of a CUDA graph that rotates among sets of weights larger than "
    "the L2; bfloat16; separate: torch's products, and SiLU-mul by torch.compile's code where it is asked for; merged: "
    "one product with the weights laid next to each other; limit: a copy that reads and writes as many bytes; grid: "
    "[rows of a tile, columns, stages, microseconds], the fastest first"
)


def microseconds(call: Callable[[int], Any], sets: int) -> float:
    """A call's, in a graph of calls on one set after the other."""
    graph = Captured(call, sets, max(12, sets))
    return round(statistics.median(graph.replay(3) for _ in range(3)), 2)


def measure(name: str, rows: int) -> dict[str, Any]:
    """All of one size; what needs more shared memory than there is is left out."""
    width, features = LAYERS[name]
    nbytes = sum(features) * width * 2
    count = max(2, math.ceil(WEIGHT_BYTES / nbytes))
    merged = [torch.randn(sum(features), width, device="cuda").bfloat16() * width**-0.5 for _ in range(count)]
    sets: list[Sequence[Tensor]] = [each.split(features) for each in merged]
    x = torch.randn(rows, width, device="cuda").bfloat16()
    rounding = "llama" if "SiLU" in name else None
    activate = torch.compile(lambda gate, up: torch.nn.functional.silu(gate) * up)
    none = [None] * len(features)

    def torchs(number: int) -> Any:
        found = [torch.nn.functional.linear(x, weight) for weight in sets[number]]
        return activate(*found) if rounding else found

    def at_once(number: int) -> Any:
        found = torch.nn.functional.linear(x, merged[number])
        return activate(*found.split(features, 1)) if rounding else found

    grid = []
    for tile, columns, stages in itertools.product(FEATURES, COLUMNS, STAGES):
        shares = Shares(features=tile, columns=columns, warps=4, stages=stages)
        try:
            took = microseconds(lambda number, shares=shares: launch(x, sets[number], none, rounding, shares), count)
        except triton.runtime.errors.OutOfResources:
            continue
        grid.append([tile, columns, stages, took])
    source = torch.empty(nbytes // 4, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return {
        "layers": name, "width": width, "features": features, "rows": rows,
        "separate": microseconds(torchs, count), "merged": microseconds(at_once, count),
        "fuseplan": microseconds(lambda number: launch(x, sets[number], none, rounding), count),
        "limit": microseconds(lambda number: target.copy_(source), 1),
        "grid": sorted(grid, key=lambda each: each[-1]),
    }  # fmt: skip


def main() -> None:
    """Measures, prints a line for each size, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=LAYERS, help="measure these layers alone, and replace their rows in the file")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/skinny_linear_DEVICE.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    path = arguments.out / f"skinny_linear_{torch.cuda.get_device_name().split()[1].lower()}.json"
    chosen = [arguments.only] if arguments.only else [*LAYERS]
    kept = json.loads(path.read_text())["rows"] if arguments.only and path.exists() else []
    rows = [row for row in kept if row["layers"] not in chosen]
    result = {
        "what": WHAT,
        "command": "python -m benchmarks.skinny_linear --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, **versions()},
        "rows": rows,
    }
    for name, count in itertools.product(chosen, ROWS):
        rows.append(measure(name, count))
        print(json.dumps({**rows[-1], "grid": rows[-1]["grid"][:3]}), flush=True)
        if arguments.write:
            path.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
