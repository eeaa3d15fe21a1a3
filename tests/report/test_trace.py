"""Reports among torch's own logs and trace artifacts, the line of a first compilation, and a report that is printed."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.report import render_report
from fuseplan.report.summary import LOGGER, summary, tell, untold
from tests.forks import Forks, Request
from tests.helpers import HIDDEN, llama, randn
from tests.report.goldens import text_of
from tests.report.screens import outcomes, planned

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
        (miss,), (applied,) = report["near_misses"], report["graphs"][0]["applied"]
        assert (miss["nearness"], miss["rule"]) == ("obstructed", "act_padding")
        assert miss["line"].startswith("test_trace.py:")
        assert (applied["rule"], applied["op"], applied["provider"]) == ("act_padding", "rms_norm_pad", "torch")
    assert report["graphs"][0]["from_cache"]


def test_levels_are_torchs_own(caplog: pytest.LogCaptureFixture) -> None:
    for level, told in ((logging.INFO, {logging.INFO}), (logging.DEBUG, {logging.INFO, logging.DEBUG})):
        caplog.clear()
        with caplog.at_level(level, "fuseplan"):
            run()
        assert {record.levelno for record in caplog.records if record.name == "fuseplan"} == told


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


PROGRAM = """
import logging
import torch
import fuseplan

CONFIGURE

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(64, eps=1e-6)

    def forward(self, x):
        return torch.nn.functional.pad(self.norm(x), (0, 64))

model = fuseplan.compile(Block().bfloat16(), config=fuseplan.PassConfig(policy="ordered(act_padding)"), dynamic=False)
with torch.inference_mode():
    for rows in (4, 8):
        model(torch.randn(rows, 64, dtype=torch.bfloat16))
"""


@pytest.mark.parametrize(
    ("configure", "lines"),
    [
        ("", 1),
        (f"logging.getLogger({LOGGER!r}).setLevel(logging.WARNING)", 0),
        ("logging.basicConfig(level=logging.INFO, format='theirs %(message)s')", 1),
    ],
    ids=["by default", "switched off", "by the user's handler"],
)
def test_the_first_compilation_says_one_line(configure: str, lines: int, forks: Forks, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.replace("CONFIGURE", configure), encoding="utf-8")
    (done,) = forks.outcomes(forks.start(Request(path=str(path))))
    assert done.status == 0, done.output
    own = [line for line in done.output.splitlines() if "fuseplan: ordered(act_padding): " in line]
    assert len(own) == lines, done.output
    assert all(line.startswith("theirs ") == ("theirs" in configure) for line in own)
    assert all("fused in 1 of 1 place" in line and "on_report=print" in line for line in own)


def test_where_many_are_compared_nothing_is_said() -> None:
    with untold():
        assert logging.getLogger(LOGGER).disabled
    assert not logging.getLogger(LOGGER).disabled


@pytest.mark.parametrize(("hint", "end"), [(True, " Full report: on_report=print"), (False, "")])
def test_the_line_may_say_where_all_of_it_is(hint: bool, end: str, caplog: pytest.LogCaptureFixture) -> None:
    (_, report), *_ = outcomes()
    with caplog.at_level(logging.INFO, LOGGER):
        tell(report, hint=hint)
    assert caplog.messages == [f"fuseplan: {summary(report)}{end}"]


def test_a_report_prints_as_explain_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert str(planned()).splitlines() == text_of(render_report(planned()), 110).splitlines()


def test_where_fusion_is_off_no_places_are_counted() -> None:
    report = planned()
    graphs = tuple(replace(graph, applied=(), lost=(), refusals=()) for graph in report.graphs)
    off = replace(report, policy="off", order=(), graphs=graphs)
    assert any(off.matched.values())
    assert summary(off) == "off fuses nothing: the policy leaves every match unfused."
