"""What people see of made-up records, as text: a file for each renderer.

python -m tests.report.goldens
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import TestCase

from rich.console import Console, RenderableType

from fuseplan.report import render_bench, render_verdict
from fuseplan.report.bench import gain
from fuseplan.report.expectation import unmet
from fuseplan.report.paragraphs import plain
from fuseplan.report.savings import verdict
from fuseplan.report.summary import alone, summary
from fuseplan.report.text import PLAIN
from fuseplan.report.trace import publish
from tests.report.drifting import cause_text, causes, drifting, expected, told, verdicts
from tests.report.screens import logged, outcomes, screens
from tests.report.timed import gains, tuned, unclear

DATA = Path(__file__).parent / "data"
Titled = Iterator[tuple[str, str]]


def text_of(content: RenderableType, width: int, starts: Sequence[str] = ()) -> str:
    """What a terminal without colours shows: all of it, or the paragraphs with a line that starts so."""
    shown = io.StringIO()
    Console(file=shown, width=width, **PLAIN).print(content)
    text = "\n".join(line.rstrip() for line in shown.getvalue().splitlines())
    parts = text.split("\n\n")
    return (
        "\n\n".join(part for part in parts if any(line.startswith((*starts,)) for line in part.splitlines()))
        if starts
        else text
    )


def terminal() -> Titled:
    """Comparisons and reports."""
    return ((title, text_of(content, width, starts)) for title, content, width, starts in screens())


def outcome() -> Titled:
    """The sentence above a report; and the line that a compilation logs, where it says it otherwise."""
    for title, each in outcomes():
        said, line = verdict(alone(each)).plain, summary(each)
        yield title, said if said.lower() == line.lower() else f"{said}\n{line}"


def drift() -> Titled:
    """What became of locks, and of expected counts."""
    yield from ((title, told(lock, now)) for title, lock, now in drifting())
    yield (
        "the cause, of what was at one place",
        "\n".join(f"{title:<40}{cause_text(lock, now)}" for title, lock, now in causes()),
    )
    yield from ((f"expected: {title}", plain(unmet(now, counts)) or "met") for title, now, counts in expected())
    yield from ((f"a lock: {title}", text_of(render_verdict(each), 80, starts)) for title, each, starts in verdicts())


def times() -> Titled:
    """Benchmarks, what is said of them, and what was tuned."""
    yield "a benchmark", text_of(render_bench(unclear()), 140)
    yield "what the plan gains", "\n".join(f"{title:<12}{gain(bench)}" for title, bench in gains())
    yield from ((title, text_of(content, width)) for title, content, width in tuned())


def logs() -> Titled:
    """What is logged of a compilation, at DEBUG."""
    for title, each in logged():
        with TestCase().assertLogs("fuseplan", logging.DEBUG) as seen:
            publish(each)
        yield title, "\n".join(f"{record.levelname:<6}{record.getMessage()}" for record in seen.records)


GOLDENS: dict[str, Callable[[], Titled]] = {
    "terminal": terminal, "outcome": outcome, "drift": drift, "times": times, "logs": logs,
}  # fmt: skip


def golden(name: str) -> str:
    """The content of a file: what is one line stands beside its title."""
    sections = ((title, text, "\n" if "\n" in text else " ") for title, text in GOLDENS[name]())
    return "".join(f"### {title}:{gap}{text}\n" for title, text, gap in sections)


if __name__ == "__main__":
    for name in GOLDENS:
        (DATA / f"{name}.txt").write_text(golden(name), encoding="utf-8")
