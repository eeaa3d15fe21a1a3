"""A comparison as the page's data: policies by ranges and graphs, with shared values in tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from fuseplan.record import Comparison, Fusion, GraphReport, Loss, NearMiss, Reason, Report
from fuseplan.report.html.changes import changes
from fuseplan.report.html.drawings import Drawn, drawing_json
from fuseplan.report.html.evidence import constant_rows, cost_rows, size_rows
from fuseplan.report.html.tables import Table
from fuseplan.report.html.verdicts import headline, rule_state, verdicts
from fuseplan.report.lock import Span
from fuseplan.report.places import places
from fuseplan.report.savings import Saved, fired, graphs_of, sizes_of
from fuseplan.report.text import policy_name


def view_of(comparison: Comparison) -> dict[str, Any]:
    """All that the page shows, as plain JSON values. Times are in nanoseconds, unless their name says otherwise."""
    return _View(comparison).json()


class _View:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.reports = (*comparison.reports, *([comparison.unconstrained] if comparison.unconstrained else []))
        self.strings, self.fusions, self.kernels = Table(), Table(), Table()
        drawings = comparison.evidence.drawings if comparison.evidence else ()
        self.drawn = {drawing.graph: Drawn(drawing) for drawing in drawings}
        graphs = [graph for report in self.reports for graph in report.graphs]
        self.graphs = list(dict.fromkeys([*self.drawn, *(graph.graph for graph in graphs)]))
        self.spans: list[Span] = list(dict.fromkeys([graph.range for graph in graphs])) or [*comparison.ranges]

    def json(self) -> dict[str, Any]:
        comparison, evidence = self.comparison, self.comparison.evidence
        first = comparison.reports[0] if comparison.reports else None
        view = {
            "workload": comparison.workload,
            "tp": comparison.tp,
            "device": comparison.device,
            "headline": headline(comparison),
            "prices": self._prices(),
            "ranges": [list(span) if span else None for span in self.spans],
            "rules": self._rules(),
            "policies": [self._policy(report) for report in self.reports],
            "verdicts": verdicts(comparison),
            "changes": changes(comparison),
            "misses": [self._miss(first, miss) for miss in first.near_misses] if first else [],
            "warnings": self._warnings(),
            "notes": list(comparison.notes),
            "breaks": list(comparison.breaks),
            "trace_ns": comparison.trace_ns,
            "stages": [list(each) for each in first.stages_ns.items()] if first else [],
            "recognized": sorted(first.recognized.items()) if first else [],
            "graphs": [self._graph(name) for name in self.graphs],
            "sizes": size_rows(evidence.sizes) if evidence else {"outcomes": [], "points": []},
            "costs": cost_rows(evidence.costs, self.strings, self.kernels) if evidence else [],
            "constants": constant_rows(evidence.constants) if evidence else [],
        }
        return {**view, "fusions": self.fusions.rows, "kernels": self.kernels.rows, "strings": self.strings.rows}

    def _prices(self) -> list[str]:
        """Where costs come from: `measured`, `modelled` or both."""
        rows = self.comparison.evidence.costs if self.comparison.evidence else ()
        plans = [graph.plan for report in self.reports for graph in report.graphs if graph.plan is not None]
        return sorted({row.provenance for row in rows} | {price for plan in plans for price in plan.prices})

    def _rules(self) -> list[dict[str, Any]]:
        """Every rule that is on anywhere, those that match anything first."""
        names = sorted({rule for report in self.reports for rule in report.rules})
        matched = {rule for report in self.reports for rule, count in report.matched.items() if count}
        return [{"name": name, "matched": name in matched} for name in sorted(names, key=lambda n: n not in matched)]

    def _graph(self, name: str) -> dict[str, Any]:
        drawn = self.drawn.get(name)
        return drawing_json(drawn, self.strings) if drawn else {"name": name, "segments": [], "boxes": []}

    def _policy(self, report: Report) -> dict[str, Any]:
        fused, matched = report.fused, report.matched
        names = [rule["name"] for rule in self._rules()]
        return {
            "name": policy_name(report),
            "order": list(report.order),
            "counterfactual": report is self.comparison.unconstrained,
            "force": list(report.force),
            "forbid": list(report.forbid),
            "rules": [[fused.get(name, 0), matched.get(name, 0), rule_state(report, name)] for name in names],
            "ranges": [self._range(report, span, names) for span in self.spans],
            "conflicts": [
                {
                    "winner": row.winner, "loser": row.loser, "op": row.op, "count": row.count,
                    "where": places(row.sources), "lost_us": row.lost_us, "flips_at_us": row.flips_at_us,
                }
                for row in report.conflicts
            ],
        }  # fmt: skip

    def _range(self, report: Report, span: Span, names: Sequence[str]) -> dict[str, Any]:
        graphs = graphs_of(report, span)
        saved = Saved.over(graphs)
        return {
            "rules": [[*fired(graphs, name)] for name in names],
            "saved": saved.saved_ns,
            "unfused": saved.unfused_ns,
            "sizes": [list(each) for each in sizes_of(graphs)],
            "graphs": [self._applied(graph) for graph in graphs],
            "proof": _proof(graphs),
        }

    def _applied(self, graph: GraphReport) -> dict[str, Any]:
        return {
            "graph": self.graphs.index(graph.graph),
            "applied": [[self._fusion(graph.graph, fusion), fusion.saving_ns] for fusion in graph.applied],
            "lost": [self._loss(graph.graph, loss) for loss in graph.lost],
        }

    def _loss(self, graph: str, loss: Loss) -> list[Any]:
        """[fusion, saving, lost, flips at, forbidden, winners]."""
        return [
            self._fusion(graph, loss.fusion), loss.fusion.saving_ns, loss.lost_ns, loss.flips_at_ns,
            int(loss.forbidden), [self._fusion(graph, winner) for winner in loss.blocked_by],
        ]  # fmt: skip

    def _fusion(self, graph: str, fusion: Fusion) -> int:
        """[graph, rule, op, provider, anchor, contested op, site, source, class, before, after, boxes, nodes,
        provenance].
        """
        drawn = self.drawn.get(graph)
        key = (graph, fusion.rule, fusion.op, fusion.provider, fusion.anchor, fusion.site, fusion.consumed)
        texts = (
            fusion.rule, fusion.op, fusion.provider, fusion.anchor, fusion.contested_op, fusion.site, fusion.source,
            fusion.site_class, *(fusion.rounding_change or (None, None)),
        )  # fmt: skip
        boxes = drawn.boxes_of((*fusion.consumed, fusion.site)) if drawn else ()
        return self.fusions.add(
            key,
            [
                self.graphs.index(graph), *map(self._text, texts), list(boxes), [*map(self._text, fusion.consumed)],
                self._text(fusion.provenance),
            ],
        )  # fmt: skip

    def _text(self, value: str | None) -> int:
        return -1 if value is None else self.strings.add(value)

    def _miss(self, report: Report, miss: NearMiss) -> dict[str, Any]:
        marks: dict[tuple[int, int | None, str | None], dict[str, Any]] = {}
        for graph, refusal in report.counted_in(miss):
            drawn = self.drawn.get(graph.graph)
            box = drawn.box_near(refusal.nodes, (refusal.source, refusal.site), refusal.op) if drawn else None
            index = self.graphs.index(graph.graph)
            marks.setdefault(
                (index, box, refusal.source),
                {"graph": index, "box": box, "source": refusal.source, "nodes": list(refusal.nodes)},
            )
        return {
            "rule": miss.rule, "reason": miss.reason.value, "op": miss.op, "detail": miss.detail, "count": miss.count,
            "fix": miss.fix, "nearness": miss.nearness.value, "expected": miss.expected, "found": miss.found,
            "provider": miss.provider, "where": places(miss.sources), "sites": places(miss.sites), "line": miss.line,
            "code": miss.code, "nodes": list(miss.nodes), "marks": list(marks.values()),
        }  # fmt: skip

    def _warnings(self) -> list[dict[str, Any]]:
        """Ineffective flags and selectors, and refusals of whole graphs, each once."""
        refusals = [warning for report in self.comparison.reports for warning in report.warnings]
        for report in self.comparison.reports:
            for graph in report.graphs:
                whole = (Reason.TRAINING, Reason.DISABLED, Reason.LIMIT)
                refusals += [each for each in graph.refusals if each.reason in whole and each.nearness is None]
        rows = dict.fromkeys((each.rule, each.reason.value, each.detail, each.fix) for each in refusals)
        return [dict(zip(("rule", "reason", "detail", "fix"), row, strict=True)) for row in rows]


def _proof(graphs: Iterable[GraphReport]) -> dict[str, Any] | None:
    plans = [(graph, graph.plan) for graph in graphs if graph.plan is not None]
    if not plans:
        return None
    objective, bound = sum(plan.objective_ns for _, plan in plans), sum(plan.bound_ns for _, plan in plans)
    return {
        "objective": objective,
        "bound": bound,
        "gap": (bound - objective) / max(1, abs(bound)),
        "components": sum(plan.components for _, plan in plans),
        "classes": sum(plan.classes for _, plan in plans),
        "cuts": [list(cut) for _, plan in plans for cut in plan.cuts],
        "plan_ns": sum(graph.plan_ns for graph, _ in plans),
        "digests": [plan.digest for _, plan in plans],
        "prices": sorted({price for _, plan in plans for price in plan.prices}),
    }
