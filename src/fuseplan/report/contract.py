"""The object that `fuseplan explain --json` prints; its shape is a contract, versioned by `schema`."""

from typing import Any

from fuseplan.record import Comparison, Report, to_json

SCHEMA = 1


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain JSON values.

    Costs (`region_us`, `saved_us`, `lost_us`, `flips_at_us`) are null where nothing is priced.
    """
    first = comparison.reports[0]
    return {
        "schema": SCHEMA,
        "workload": comparison.workload,
        "tp": comparison.tp,
        "device": comparison.device,
        "ranges": [list(span) for span in comparison.ranges],
        "policies": [_policy(report) for report in comparison.reports],
        "conflicts": [
            {**to_json(conflict), "policy": _policy_name(report)}
            for report in comparison.reports
            for conflict in report.conflicts
        ],
        "near_misses": [to_json(miss) for miss in first.near_misses],
        "recognized": first.recognized,
        "warnings": [to_json(warning) for warning in first.warnings],
        "breaks": list(comparison.breaks),
    }


def _policy(report: Report) -> dict[str, Any]:
    order = {"order": list(report.order)} if report.order else {}
    return {
        "policy": report.policy,
        **order,
        "fused": report.fused,
        "matched": report.matched,
        "per_range": [
            {"range": list(span) if span else None, "fused": fused} for span, fused in report.per_range.items()
        ],
        "region_us": None,
        "saved_us": None,
    }


def _policy_name(report: Report) -> str:
    return f"{report.policy}({', '.join(report.order)})" if report.order else report.policy
