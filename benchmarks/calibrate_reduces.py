"""Fits what exchanges of rows between ranks take, unfused and fused, and shows the errors.

    PYTHONPATH=src:. python benchmarks/calibrate_reduces.py [--write]

Three families, each by least squares on log(model / measured): Hopper, on the regions that were run on two H100s, two
H200s and four H100s, and on published all-reduces; Blackwell and AMD, on published ones alone. What published rows
tell only together is held near where the fit starts. Regions were run without NVLink multicast, published rows with.
No row of benchmarks/data/fusions-published.json is read: benchmarks/published.py scores by these.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from benchmarks.contest import Contest
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs import HARDWARE, Constant, Hardware, Kernel, Region, total_ns
from fuseplan.rules.parts.pad import Padding
from fuseplan.rules.parts.rms_norm import PART as RMS_NORM

ROOT = Path(__file__).parent
SIGMA_OURS, SIGMA_PUBLISHED, SIGMA_START = 0.08, 0.12, 0.3
WIDE = {"step": 0.7, "peer": 0.7, "second": 0.7}
"""Wider than others around their start: nothing is known of them before."""
START: dict[str, dict[str, tuple[float, ...]]] = {
    "h200": {
        # hwLatencies and llMaxBws of NCCL's tuning.cc, 18 links of SM90_NVLINK_BW, and 0.92 of them for LL128
        "library.NCCL ring LL": (7800, 600, 141), "library.NCCL ring LL128": (17800, 600, 341),
        "library.NCCL ring Simple": (15200, 3400, 371), "library.NCCL NVLS": (30000, 100, 300),
        # a launch and one wait or two; links of 450 GB/s on paper, of which two thirds
        "shots.vLLM custom one-shot": (4000, 1000, 300, 250), "shots.vLLM custom two-shot": (8000, 1000, 300, 60),
        "shots.symm_mem one-shot": (5000, 1000, 300, 170), "shots.symm_mem two-shot": (8000, 1000, 300, 120),
        "shots.symm_mem multimem": (8000, 500, 300, 120),
        "triton": (2800, 1000, 380, 2800), "flashinfer": (2800, 1000, 380, 10_000),
    },
    "b200": {
        # Links are twice as wide; vLLM's two stages gain nothing by that among four B200s, beside six H100s.
        "library.NCCL ring LL": (7800, 1000, 282), "library.NCCL ring LL128": (17800, 400, 664),
        "shots.vLLM custom one-shot": (4000, 1000, 600, 130), "shots.vLLM custom two-shot": (8000, 1000, 300, 60),
        "shots.symm_mem two-shot": (8000, 1000, 600, 240), "shots.symm_mem multimem": (8000, 500, 600, 240),
    },
    "mi300x": {"aiter.peers": (1044, 0, 53)},
}  # fmt: skip
"""Latency, step, bandwidth, peer, or signal, step, bandwidth, second, that a fit starts from, and is held near."""
REGIONS = {"region_h100x2": ("h100", 2), "region_h200x2": ("h200", 2), "region_h100x4": ("h100", 4)}
FITTED = ("unfused", "pad_nccl", "reduce_then_pad", "all", "reduce", "flashinfer", "unfused_one_shot", "pad_one_shot")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A time and what it is of: a column of a region, or an all-reduce by name."""

    device: str
    ranks: int
    column: str
    nbytes: int
    us: float
    tokens: int = 0


def regions() -> list[Row]:
    found = []
    for name, (device, ranks) in REGIONS.items():
        for row in json.loads((ROOT / f"results/{name}.json").read_text())["rows"]:
            times = {column: row[column][0] for column in row if isinstance(row[column], list)}
            shots = [times[each] for each in ("flashinfer_one_shot", "flashinfer_two_shot") if each in times]
            times |= {"flashinfer": min(shots)} if shots else {}
            found += [
                Row(device=device, ranks=ranks, column=c, nbytes=0, us=us, tokens=row["tokens"])
                for c, us in times.items()
                if c in FITTED
            ]
    return found


def published() -> list[Row]:
    tables = json.loads((ROOT / "data/all-reduces-published.json").read_text())["tables"]
    return [
        Row(device=table["device"], ranks=table["ranks"], column=column, nbytes=row[0], us=us)
        for table in tables
        for row in table["rows"]
        for column, us in zip(table["columns"][1:], row[1:], strict=True)
        if us is not None
    ]


def modelled_us(hardware: Hardware, row: Row) -> float:
    """A row's time by the model."""
    if not row.tokens:
        return all_reduce_us(hardware, row.column, row.nbytes, row.ranks)
    return total_ns(kernels_of(hardware, row)) / 1e3


def kernels_of(hardware: Hardware, row: Row) -> tuple[Kernel, ...]:
    """The kernels of a region's column, on a machine without multicast."""
    return kernels_at(without_multicast(hardware), row.column, row.tokens, 2880, row.ranks, 3072)


def kernels_at(
    hardware: Hardware, column: str, tokens: int, hidden: int, ranks: int, padded: int | None = None
) -> tuple[Kernel, ...]:
    """The kernels of a column of regions, of any width; padded: to which norms are padded, None: they aren't."""
    model, tail = Contest(hardware), None if padded is None else Padding(padded=padded)
    site = Region(
        core=RMS_NORM.traffic, tokens=tokens, width=hidden, reduce=True, residual=True, tail=tail, ranks=ranks
    )
    symmetric = replace(site, reducer="symm_mem one-shot")
    copy = (model.copy(site.row_bytes),)
    kernels = {
        "unfused": lambda: model.unfused(site),
        "pad_nccl": lambda: model.alternative(site, site.without_reduce(), "triton"),
        "reduce_then_pad": lambda: model.alternative(site, site.without_tail(), "triton"),
        "all": lambda: model.fused(site, "triton"),
        "reduce": lambda: model.fused(site.without_tail(), "triton"),
        "flashinfer": lambda: model.fused(site.without_tail(), "flashinfer"),
        "flashinfer_then_pad": lambda: model.alternative(site, site.without_tail(), "flashinfer"),
        "unfused_one_shot": lambda: (*copy, *model.unfused(symmetric)),
        "pad_one_shot": lambda: (*copy, *model.alternative(symmetric, site.without_reduce(), "triton")),
    }
    return kernels[column]()


