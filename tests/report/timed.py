"""What was timed, made up: steps under several policies, and alternatives that were tuned."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from fuseplan.cli.tune import NOTHING, _rendered
from fuseplan.measurement.costs import Measurement
from fuseplan.measurement.tuning.tuner import Unclear
from fuseplan.measurement.tuning.work import Skipped
from fuseplan.planner.costs import Provenance, Row
from fuseplan.record.bench import BatchTimes, Bench, PolicyTime
from fuseplan.record.paired import Paired

ORDERED = "ordered(act_padding, allreduce_rms)"
FUSED = "allreduce_rms all_reduce_fused_add_rms_norm triton"


def beside(difference_ns: int, half_ns: int) -> Paired:
    """A difference, and half of its interval."""
    return Paired(
        difference_ns=difference_ns, low_ns=difference_ns - half_ns, high_ns=difference_ns + half_ns, repeats=9
    )


def batch(size: int, *further: PolicyTime, planned_ns: int = 900_000, half_ns: int = 4_000) -> BatchTimes:
    """All policies at a batch size."""
    planned: dict[str, Any] = {"step_ns": planned_ns, "spread_ns": 4_000, "fused": {"act_padding": 4},
                               "beside_plain": beside(planned_ns - 1_000_000, half_ns)}  # fmt: skip
    rows = (
        PolicyTime(policy="planned", prices=("measured",), **planned),
        PolicyTime(policy="ordered(act_padding)", same_as="planned", **planned),
        PolicyTime(policy=ORDERED, step_ns=1_004_000, spread_ns=5_000, fused={"act_padding": 3, "allreduce_rms": 1},
                   beside_plain=beside(4_000, 5_000)),
        *further,
        PolicyTime(policy="off", step_ns=1_050_000, spread_ns=2_000, beside_plain=beside(50_000, 60_000)),
        PolicyTime(policy="torch.compile", step_ns=1_000_000, spread_ns=3_000),
    )  # fmt: skip
    return BatchTimes(batch=size, steps=10, policies=rows)


BENCH = Bench(
    workload="a [model]", tp=2, device="h200", torch="2.11.0", triton="3.6.0", date="2026-11-27", command="as it was",
    repeats=9, batches=(batch(1), batch(8)), notes=("mind",),
)  # fmt: skip


def unclear() -> Bench:
    """One policy that more repeats would settle, and one that hardly any would."""
    times: dict[str, Any] = {"step_ns": 1_050_000, "spread_ns": 2_000, "fused": {"act_quant": 1}}
    near = PolicyTime(policy="ordered(act_quant)", beside_plain=beside(50_000, 60_000), **times)
    far = PolicyTime(policy="ordered(norm_quant)", beside_plain=beside(0, 60_000), **times)
    same = replace(near, policy="ordered(act_quant, pad)", same_as="ordered(act_quant)")
    return replace(BENCH, batches=(batch(1), batch(8, near, same, far)))


def gains() -> Iterator[tuple[str, Bench]]:
    """(title, bench), of which one sentence is said."""
    for title, planned_ns, half_ns in (
        ("faster", 950_000, 10_000),
        ("slower", 1_050_000, 10_000),
        ("even", 1_001_000, 2_000),
        ("unclear", 950_000, 60_000),
        ("too noisy", 1_000_000, 600_000),
    ):
        yield title, replace(BENCH, batches=(batch(1, planned_ns=planned_ns, half_ns=half_ns),))
    off = BENCH.batches[0].policies[3]
    yield "fuses none", replace(BENCH, batches=(replace(BENCH.batches[0], policies=(off, batch(1).plain)),))


def tuned() -> Iterator[tuple[str, RenderableType, int]]:
    """(title, what is shown, columns)."""
    origin = {"device": "h100", "torch": "2.11", "triton": "", "topology": "tp2", "date": "2026-11-27", "command": "x"}
    rows = tuple(
        Row(key=f"site: {name}", tokens=size, time_ns=1000 * size + 10 * len(name), spread_ns=20,
            provenance=Provenance.MEASURED, **origin)
        for name in (FUSED, "unfused") for size in (1, 8, 64, 512) if (name, size) != (FUSED, 64)
    )  # fmt: skip
    skipped = (
        Skipped(site="site", alternative=FUSED, tokens=64, reason="it raised"), Skipped(site="other", reason="no ranks")
    )  # fmt: skip
    doubts = [Unclear(site="site", alternative=FUSED, tokens=n, beside_unfused=beside(1 - n, 30)) for n in range(1, 9)]
    found = Measurement(
        device="h100", rows=rows, skipped=skipped, classes={"site": 3, "other": 1}, unclear=(*doubts,), notes=("mind",)
    )  # fmt: skip
    none = Measurement(device="h100", rows=(), skipped=(), classes={})
    yield "tuned", _rendered(found, Path("costs.json"), NOTHING), 160
    few = _rendered(replace(found, skipped=(), unclear=(), notes=()), Path("costs.json"), NOTHING)
    yield "tuned, in few columns", Group(few, _rendered(none, Path("costs.json"), NOTHING)), 76
