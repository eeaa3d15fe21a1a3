"""`fuseplan diff`: the changes between two plans."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fuseplan.cli.console import Debug, Json, one_line_errors, show


def diff_plans(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A file that explain --save-plan wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another one.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the changes between two files of plans. Exit status 1 if there are any."""
    with one_line_errors(debug):
        from fuseplan.record import SavedPlans, diff
        from fuseplan.record.text import printable

        changes = diff(SavedPlans.load(first), SavedPlans.load(second))
        if as_json:
            show({"schema": 1, "changes": changes}, as_json=True)
        else:
            show(Text("\n".join(map(printable, changes)) or "the same fusions at the same places"), as_json=False)
        if changes:
            raise typer.Exit(1)