def all_reduce_us(hardware: Hardware, name: str, nbytes: int, ranks: int) -> float:
    """An all-reduce by name: one of the device's, `NCCL`, or one of AITER's stages."""
    region = Region(core=RMS_NORM.traffic, tokens=1, width=max(1, nbytes // 2), reduce=True, ranks=ranks)
    if name.startswith("AITER"):
        assert hardware.aiter is not None
        gate = replace(hardware.aiter.plain, max_bytes={8: None} if "one" in name else {})
        return total_ns(Contest(replace(hardware, aiter=replace(hardware.aiter, plain=gate))).reduce(region)) / 1e3
    return total_ns(Contest(hardware).reduce(replace(region, reducer="torch" if name == "NCCL" else name))) / 1e3


def tied(values: Mapping[str, float]) -> dict[str, float]:
    """AITER's second wait is as long as its first."""
    signal = "aiter.peers.signal"
    return {**values, "aiter.peers.second": values[signal]} if signal in values else dict(values)


def with_values(value: Any, values: Mapping[str, float], prefix: str = "") -> Any:
    """A device with other constants, by their dotted names."""
    if isinstance(value, Constant):
        return replace(value, value=values[prefix]) if prefix in values else value
    if isinstance(value, tuple):
        return tuple(with_values(item, values, f"{prefix}.{getattr(item, 'name', '')}") for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: f"{prefix}.{item.name}" if prefix else item.name for item in fields(value)}
        return replace(value, **{name: with_values(getattr(value, name), values, path) for name, path in parts.items()})
    return value


def start_of(device: str) -> dict[str, float]:
    """Constants of a device by name, where the fit starts."""
    found = dict[str, float]()
    for name, values in START[device].items():
        waits = name in ("triton", "flashinfer", "aiter.peers")
        parts = ("signal", "step", "bandwidth", "second") if waits else ("latency", "step", "bandwidth", "peer")
        found |= {f"{name}.{part}": float(value) for part, value in zip(parts, values, strict=False) if value}
    return found


def fit(device: str, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Constants of a device by name, with their sigma."""
    start = start_of(device)
    assert start.keys() <= dict(HARDWARE[device].constants()).keys()

    def residuals(logs: np.ndarray) -> np.ndarray:
        values = dict(zip(start, np.exp(logs), strict=True))
        hardware = {device: with_values(fitted_of(device), tied(values)) for device in {row.device for row in rows}}
        data = [
            np.log(modelled_us(hardware[row.device], row) / row.us) / (SIGMA_OURS if row.tokens else SIGMA_PUBLISHED)
            for row in rows
        ]
        near = [
            np.log(values[name] / origin) / WIDE.get(name.rsplit(".", 1)[1], SIGMA_START)
            for name, origin in start.items()
        ]
        return np.array([*data, *near])

    best = least_squares(residuals, np.log(list(start.values())), diff_step=1e-3, loss="soft_l1")
    spread = np.sqrt(np.diag(np.linalg.pinv(best.jac.T @ best.jac)))
    return {
        name: {"value": round(float(np.exp(log)), 1), "sigma": f"{100 * sigma:.0f} %"}
        for name, log, sigma in zip(start, best.x, spread, strict=True)
    }


def fitted_of(device: str) -> Hardware:
    """A device without trees, whose constants follow from those of the rings."""
    hardware = HARDWARE[device]
    return replace(hardware, library=tuple(each for each in hardware.library if each.algorithm != "tree"))


def errors(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Median and largest relative error, and the share of rows within 20 %, by column."""
    by_column: dict[str, list[float]] = {}
    for row in rows:
        where = f"{row.device} x {row.ranks}: {row.column}"
        by_column.setdefault(where, []).append(abs(modelled_us(HARDWARE[row.device], row) / row.us - 1))
    return {
        where: {
            "rows": len(found),
            "median": round(float(np.median(found)), 3),
            "max": round(max(found), 3),
            "within_20": round(float(np.mean(np.array(found) <= 0.2)), 3),
        }
        for where, found in sorted(by_column.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits what exchanges of rows between ranks take.")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reduces.json")
    write = parser.parse_args().write
    ours, tables = regions(), published()
    hopper = [*ours, *(row for row in tables if row.device in ("h100", "h200"))]
    families = {"h200": hopper, **{name: [row for row in tables if row.device == name] for name in ("b200", "mi300x")}}
    result = {
        "what": "constants of exchanges between ranks in the cost model, in ns and GB/s, and its relative errors",
        "command": "PYTHONPATH=src:. python benchmarks/calibrate_reduces.py --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "no device: committed results of H100 and H200, and published tables",
        "constants": {device: fit(device, rows) for device, rows in families.items()},
        "errors": errors([*ours, *tables]),
        "ours": overall(ours),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if write:
        (ROOT / "results/reduces.json").write_text(text + "\n")


def overall(rows: list[Row]) -> dict[str, float]:
    """Of all rows measured here."""
    found = np.array([abs(modelled_us(HARDWARE[row.device], row) / row.us - 1) for row in rows])
    return {
        "rows": len(found), "median": round(float(np.median(found)), 3),
        "within_20": round(float(np.mean(found <= 0.2)), 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
