"""`fuseplan explain`: what each policy would fuse, and why."""

from pathlib import Path
from typing import Annotated

import typer

from fuseplan.cli.console import Debug, Json, one_line_errors, say, show
from fuseplan.cli.own import Modules, find_own
from fuseplan.cli.request import (
    AllowRoundingChanges,
    Forbid,
    Force,
    Layers,
    ProviderNames,
    Ranges,
    Workload,
    compared,
    find_policies,
    find_providers,
    find_ranges,
    import_torch,
)
from fuseplan.cli.spelling import check_files, check_spelling


def explain(
    workload: Workload,
    tp: Annotated[int, typer.Option(metavar="N", help="Ranks of tensor parallelism, up to 65536.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A device profile, whose providers are assumed present. Default: this machine's GPU, or h200.",
        ),
    ] = None,
    ranges: Ranges = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="planned, off or ordered(RULE, ...); may be repeated. Default: planned, off, orders that differ.",
        ),
    ] = None,
    layers: Layers = None,
    force: Force = None,
    forbid: Forbid = None,
    provider: ProviderNames = None,
    modules: Modules = None,
    costs: Annotated[Path | None, typer.Option(metavar="FILE", help="A cost table, in place of the model.")] = None,
    allow_rounding_changes: AllowRoundingChanges = False,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Replay saved plans.")] = None,
    save_plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plans to a file.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as a page, which needs no other file.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show conflicts, declined matches and where the time went.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what each policy would fuse in WORKLOAD. Needs no GPU, no weights and no network."""
    with one_line_errors(debug):
        check_spelling(
            workload, device=device, policies=policies, providers=provider,
            selectors=[*(force or ()), *(forbid or ())], ranges=ranges, own=bool(modules),
        )  # fmt: skip
        check_files(costs=costs, plan=plan)
        import_torch()
        from fuseplan.config import PassConfig
        from fuseplan.devices import default_profile, device_profile
        from fuseplan.record import SavedPlans
        from fuseplan.report import check_html, comparison_to_json, render_comparison, save_html
        from fuseplan.rules.families import BUILT_IN_RULES

        if html is not None:
            check_html(html)
        if save_plan is not None:
            SavedPlans.check_file(save_plan)
        profile = device_profile(device) if device is not None else default_profile()
        spans = find_ranges(ranges)
        own = find_own(modules)
        chosen = find_policies(policies, own.rules)
        config = PassConfig(
            force=tuple(force or ()),
            forbid=tuple(forbid or ()),
            cost_table=costs,
            plan=plan,
            allow_rounding_changes=allow_rounding_changes,
        )
        comparison = compared(
            workload, tp=tp, layers=layers, ranges=spans, device=profile, policies=chosen, config=config,
            providers=find_providers(provider, own.providers), rules=(*BUILT_IN_RULES, *own.rules),
            evidence=html is not None,
        )  # fmt: skip
        if save_plan is not None:
            comparison.plans().save(save_plan)
        if html is not None:
            save_html(comparison, html)
            say(f"the report is in {html}")
        show(comparison_to_json(comparison) if as_json else render_comparison(comparison, verbose=verbose), as_json)
