import io
from dataclasses import replace

import pytest
from rich.console import Console

from fuseplan.record import Pending, Reason, Refusal
from fuseplan.record.report import latest
from fuseplan.report import comparison_to_json, render_comparison, render_report
from tests.report.goldens import text_of
from tests.report.locked import graph, report
from tests.report.screens import everything, outcomes, screens
from tests.report.synthetic import PAD


def test_color_only_on_terminals() -> None:
    for color in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, width=80, force_terminal=color, color_system="standard" if color else None)
        console.print(render_comparison(everything()))
        assert ("\x1b[" in shown.getvalue()) == color


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_or_cut(width: int) -> None:
    for title, content, *_ in screens():
        text = text_of(content, width)
        assert max(map(len, text.splitlines())) <= width, title
        assert "…" not in text, title


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
    other = replace(
        left_out.graphs[0], refusals=tuple(replace(each, reason=reason) for each in left_out.graphs[0].refusals)
    )
    assert text_of(render_report(replace(left_out, graphs=(other,))), 80) == text_of(render_report(left_out), 80)
