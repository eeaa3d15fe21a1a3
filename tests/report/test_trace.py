"""Reports among torch's own logs and trace artifacts."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from tests.helpers import HIDDEN, llama, randn

W = torch.ones(HIDDEN, dtype=torch.bfloat16)
FORCED = fuseplan.PassConfig(force=["act_padding"])


def block(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = llama(x, None, w)[0]
    return F.pad(y, (0, 8)), F.pad(llama(y.sin(), None, w)[0].relu(), (0, 8))


def run(config: fuseplan.PassConfig = FORCED) -> None:
    torch._dynamo.reset()
    with torch.inference_mode():
        fuseplan.compile(block, config=config)(randn(5, HIDDEN), W)


@pytest.fixture
def artifacts() -> Iterator[list[tuple[str, Any]]]:
    """(name, content) of fuseplan's artifacts, as a trace handler of torch's gets them."""
    found: list[tuple[str, Any]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            artifact = getattr(record, "metadata", {}).get("artifact", {})
            if str(artifact.get("name", "")).startswith("fuseplan"):
                assert artifact["encoding"] == "json"
                found.append((artifact["name"], json.loads(record.payload)))  # type: ignore[attr-defined]

    logger, handler = logging.getLogger("torch.__trace"), Collect()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_report_and_plan_are_artifacts_cold_and_warm(artifacts: list[tuple[str, Any]]) -> None:
    for _ in range(2):
        artifacts.clear()
        run()
        assert [name for name, _ in artifacts] == ["fuseplan_plan", "fuseplan_report"]
        (_, plan), (_, report) = artifacts
        assert (len(plan["selected"]), plan["gap"]) == (1, 0.0)
        assert report["digests"] == [plan["digest"]]
        assert report["fused"]["act_padding"] == 1
        assert [miss["nearness"] for miss in report["near_misses"]] == ["obstructed"]
        assert report["graphs"][0]["applied"][0]["rule"] == "act_padding"
    assert report["graphs"][0]["from_cache"]


def test_levels_are_torchs_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fuseplan"):
        run()
    (headline,) = [record for record in caplog.records if record.name == "fuseplan"]
    assert headline.getMessage().startswith("graph_0: planned applies 1 act_padding; saves ")
    assert "near misses: 1" in headline.getMessage()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "fuseplan"):
        run()
    details = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert any("applied act_padding as rms_norm_pad by torch" in line for line in details)
    assert any("near miss (obstructed) of act_padding, 1 x" in line and "test_trace.py:" in line for line in details)


def test_a_graph_that_is_left_alone_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, x = fuseplan.compile(block), randn(5, HIDDEN).requires_grad_()
    with caplog.at_level(logging.INFO, "fuseplan"), pytest.warns(fuseplan.FuseplanWarning, match="backward"):
        model(x, W)
    assert any("left unfused: the graph has a backward" in record.getMessage() for record in caplog.records)


def test_torch_logs_knows_fuseplan_by_its_name() -> None:
    """torch imports the package to find its loggers while torch itself is only half there."""
    code = (
        "import torch, fuseplan\n"
        "from fuseplan.compilation.manager import PostGradPassManager\n"
        "from fuseplan.record import GraphReport, Report\n"
        "from fuseplan.report.trace import publish\n"
        "PostGradPassManager(fuseplan.PassConfig())\n"
        "publish(Report(policy='off', order=(), rules=(), graphs=(GraphReport(graph='graph_0'),)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "TORCH_LOGS": "+fuseplan"},
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "graph_0: off applies nothing" in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("I")
