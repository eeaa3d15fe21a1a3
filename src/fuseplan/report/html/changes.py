"""The effect of force and forbid: a policy against the same policy without them."""

from typing import Any

from fuseplan import record
from fuseplan.record import Change, Comparison, Report
from fuseplan.report.html.verdicts import behind_us
from fuseplan.report.places import places


def changes(comparison: Comparison) -> dict[str, Any] | None:
    """The cost of the constraints by range, and the replaced fusions; None where there are none."""
    free, bound = comparison.unconstrained, comparison.constrained
    if free is None or bound is None:
        return None
    return {
        "force": list(bound.force),
        "forbid": list(bound.forbid),
        "lost_us": behind_us(bound, free),
        "rows": _rows(bound, free),
    }


def _rows(bound: Report, free: Report) -> list[dict[str, Any]]:
    """One row for each change of choice, over all ranges, with the places where it happens."""
    rows: dict[tuple[str, str], list[Change]] = {}
    for each in record.changes(free, bound):
        rows.setdefault((each.before, each.after), []).append(each)
    return [
        {
            "before": before,
            "after": after,
            "count": sum(each.count for each in changed),
            "where": places(source for each in changed for source in each.sources),
        }
        for (before, after), changed in rows.items()
    ]
