"""The object that `fuseplan explain --json` prints; its shape is a contract, versioned by `schema`."""

from collections import Counter
from typing import Any

from fuseplan.record import Comparison, Report, Unsure, changes, differences, to_json
from fuseplan.report.savings import Saved, graphs_of, sizes_of
from fuseplan.report.text import policy_name

SCHEMA = 1


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain JSON values.

    Times are of the middle size of each range, `saved_us` weighted over its sizes, and sums over graphs and ranges.
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
            {**to_json(conflict), "policy": policy_name(report)}
            for report in comparison.reports
            for conflict in report.conflicts
        ],
        "near_misses": [to_json(miss) for miss in first.near_misses],
        "unsure": [_unsure(each) for each in first.unsure],
        "recognized": first.recognized,
        "warnings": [to_json(warning) for warning in first.warnings],
        "breaks": list(comparison.breaks),
        "notes": list(comparison.notes),
        "counterfactual": _counterfactual(comparison),
    }


def report_to_json(report: Report) -> dict[str, Any]:
    """The report of one compilation as plain JSON values: counts, conflicts and near misses, then graph by graph."""
    return {
        "schema": SCHEMA,
        **_policy(report),
        "conflicts": [to_json(conflict) for conflict in report.conflicts],
        "near_misses": [to_json(miss) for miss in report.near_misses],
        "unsure": [_unsure(each) for each in report.unsure],
        "recognized": report.recognized,
        "warnings": [to_json(warning) for warning in report.warnings],
        "graphs": [to_json(graph) for graph in report.graphs],
    }


def _counterfactual(comparison: Comparison) -> dict[str, Any] | None:
    """The effect of forcing and forbidding, beside the same policy without; None where nothing is forced or
    forbidden.
    """
    free, asked = comparison.unconstrained, comparison.constrained
    if free is None or asked is None:
        return None
    return {
        "force": list(asked.force),
        "forbid": list(asked.forbid),
        "without": _policy(free),
        "changes": to_json(changes(free, asked)),
        "lost_us": [
            {"range": list(each.range) if each.range else None, "lost_us": (each.before_ns - each.after_ns) / 1000}
            for each in differences(free, asked)
        ],
    }


def _policy(report: Report) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": report.policy}
    if report.order:
        row["order"] = list(report.order)
    row |= {name: list(given) for name, given in (("force", report.force), ("forbid", report.forbid)) if given}
    row |= {
        "fused": report.fused,
        "matched": report.matched,
        "provenance": dict(sorted(Counter(f.provenance for graph in report.graphs for f in graph.applied).items())),
        "per_range": [_range(report, span) for span in report.per_range],
        "region_us": report.region_us,
        "saved_us": report.saved_us,
        **_ends(Saved.over(report.graphs)),
    }
    plans = [graph.plan for graph in report.graphs if graph.plan is not None]
    if plans:
        objective, bound = sum(plan.objective_ns for plan in plans), sum(plan.bound_ns for plan in plans)
        row |= {
            "objective_ns": objective,
            "bound_ns": bound,
            "gap": (bound - objective) / max(1, abs(bound)),
            "plan_ms": sum(graph.plan_ns for graph in report.graphs) / 1e6,
            "digests": [plan.digest for plan in plans],
        }
    return row


def _unsure(found: Unsure) -> dict[str, Any]:
    return {**to_json(found), "tuning_s": found.tuning_s}


def _ends(saved: Saved) -> dict[str, float | None]:
    """The ends of the interval of `saved_us`; None where they aren't known."""
    ends = (("saved_low_us", saved.low_ns), ("saved_high_us", saved.high_ns))
    return {name: None if end is None else end / 1000 for name, end in ends}


def _range(report: Report, span: tuple[int, int] | None) -> dict[str, Any]:
    graphs = graphs_of(report, span)
    saved = Saved.over(graphs)
    return {
        "range": list(span) if span else None,
        "fused": report.per_range[span],
        "region_us": (saved.unfused_ns - saved.saved_ns) / 1000,
        "saved_us": saved.saved_ns / 1000,
        **_ends(saved),
        "unfused_us": saved.unfused_ns / 1000,
        "step_us": None if saved.step_ns is None else saved.step_ns / 1000,
        "sizes": [
            {
                "tokens": tokens,
                "unfused_us": unfused_ns / 1000,
                "saved_us": saved_ns / 1000,
                "all_reduces": sorted(
                    {name for g in graphs for s in g.sizes if s.tokens == tokens for name in s.all_reduces}
                ),
            }
            for tokens, unfused_ns, saved_ns in sizes_of(graphs)
        ],
    }
