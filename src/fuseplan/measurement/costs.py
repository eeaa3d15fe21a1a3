"""Measured costs of one model: its graphs, their classes of components, and a row for each alternative and size."""

import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fuseplan.config import CompileRange, PassConfig
from fuseplan.errors import ConfigError, WorkloadError
from fuseplan.explanation.capture import capture
from fuseplan.explanation.explanation import Explanation
from fuseplan.graph.facts import tensor_of
from fuseplan.measurement.tuning import (
    LEAST_REPEATS,
    Origin,
    Ranks,
    Skipped,
    Step,
    Tuner,
    Unclear,
    Work,
    busy,
    merge_into,
    table_in,
    work_of,
)
from fuseplan.planner import Problem
from fuseplan.planner.costs import Row
from fuseplan.providers import BUILT_IN_PROVIDERS, Provider, local_profile
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification import Verifier


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of measuring.

    Attributes:
        device: the profile's name.
        rows: one for each alternative and size.
        skipped: alternatives that aren't measured, and why.
        classes: how many components each signature has, in all graphs and ranges.
        stopped: whether it was interrupted: the rows are complete, and the rest is missing.
        unclear: alternatives that the repeats can't distinguish from the component without fusions.
        notes: caveats, one line each.
    """

    device: str
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    classes: dict[str, int]
    stopped: bool = False
    unclear: tuple[Unclear, ...] = ()
    notes: tuple[str, ...] = ()


def tune(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    table: Path,
    ranges: Sequence[CompileRange],
    tokens: Sequence[int] = (),
    repeats: int = 9,
    config: PassConfig | None = None,
    rules: Sequence[Rule] = (),
    providers: Sequence[Provider] = BUILT_IN_PROVIDERS,
    ranks: Ranks | None = None,
    command: str = "fuseplan.measurement.tune",
    watch: Callable[[Step], None] = lambda step: None,
    only_unsure: bool = False,
    listed: Callable[[Sequence[Work]], None] = lambda works: None,
) -> Measurement:
    """Measures the alternatives of each component, in context, and puts the times into a cost table.

    Fused ops are verified first, and those that fail are left out. The model's weights are not used: only the part of
    its graphs around each component runs, on random arguments.

    Args:
        model: a module or function; its weights may be fake tensors.
        inputs: its positional arguments, which may be fake, too.
        table: the file that rows are merged into, class by class.
        ranges: the compile ranges.
        tokens: the sizes to measure; none: both ends of each range and the geometric middle.
        repeats: of each time, at least 5.
        config: flags other than the defaults; its policy, ranges and costs aren't used.
        rules: fusions beside the built-in ones.
        providers: all that are available here are measured.
        ranks: of a tensor-parallel group: all measure the same, the slowest one counts, and the first one writes. None:
            this process alone.
        command: for the rows' provenance.
        watch: called before each step.
        only_unsure: measure only alternatives that could change the plan, by the intervals of modelled prices, and that
            the table lacks.
        listed: called with the work to measure, before it is measured.

    Raises:
        ConfigError: fewer repeats, a size outside of the ranges, or the table is broken, of another device, or can't be
            written.
        WorkloadError: nothing could be traced, or the model isn't on this machine's device.
        RanksError: another rank failed, or didn't come in time.
    """
    profile, ranks, notes = local_profile(), ranks or Ranks(), busy()
    config = replace(
        config or PassConfig(), compile_ranges=tuple(ranges), policy="planned", costs="modelled", cost_table=None,
        force=(), forbid=(), plan=None,
    )  # fmt: skip
    check_measurable(config.compile_ranges, tokens, repeats)
    if ranks.rank == 0:
        merge_into(table, profile.name, ())
    traced = capture(model, inputs, {}, dynamic=True)
    _check_device(traced.graphs, profile.name)
    explanation = Explanation(traced, config, None, providers, (*BUILT_IN_RULES, *rules))
    spans = [(entry, entry.manager.compile_range) for entry in explanation.entries]
    problems = [(entry.analysis.problem, (span.start, span.end)) for entry, span in spans if span is not None]
    found = tune_problems(
        problems, table=table, tokens=tokens, repeats=repeats, config=config, providers=providers, ranks=ranks,
        command=command, watch=watch, only_unsure=only_unsure, listed=listed,
    )  # fmt: skip
    skipped = [
        Skipped(site=graph.graph, reason=refusal.detail) for graph in explanation.skipped for refusal in graph.refusals
    ]
    return replace(found, skipped=tuple(dict.fromkeys([*skipped, *found.skipped])), notes=tuple(notes))


def tune_problems(
    problems: Sequence[tuple[Problem, tuple[int, int]]],
    *,
    table: Path,
    tokens: Sequence[int],
    repeats: int,
    config: PassConfig,
    providers: Sequence[Provider],
    ranks: Ranks,
    command: str,
    watch: Callable[[Step], None] = lambda step: None,
    only_unsure: bool = False,
    listed: Callable[[Sequence[Work]], None] = lambda works: None,
    lower: Callable[[fx.Graph], None] | None = None,
) -> Measurement:
    """`tune` on graphs that were analysed before.

    Args:
        problems: each with first and last number of tokens of its range.
        table: as for `tune`.
        tokens: as for `tune`.
        repeats: as for `tune`.
        config: says how to verify.
        providers: as for `tune`.
        ranks: as for `tune`.
        command: as for `tune`.
        watch: as for `tune`.
        only_unsure: as for `tune`.
        listed: as for `tune`.
        lower: replaces an engine's own ops by ops that Inductor knows.

    Raises:
        ConfigError: the table is broken, of another device, or can't be written.
        RanksError: another rank failed, or didn't come in time.
    """
    profile = local_profile()
    works, skipped = work_of(problems, tokens)
    if only_unsure:
        known = table_in(table, profile.name)
        works = [each for work in works if (each := work.unsure) is not None and not each.is_in(known)]
    listed(works)

    def save(rows: Sequence[Row]) -> None:
        if ranks.rank == 0:
            merge_into(table, profile.name, rows)

    origin = origin_of(profile.name, ranks.size, command)
    stopped = False
    tuner = None
    if works:
        verifier = Verifier(
            mode=config.verify, providers=providers, deadline_s=config.verify_timeout_s,
            rank=ranks.rank if ranks.size > 1 else None,
        )  # fmt: skip
        tuner = Tuner(
            verifier=verifier, ranks=ranks, origin=origin, repeats=repeats, save=save, watch=watch, lower=lower
        )
        try:
            tuner.run(works)
        except KeyboardInterrupt:
            stopped = True
    classes: dict[str, int] = {}
    for work in works:
        classes[work.signature] = max(work.count, classes.get(work.signature, 0))
    return Measurement(
        device=profile.name, rows=tuple(tuner.saved) if tuner else (), classes=classes, stopped=stopped,
        skipped=tuple(dict.fromkeys([*skipped, *(tuner.skipped if tuner else ())])),
        unclear=tuple(tuner.unclear) if tuner else (),
    )  # fmt: skip


def check_measurable(ranges: Sequence[CompileRange], tokens: Sequence[int], repeats: int) -> None:
    """Checks arguments of `tune` before anything is built.

    Raises:
        ConfigError: fewer repeats than 5, or a size outside of the ranges.
    """
    if repeats < LEAST_REPEATS:
        raise ConfigError(f"repeats={repeats}: a median and its spread need at least {LEAST_REPEATS}")
    for size in tokens:
        if not any(size in each for each in ranges):
            raise ConfigError(
                f"tokens={size} lie in none of the ranges {', '.join(map(str, ranges))}; add one that has them"
            )


def _check_device(graphs: Sequence[Any], device: str) -> None:
    """Refuses graphs on another device than the table's."""
    kind = "cpu" if device == "cpu" else "cuda"
    values = [tensor_of(node) for gm in graphs for node in gm.graph.find_nodes(op="placeholder")]
    others = sorted({value.device.type for value in values if value is not None and value.device.type != kind})
    if others:
        raise WorkloadError(
            f"the model or its inputs are on {' and '.join(others)}, and times are measured on {device}; build all "
            f"of it on {kind}"
        )


def origin_of(device: str, ranks: int, command: str) -> Origin:
    """The provenance of rows that are measured now."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return Origin(
        device=device, torch=torch.__version__, triton=triton, topology=topology(ranks), command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )  # fmt: skip


def topology(ranks: int) -> str:
    """Ranks, their communication library, and whether GPUs reach each other's memory: `tp2 nccl p2p`."""
    if ranks == 1:
        return "tp1"
    reach = ""
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        here = torch.cuda.current_device()
        others = [other for other in range(ranks) if other != here]
        reach = " p2p" if all(torch.cuda.can_device_access_peer(here, other) for other in others) else ""
    return f"tp{ranks} {dist.get_backend()}{reach}"
