"""Near misses on a terminal: one paragraph a cause, whatever number of rules and layers it concerns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from fuseplan.record import NearMiss, Nearness
from fuseplan.record.text import count_of
from fuseplan.report.places import places
from fuseplan.report.text import entry, enumerate_names, indented

SHOWN = 8
"""Causes that are shown in full; the rest are counted."""


@dataclass(frozen=True)
class Cause:
    """Rows that differ in their rule alone.

    Attributes:
        rules: all of them, in order of name.
        row: the first.
    """

    rules: tuple[str, ...]
    row: NearMiss


def causes(rows: Iterable[NearMiss]) -> list[Cause]:
    """The rows, each cause once, in their order."""
    grouped: dict[tuple[object, ...], list[NearMiss]] = {}
    for row in rows:
        key = (row.nearness, row.reason, row.provider, row.found, row.source, row.sites, row.count, row.line)
        grouped.setdefault(key, []).append(row)
    return [Cause(tuple(sorted({row.rule for row in group if row.rule})), group[0]) for group in grouped.values()]


def render_near_misses(rows: Sequence[NearMiss]) -> tuple[list[RenderableType], list[RenderableType]]:
    """Near misses in full; declined matches and distant misses in a line each."""
    near = [row for row in rows if row.nearness not in (Nearness.DECLINED, Nearness.ABSENT)]
    shown = causes(near)
    lines: list[RenderableType] = []
    for cause in shown[:SHOWN]:
        lines += _paragraph(cause)
    if len(shown) > SHOWN:
        lines.append(entry("near miss", f"{len(shown) - SHOWN} more causes: --json and --html have them all"))
    aside: list[RenderableType] = [entry("declined", Text(line, style="dim"), "dim") for line in _declined(rows)]
    aside += [entry("no match", Text(line, style="dim"), "dim") for line in _far(rows)]
    return lines, aside


def _paragraph(cause: Cause) -> Iterator[RenderableType]:
    row = cause.row
    who = enumerate_names(cause.rules) if cause.rules else str(row.op)
    where = places(row.sites) or places(row.sources)
    title = f"{who}: {row.reason.value}, {count_of(row.count, 'place')}{f' ({where})' if where else ''}"
    yield entry("near miss", title)
    yield indented(row.detail)
    shown = "" if places(row.sources) == where else places(row.sources)
    at = "  ".join(dict.fromkeys(part for part in (shown, row.line) if part))
    if at or row.code:
        yield indented(Text.assemble("at    ", at, (f"  {row.code}" if row.code else "", "italic dim")))
    if row.fix:
        yield indented(Text.assemble(("fix   ", "green"), row.fix))


def _declined(rows: Sequence[NearMiss]) -> Iterator[str]:
    """Providers that decline matches which others take."""
    for cause in causes(row for row in rows if row.nearness is Nearness.DECLINED):
        row = cause.row
        fix = f"; {row.fix}" if row.fix else ""
        yield f"{enumerate_names(cause.rules)} in {count_of(row.count, 'place')}: {row.detail}{fix}"


def _far(rows: Sequence[NearMiss]) -> Iterator[str]:
    """Ops that a fusion starts or ends with, without any of the rest near them."""
    grouped: dict[tuple[str, ...], list[NearMiss]] = {}
    for cause in causes(row for row in rows if row.nearness is Nearness.ABSENT):
        grouped.setdefault((*cause.rules, str(cause.row.expected)), []).append(cause.row)
    for (*rules, expected), members in grouped.items():
        found = enumerate_names(list(dict.fromkeys(str(row.found) for row in members)))
        where = places(site for row in members for site in row.sites)
        total = count_of(sum(row.count for row in members), "place")
        at = f": {where}" if where else ""
        yield f"{enumerate_names(rules)} in {total}, where {found} is and no {expected}{at}"
