"""`fuseplan tune` as a user meets it, alone and under torchrun."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from fuseplan.cli import app, console
from fuseplan.cli.console import measuring
from fuseplan.devices import PROFILES
from fuseplan.devices.hardware import Error
from fuseplan.planner.costs import CostTable, DeviceRecord, Measured, cached_path, record_path
from fuseplan.record.text import duration
from tests.forks import Forks, Request
from tests.lines import one_line
from tests.ranks import variables_of_ranks

WORKLOADS = "tests.cli.tuned_workloads"
PADS = f"{WORKLOADS}:pads"
SITE = "add -> rms_norm -> pad 64:80 64 bfloat16 gpt_oss"
FUSED = "act_padding fused_add_rms_norm_pad torch"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_rows_go_to_the_table_and_to_a_person(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    result = run(PADS, "--tokens", "4", "--repeats", "5", "--out", str(path))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{SITE}, 1 in the model"
    assert lines[1].split() == ["us", "(spread),", "at", "tokens", "4"]
    assert [line.split("  ")[0] for line in lines[2:4]] == ["unfused", FUSED]
    assert lines[-1] == f"2 rows in {path}"
    assert f"0 of 2: verifying: {SITE}" in result.stderr
    assert {row.key for row in CostTable.load(path, device="cpu").rows} == {f"{SITE}: unfused", f"{SITE}: {FUSED}"}


def test_json_and_the_default_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = cached_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text("{")  # a broken default is replaced
    result = run(PADS, "--range", "4", "--repeats", "5", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {name: data[name] for name in ("schema", "tp", "device", "table", "skipped", "stopped")} == {
        "schema": 1, "tp": 1, "device": "cpu", "table": str(path), "skipped": [], "stopped": False,
    }  # fmt: skip
    assert [(row["tokens"], row["provenance"], row["topology"]) for row in data["rows"]] == [(4, "measured", "tp1")] * 2
    assert len(CostTable.load(path, device="cpu").rows) == 2
    explained = CliRunner().invoke(app, ["explain", PADS, "--device", "cpu", "--range", "4"])
    assert "costs are measured for cpu" in explained.stdout


def test_a_workload_without_fusions_says_so(tmp_path: Path) -> None:
    result = run(f"{WORKLOADS}:plain", "--out", str(tmp_path / "costs.json"))
    assert result.exit_code == 0
    assert result.stdout == "nothing was measured: no fusion matches that can be run\n"


@pytest.mark.parametrize(
    ("arguments", "ranks", "text"),
    [
        ([PADS, "--tp", "2"], "", "tp=2 takes as many processes: torchrun --nproc-per-node 2 -m fuseplan tune ..."),
        ([PADS, "--tp", "0"], "", "tp=0: give a number of ranks of at least 1, or leave it out"),
        ([PADS, "--tp", "4"], "2", "tp=4, but torchrun started 2 ranks; leave --tp out, or start as many"),
        ([PADS], "two", "WORLD_SIZE='two': allowed are numbers, as torchrun sets them"),
        ([PADS, "--deadline", "0"], "", "deadline=0: allowed are seconds, more than 0 and finite"),
        ([PADS, "--repeats", "4"], "", "repeats=4: a median and its spread need at least 5"),
        ([PADS, "--range", "1:8", "--tokens", "9"], "", "tokens=9 lie in none of the ranges 1:8; add one that has"),
        ([PADS, "--range", "8:1"], "", "compile range 8:1 is empty; write 1:8?"),
        ([PADS, "--provider", "tritn"], "", "unknown provider 'tritn'; did you mean 'triton'?"),
        ([], "", "give a WORKLOAD whose fusions are measured, or --device-only"),
        (["--device-only"], "", "measures a GPU, and torch sees none on this machine: run it where one is"),
        (["--device-only", PADS, "--tokens", "4"], "", "GPU of this machine alone; leave WORKLOAD and --tokens"),
        (["--device-only", "--repeats", "4"], "", "repeats=4: a median and its spread need at least 5"),
        (["--device-only", "--only-unsure"], "", "leave --only-unsure out"),
    ],
)
def test_what_can_not_be_served_is_one_line(
    arguments: list[str], ranks: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    out = ["--out", str(tmp_path / "costs.json")] if PADS in arguments[:1] else []
    assert text in one_line(run(*arguments, *out))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", '{"schema": 1, "device": "h200", "rows": []}'])
def test_a_broken_table_that_is_named_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    assert one_line(run(PADS, "--out", str(path)))
    assert path.read_text() == content


INTERRUPTED = """
import io, os, signal, sys, threading
from fuseplan.cli import main

class Watched(io.TextIOWrapper):
    def write(self, text):
        if "0 of 18: verifying" in text:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return super().write(text)

