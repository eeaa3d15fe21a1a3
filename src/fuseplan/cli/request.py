"""Shared by commands on a workload: their options, and the way from those to a comparison."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fuseplan.cli.console import progress

_WORKLOAD = typer.Argument(
    metavar="WORKLOAD",
    help="A built-in name, the path of a Hugging Face config.json, or package.module:factory (runs it).",
)
Workload = Annotated[str, _WORKLOAD]
AnyWorkload = Annotated[str | None, _WORKLOAD]
Ranges = Annotated[
    list[str] | None,
    typer.Option("--range", metavar="FIRST:LAST", help="A compile range in tokens; may be repeated."),
]
Layers = Annotated[int | None, typer.Option(metavar="N", help="Another number of layers than the model's own.")]
Force = Annotated[
    list[str] | None,
    typer.Option(metavar="SELECTOR", help="A fusion to apply: RULE[@PLACE | #SITE][:PROVIDER]; repeatable."),
]
Forbid = Annotated[list[str] | None, typer.Option(metavar="SELECTOR", help="A fusion not to apply; repeatable.")]
ProviderNames = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A provider that may run fused ops; repeatable. Default: all.")
]
AllowRoundingChanges = Annotated[
    bool, typer.Option("--allow-rounding-changes", help="Let kernels round at other points than the graph.")
]


def import_torch() -> None:
    """Imports torch, which takes seconds, and checks that it is supported.

    Raises:
        CompatibilityError: it is too old, or private interfaces of it have moved.
    """
    from fuseplan.config import Launch

    with progress("importing torch") if Launch.read().rank == 0 else contextlib.nullcontext():
        from fuseplan.compatibility import require_supported_torch

        require_supported_torch(everything=True)


def compared(
    workload: str,
    *,
    tp: int,
    layers: int | None,
    ranges: Sequence[Any],
    device: Any,
    policies: Sequence[Any],
    config: Any,
    providers: Sequence[Any],
    rules: Sequence[Any] | None = None,
    evidence: bool = False,
) -> Any:
    """Builds a workload and compares policies on it, with progress on a terminal. Output of the user's code goes to
    standard error, so that standard output only has the command's own.

    The arguments are as for `comparison.compare` and `catalog.build`; `rules` are the built-in ones by default.

    Raises:
        FuseplanError: the request can't be served; broken tables, plans and selectors are found before anything is
            built.
    """
    from fuseplan.compilation.manager import PostGradPassManager
    from fuseplan.explanation.comparison import compare
    from fuseplan.record.text import count_of
    from fuseplan.rules.families import BUILT_IN_RULES
    from fuseplan.workloads import catalog
    from fuseplan.workloads.catalog import layers_of

    rules = BUILT_IN_RULES if rules is None else rules
    PostGradPassManager(config, device=device, rules=rules)
    with (
        contextlib.redirect_stdout(sys.stderr),
        progress(f"building {workload}") as update,
        catalog.build(workload, tp=tp, layers=layers) as built,
    ):
        layers = layers_of(built.model)
        what = f"{count_of(layers, 'layer')} of {workload}" if layers else workload
        return compare(
            built.model, built.inputs, workload=workload, tp=tp, ranges=ranges, device=device, policies=policies,
            build_ns=built.build_ns, config=config, providers=providers, rules=rules, evidence=evidence,
            notes=built.notes, watch=lambda stage: update(f"{stage} {what}"),
        )  # fmt: skip


def check_selectors(texts: Sequence[str]) -> None:
    """Refuses selectors of --force and --forbid that select nothing in any graph.

    Raises:
        ConfigError: one is malformed, or names an unknown rule.
    """
    from fuseplan.planner import check_selector
    from fuseplan.rules import by_name
    from fuseplan.rules.families import BUILT_IN_RULES

    known = sorted(by_name(BUILT_IN_RULES))
    for text in texts:
        check_selector(text, known)


def find_providers(names: Sequence[str] | None, own: Sequence[Any] = ()) -> Any:
    """The providers of those names, or all: the built-in ones and the user's own.

    Raises:
        ConfigError: there is no such provider.
    """
    from fuseplan.config import unknown
    from fuseplan.providers import BUILT_IN_PROVIDERS

    every = (*BUILT_IN_PROVIDERS, *own)
    known = {provider.name: provider for provider in every}
    for name in names or ():
        if name not in known:
            raise unknown("provider", name, known)
    return tuple(known[name] for name in dict.fromkeys(names)) if names else every


def find_ranges(texts: Sequence[str] | None) -> Any:
    """The compile ranges of those texts, or the default ones.

    Raises:
        ConfigError: one isn't of the form FIRST:LAST, or two overlap.
    """
    from fuseplan.config import CompileRange, check_ranges
    from fuseplan.workloads.catalog import DEFAULT_RANGES

    return check_ranges([CompileRange.parse(text) for text in texts or ()]) or DEFAULT_RANGES


def find_policies(texts: Sequence[str] | None, own: Sequence[Any] = ()) -> list[Any]:
    """The policies of those texts, which may list built-in rules and the user's own.

    Raises:
        ConfigError: one is malformed, or names an unknown rule; the text names the near spelling.
    """
    from fuseplan.config import PassConfig, Policy
    from fuseplan.rules import enabled_rules
    from fuseplan.rules.families import BUILT_IN_RULES

    policies = [Policy.parse(text) for text in texts or ()]
    for policy in policies:
        enabled_rules(PassConfig(policy=policy), (*BUILT_IN_RULES, *own))
    return policies
