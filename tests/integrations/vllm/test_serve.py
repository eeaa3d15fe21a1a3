"""`vllm serve` with fuseplan: it answers, and says where its report is."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuseplan.record import Report
from fuseplan.record.serialization import from_json
from tests.integrations.vllm.checkpoints import HIDDEN, LAYERS
from tests.integrations.vllm.conftest import ASKED, environment

START_S = 300.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def complete(port: int, model: str) -> Any:
    """A completion as OpenAI's clients ask for it."""
    body = {"model": model, "prompt": "w5 w9 w13", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    """Until it is healthy."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise AssertionError("vllm serve isn't healthy")


def test_a_server_answers_and_names_its_report(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    port, model, log = free_port(), str(checkpoint("llama")), tmp_path / "log"
    reports = tmp_path / "reports"
    # What `vllm serve` runs: the CPU build has no such command, since its package has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "bfloat16"]
    command += ["--port", str(port), "--max-model-len", "128", "--max-num-seqs", "4", "--host", "127.0.0.1"]
    variables = environment(tmp_path / "cache", FUSEPLAN_REPORT_DIR=str(reports), **ASKED)
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(port, server)
            answer = complete(port, model)
        except AssertionError as error:
            raise AssertionError(log.read_text()[-6000:]) from error
        finally:
            server.terminate()
            server.wait(60)
    (choice,) = answer["choices"]
    assert len(choice["text"].split()) == 6
    (path,) = re.findall(r"fuseplan on rank 0: .*; report: (\S+)", log.read_text())
    assert Path(path) == reports / "rank_0_0.json"
    report = from_json(Report, json.loads(Path(path).read_text()))
    assert report.recognized[f"fused_add_rms_norm[{HIDDEN}]"] == 2 * LAYERS
