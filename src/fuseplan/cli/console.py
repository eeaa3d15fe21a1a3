"""What every command shares: options, one-line errors, progress, and where output goes."""

import io
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuseplan.errors import FuseplanError
from fuseplan.record.text import printable

PIPED_WIDTH = 110
"""Columns of output that goes to no terminal, unless COLUMNS says otherwise."""

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Of consoles: names of workloads, modules and files are shown as they are."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Ends a command with exit status 2 and one line for whatever a user can cause."""
    try:
        yield
    except FuseplanError as error:
        if debug:
            traceback.print_exc()
        say(f"fuseplan: {error}")
        raise typer.Exit(2) from None


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error where that is a terminal; what comes out is not disturbed by it."""
    console = Console(stderr=True, **PLAIN)
    if not console.is_terminal:
        yield lambda text: None
        return
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    with console.status(Text(printable(text)), spinner=spinner) as status:
        yield lambda text: status.update(Text(printable(text)))


def say(text: str) -> None:
    """One line on standard error, beside what was asked for."""
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
        width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns
        text = io.StringIO()
        Console(file=text, width=width, **PLAIN).print(content)
        # Tables fill their lines up to their width.
        print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
