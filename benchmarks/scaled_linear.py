"""Linear layers of few rows in fp8 with scales of rows on one GPU: fuseplan's kernel beside torch's products.

python -m benchmarks.scaled_linear [--write]
"""

import argparse
import datetime
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.graphs import versions
from benchmarks.quantised import codes_of, scales_of
from benchmarks.skinny_linear import ROWS, WEIGHT_BYTES, microseconds
from fuseplan.dialect import ScaledLayers
from fuseplan.providers.triton.scaled_linear import launch

LAYERS = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "gate, up": (4096, (14336, 14336)),
    "o": (4096, (4096,)),
    "down": (14336, (4096,)),
}
"""Width and features, of Llama-3.1-8B."""
WHAT = (
    "microseconds a call, the median of three repeats of a CUDA graph that rotates among sets of weights larger than "
    "the L2; fp8 with scales of rows; separate: torch._scaled_mm of each layer; precise: fuseplan's kernel as for "
    "use_fast_accum=False; limit: a copy that reads and writes as many bytes; off: the largest difference to float64 "
    "over the largest element, of each"
)


def quantised(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, width] of normal values, and their scales [rows, 1]."""
    values = torch.randn(rows, width, device="cuda")
    scales = scales_of(values, width)
    return codes_of(values, scales), scales


def measure(name: str, rows: int) -> dict[str, Any]:
    """All of one size."""
    width, features = LAYERS[name]
    nbytes = sum(features) * width
    count = max(2, math.ceil(WEIGHT_BYTES / nbytes))
    sets = [[quantised(each, width) for each in features] for _ in range(count)]
    x, scale = quantised(rows, width)

    def layers(number: int, *, fast: bool = True) -> ScaledLayers:
        return ScaledLayers(
            x=x, x_scale=scale, weights=[codes for codes, _ in sets[number]],
            scales=[own.t() for _, own in sets[number]], biases=[None] * len(features), use_fast_accum=fast,
        )  # fmt: skip

    def torchs(number: int) -> list[Tensor]:
        return [
            torch._scaled_mm(x, codes.t(), scale, own.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
            for codes, own in sets[number]
        ]

    exact = [(x.double() * scale) @ (codes.double() * own).t() for codes, own in sets[0]]

    def off(found: Any) -> float:
        return max(
            float((got.double() - want).abs().max() / want.abs().max())
            for got, want in zip(found, exact, strict=True)
        )  # fmt: skip

    source = torch.empty(nbytes // 2, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "layers": name, "width": width, "features": features, "rows": rows,
        "separate": microseconds(torchs, count),
        "fuseplan": microseconds(lambda number: launch(layers(number)), count),
        "precise": microseconds(lambda number: launch(layers(number, fast=False)), count),
        "limit": microseconds(lambda number: target.copy_(source), 1),
        "off": {
            "separate": off(torchs(0)), "fuseplan": off(launch(layers(0))),
            "precise": off(launch(layers(0, fast=False))),
        },
    }  # fmt: skip


def main() -> None:
    """Measures, prints a line for each size, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scaled_linear_DEVICE.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    rows = list[dict[str, Any]]()
    result = {
        "what": WHAT,
        "command": "python -m benchmarks.scaled_linear --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, **versions()},
        "rows": rows,
    }
    for name, count in itertools.product(LAYERS, ROWS):
        rows.append(measure(name, count))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    if arguments.write:
        path = arguments.out / f"scaled_linear_{torch.cuda.get_device_name().split()[1].lower()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
