"""Fits the cost model's constants of kernels that stay on one GPU, and shows its errors.

    PYTHONPATH=src:. python benchmarks/calibrate_costs.py [--write]

H200: run 1, columns U, C, B and D, by least squares on log(model / measured), whose sigma is 10 % (single runs scatter
by up to 20 %). These columns can't tell all constants apart, so those that somebody has published are held near that
value, with a sigma of 20 %. Runs 2 and 3 and all other columns are tried only. Columns B and D are of sketches; what
fuseplan's own kernels exchange, and what NCCL takes, is fitted by benchmarks/calibrate_reduces.py.

AITER's two constants: published one-stage tables of MI355X.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from benchmarks.calibrate_reduces import with_values
from benchmarks.contest import Contest
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs import HARDWARE, Hardware, OneStageLimits, Region
from fuseplan.rules.parts.pad import Padding
from fuseplan.rules.parts.rms_norm import PART as RMS_NORM

ROOT = Path(__file__).parent
SIGMA_RUN, SIGMA_PUBLISHED = 0.1, 0.2
PUBLISHED = {
    "cache_bandwidth": 5810.0,  # gpu-benches, gpu-small-kernels/h200_graph.txt: between 4.2 and 33.4 MB
    "triton.bandwidth": 380.0,  # NVIDIA/nccl issue 1264: p2pBandwidthLatencyTest, H100, one direction
    "library.NCCL ring LL.latency": 7800.0,  # NCCL's tuning.cc: 6.6 us and two steps of 0.6
    "library.NCCL ring LL.bandwidth": 141.0,  # NCCL's tuning.cc: llMaxBws, Hopper
    "library.NCCL ring Simple.latency": 15200.0,  # NCCL's tuning.cc: 8.4 us and two steps of 3.4
    "library.NCCL ring Simple.bandwidth": 370.8,  # NCCL's topo.h: SM90_NVLINK_BW of 20.6, 18 links
}
START = {**PUBLISHED, "launch": 2000.0, "generated_norm": 500.0, "strided_copy": 3000.0, "triton.signal": 4000.0}
OURS = without_multicast(HARDWARE["h200"])
"""As these runs were made."""


def h200_with(values: Mapping[str, float]) -> Hardware:
    """An H200 with the two protocols that NCCL runs between two ranks, and with sketches, which copied rows."""
    base = HARDWARE["h200"]
    assert base.triton is not None
    library = tuple(each for each in base.library if each.name in ("NCCL ring LL", "NCCL ring Simple"))
    changed: Hardware = with_values(replace(base, library=library, triton=replace(base.triton, stages=True)), values)
    return changed


def site(tokens: int, ranks: int = 2) -> Region:
    return Region(
        core=RMS_NORM.traffic, tokens=tokens, width=2880, reduce=True, residual=True, tail=Padding(padded=3072),
        ranks=ranks,
    )  # fmt: skip


def contest(hardware: Hardware, tokens: int) -> dict[str, int]:
    """Columns U, C, B, D, FP and what stands beside them, with a pad as the probe runs it: eager."""
    model, whole = Contest(hardware, pad="eager"), site(tokens)
    pad, reduce = whole.without_reduce(), whole.without_tail()
    columns = {
        "U": model.unfused_ns(whole),
        "C": model.alternative_ns(whole, pad, "triton"),
        "B": model.alternative_ns(whole, reduce, "triton"),
        "D": model.fused_ns(whole, "triton"),
        "nccl_ar": sum(kernel.ns for kernel in model.reduce(whole)),
        "tri_add_rms_pad": model.fused_ns(pad, "triton"),
        "ind_add_rms_pad": Contest(hardware).unfused_ns(pad),
    }
    if hardware.flashinfer:
        columns["F"] = model.fused_ns(reduce, "flashinfer")
    return columns


def fit(
    residuals: Callable[[Mapping[str, float]], list[float]], start: Mapping[str, float]
) -> tuple[dict[str, float], Any]:
    """The best of 24 starts around `start`, in log space."""
    names, random = list(start), np.random.default_rng(0)
    origin = np.log([start[name] for name in names])
    solutions = [
        least_squares(
            lambda x: np.array(residuals(dict(zip(names, np.exp(x), strict=True)))),
            origin + (random.normal(0, 0.15, len(names)) if trial else 0),
            diff_step=1e-3,
        )
        for trial in range(24)
    ]
    best = min(solutions, key=lambda solution: float(solution.cost))
    return dict(zip(names, np.exp(best.x), strict=True)), best


def log_ratios(rows: Sequence[Mapping[str, float]], hardware: Hardware, columns: Sequence[str]) -> list[float]:
    modelled = [contest(hardware, int(row["tokens"])) for row in rows]
    return [
        float(np.log(m[c] / 1e3 / row[c])) for row, m in zip(rows, modelled, strict=True) for c in columns if c in row
    ]


def errors(rows: Sequence[Mapping[str, float]], hardware: Hardware, columns: Sequence[str]) -> dict[str, Any]:
    found = {}
    for column in columns:
        relative = {
            int(row["tokens"]): round(contest(hardware, int(row["tokens"]))[column] / 1e3 / row[column] - 1, 3)
            for row in rows
            if column in row
        }
        if relative:
            sizes = np.abs(list(relative.values()))
            found[column] = {
                "median": round(float(np.median(sizes)), 3),
                "max": round(float(np.max(sizes)), 3),
                "by_tokens": relative,
            }
    return found


def calibrate_h200(runs: Mapping[int, Sequence[Mapping[str, float]]]) -> tuple[dict[str, float], dict[str, Any]]:
    def residuals(values: Mapping[str, float]) -> list[float]:
        data = log_ratios(runs[1], h200_with(values), "UCBD")
        published = [float(np.log(values[name] / value)) for name, value in PUBLISHED.items()]
        return [each / SIGMA_RUN for each in data] + [each / SIGMA_PUBLISHED for each in published]

    values, best = fit(residuals, START)
    # Half the sum of squares is -log of the posterior, so its inverse Hessian is the covariance.
    spread = np.sqrt(np.diag(np.linalg.inv(best.jac.T @ best.jac)))
    summary = {
        name: {"value": round(value, 1), "sigma": f"{100 * sigma:.0f} %", "published": PUBLISHED.get(name)}
        for (name, value), sigma in zip(values.items(), spread, strict=True)
    }
    return values, summary


def calibrate_aiter(published: Mapping[str, Any]) -> dict[str, Any]:
    def times(values: Mapping[str, float], table: Mapping[str, Any]) -> list[tuple[float, float]]:
        base = HARDWARE["mi355x"]
        assert base.aiter
        peers = with_values(base.aiter.peers, values)
        gate = OneStageLimits(source="", max_bytes={8: None} if table["stages"] == 1 else {})
        model = Contest(replace(base, aiter=replace(base.aiter, peers=peers, fused=gate)))
        shape = {"width": table["width"], "ranks": table["ranks"], "reduce": True, "residual": True}
        return [
            (model.fused_ns(Region(core=RMS_NORM.traffic, tokens=m, **shape), "aiter") / 1e3, us)
            for m, us in table["rows"]
        ]

    def residuals(values: Mapping[str, float]) -> list[float]:
        one_stage = [table for table in published["tables"] if table["stages"] == 1]
        return [float(np.log(model / us)) for table in one_stage for model, us in times(values, table)]

    values, _ = fit(residuals, {"signal": 2000.0, "bandwidth": 60.0})
    tried = [
        {
            "source": table["source"],
            "stages": table["stages"],
            "relative": {
                row[0]: round(m / us - 1, 3) for row, (m, us) in zip(table["rows"], times(values, table), strict=True)
            },
        }
        for table in published["tables"]
    ]
    return {"constants": {name: round(value, 1) for name, value in values.items()}, "errors": tried}


def try_h100(published: Mapping[str, Any]) -> list[dict[str, float]]:
    """do_bench empties the cache between runs, so only sizes far beyond it compare."""
    model, rows = Contest(HARDWARE["h100"]), []
    for row in published["rows"]:
        part = site(row["rows"]).without_reduce()
        rows.append(
            {
                "rows": row["rows"],
                "inductor": round(model.unfused_ns(part) / 1e3 / row["inductor_us"] - 1, 3),
                "triton_sketch": round(model.fused_ns(part, "triton") / 1e3 / row["triton_sketch_us"] - 1, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits the cost model's constants and shows its errors.")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cost_model_h200.json")
    write = parser.parse_args().write
    measured = json.loads((ROOT / "data/h200x2-ar-add-rms-pad.json").read_text())
    runs = {run["run"]: run["rows"] for run in measured["runs"]}
    values, constants = calibrate_h200(runs)
    fitted = h200_with(values)
    columns = ("U", "C", "B", "D", "nccl_ar", "tri_add_rms_pad", "ind_add_rms_pad")
    current = ("U", "C", "nccl_ar", "tri_add_rms_pad", "ind_add_rms_pad", "F")
    result = {
        "what": "constants of the cost model for H200, their errors, and the contest it decides; nanoseconds and GB/s",
        "command": "PYTHONPATH=src:. python benchmarks/calibrate_costs.py --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{measured['device']} (measured {measured['date']}); fitted on {platform.machine()}, one process",
        "fitted_on": "run 1, columns U, C, B, D; sigma 10 %; published values as priors, sigma 20 %",
        "constants": constants,
        "errors": {f"run {run}": errors(rows, fitted, columns) for run, rows in sorted(runs.items())},
        "committed": {
            f"run {run}": {c: {k: e[k] for k in ("median", "max")} for c, e in errors(rows, OURS, current).items()}
            for run, rows in sorted(runs.items())
        },
        "contest": {
            tokens: {column: round(ns / 1e3, 2) for column, ns in contest(OURS, tokens).items()}
            for tokens in (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
        },
        "h100": try_h100(json.loads((ROOT / "data/h100-add-rms-pad.json").read_text())),
        "mi355x_aiter": calibrate_aiter(json.loads((ROOT / "data/mi355x-aiter-published.json").read_text())),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if write:
        (ROOT / "results/cost_model_h200.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
