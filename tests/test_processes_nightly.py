"""Processes that compile real code on one cache: broken entries, interrupts, kills, spawned children, many at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fuseplan.record import Report, from_json

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).parents[1]
COLD = {"difference": pytest.approx(0, abs=1e-5), "fused": 1, "from_cache": [False]}
WARM = {**COLD, "from_cache": [True]}


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.compile_once", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def assert_sound(cache: Path, process: subprocess.Popen[str] | None = None) -> None:
    """Whatever reports there are can be read, and a process, by itself a new one, fuses and computes what it should."""
    for path in (cache / "fuseplan" / "reports").glob("*"):
        if path.suffix == ".json":
            from_json(Report, json.loads(path.read_text()))
        else:
            assert path.name.startswith("."), path
    (found,) = result(process or start(cache))
    assert (found["difference"], found["fused"]) == (COLD["difference"], 1)


@pytest.mark.parametrize("part", ["fuseplan", "fxgraph", "aotautograd"])
def test_entries_of_caches_that_are_broken(part: str, tmp_path: Path) -> None:
    assert result(start(tmp_path)) == [COLD]
    spoiled = [path for path in tmp_path.glob(f"{part}/**/*") if path.is_file()]
    for path in spoiled:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (found,) = result(start(tmp_path))
    assert found["difference"] == COLD["difference"]
    assert found["fused"] in (0, 1)
    assert spoiled


def test_a_warm_cache_and_a_spawned_child(tmp_path: Path) -> None:
    assert result(start(tmp_path, "spawn")) == [COLD, WARM]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("delay_s", [0.1, 0.7, 1.5, 2.5, 4.0, 6.0])
def test_a_process_that_is_stopped_while_it_compiles(kind: signal.Signals, delay_s: float, tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    time.sleep(delay_s)
    process.send_signal(kind)
    _, error = process.communicate(timeout=120)
    if kind is signal.SIGINT and process.returncode != 0:
        assert "KeyboardInterrupt" in error
    assert_sound(tmp_path)


def test_several_processes_at_once(tmp_path: Path) -> None:
    for process in [start(tmp_path) for _ in range(4)]:
        assert_sound(tmp_path, process)
