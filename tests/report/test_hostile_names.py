"""A module, file or op of any name: what is shown of it moves no cursor, colours nothing, makes no line of its own."""

import dataclasses
import io
import logging
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from fuseplan.cli import app
from fuseplan.cli.console import say
from fuseplan.record import Comparison, SavedPlans
from fuseplan.report import render_comparison, render_report, render_verdict
from fuseplan.report.drift import drifts
from fuseplan.report.trace import publish
from fuseplan.report.verdict import Verdict
from tests.report.locked import applied, graph, lock_of, refusal, report
from tests.report.synthetic import Synthetic

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\na.lock holds\u202e\u2028\udce4"
WRITTEN = r"\x1b[2J\x1b]0;title\x07\x9b31m\r\na.lock holds\u202e\u2028\udce4"


def named() -> Comparison:
    return Synthetic(name=lambda name: name + HOSTILE, obstructed=(1,)).comparison()


def shown(renderable: RenderableType) -> str:
    output = io.StringIO()
    Console(file=output, width=1000, emoji=False, highlight=False).print(renderable)
    return output.getvalue()


def assert_printable(text: str) -> None:
    assert WRITTEN in text
    assert [line for line in text.split("\n") if not line.isprintable()] == []


def test_terminals_show_what_models_are_named() -> None:
    comparison = named()
    assert_printable(shown(render_comparison(comparison)))
    assert_printable(shown(render_report(comparison.reports[0], f"model{HOSTILE}")))
    broken = dataclasses.replace(comparison, breaks=(HOSTILE,))
    assert shown(render_comparison(broken)).count("\n") == shown(render_comparison(comparison)).count("\n") + 1


def test_logs_show_what_models_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fuseplan"):
        for each in named().reports:
            publish(each)
    assert len(caplog.messages) > len(named().reports)
    assert_printable("\n".join(caplog.messages))


def test_verdicts_show_what_locks_and_models_are_named() -> None:
    lock = lock_of(*applied(f"act_padding{HOSTILE}".replace(" ", "_"), [f"layers.0{HOSTILE}", "norm"]))
    model = report(graph(refusals=[refusal(None, f"layers.0{HOSTILE}", f"clone{HOSTILE}")]))
    found = drifts(lock, model)
    verdict = Verdict(
        path=f"a{HOSTILE}", lock=lock, found=lock, drifts=found, breaks=(HOSTILE,), resettled={"tp": (HOSTILE, "2")}
    )
    assert found
    assert_printable(verdict.text)
    assert_printable(shown(render_verdict(verdict)))


def test_differences_of_plans_show_what_the_files_say(tmp_path: Path) -> None:
    before = SavedPlans(workload="w", tp=1, plans=())
    before.save(tmp_path / "before.json")
    dataclasses.replace(before, workload=f"w{HOSTILE}").save(tmp_path / "after.json")
    result = CliRunner().invoke(app, ["diff", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    assert result.exit_code == 1
    assert_printable(result.stdout)


def test_errors_show_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"fuseplan: {HOSTILE}")
    assert capsys.readouterr().err == f"fuseplan: {WRITTEN}\n"
