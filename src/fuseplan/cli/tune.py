"""`fuseplan tune`: the time of each alternative on this machine, measured in context and put into a cost table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from fuseplan.cli.console import Debug, Json, measuring, one_line_errors, say, show, table_of
from fuseplan.cli.ranks import DEADLINE_S, REPEATS, Deadline, Tp, built, command_of, ranks_of
from fuseplan.cli.request import (
    AllowRoundingChanges,
    AnyWorkload,
    Layers,
    ProviderNames,
    Ranges,
    find_providers,
    find_ranges,
    import_torch,
)
from fuseplan.cli.spelling import check_spelling
from fuseplan.errors import ConfigError
from fuseplan.record.text import count_of, duration, printable

UNFUSED = "unfused"
LACKING = "costs='auto' models a class that lacks an alternative; costs='measured' leaves that alternative out"
NOTHING = "nothing was measured: no fusion matches that can be run"
NOTHING_UNSURE = "nothing is unsure: no measurement could change the plan"
INTERRUPTED = 130
"""The customary exit status after Ctrl-C."""


def tune(
    workload: AnyWorkload = None,
    tp: Tp = None,
    ranges: Ranges = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A size to measure; may be repeated. Default: ends and middle of each range."),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often each time is taken, at least 5.")] = REPEATS,
    layers: Layers = None,
    provider: ProviderNames = None,
    allow_rounding_changes: AllowRoundingChanges = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cost table to write to. Default: the one that is read by default."),
    ] = None,
    deadline: Deadline = DEADLINE_S,
    device_only: Annotated[
        bool,
        typer.Option("--device-only", help="Measure the GPU's launches and copies instead, for the cost model."),
    ] = False,
    only_unsure: Annotated[
        bool,
        typer.Option("--only-unsure", help="Measure only alternatives that could change the plan."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the fusions of WORKLOAD on this machine, each beside its alternatives, and put the times into a cost
    table. Under torchrun for tensor parallelism: torchrun --nproc-per-node 2 -m fuseplan tune WORKLOAD.
    """
    with one_line_errors(debug):
        check_spelling(workload, providers=provider, ranges=ranges)
        import_torch()
        if device_only:
            given = {"WORKLOAD": workload, "--tp": tp, "--range": ranges, "--tokens": tokens, "--layers": layers,
                     "--provider": provider, "--out": out, "--only-unsure": only_unsure or None}  # fmt: skip
            _device(repeats, [name for name, value in given.items() if value is not None], as_json=as_json)
            return
        if workload is None:
            raise ConfigError("give a WORKLOAD whose fusions are measured, or --device-only")
        from fuseplan.config import PassConfig
        from fuseplan.measurement.costs import check_measurable
        from fuseplan.measurement.costs import tune as measure
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
                    config=config, providers=providers, ranks=ranks, command=command_of(ranks.size),
                    watch=lambda step: tell(f"{step.doing}: {step.site}", step.done, step.total),
                    only_unsure=only_unsure, listed=_list if only_unsure and ranks.rank == 0 else lambda works: None,
                )  # fmt: skip
            if ranks.rank == 0:
                none = NOTHING_UNSURE if only_unsure else NOTHING
                show(_json(found, workload, ranks.size, table) if as_json else _rendered(found, table, none), as_json)
            if found.stopped:
                if ranks.rank == 0:
                    say(f"interrupted; {len(found.rows)} rows are in {table}; the unfinished measurement is lost")
                raise typer.Exit(INTERRUPTED)


def _device(repeats: int, given: Sequence[str], *, as_json: bool) -> None:
    """Measures the device alone, and stores the constants where prices are read from."""
    from fuseplan.config import Launch
    from fuseplan.measurement.tuning import LEAST_REPEATS, measure_device
    from fuseplan.planner.costs import record_path
    from fuseplan.record import to_json

    if given:
        raise ConfigError(f"--device-only measures the GPU of this machine alone; leave {' and '.join(given)} out")
    if Launch.read().ranks > 1:
        raise ConfigError("--device-only measures one GPU, and torchrun started several ranks: run it without torchrun")
    if repeats < LEAST_REPEATS:
        raise ConfigError(f"repeats={repeats}: a median and its spread need at least {LEAST_REPEATS}")
    record = measure_device(repeats=repeats, command=command_of(1))
    path = record_path(record.device)
    record.save(path)
    if as_json:
        show({"schema": 1, **to_json(record), "path": str(path)}, as_json=True)
        return
    table = table_of(record.device, "median", "spread", "")
    for each in record.constants:
        table.add_row(each.name, f"{each.value:,.0f}", f"{each.spread:,.0f}", each.unit)
    kept = f"kept in {path}: prices for this machine's device use it"
    show(Group(table, Text(printable(kept))), as_json=False)


def _check_table(path: Path, *, is_default: bool) -> None:
    """Finds out before anything is measured whether rows can be merged into a table.

    Raises:
        ConfigError: it is broken, of another device, or can't be written to.
    """
    from fuseplan.measurement.tuning import merge_into, table_in
    from fuseplan.providers import local_profile

    device = local_profile().name
    try:
        table_in(path, device)
    except ConfigError as error:
        if not is_default:
            raise
        say(f"{error}; it is written anew")
    merge_into(path, device, (), replace_broken=is_default)


