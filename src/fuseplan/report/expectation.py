"""The number of fusions in a report beside the expected number, and the causes of missing ones."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from fuseplan.record import Nearness, Report
from fuseplan.report.absence import Absence, AbsenceKind, Witness, absences
from fuseplan.report.drift import wheres
from fuseplan.report.lock import Span
from fuseplan.report.paragraphs import Line, break_paragraphs, cause_lines, where_text

MOST_CAUSES = 5
"""Causes shown for one rule, the likeliest first."""


def unmet(report: Report, expected: Mapping[str, int]) -> list[list[Line]]:
    """Paragraphs about every rule whose count differs; none where all counts are met.

    Args:
        report: the actual fusions.
        expected: fusions by rule, over all graphs and ranges.
    """
    fused = report.fused
    paragraphs = [
        paragraph
        for rule, count in sorted(expected.items())
        if fused.get(rule, 0) != count
        for paragraph in _about(report, rule, count)
    ]
    return paragraphs + break_paragraphs(map(str, report.breaks)) if paragraphs else []


def _about(report: Report, rule: str, expected: int) -> Iterator[list[Line]]:
    ranges = len({graph.range for graph in report.graphs})
    found = [(graph.range, fusion.source) for graph in report.graphs for fusion in graph.applied if fusion.rule == rule]
    lines = [Line("wrong", f"{rule}: expected {expected}, found {len(found)}")]
    if found:
        lines.append(Line("there", where_text(wheres(found), ranges)))
    if len(found) > expected:
        yield lines
        return
    witness = Witness(report)
    causes = _missing(witness, rule)
    if not causes:
        lines.append(Line("why", _nothing(witness, rule, "nothing else" if found else "nothing")))
    yield lines
    for cause, places in causes[:MOST_CAUSES]:
        yield [Line("missed", where_text(wheres(places), ranges)), *cause_lines(cause)]
    if len(causes) > MOST_CAUSES:
        yield [Line("", f"and {len(causes) - MOST_CAUSES} further causes: see near_misses of fuseplan.explain(...)")]


def _nothing(witness: Witness, rule: str, nothing: str) -> str:
    """The text for a rule without an obstacle in the report, of which the graph has `nothing` (else)."""
    policy = witness.policy_off(rule)
    if policy is not None:
        return policy.detail
    if rule not in witness.report.rules:
        return "it isn't among the rules that are on"
    return ": ".join(filter(None, (f"the graph has {nothing} that it could match", witness.broken)))


def _missing(witness: Witness, rule: str) -> list[tuple[Absence, list[tuple[Span, str | None]]]]:
    """Causes with their places: matches first, then the nearest misses, then the most frequent."""
    found = list(witness.of_rule(rule))
    places: dict[int, list[tuple[Span, str | None]]] = defaultdict(list)
    made: dict[int, Absence] = {}
    for cause, (_, span, place) in zip(absences([finding for finding, _, _ in found]), found, strict=True):
        made[id(cause)] = cause
        places[id(cause)].append((span, place))

    def distance(cause: Absence) -> tuple[int, int, int]:
        nearness = cause.near_miss.nearness if cause.near_miss else Nearness.REFUSED
        return list(AbsenceKind).index(cause.kind), list(Nearness).index(nearness), -len(places[id(cause)])

    return [(cause, places[id(cause)]) for cause in sorted(made.values(), key=distance)]
