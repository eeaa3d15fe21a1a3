"""`fuseplan explain`: what each policy would fuse, and why."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fuseplan.cli.console import Debug, Json, one_line_errors, progress, say, show


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
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as a page, which needs no other file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what each policy would fuse in WORKLOAD. Needs no GPU, no weights and no network."""
    with one_line_errors(debug):
        from fuseplan.compatibility import require_supported_torch

        require_supported_torch()
        from fuseplan import workloads
        from fuseplan.comparison import compare
        from fuseplan.config import CompileRange, PassConfig, Policy, check_ranges
        from fuseplan.providers import device_profile
        from fuseplan.record import SavedPlans
        from fuseplan.report import check_html, comparison_to_json, render_comparison, save_html

        if html is not None:
            check_html(html)
        if save_plan is not None:
            SavedPlans.check_file(save_plan)
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
        with progress(f"building {workload}") as update, workloads.build(workload, tp=tp, layers=layers) as built:
            update(f"tracing {workload}: Dynamo, AOTAutograd, Inductor's post-grad passes")
            comparison = compare(
                built.model, built.inputs, workload=workload, tp=tp, ranges=spans, device=profile, policies=chosen,
                build_ns=built.build_ns, config=config, providers=allowed, evidence=html is not None,
            )  # fmt: skip
        if save_plan is not None:
            comparison.plans().save(save_plan)
        if html is not None:
            save_html(comparison, html)
            say(f"the report is in {html}")
        show(comparison_to_json(comparison) if as_json else render_comparison(comparison), as_json)


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
