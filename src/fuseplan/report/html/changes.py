"""What force and forbid change: the plan against the same plan without them."""

from typing import Any

from fuseplan.record import Comparison, Fusion, GraphReport, Report
from fuseplan.report.html.verdicts import behind_us
from fuseplan.report.terminal import places


def changes(comparison: Comparison) -> dict[str, Any] | None:
    """What the constraints cost by range, and what is applied where in the place of what; None where there are none."""
    free = comparison.unconstrained
    bound = next((report for report in comparison.reports if report.policy == "planned"), None)
    if free is None or bound is None:
        return None
    return {
        "force": list(bound.force),
        "forbid": list(bound.forbid),
        "lost_us": behind_us(bound, free),
        "rows": _rows(bound, free),
    }


def _rows(bound: Report, free: Report) -> list[dict[str, Any]]:
    """One row for each change of choice, with the places where it happens."""
    others = {(graph.graph, graph.range): graph for graph in free.graphs}
    rows: dict[tuple[str, str], list[Fusion]] = {}
    for graph in bound.graphs:
        other = others.get((graph.graph, graph.range))
        if other is not None:
            before, after = _by_site(other), _by_site(graph)
            for site in {**before, **after}:
                change = (_choice(before.get(site)), _choice(after.get(site)))
                if change[0] != change[1]:
                    rows.setdefault(change, []).append((before.get(site) or after[site])[0])
    return [
        {"before": before, "after": after, "count": len(fusions), "where": places(each.source for each in fusions)}
        for (before, after), fusions in rows.items()
    ]


def _by_site(graph: GraphReport) -> dict[str, list[Fusion]]:
    sites: dict[str, list[Fusion]] = {}
    for fusion in graph.applied:
        sites.setdefault(fusion.site, []).append(fusion)
    return sites


def _choice(fusions: list[Fusion] | None) -> str:
    return " and ".join(sorted(f"{each.rule} {each.provider}" for each in fusions)) if fusions else "unfused"