def _json(found: Any, workload: str, tp: int, table: Path) -> dict[str, Any]:
    from fuseplan.record import to_json

    return {
        "schema": 1, "workload": workload, "tp": tp, "device": found.device, "table": str(table),
        "rows": [to_json(row) for row in found.rows], "skipped": [to_json(each) for each in found.skipped],
        "stopped": found.stopped, "unclear": [to_json(each) for each in found.unclear], "notes": list(found.notes),
    }  # fmt: skip


def _list(works: Sequence[Any]) -> None:
    """Lists the deciding alternatives, and about how long measuring them takes."""
    from fuseplan.providers import local_profile
    from fuseplan.record.unsure import seconds_of

    if not works:
        return
    device = local_profile().name
    counted = sum(len(work.alternatives) for work in works)
    takes = duration(seconds_of(sum(work.steps for work in works), device))
    classes = "1 class" if len(works) == 1 else f"{len(works)} classes"
    say(f"{count_of(counted, 'alternative')} of {classes} of places decide; measuring them takes about {takes}")
    for work in works:
        say(f"{work.signature} at {', '.join(map(str, work.tokens))} tokens: {', '.join(work.alternatives)}")


def _rendered(found: Any, path: Path, none: str) -> Group:
    """A table for each class, the unmeasured alternatives with reasons, and the file of the rows."""
    parts: list[Any] = []
    for site, count in sorted(found.classes.items()):
        start = f"{site}: "
        rows = [row for row in found.rows if row.key.startswith(start)]
        if rows:
            heading = Text(printable(f"{site}, {count} in the model"), style="bold")
            parts += [heading, _Times(start, rows), Text("")]
    for each in found.skipped:
        size = f" at {count_of(each.tokens, 'token')}" if each.tokens else ""
        what = f"{each.site}: {each.alternative}" if each.alternative else each.site
        parts.append(Text(printable(f"not measured: {what}{size}: {each.reason}")))
    if any(each.alternative for each in found.skipped):
        parts.append(Text(LACKING))
    parts += map(Text, map(printable, _doubts(found)))
    kept = f"{len(found.rows)} rows in {path}" if found.rows else none
    return Group(*parts, Text(printable(kept)))


def _doubts(found: Any) -> Iterator[str]:
    """The differences that the repeats leave open, how many would settle them, and further notes."""
    for each in found.unclear[:MOST_DOUBTS]:
        low, high = (time_ns / 1000 for time_ns in (each.beside_unfused.low_ns, each.beside_unfused.high_ns))
        needed = each.beside_unfused.repeats_needed
        settled = f"about {needed} repeats would settle it" if needed else "more repeats would hardly settle it"
        beside = f"{low:+.2f} to {high:+.2f} us beside {UNFUSED}"
        yield f"unclear: {each.site}: {each.alternative} at {count_of(each.tokens, 'token')}: {beside}; {settled}"
    if len(found.unclear) > MOST_DOUBTS:
        yield f"unclear: {len(found.unclear) - MOST_DOUBTS} more, which --json has"
    yield from (f"note  {note}" for note in found.notes)


MOST_DOUBTS = 6
"""Unclear rows that are shown."""


class _Times:
    """Alternatives down, `unfused` first; sizes across, below each other as far as the terminal is too narrow; the
    fastest of each size in green.
    """

    def __init__(self, start: str, rows: Sequence[Any]) -> None:
        self.times: dict[str, dict[int, Any]] = {}
        for row in rows:
            self.times.setdefault(printable(row.key.removeprefix(start)), {})[row.tokens] = row
        self.sizes = sorted({row.tokens for row in rows})
        self.best = {size: min(row.time_ns for row in rows if row.tokens == size) for size in self.sizes}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich's console protocol."""
        names = sorted(self.times, key=lambda name: (name != UNFUSED, name))
        cells = {
            (name, size): _cell(self.times[name].get(size), self.best[size]) for name in names for size in self.sizes
        }
        word = max(len(word) for name in [HEADING, *names] for word in name.split())
        wide = GAP + max(len(str(each)) for each in [*cells.values(), *self.sizes])
        count = max(1, (options.max_width - word) // wide)
        if len(max(names, key=len)) + wide * len(self.sizes) <= options.max_width:
            count = len(self.sizes)
        for first in range(0, len(self.sizes), count):
            sizes = self.sizes[first : first + count]
            table = table_of(HEADING, *map(str, sizes))
            table.columns[0].min_width = word
            for name in names:
                table.add_row(name, *(cells[name, size] for size in sizes))
            yield table
            if sizes[-1] != self.sizes[-1]:
                yield ""


HEADING, GAP = "us (spread), at tokens", 3


def _cell(row: Any, best: int) -> Text:
    if row is None:
        return Text("-")
    return Text(f"{row.time_ns / 1000:.2f} ({row.spread_ns / 1000:.2f})", style="green" if row.time_ns == best else "")
