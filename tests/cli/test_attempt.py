"""`fuseplan try` as a user meets it."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fuseplan.cli import app
from fuseplan.planner.costs import CostTable
from fuseplan.record.bench import BatchTimes, Bench, PolicyTime
from fuseplan.record.paired import Paired
from fuseplan.report.bench import gain
from tests.lines import one_line

WORKLOAD = "tests.cli.tuned_workloads:pads"


@pytest.mark.usefixtures("by_code_at_night")  # tests/docs has it by code
def test_one_command_tunes_times_and_explains(tmp_path: Path) -> None:
    table, page = tmp_path / "costs.json", tmp_path / "try.html"
    result = CliRunner().invoke(
        app, ["try", WORKLOAD, "--batch", "4", "--repeats", "5", "--out", str(table), "--html", str(page)]
    )
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    took = r"; on cpu, batch 4: \S+ \S+ a step under the plan, \S+ \S+ under torch\.compile\.$"
    assert re.search(took, first), first
    assert re.match(
        "The plan fuses nothing|The plan gains nothing|Whether the plan gains anything is unclear|A step takes ", first
    )
    assert "costs are measured for cpu" in "\n".join(rest)
    assert len(CostTable.load(table, device="cpu").rows) == 2
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert re.search(r"\d of \d.*: tuning, ", result.stderr)
    assert f"the report is in {page}" in result.stderr


def test_what_can_not_be_written_is_found_before_anything_runs(tmp_path: Path) -> None:
    assert one_line(CliRunner().invoke(app, ["try", WORKLOAD, "--html", str(tmp_path / "nowhere" / "try.html")]))


FUSED = {"act_padding": 1}


@pytest.mark.parametrize(
    ("beside", "fused", "expected"),
    [
        ((-50_000, -60_000, -40_000), FUSED, "A step takes 5.0 % less time with the plan (-6.0 to -4.0 %)"),
        ((50_000, 40_000, 60_000), FUSED, "A step takes 5.0 % more time with the plan (+4.0 to +6.0 %)"),
        ((1_000, -2_000, 3_000), FUSED, "The plan gains nothing that could be measured here (-0.2 to +0.3 %)"),
        ((-50_000, -110_000, 10_000), FUSED,
         "Whether the plan gains anything is unclear (-11.0 to +1.0 %): about 16 repeats would settle it (--repeats"),
        ((-50_000, -60_000, 10_000), {}, "The plan fuses nothing, so both run the same code (-6.0 to +1.0 % is noise)"),
    ],
)  # fmt: skip
def test_the_verdict(beside: tuple[int, int, int], fused: dict[str, int], expected: str) -> None:
    middle, low, high = beside
    paired = Paired(difference_ns=middle, low_ns=low, high_ns=high, repeats=9)
    rows = (
        PolicyTime(policy="planned", step_ns=1_000_000 + middle, spread_ns=0, fused=fused, beside_plain=paired),
        PolicyTime(policy="torch.compile", step_ns=1_000_000, spread_ns=0),
    )
    bench = Bench(
        workload="w", tp=1, device="h200", torch="", triton="", date="", repeats=9,
        batches=(BatchTimes(batch=1, steps=1, policies=rows),),
    )  # fmt: skip
    shown, _, rest = gain(bench).partition("; on h200, batch 1: ")
    assert shown.startswith(expected)
    assert rest
