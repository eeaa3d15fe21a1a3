"""The most important first: which rule starves which under which policy, and at what cost."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fuseplan.record import Comparison, ConflictClass, Reason, Report
from fuseplan.record.report import UNFUSED
from fuseplan.report.places import places
from fuseplan.report.savings import Saved, by_range, counts_of_step, is_covered, losses_of, verdict


def headline(comparison: Comparison) -> str:
    """The first policy's saving, and its share, with the page's unit."""
    if not comparison.reports:
        return "Nothing was compared"
    return re.sub(r"(?<=\d) us\b", " µs", verdict(comparison, orders=False).plain)


def verdicts(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for every rule that loses places under a fixed order to a rule that doesn't do its work too; those that
    get none first.
    """
    rows = [row for index, report in enumerate(comparison.reports) for row in _of(comparison, index, report)]
    return sorted(rows, key=lambda row: row["state"] != "starved")


def _of(comparison: Comparison, index: int, report: Report) -> Iterator[dict[str, Any]]:
    losers: dict[str, list[ConflictClass]] = {}
    for conflict in report.conflicts if report.order else ():
        if conflict.winner != UNFUSED:
            losers.setdefault(conflict.loser, []).append(conflict)
    for loser, conflicts in losers.items():
        if not is_covered(report, loser):
            known = [(row.lost_us, row.count) for row in conflicts if row.lost_us is not None]
            weight = sum(count for _, count in known)
            fused, matched = map(max, zip(*counts_of_step(report, loser), strict=True))
            yield {
                "policy": index,
                "loser": loser,
                "winners": [[row.winner, _places_in_step(report, row)] for row in conflicts],
                "op": conflicts[0].op,
                "where": places(source for row in conflicts for source in row.sources),
                "fused": fused,
                "matched": matched,
                "state": rule_state(report, loser),
                "lost_us": round(sum(us * count for us, count in known) / weight, 3) if weight else None,
                "behind_us": behind_us(report, comparison.reports[0]),
            }


def _places_in_step(report: Report, found: ConflictClass) -> int:
    """The number of places of a step in a conflict class, in the range where it is highest."""
    ranges = (replace(report, graphs=tuple(graphs)) for graphs in by_range(report))
    kind = (found.winner, found.loser, found.op)
    return max(row.count for each in ranges for row in each.conflicts if (row.winner, row.loser, row.op) == kind)


def rule_state(report: Report, rule: str) -> str:
    """How a rule fares under a policy.

    `unlisted` (by its order), `unmatched`, `all` or `some` of its matches applied; and where none is: `off`, `covered`
    by fusions of a superset of its nodes, `starved` by the order, `forbidden`, `unpriced`, `unsure`, `outdone` in the
    plan, or not `worth` it.
    """
    fused, matched = report.fused.get(rule, 0), report.matched.get(rule, 0)
    if report.order and rule not in report.order:
        return "unlisted"
    if not matched:
        return "unmatched"
    if fused:
        return "all" if fused == matched else "some"
    if report.policy == "off":
        return "off"
    if is_covered(report, rule):
        return "covered"
    if report.order:
        return "starved"
    losses = list(losses_of(report, rule))
    if losses and all(loss.forbidden for loss in losses):
        return "forbidden"
    if not losses and any(each.rule == rule and each.reason is Reason.UNPRICED for each in report.warnings):
        return "unpriced"
    if not losses and any(each.rule == rule and each.reason is Reason.UNSURE for each in report.near_misses):
        return "unsure"
    return "outdone" if any(loss.blocked_by for loss in losses) else "worth"


def behind_us(report: Report, first: Report) -> list[float]:
    """How much less a policy saves than the first one, by range."""
    saved = [[Saved.of(each, span).saved_ns for each in (first, report)] for span in report.per_range]
    return [round((best - own) / 1000, 3) for best, own in saved]
