"""What people see: what was recorded (`python -m tests.report.goldens` records it anew), in colour on terminals alone
and no wider than they are; and the same as JSON.
"""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from fuseplan.record import Pending, Reason, Refusal
from fuseplan.record.report import latest
from fuseplan.report import comparison_to_json, render_comparison, render_report
from fuseplan.report.verdict import render_verdict, verdict_to_json
from tests.report.drifting import verdicts
from tests.report.goldens import DATA, GOLDENS, golden, text_of
from tests.report.locked import graph, report
from tests.report.screens import everything, outcomes, screens
from tests.report.synthetic import PAD


@pytest.mark.parametrize("name", GOLDENS)
def test_people_see_what_was_recorded(name: str) -> None:
    assert golden(name).splitlines() == (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def test_every_file_is_of_a_renderer() -> None:
    assert {path.stem for path in DATA.iterdir()} == set(GOLDENS)


def test_color_only_on_terminals() -> None:
    for color in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, width=80, force_terminal=color, color_system="standard" if color else None)
        console.print(render_comparison(everything()))
        assert ("\x1b[" in shown.getvalue()) == color


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_or_cut(width: int) -> None:
    all_verdicts = [(title, render_verdict(verdict)) for title, verdict, _ in verdicts()]
    for title, content in [*((title, content) for title, content, *_ in screens()), *all_verdicts]:
        text = text_of(content, width)
        assert max(map(len, text.splitlines())) <= width, title
        assert "…" not in text, title


def test_a_verdict_says_the_same_where_there_is_no_terminal() -> None:
    for title, verdict, _ in verdicts():
        if not verdict.resettled:
            assert verdict.text.split() == text_of(render_verdict(verdict), 80).split(), title


def test_verdicts_as_json() -> None:
    (_, broken, _), *_ = verdicts()
    data = verdict_to_json(broken)
    assert (data["schema"], data["passed"], data["written"], data["lock"]) == (1, False, False, "f.lock")
    assert data["locked"] == {"allreduce_rms_padding": 36}
    assert data["fused"] == {"allreduce_rms": 1, "allreduce_rms_padding": 30}
    assert data["per_range"] == [{"range": [1, 64], "fused": data["fused"]}]
    assert sorted(each["change"] for each in data["differences"]) == ["lost", "moved"]
    moved = next(each for each in data["differences"] if each["change"] == "moved")
    assert moved["cause"]["near_miss"]["rule"] == "allreduce_rms_padding"
    assert moved["where"] == [{"ranges": ["1:64"], "places": ["layers.7.norm"], "count": 1}]


def test_of_two_reports_on_a_graph_the_last_counts() -> None:
    pending = Pending(rule=PAD, op="fused", ops="", provider="flashinfer", signature="", group="0", cases=())
    settled, other = report(replace(graph(), digest="d")), report(graph())
    waiting = report(replace(graph(), digest="d", pending=(pending,)))
    assert latest([waiting, other, settled]) == [settled, other]


def test_near_misses_are_one_row_a_cause() -> None:
    refusals = [Refusal(reason=Reason.USERS, rule=PAD, op="norm", detail=f"read by add_{layer}") for layer in range(5)]
    (row,) = comparison_to_json(replace(everything(), reports=(report(graph(refusals=refusals)),)))["near_misses"]
    assert (row["rule"], row["reason"], row["op"], row["count"]) == (PAD, "users", "norm", 5)


@pytest.mark.parametrize("reason", [Reason.PACKAGE, Reason.LIMIT, Reason.COUPLED, Reason.UNPRICED])
def test_what_keeps_a_match_out_is_said_whatever_it_is(reason: Reason) -> None:
    left_out = dict(outcomes())["two are left out"]
    refusals = tuple(replace(each, reason=reason) for each in left_out.graphs[0].refusals)
    other = replace(left_out, graphs=(replace(left_out.graphs[0], refusals=refusals),))
    assert text_of(render_report(other), 80) == text_of(render_report(left_out), 80)
