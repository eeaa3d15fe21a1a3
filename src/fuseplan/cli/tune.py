"""`fuseplan tune`: what each alternative takes on this machine, measured in context and put into a cost table."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from fuseplan.cli.console import Debug, Json, measuring, one_line_errors, say, show, table_of
from fuseplan.cli.ranks import DEADLINE_S, REPEATS, Deadline, Tp, built, ranks_of
from fuseplan.cli.request import (
    AllowRoundingChanges,
    Layers,
    ProviderNames,
    Ranges,
    Workload,
    find_providers,
    find_ranges,
)
from fuseplan.record.text import printable

UNFUSED = "unfused"
LACKING = "costs='auto' models a class that lacks an alternative; costs='measured' leaves that alternative out"
INTERRUPTED = 130
"""The exit status of what Ctrl-C ended, by custom."""


def tune(
    workload: Workload,
    tp: Tp = None,
    ranges: Ranges = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A size to measure; may be repeated. Default: ends and middle of each range."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="How often each time is taken, at least 5.")] = REPEATS,
    layers: Layers = None,
    provider: ProviderNames = None,
    allow_rounding_changes: AllowRoundingChanges = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cost table to write to. Default: the one that is read by default."),
    ] = None,
    deadline: Deadline = DEADLINE_S,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what the fusions of WORKLOAD take on this machine, each beside what it competes with, and put the times
    into a cost table. Under torchrun for tensor parallelism: torchrun --nproc-per-node 2 -m fuseplan tune WORKLOAD.
    """
    with one_line_errors(debug):
        from fuseplan.compatibility import require_supported_torch

        require_supported_torch(everything=True)
        from fuseplan.config import PassConfig
        from fuseplan.measurement import check_measurable
        from fuseplan.measurement import tune as measure
        from fuseplan.planner.costs import cached_path
        from fuseplan.providers import local_profile

        config = PassConfig(allow_rounding_changes=allow_rounding_changes)
        with ranks_of(tp, deadline, "tune", debug=debug) as ranks:
            spans, providers = find_ranges(ranges), find_providers(provider)
            check_measurable(spans, tokens or (), repeats)
            table = out or cached_path(local_profile().name)
            if ranks.rank == 0:
                _check_table(table, is_default=out is None)
            with measuring(ranks.rank == 0) as tell, built(workload, ranks, layers) as made:
                found = measure(
                    made.model, made.inputs, table=table, ranges=spans, tokens=tokens or (), repeats=repeats,
                    config=config, providers=providers, ranks=ranks, command=_command(ranks.size),
                    watch=lambda step: tell(f"{step.doing}: {step.site}", step.done, step.total),
                )  # fmt: skip
            if ranks.rank == 0:
                show(_json(found, workload, ranks.size, table) if as_json else _rendered(found, table), as_json)
            if found.stopped:
                if ranks.rank == 0:
                    say(f"interrupted; {len(found.rows)} rows are in {table}, and what was being measured is not")
                raise typer.Exit(INTERRUPTED)


def _check_table(path: Path, *, is_default: bool) -> None:
    """Finds out before anything is measured whether rows can be merged into a table.

    Raises:
        ConfigError: it is broken, of another device, or can't be written to.
    """
    from fuseplan.errors import ConfigError
    from fuseplan.providers import local_profile
    from fuseplan.tuning import merge_into, table_in

    device = local_profile().name
    try:
        table_in(path, device)
    except ConfigError as error:
        if not is_default:
            raise
        say(f"{error}; it is written anew")
    merge_into(path, device, (), replace_broken=is_default)


def _command(ranks: int) -> str:
    """As it would be written again."""
    start = f"torchrun --nproc-per-node {ranks} -m fuseplan" if ranks > 1 else "fuseplan"
    return shlex.join([*start.split(), *sys.argv[1:]])


def _json(found: Any, workload: str, tp: int, table: Path) -> dict[str, Any]:
    from fuseplan.record import to_json

    return {
        "schema": 1, "workload": workload, "tp": tp, "device": found.device, "table": str(table),
        "rows": [to_json(row) for row in found.rows], "skipped": [to_json(each) for each in found.skipped],
        "stopped": found.stopped,
    }  # fmt: skip


def _rendered(found: Any, path: Path) -> Group:
    """A table for each class, what isn't measured and why, and where the rows are."""
    parts: list[Any] = []
    for site, count in sorted(found.classes.items()):
        start = f"{site}: "
        rows = [row for row in found.rows if row.key.startswith(start)]
        if rows:
            heading = Text(printable(f"{site}, {count} in the model"), style="bold")
            parts += [heading, _times(start, rows), Text("")]
    for each in found.skipped:
        size = f" at {each.tokens} tokens" if each.tokens else ""
        what = f"{each.site}: {each.alternative}" if each.alternative else each.site
        parts.append(Text(printable(f"not measured: {what}{size}: {each.reason}")))
    if any(each.alternative for each in found.skipped):
        parts.append(Text(LACKING))
    kept = (
        f"{len(found.rows)} rows in {path}" if found.rows else "nothing was measured: no fusion matches that can be run"
    )
    return Group(*parts, Text(printable(kept)))


def _times(start: str, rows: Sequence[Any]) -> Any:
    """Alternatives down, `unfused` first; sizes across; the fastest of each size in green."""
    times: dict[str, dict[int, Any]] = {}
    for row in rows:
        times.setdefault(row.key.removeprefix(start), {})[row.tokens] = row
    sizes = sorted({row.tokens for row in rows})
    best = {size: min(row.time_ns for row in rows if row.tokens == size) for size in sizes}
    table = table_of("us, at tokens", *map(str, sizes))
    for name in sorted(times, key=lambda name: (name != UNFUSED, name)):
        table.add_row(printable(name), *(_cell(times[name].get(size), best[size]) for size in sizes))
    return table


def _cell(row: Any, best: int) -> Text:
    if row is None:
        return Text("-")
    return Text(f"{row.time_ns / 1000:.2f} ±{row.spread_ns / 2000:.2f}", style="green" if row.time_ns == best else "")
