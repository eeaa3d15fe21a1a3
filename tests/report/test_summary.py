"""A report prints as `explain` shows it, and a first compilation says one line."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fuseplan
from fuseplan.record import GraphReport, Reason, Refusal, Report
from fuseplan.report.summary import LOGGER, summary, tell, untold
from tests.forks import Forks, Request

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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2880, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.norm(x), (0, 192))


def test_a_report_prints_as_explain_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    report = fuseplan.explain(Block().bfloat16(), torch.randn(16, 2880, dtype=torch.bfloat16), device="h200")
    print(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("The plan saves 2.0 us a step (1.0 to 2.8): ")
    assert "policy padding us ops step planned 1 of 1 2.0 " in shown
    assert "GraphReport(" not in shown


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


def test_a_graph_that_was_left_alone_says_why() -> None:
    refusal = Refusal(reason=Reason.DISABLED, detail="FUSEPLAN=0 switches every fusion off")
    graph = GraphReport(graph="graph_0", refusals=(refusal,))
    report = Report(policy="planned", order=(), rules=(), graphs=(graph,))
    assert summary(report) == "nothing is fused: FUSEPLAN=0 switches every fusion off."


def test_where_many_are_compared_nothing_is_said() -> None:
    with untold():
        assert logging.getLogger(LOGGER).disabled
    assert not logging.getLogger(LOGGER).disabled


def said(report: Report, *, hint: bool, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.INFO, LOGGER):
        tell(report, hint=hint)
    return caplog.messages[-1]


def test_the_line_says_where_what_is_saved_and_of_what(caplog: pytest.LogCaptureFixture) -> None:
    report = fuseplan.explain(Block().bfloat16(), torch.randn(16, 2880, dtype=torch.bfloat16), device="h200")
    unfused_us = sum(graph.unfused_ns for graph in report.graphs) / 1000
    assert said(report, hint=True, caplog=caplog) == (
        f"fuseplan: fused in 1 of 1 place. Estimated saving: 2.0 us a step (1.0 to 2.8), "
        f"{100 * report.saved_us / unfused_us:.0f} % of the {unfused_us:.1f} us of norm and pad. "
        "Full report: on_report=print"
    )
    assert said(report, hint=False, caplog=caplog).endswith("of norm and pad.")


def test_the_line_says_why_nothing_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    report = fuseplan.explain(Block().bfloat16(), torch.randn(16, 2880, dtype=torch.bfloat16), device="cpu")
    assert not report.graphs[0].applied
    assert said(report, hint=False, caplog=caplog) == (
        "fuseplan: the plan fuses nothing: 1 place matches, but fusing it costs more than it saves."
    )
    nothing = fuseplan.explain(nn.Linear(64, 64), torch.randn(4, 64), device="cpu")
    assert said(nothing, hint=False, caplog=caplog) == "fuseplan: nothing to fuse: no rule matches anywhere."
