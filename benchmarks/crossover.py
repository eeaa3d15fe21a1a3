"""Which kernels are the fastest for an all-reduce with the norm behind it, by message: measured, and by the model.

    PYTHONPATH=src:. python benchmarks/crossover.py [--write]

Measured rows are those of `benchmarks/results/region_*.json` (hidden size 2,880, with a pad to 3,072); nothing is run
here. Where nothing was measured, the model alone says.
"""

import argparse
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.calibrate_reduces import REGIONS, ROOT, kernels_at
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs import HARDWARE, Hardware, total_ns

OURS = "fuseplan"
COLUMNS = {
    OURS: "all", "FlashInfer": "flashinfer_then_pad", "NCCL": "pad_nccl", "symmetric memory": "pad_one_shot",
}  # fmt: skip
"""Who does the all-reduce, and the measured column: fuseplan's kernel of all, FlashInfer's op and a pad, or NCCL's or
torch's one-shot all-reduce and fuseplan's norm and pad.
"""
TOKENS = tuple(2**power for power in range(14))
MODELLED = (("h100", 2), ("h100", 4), ("h200", 2), ("h200", 4))
HIDDEN = (2880, 4096, 8192)
WHAT = (
    "microseconds of all-reduce, residual add and RMSNorm (with a pad where measured), bfloat16, by who does the "
    "all-reduce; fastest, and fastest of others: measured, and by the cost model without NVLink multicast; regret: "
    "the measured time of the model's choice over the least one, less 1; shapes: by the model alone, without a pad"
)
Times = Mapping[str, float]


def modelled(hardware: Hardware, tokens: int, hidden: int, ranks: int, padded: int | None = None) -> Times:
    """Microseconds by provider."""
    kernels = {name: kernels_at(hardware, column, tokens, hidden, ranks, padded) for name, column in COLUMNS.items()}
    return {name: round(total_ns(each) / 1e3, 2) for name, each in kernels.items()}


def fastest(times: Times) -> str:
    """Whose time is the least."""
    return min(times, key=lambda name: times[name])


def others(times: Times) -> dict[str, float]:
    """Without fuseplan's kernel of all."""
    return {name: each for name, each in times.items() if name != OURS}


def measured_rows() -> Iterator[dict[str, Any]]:
    """Each measured size beside the model."""
    for name, (device, ranks) in REGIONS.items():
        hardware = without_multicast(HARDWARE[device])
        for row in json.loads((ROOT / f"results/{name}.json").read_text())["rows"]:
            times = {provider: row[column][0] for provider, column in COLUMNS.items() if column in row}
            by_model = modelled(hardware, row["tokens"], 2880, ranks, 3072)
            by_model = {provider: by_model[provider] for provider in times}
            found: dict[str, Any] = {
                "device": device, "ranks": ranks, "hidden": 2880, "tokens": row["tokens"], "measured": times,
                "modelled": by_model,
            }  # fmt: skip
            for which, of in (("fastest", dict), ("fastest_of_others", others)):
                chosen = fastest(of(by_model))
                found[which] = {"measured": fastest(of(times)), "modelled": chosen}
                found[f"regret_{which}"] = round(times[chosen] / min(of(times).values()) - 1, 4)
            yield found


def modelled_rows() -> Iterator[dict[str, Any]]:
    """What the model says of each shape: who is the fastest at powers of two tokens."""
    for device, ranks in MODELLED:
        for hidden in HIDDEN:
            plain = without_multicast(HARDWARE[device])
            of_all = {fastest(modelled(plain, tokens, hidden, ranks)) for tokens in TOKENS}
            yield {
                "device": device, "ranks": ranks, "hidden": hidden, "tokens": [TOKENS[0], TOKENS[-1]],
                "fastest": sorted(of_all),
            }  # fmt: skip


def main() -> None:
    """Prints who is the fastest, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/crossover.json")
    arguments = parser.parse_args()
    rows, shapes = list(measured_rows()), list(modelled_rows())
    for row in rows:
        said = (f"{row[which]['measured']} (model: {row[which]['modelled']}, {row[f'regret_{which}']:.1%})"
                for which in ("fastest", "fastest_of_others"))  # fmt: skip
        print(f"{row['ranks']} x {row['device']}, {row['tokens']:>5} tokens: {'; of others '.join(said)}")
    for shape in shapes:
        print(json.dumps(shape))
    if arguments.write:
        result = {
            "what": WHAT, "command": "PYTHONPATH=src:. python benchmarks/crossover.py --write",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "regret": max(row["regret_fastest"] for row in rows),
            "regret_of_others": max(row["regret_fastest_of_others"] for row in rows),
            "rows": rows, "shapes": shapes,
        }  # fmt: skip
        (Path(__file__).parent / "results/crossover.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
