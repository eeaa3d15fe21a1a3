"""The command line: parse, call the API, render."""

import importlib.metadata
import io
import re
import sys
from typing import Annotated, Any

import typer
import typer.core

from fuseplan import __version__
from fuseplan.cli.attempt import attempt
from fuseplan.cli.bench import bench
from fuseplan.cli.check import check
from fuseplan.cli.explain import explain
from fuseplan.cli.listing import devices, providers, rules
from fuseplan.cli.plans import diff_plans
from fuseplan.cli.tune import tune
from fuseplan.cpython import uncollected

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fuse kernels in models under torch.compile: see what fuses and why, measure the gain.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"fuseplan {__version__}, torch {importlib.metadata.version('torch')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions, and exit.")
    ] = False,
) -> None:
    pass


class _Command(typer.core.TyperCommand):
    """Arguments in help as in the texts: `WORKLOAD`, where typer has `{WORKLOAD}` and `WORKLOAD <str>`."""

    def get_usage(self, ctx: Any) -> str:
        return re.sub(r"\{([A-Z]+)\}", r"\1", super().get_usage(ctx))

    def get_help(self, ctx: Any) -> str:
        text = re.sub(r"\{([A-Z]+)\}", r"\1", super().get_help(ctx))
        return re.sub(r"^(  [A-Z]+ )(<\w+>)", lambda found: found[1] + " " * len(found[2]), text, flags=re.MULTILINE)


app.command(cls=_Command, short_help="Show what would be fused in a model, and the saving.")(explain)
app.command(name="try", cls=_Command, short_help="Measure on this machine how much faster a model gets.")(attempt)
app.command(cls=_Command, short_help="Time a model's fusions, so that plans rest on measurements.")(tune)
app.command(cls=_Command, short_help="Time steps of a model with and without fuseplan.")(bench)
app.command(cls=_Command, short_help="Fail where a model's fusions differ from a lock file.")(check)
app.command(cls=_Command, short_help="List the fusions.")(rules)
app.command(cls=_Command, short_help="List the kernel libraries, and which are installed here.")(providers)
app.command(cls=_Command, short_help="List the devices with known prices.")(devices)
app.command(name="diff", cls=_Command, short_help="Show the changes between two files of plans.")(diff_plans)


def main() -> None:
    """The console script. Exit status: 0; 1 when a check failed; 2 when the request can't be served."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A quoted line of a model can have anything, and a terminal or a pipe in CI may be ASCII.
            stream.reconfigure(errors="backslashreplace")
    # A command keeps nearly all its objects until its end: the collector would search millions of them in vain. They
    # are collected as Python ends, and must be: a native module whose objects outlive it prints leaks.
    with uncollected():
        app()
