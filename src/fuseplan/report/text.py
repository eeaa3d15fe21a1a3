"""Small things that every text about a report needs: counts, lists, indents, names of policies."""

import io
import shutil
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fuseplan.record import Reason, Refusal, Report

INDENT = 13

PIPED_WIDTH = 110
"""Columns of output that goes to no terminal, unless COLUMNS says otherwise."""

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Arguments of consoles: names of workloads, modules and files are shown as they are."""


def as_text(content: RenderableType) -> str:
    """The text of a renderable without colour: as wide as the terminal, or `PIPED_WIDTH` columns."""
    width, text = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns, io.StringIO()
    Console(file=text, width=width, **PLAIN).print(content)
    # Tables fill their lines up to their width.
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def policy_name(report: Report) -> str:
    """A policy as it is written on the command line."""
    return f"{report.policy}({', '.join(report.order)})" if report.order else report.policy


def warnings_of(report: Report) -> tuple[Refusal, ...]:
    """Flags without effect, selectors without a match, why graphs were left unfused, and regions that are counted once
    though they may run more often.
    """
    whole = [
        refusal
        for graph in report.graphs
        for refusal in graph.refusals
        if refusal.reason in (Reason.TRAINING, Reason.DISABLED, Reason.REPEATS) and refusal.nearness is None
    ]
    return tuple(dict.fromkeys((*report.warnings, *whole)))


def enumerate_names(parts: Sequence[str]) -> str:
    """`a, b and c`"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def tokens_of(span: tuple[int, int]) -> str:
    """`1-64`, or `8`"""
    first, last = span
    return str(first) if first == last else f"{first}-{last}"


def indented(content: str | Text, columns: int = INDENT) -> Padding:
    """A paragraph that stands under a title."""
    return Padding(content if isinstance(content, Text) else Text(content), (0, 0, 0, columns))


def entry(label: str, content: str | Text, style: str = "bold yellow") -> Table:
    """A paragraph with its title beside it; a string is shown as it is, without markup."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=INDENT - 1, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(label, style=style), content if isinstance(content, Text) else Text(content))
    return table
