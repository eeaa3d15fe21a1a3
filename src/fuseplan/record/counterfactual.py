"""The effect of forcing and forbidding: two reports on the same graphs, place by place."""

from collections.abc import Iterator
from dataclasses import dataclass

from fuseplan.record.fusion import Fusion
from fuseplan.record.report import UNFUSED, GraphReport, Report


@dataclass(frozen=True, kw_only=True)
class Change:
    """Places of one range at which one choice takes the place of another.

    Attributes:
        range: first and last number of tokens, None where they aren't limited.
        before: rule and provider, e.g. `allreduce_rms triton`, or `unfused`; several where they were coupled.
        after: in the same form.
        count: in how many places.
        sources: the places in the user's model.
    """

    range: tuple[int, int] | None
    before: str
    after: str
    count: int
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The savings of a range under two reports.

    Attributes:
        range: first and last number of tokens, None where they aren't limited.
        before_ns: the saving under the first.
        after_ns: the saving under the second.
    """

    range: tuple[int, int] | None
    before_ns: int
    after_ns: int


def changes(before: Report, after: Report) -> tuple[Change, ...]:
    """Where the second report applies something else than the first, range by range."""
    grouped: dict[tuple[tuple[int, int] | None, str, str], list[str | None]] = {}
    for old, new in _pairs(before, after):
        choices = _choices(old), _choices(new)
        for site in dict.fromkeys((*choices[0], *choices[1])):
            (left, place), (right, other) = (each.get(site, (UNFUSED, None)) for each in choices)
            if left != right:
                grouped.setdefault((old.range, left, right), []).append(place or other)
    return tuple(
        Change(
            range=span, before=left, after=right, count=len(places),
            sources=tuple(dict.fromkeys(place for place in places if place is not None)),
        )
        for (span, left, right), places in grouped.items()
    )  # fmt: skip


def differences(before: Report, after: Report) -> tuple[Difference, ...]:
    """The savings of each range under both."""
    totals: dict[tuple[int, int] | None, list[int]] = {}
    for old, new in _pairs(before, after):
        total = totals.setdefault(old.range, [0, 0])
        total[0] += old.saved_ns
        total[1] += new.saved_ns
    return tuple(Difference(range=span, before_ns=old, after_ns=new) for span, (old, new) in totals.items())


def _pairs(before: Report, after: Report) -> Iterator[tuple[GraphReport, GraphReport]]:
    others = {(graph.graph, graph.range): graph for graph in after.graphs}
    for graph in before.graphs:
        if (graph.graph, graph.range) in others:
            yield graph, others[graph.graph, graph.range]


def _choices(graph: GraphReport) -> dict[str, tuple[str, str | None]]:
    """(rules and providers, source) by site; fusions that were coupled share one."""
    applied: dict[str, list[Fusion]] = {}
    for fusion in graph.applied:
        applied.setdefault(fusion.site, []).append(fusion)
    return {
        site: (" and ".join(sorted(f"{each.rule} {each.provider}" for each in fusions)), fusions[0].source)
        for site, fusions in applied.items()
    }
