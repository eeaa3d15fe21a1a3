"""The command line: parse, call the API, render."""

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
            "--policy",
            help="planned, off or ordered(RULE, ...); may be repeated. Default: planned, off, orders that differ.",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Another number of layers than the model's own.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="SELECTOR", help="What the plan must apply: RULE[@PLACE | #SITE][:PROVIDER]; repeatable."),
    ] = None,
    forbid: Annotated[
        list[str] | None, typer.Option(metavar="SELECTOR", help="What the plan must not apply; may be repeated.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Who may run fused ops; may be repeated. Default: all.")
    ] = None,
    costs: Annotated[Path | None, typer.Option(metavar="FILE", help="A cost table, in place of the model.")] = None,
    allow_rounding_changes: Annotated[
        bool, typer.Option("--allow-rounding-changes", help="Let kernels round at other points than the graph.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Replay saved plans.")] = None,
    save_plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plans to a file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what each policy would fuse in WORKLOAD. Needs no GPU, no weights and no network."""
    with _one_line_errors(debug):
        from fuseplan.compatibility import require_supported_torch

        require_supported_torch()
        from fuseplan import workloads
        from fuseplan.config import CompileRange, PassConfig, Policy, check_ranges
        from fuseplan.frontend import compare
        from fuseplan.providers import device_profile
        from fuseplan.report import comparison_to_json, render_comparison

        profile = device_profile(device)
        spans = check_ranges([CompileRange.parse(text) for text in ranges or ()]) or workloads.DEFAULT_RANGES
        chosen = [Policy.parse(text) for text in policies or ()]
        check_policies(chosen)
        config = PassConfig(
            force=tuple(force or ()),
            forbid=tuple(forbid or ()),
            cost_table=costs,
            plan=plan,
            allow_rounding_changes=allow_rounding_changes,
        )
        allowed = find_providers(provider)
        check_manager(config, profile)
        with _progress(f"building {workload}") as update, workloads.build(workload, tp=tp, layers=layers) as built:
            update(f"tracing {workload}: Dynamo, AOTAutograd, Inductor's post-grad passes")
            comparison = compare(
                built.model, built.inputs, workload=workload, tp=tp, ranges=spans, device=profile, policies=chosen,
                build_ns=built.build_ns, config=config, providers=allowed,
            )  # fmt: skip
        if save_plan is not None:
            comparison.plans().save(save_plan)
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


@app.command()
def devices(as_json: Json = False, debug: Debug = False) -> None:
    """List the device profiles, and the constants of their cost model with their sources."""
    with _one_line_errors(debug):
        from fuseplan.planner.costs import HARDWARE
        from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, local_profile

        local = local_profile().name
        rows: list[dict[str, Any]] = [
            {
                "device": name,
                "description": profile.description,
                "here": name == local,
                "providers": sorted(p.name for p in BUILT_IN_PROVIDERS if p.unavailable(profile) is None),
                "constants": [
                    {"name": each, "value": constant.value, "unit": constant.unit, "source": constant.source}
                    for each, constant in HARDWARE[name].constants()
                ],
            }
            for name, profile in PROFILES.items()
        ]
        if as_json:
            return _show({"schema": 1, "devices": rows}, as_json=True)
        table = _table("device", "", "here", "providers", "launch", "memory", "measured constants")
        for row in rows:
            constants = {each["name"]: each for each in row["constants"]}
            table.add_row(
                row["device"],
                row["description"],
                Text("yes", style="green") if row["here"] else "",
                ", ".join(row["providers"]),
                f"{constants['launch']['value'] / 1000:.1f} us",
                f"{constants['memory_bandwidth']['value']:.0f} GB/s",
                _measured(row["constants"]),
            )
        _show(table, as_json=False)
        return _show(Text("--json prints every constant with its source", style="dim"), as_json=False)


def _measured(constants: list[dict[str, Any]]) -> str:
    derived = ("H200's", "MI355X's", "AITER's", "datasheet", "nominal", "not measured")
    known = [each for each in constants if not any(mark in each["source"] for mark in derived)]
    return f"{len(known)} of {len(constants)}"


@app.command(name="diff")
def diff_plans(
    first: Annotated[Path, typer.Argument(help="A file that explain --save-plan wrote.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what changed between two files of plans. Exit status 1 where anything did."""
    with _one_line_errors(debug):
        from fuseplan.record import SavedPlans, diff

        changes = diff(SavedPlans.load(first), SavedPlans.load(second))
        if as_json:
            _show({"schema": 1, "changes": changes}, as_json=True)
        else:
            _show(Text("\n".join(changes) or "the same fusions at the same places"), as_json=False)
        if changes:
            raise typer.Exit(1)


def find_providers(names: list[str] | None) -> Any:
    """The providers of those names, or all.

    Raises:
        ConfigError: there is no such provider.
    """
    from fuseplan.config import unknown
    from fuseplan.providers import BUILT_IN_PROVIDERS

    known = {provider.name: provider for provider in BUILT_IN_PROVIDERS}
    for name in names or ():
        if name not in known:
            raise unknown("provider", name, known)
    return tuple(known[name] for name in dict.fromkeys(names)) if names else BUILT_IN_PROVIDERS


def check_manager(config: Any, device: Any) -> None:
    """Refuses broken tables, plans and selectors before anything is built.

    Raises:
        FuseplanError: the text says which.
    """
    from fuseplan.manager import PostGradPassManager

    PostGradPassManager(config, device=device)


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
