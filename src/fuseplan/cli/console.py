"""Shared by all commands: options, one-line errors, progress, and where output goes."""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fuseplan.errors import FuseplanError, RanksError
from fuseplan.record.text import duration, printable

LINE_S = 5.0
"""Seconds between lines of progress."""

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Arguments of consoles: names of workloads, modules and files are shown as they are."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Ends a command with exit status 2 and one line for any error that a user can cause."""
    try:
        yield
    except FuseplanError as error:
        if debug:
            traceback.print_exc()
        if not (isinstance(error, RanksError) and error.reported):
            say(f"fuseplan: {error}")
        raise typer.Exit(2) from None


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Shows the current step and its duration so far, on standard error where that is a terminal; standard output isn't
    affected.
    """
    console = Console(stderr=True, **PLAIN)
    if not console.is_terminal:
        yield lambda text: None
        return
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    columns = (SpinnerColumn(spinner), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(text), total=None)
        # At once, since a stage may be over before the next look.
        yield lambda text: bar.update(task, description=printable(text), refresh=True)


@contextmanager
def measuring(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress of measuring on standard error, with the time left: a bar where that is a terminal, else a line
    now and then.

    Args:
        shown: whether progress is shown; of several ranks one shows it.

    Yields:
        `tell(what, done, total)`.
    """
    console = Console(stderr=True, **PLAIN)
    if not shown:
        yield lambda what, done, total: None
    elif not console.is_terminal:
        yield _Lines()
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(task, description=printable(what), completed=done, total=total)


class _Lines:
    """Prints a line when there is progress and some seconds have passed."""

    def __init__(self) -> None:
        self._start, self._last, self._shown = time.monotonic(), -math.inf, -1

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == self._shown or now - self._last < LINE_S:
            return
        self._last, self._shown = now, done
        left = f", about {duration((now - self._start) / done * (total - done))} left" if done else ""
        say(f"{done} of {total}{left}: {what}")


def say(text: str) -> None:
    """Prints one line on standard error, beside the command's own output."""
    Console(stderr=True, soft_wrap=True, **PLAIN).print(Text(printable(text)))


def table_of(*columns: str) -> Table:
    """An empty table in the house style."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show(content: Any, as_json: bool) -> None:
    """Prints JSON, or a renderable: as wide as the terminal is, and without colour where there is none."""
    if as_json:
        print(json.dumps(content, indent=1))
    elif sys.stdout.isatty():
        Console(**PLAIN).print(content)
    else:
        from fuseplan.report.text import as_text

        print(as_text(content))