sys.stderr = Watched(sys.stderr.buffer, line_buffering=True)
main()
"""


def test_ctrl_c_leaves_a_whole_table(tmp_path: Path, forks: Forks) -> None:
    path, program = tmp_path / "costs.json", tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    arguments = ("tune", PADS, "--repeats", "100000", "--out", str(path))
    (done,) = forks.outcomes(forks.start(Request(path=str(program), processes=[(arguments, {})])))
    assert done.status == 130, done.output
    # Libraries may tell of leaks at exit.
    lines = [line for line in done.output.splitlines() if line.startswith("interrupted")]
    assert lines == [f"interrupted; 0 rows are in {path}; the unfinished measurement is lost"]
    assert CostTable.load(path, device="cpu").rows == ()


@pytest.mark.distributed
def test_ranks_measure_in_lock_step_and_one_writes(tmp_path: Path, forks: Forks) -> None:
    path = tmp_path / "costs.json"
    arguments = ("tune", f"{WORKLOADS}:reduces", "--tokens", "4", "--repeats", "5", "--out", str(path), "--json")
    request = Request(module="fuseplan", processes=[(arguments, each) for each in variables_of_ranks(2)])
    first, second = forks.outcomes(forks.start(request))
    assert (first.status, second.status) == (0, 0), first.output + second.output
    data: dict[str, Any] = json.loads("{" + first.output.partition("{")[2])
    assert data["tp"] == 2
    site = f"all_reduce[2] -> {SITE}"
    names = {
        "unfused", FUSED, "allreduce_rms all_reduce_fused_add_rms_norm torch",
        "allreduce_rms_padding all_reduce_fused_add_rms_norm_pad torch",
    }  # fmt: skip
    assert {row["key"] for row in data["rows"]} == {f"{site}: {name}" for name in names}
    assert {row["topology"] for row in data["rows"]} == {"tp2 gloo"}
    assert len(CostTable.load(path, device="cpu").rows) == 4


@pytest.mark.nightly
@pytest.mark.distributed
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fuseplan", "tune"]
    command += [f"{WORKLOADS}:fails_on_rank_1", "--tokens", "4", "--out", str(tmp_path / "costs.json")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **own}, timeout=180
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("fuseplan: ")]
    assert lines == [f"fuseplan: {WORKLOADS}:fails_on_rank_1: the factory failed: ValueError: not on this one"]


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.0)
    with measuring(shown=True) as tell:
        tell("one", 0, 4)
        tell("still one", 0, 4)
        tell("two", 2, 4)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0 of 4: one"
    assert second.startswith("2 of 4, about 0 s left: two")
    screen = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda **options: Console(file=screen, force_terminal=True, width=80))
    with measuring(shown=True) as tell:
        tell("[bold]this", 1, 4)
    assert "[bold]this" in screen.getvalue()
    assert "1/4" in screen.getvalue()
    with measuring(shown=False) as tell:
        tell("nothing", 1, 4)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.6, "90 s"), (100, "2 min"), (3600, "1 h 0 min"), (5000, "1 h 23 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_was_measured_of_the_device_is_kept_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = (Measured(name="launch", value=2100.0, unit="ns", spread=40.0),)
    record = DeviceRecord(
        device="nvidia-rtx-a6000", reported="NVIDIA RTX A6000", torch="2.13.0", date="2026-11-28", command="x",
        constants=constants,
    )  # fmt: skip
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fuseplan.measurement.tuning.measure_device", lambda **options: record)
    result = run("--device-only")
    assert result.exit_code == 0, result.output
    assert ["launch", "2,100", "40", "ns"] in [line.split() for line in result.stdout.splitlines()]
    path = record_path("nvidia-rtx-a6000")
    assert f"kept in {path}" in result.stdout
    assert DeviceRecord.load(path, "nvidia-rtx-a6000") == record
    data = json.loads(run("--device-only", "--json").stdout)
    assert (data["path"], data["device"]) == (str(path), "nvidia-rtx-a6000")


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which the reference may take next to no time, or so the model says."""
    profile = PROFILES["cpu"]
    assert profile.hardware is not None
    errors = {f"eager, {part}": Error(less=0.9, more=0.1) for part in ("fixed", "moved")}
    hardware = replace(profile.hardware, errors=errors)
    monkeypatch.setitem(PROFILES, "cpu", replace(profile, hardware=hardware))


@pytest.mark.usefixtures("doubtful")
def test_what_could_change_the_plan_is_told_and_measured_once(tmp_path: Path) -> None:
    def explained(*arguments: str) -> list[str]:
        shown = CliRunner().invoke(app, ["explain", PADS, "--device", "cpu", "--range", "4", *arguments]).stdout
        return [line for line in shown.splitlines() if "--only-unsure" in line]

    path = tmp_path / "costs.json"
    asked = (PADS, "--range", "4", "--only-unsure", "--out", str(path))
    note = "note  measuring could change the plan in 1 place: fuseplan tune --only-unsure, about 8 s"
    assert explained() == [note]
    result = run(*asked, "--repeats", "5")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == "2 alternatives of 1 class of places decide; measuring them takes about 8 s"
    assert lines[1] == f"{SITE} at 4 tokens: unfused, {FUSED}"
    assert result.stdout.splitlines()[-1] == f"2 rows in {path}"
    again = run(*asked)
    assert (again.exit_code, again.stdout) == (0, "nothing is unsure: no measurement could change the plan\n")
    assert explained("--costs", str(path)) == []


def test_nothing_is_measured_where_nothing_is_unsure(tmp_path: Path) -> None:
    result = run(PADS, "--only-unsure", "--out", str(tmp_path / "costs.json"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "nothing is unsure: no measurement could change the plan\n"
