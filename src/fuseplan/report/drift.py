"""The changes between a lock and a report: which fusion, where, and why."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from fuseplan.record import Report
from fuseplan.report.absence import Absence, AbsenceKind, Finding, Witness, absences, layer_of
from fuseplan.report.lock import Applied, FusionLock, Placed, Span, placed_in, span_text
from fuseplan.report.places import fold


class DriftKind(StrEnum):
    """The fate of a fusion."""

    LOST = "lost"
    MOVED = "moved"
    """Another fusion has its place, or its place has another name."""
    GAINED = "gained"


@dataclass(frozen=True, kw_only=True)
class Where:
    """Places that are the same in several ranges.

    Attributes:
        ranges: as a lock writes them.
        places: folded, as a lock writes them.
        count: how many, over these ranges.
    """

    ranges: tuple[str, ...]
    places: tuple[str, ...]
    count: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One change, for one cause, at all places where it happened.

    Attributes:
        change: lost, moved or gained.
        before: the lock's fusion, as `RULE OP PROVIDER`; None where it has none.
        after: the report's fusion, in the same form.
        count: in how many places, over all graphs and ranges.
        where: these places.
        cause: why the lock's fusion isn't there; None for a gained one.
    """

    change: DriftKind
    before: str | None
    after: str | None
    count: int
    where: tuple[Where, ...]
    cause: Absence | None = None


class _Unit(NamedTuple):
    """One fusion at one place in one range."""

    span: Span
    place: str | None
    before: Applied | None
    after: Applied | None
    finding: Finding | None = None


def drifts(lock: FusionLock, report: Report) -> tuple[Drift, ...]:
    """The differences between a report and its lock, in the ranges of the lock.

    Args:
        lock: the expected fusions.
        report: the answer to the same question.
    """
    witness = Witness(report)
    units = [
        unit for span, placed in lock.placed.items() for unit in _units(placed, placed_in(report, span), span, witness)
    ]
    explained = [unit for unit in units if unit.finding is not None]
    by_unit = absences([unit.finding for unit in explained if unit.finding is not None])
    rows: dict[tuple[int | None, Applied | None, Applied | None], list[_Unit]] = defaultdict(list)
    causes = {id(cause): cause for cause in by_unit}
    for unit, cause in zip(explained, by_unit, strict=True):
        rows[id(cause), unit.before, unit.after].append(unit)
    for unit in units:
        if unit.finding is None:
            rows[None, unit.before, unit.after].append(unit)
    order = [*causes, None]
    return tuple(
        _drift(members, causes[key] if key is not None else None)
        for (key, _, _), members in sorted(rows.items(), key=lambda row: order.index(row[0][0]))
    )


def _units(before: Placed, after: Placed, span: Span, witness: Witness) -> Iterator[_Unit]:
    lost, gained = before - after, after - before
    for kernel, old, new in _renamed(lost, gained, span, witness):
        lost[kernel, old] -= 1
        gained[kernel, new] -= 1
        yield _Unit(span, old, kernel, kernel, Finding(AbsenceKind.RENAMED, now=new))
    lost, gained = +lost, +gained
    # The kernels that are new at a place. Places without a module path can't be distinguished.
    come: dict[str | None, list[Applied]] = defaultdict(list)
    for (kernel, place), count in sorted(gained.items(), key=_by_text, reverse=True):
        if place is not None:
            come[place] += [kernel] * count
    for (kernel, place), count in sorted(lost.items(), key=_by_text):
        for finding in witness.about(kernel, span, place, count):
            successor = come[place].pop() if come.get(place) else None
            if successor is not None:
                gained[successor, place] -= 1
            yield _Unit(span, place, kernel, successor, finding)
    for (kernel, place), count in sorted(gained.items(), key=_by_text):
        yield from (_Unit(span, place, None, kernel) for _ in range(count))


def _renamed(lost: Placed, gained: Placed, span: Span, witness: Witness) -> list[tuple[Applied, str, str]]:
    """Fusions that are still in their layer, at places with other names: (kernel, name before, name now). Where a layer
    has several, they can't be told apart, and so there have to be as many as before.
    """
    taken = {place for _, place in lost}, {place for _, place in gained}
    old: dict[tuple[Applied, str], list[str]] = defaultdict(list)
    new: dict[tuple[Applied, str], list[str]] = defaultdict(list)
    for counts, others, found in ((lost, taken[1], old), (gained, taken[0], new)):
        for (kernel, place), count in sorted(counts.items(), key=_by_text):
            layer = layer_of(place)
            if place is not None and layer is not None and place not in others:
                found[kernel, layer] += [place] * count
    return [
        (kernel, before, now)
        for (kernel, layer), places in old.items()
        if len(places) == len(new[kernel, layer]) and all(witness.is_gone(kernel, span, place) for place in places)
        for before, now in zip(places, new[kernel, layer], strict=True)
    ]


def _by_text(item: tuple[tuple[Applied, str | None], int]) -> tuple[Applied, str]:
    (kernel, place), _ = item
    return kernel, place or ""


def _drift(units: Sequence[_Unit], cause: Absence | None) -> Drift:
    before, after = units[0].before, units[0].after
    return Drift(
        change=DriftKind.GAINED if before is None else DriftKind.LOST if after is None else DriftKind.MOVED,
        before=str(before) if before else None,
        after=str(after) if after else None,
        count=len(units),
        where=wheres((unit.span, unit.place) for unit in units),
        cause=cause,
    )


def wheres(found: Iterable[tuple[Span, str | None]]) -> tuple[Where, ...]:
    """Places by range; ranges with the same places share an entry.

    Args:
        found: range and module path of each.
    """
    by_span: dict[Span, Counter[str | None]] = defaultdict(Counter)
    for span, place in found:
        by_span[span][place] += 1
    groups: dict[tuple[Span, ...], dict[str | None, int]] = defaultdict(dict)
    for place in dict.fromkeys(place for counts in by_span.values() for place in counts):
        spans_by_count: dict[int, list[Span]] = defaultdict(list)
        for span, counts in by_span.items():
            if counts[place]:
                spans_by_count[counts[place]].append(span)
        for count, spans in spans_by_count.items():
            groups[tuple(spans)][place] = count
    return tuple(
        Where(ranges=tuple(map(span_text, spans)), places=fold(counts), count=sum(counts.values()) * len(spans))
        for spans, counts in groups.items()
    )
