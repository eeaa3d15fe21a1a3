"""The command line: parse, call the API, render."""

import io
import sys

import typer

from fuseplan.cli.bench import bench
from fuseplan.cli.check import check
from fuseplan.cli.explain import explain
from fuseplan.cli.listing import devices, providers, rules
from fuseplan.cli.plans import diff_plans
from fuseplan.cli.tune import tune
from fuseplan.cpython import uncollected

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which fusions fire in a torch.compile'd model, which starve, and why.",
)
app.command()(explain)
app.command()(tune)
app.command()(bench)
app.command()(check)
app.command()(rules)
app.command()(providers)
app.command()(devices)
app.command(name="diff")(diff_plans)


def main() -> None:
    """The console script. Exit status: 0; 1 when a check failed; 2 when the request can't be served."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A quoted line of a model can have anything, and a terminal or a pipe in CI may be ASCII.
            stream.reconfigure(errors="backslashreplace")
    # Nearly all that a command makes it keeps until its end: the collector would search millions of objects in vain.
    # It is collected as Python ends, and must be: a native module whose objects outlive it prints what has leaked.
    with uncollected():
        app()
