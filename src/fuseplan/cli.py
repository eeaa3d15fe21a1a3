"""The command line: parse, call the API, render."""

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

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which fusions fire in a torch.compile'd model, which starve, and why.",
)

PIPED_WIDTH = 110
"""Columns of output that goes to no terminal, unless COLUMNS says otherwise."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """The console script. Exit status: 0; 1 when a check failed; 2 when the request can't be served."""
    app()


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except FuseplanError as error:
        if debug:
            traceback.print_exc()
        Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"fuseplan: {error}"))
        raise typer.Exit(2) from None


@contextmanager
def _progress(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error where that is a terminal; what comes out is not disturbed by it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(text) as status:
        yield status.update


@app.command()
def explain(
    workload: Annotated[
        str,
        typer.Argument(
            help="A built-in name, the path of a Hugging Face config.json, or package.module:factory (runs it)."
        ),
    ],
    tp: Annotated[int, typer.Option(help="Ranks of tensor parallelism.")] = 1,
    device: Annotated[str, typer.Option(help="A device profile, whose providers are taken as present.")] = "h200",
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="FIRST:LAST", help="A compile range in tokens; may be repeated."),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="off or ordered(RULE, ...); may be repeated. Default: off and every order that differs."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Another number of layers than the model's own.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what each policy would fuse in WORKLOAD. Needs no GPU, no weights and no network."""
    with _one_line_errors(debug):
        from fuseplan.compatibility import require_supported_torch

        require_supported_torch()
        from fuseplan import workloads
        from fuseplan.config import CompileRange, Policy, check_ranges
        from fuseplan.frontend import compare
        from fuseplan.providers import device_profile
        from fuseplan.report import comparison_to_json, render_comparison

        profile = device_profile(device)
        spans = check_ranges([CompileRange.parse(text) for text in ranges or ()]) or workloads.DEFAULT_RANGES
        chosen = [Policy.parse(text) for text in policies or ()]
        check_policies(chosen)
        with _progress(f"building {workload}") as update, workloads.build(workload, tp=tp, layers=layers) as built:
            update(f"tracing {workload}: Dynamo, AOTAutograd, Inductor's post-grad passes")
            comparison = compare(
                built.model, built.inputs, workload=workload, tp=tp, ranges=spans, device=profile, policies=chosen,
                build_ns=built.build_ns,
            )  # fmt: skip
        _show(comparison_to_json(comparison) if as_json else render_comparison(comparison), as_json)


@app.command()
def rules(
    name: Annotated[str | None, typer.Argument(help="One rule; default: all.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the fusions: what each matches and the op that takes its place."""
    with _one_line_errors(debug):
        from fuseplan.config import unknown
        from fuseplan.rules import BUILT_IN_RULES, by_name

        known = by_name(BUILT_IN_RULES)
        if name is not None and name not in known:
            raise unknown("rule", name, known)
        rows = [
            {"rule": rule, "flags": list(members[0].flags), "fusions": [member.describe() for member in members]}
            for rule, members in known.items()
            if name in (None, rule)
        ]
        if as_json:
            return _show({"schema": 1, "rules": rows}, as_json=True)
        table = _table("rule", "flag", "pattern  =>  fused op")
        for row in rows:
            for index, fusion in enumerate(row["fusions"]):
                table.add_row(*(("", "") if index else (str(row["rule"]), " and ".join(row["flags"]))), fusion)
        return _show(table, as_json=False)


@app.command()
def providers(as_json: Json = False, debug: Debug = False) -> None:
    """List who can run fused ops: available on this machine, or why not."""
    with _one_line_errors(debug):
        from fuseplan.providers import BUILT_IN_PROVIDERS

        rows: list[dict[str, Any]] = []
        for provider in sorted(BUILT_IN_PROVIDERS, key=lambda each: each.name):
            refusal = provider.unavailable()
            rows.append(
                {
                    "provider": provider.name,
                    "description": provider.description,
                    "available": refusal is None,
                    "why_not": refusal.detail if refusal else None,
                    "mend": refusal.mend if refusal else None,
                    "version": provider.version(),
                    "implements": sorted(provider.implements),
                }
            )
        if as_json:
            return _show({"schema": 1, "providers": rows}, as_json=True)
        table = _table("provider", "available", "fused ops", "")
        for row in rows:
            available = Text("yes", style="green") if row["available"] else Text("no", style="red")
            why = "; ".join(str(text) for text in (row["why_not"] or row["description"], row["mend"]) if text)
            table.add_row(str(row["provider"]), available, str(len(row["implements"])), why)
        return _show(table, as_json=False)


def check_policies(policies: list[Any]) -> None:
    """Refuses a policy with an unknown rule before anything is built.

    Raises:
        ConfigError: the text names the near spelling.
    """
    from fuseplan.config import PassConfig
    from fuseplan.rules import enabled_rules

    for policy in policies:
        enabled_rules(PassConfig(policy=policy))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show(content: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        piped = not sys.stdout.isatty()
        width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns if piped else None
        Console(file=sys.stdout, highlight=False, width=width).print(content)
