"""A report prints as `explain` shows it, and a first compilation says one line."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fuseplan.report import render_report
from fuseplan.report.summary import LOGGER, summary, tell, untold
from tests.forks import Forks, Request
from tests.report.goldens import text_of
from tests.report.screens import outcomes, planned

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
