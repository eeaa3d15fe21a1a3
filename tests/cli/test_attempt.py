"""`fuseplan try` as a user meets it."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fuseplan.cli import app
from fuseplan.planner.costs import CostTable
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
