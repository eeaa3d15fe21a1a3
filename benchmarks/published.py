"""Scores the cost model by published times that no constant is fitted on.

    PYTHONPATH=src:. python benchmarks/published.py [--write]

Of benchmarks/data/fusions-published.json: whether the model tells which of two is faster, how far its times are from
the published ones, and how far the size is from which on the other one is faster.
"""

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.calibrate_reduces import all_reduce_us
from benchmarks.contest import Contest
from fuseplan.planner.costs import HARDWARE, Hardware, Region
from fuseplan.rules.parts.rms_norm import PART as RMS_NORM

ROOT = Path(__file__).parent
DATA = json.loads((ROOT / "data/fusions-published.json").read_text())


def hardware_of(table: dict[str, Any]) -> Hardware:
    """The device of a table, with AITER in the stages that it says."""
    hardware = HARDWARE[table["device"]]
    if "stages" in table:
        assert hardware.aiter is not None
        gate = replace(hardware.aiter.fused, max_tokens=None, max_bytes={8: None} if table["stages"] == 1 else {})
        hardware = replace(hardware, aiter=replace(hardware.aiter, fused=gate))
    return hardware


def region(table: dict[str, Any], width: int, tokens: int) -> Region:
    return Region(
        core=RMS_NORM.traffic, tokens=tokens, width=width, reduce=True, residual=True, ranks=table["ranks"],
        reducer=table["reducer"],
    )  # fmt: skip


def times(table: dict[str, Any], width: int, tokens: int) -> tuple[float, float]:
    """(fused, unfused) by the model, in us."""
    model, site = Contest(hardware_of(table)), region(table, width, tokens)
    return model.fused_ns(site, table["provider"]) / 1e3, model.unfused_ns(site) / 1e3


def signs() -> Iterator[dict[str, Any]]:
    """Rows that say which of two is faster: fused or not, or of two all-reduces one."""
    for table in DATA["fusions"]:
        for width, tokens, fused, unfused in table["rows"]:
            if unfused is not None:
                mine = times(table, width, tokens)
                yield _sign(table, f"{tokens} x {width}", unfused - fused, mine[1] - mine[0])
    for table in DATA["savings"]:
        for tokens, least, most in table["rows"]:
            fused, unfused = times(table, table["width"], tokens)
            published = least if most is None else (least + most) / 2
            yield _sign(table, f"{tokens} x {table['width']}", published or 1, unfused - fused)


def _sign(table: dict[str, Any], row: str, published: float, modelled: float) -> dict[str, Any]:
    return {
        "source": short(table), "row": row, "published": round(published, 2), "modelled": round(modelled, 2),
        "right": (published > 0) == (modelled > 0),
    }  # fmt: skip


def errors() -> Iterator[dict[str, Any]]:
    """Published times and the model's."""
    for table in DATA["fusions"]:
        for width, tokens, *published in table["rows"]:
            for what, us, mine in zip(("fused", "unfused"), published, times(table, width, tokens), strict=True):
                if us is not None:
                    yield _error(table, f"{tokens} x {width}: {what}", us, mine)
    for table in DATA["all_reduces"]:
        for nbytes, *published in table["rows"]:
            for name, us in zip(table["columns"][1:], published, strict=True):
                mine = all_reduce_us(HARDWARE[table["device"]], name, nbytes, table["ranks"])
                yield _error(table, f"{nbytes} bytes: {name}", us, mine)


def _error(table: dict[str, Any], row: str, published: float, modelled: float) -> dict[str, Any]:
    return {
        "source": short(table), "row": row, "published": published, "modelled": round(modelled, 2),
        "error": round(modelled / published - 1, 3),
    }  # fmt: skip


def short(table: dict[str, Any]) -> str:
    """`vllm-project/vllm#44079, 8 x h200`."""
    owner, name, _, number = table["source"].split(",")[0].removeprefix("github.com/").split("/")
    return f"{owner}/{name}#{number.split()[0].rstrip(':')}, {table['ranks']} x {table['device']}"


def crossovers() -> Iterator[dict[str, Any]]:
    """Sizes from which on the second is faster."""
    for row in DATA["crossovers"]:
        first, then = (_timed(row, row[each]) for each in ("first", "then"))
        sizes = [2 ** (power / 16) for power in range(13 * 16, 28 * 16)]
        found = next((size for size in sizes if first(int(size)) > then(int(size))), math.inf)
        yield {
            "source": row["source"], "ranks": row["ranks"], "device": row["device"], "first": row["first"],
            "then": row["then"], "published": row["bytes"], "modelled": round(found),
            "factor": round(max(found / row["bytes"], row["bytes"] / found), 2),
        }  # fmt: skip


def _timed(row: dict[str, Any], name: str) -> Callable[[int], float]:
    if name in ("FlashInfer's fusion", "vLLM's all-reduce and a norm"):
        table = {"provider": "flashinfer", "reducer": "vllm", **row}
        return lambda nbytes: times(table, row["width"], max(1, nbytes // 2 // row["width"]))[name.startswith("vLLM")]
    return lambda nbytes: all_reduce_us(HARDWARE[row["device"]], name, nbytes, row["ranks"])


def score() -> dict[str, Any]:
    """All of it."""
    told, off, crossed = list(signs()), list(errors()), list(crossovers())
    by_source: dict[str, list[float]] = {}
    for row in off:
        by_source.setdefault(row["source"], []).append(abs(row["error"]))
    return {
        "signs_right": round(statistics.fmean(row["right"] for row in told), 3),
        "signs": len(told),
        "median_error": round(statistics.median(abs(row["error"]) for row in off), 3),
        "times": len(off),
        "largest_factor": max(row["factor"] for row in crossed),
        "median_error_by_source": {name: round(statistics.median(each), 3) for name, each in sorted(by_source.items())},
        "wrong": [row for row in told if not row["right"]],
        "crossovers": crossed,
        "rows": off,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores the cost model by published times.")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/published.json")
    write = parser.parse_args().write
    result = {
        "what": "the cost model beside published times that no constant is fitted on; microseconds",
        "command": "PYTHONPATH=src:. python benchmarks/published.py --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "no device",
        **score(),
    }
    if write:
        (ROOT / "results/published.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1))


if __name__ == "__main__":
    main()
