"""A compilation's report where torch's own tools look for it: structured trace artifacts, which `tlparse` lists beside
Inductor's, and the logger `fuseplan`, which `TORCH_LOGS=fuseplan` (INFO) and `TORCH_LOGS=+fuseplan` (DEBUG) switch on.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch._logging._internal import trace_structured

from fuseplan.record import GraphReport, NearMiss, Report
from fuseplan.record.plan import plan_to_json
from fuseplan.record.report import ASSUMED
from fuseplan.record.text import printable
from fuseplan.report.contract import report_to_json
from fuseplan.report.text import policy_name, tokens_of

log = logging.getLogger("fuseplan")

REPORT, PLAN = "fuseplan_report", "fuseplan_plan"
"""Names of the artifacts; both are JSON."""


def publish(report: Report) -> None:
    """Logs the report of one compilation, and puts it and its plans among torch's trace artifacts.

    INFO is one line a graph, DEBUG adds a line for each fusion, loss and near miss. Where neither a trace
    (`TORCH_TRACE`) nor the logger is on, this costs next to nothing.
    """
    for graph in report.graphs:
        if log.isEnabledFor(logging.INFO):
            log.info("%s", printable(_headline(report, graph)))
        if log.isEnabledFor(logging.DEBUG):
            for line in _lines(graph):
                log.debug("%s: %s", graph.graph, printable(line))
        if graph.plan is not None:
            _artifact(PLAN, functools.partial(plan_to_json, graph.plan))
    if log.isEnabledFor(logging.DEBUG):
        for miss in report.near_misses:
            log.debug("%s", printable(_near_miss(miss)))
    _artifact(REPORT, functools.partial(report_to_json, report))


def _artifact(name: str, content: Callable[[], dict[str, Any]]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(content()),
        expect_trace_id=False,
    )


def _headline(report: Report, graph: GraphReport) -> str:
    at = f" at {tokens_of(graph.range)} tokens" if graph.range else ""
    if not graph.matched and graph.refusals:
        return f"{graph.graph}{at}: left unfused: {graph.refusals[0].detail}"
    counts = [f"{count} {rule}" for rule, count in graph.count(report.rules).items() if count]
    applied = ", ".join(counts) or "nothing"
    saved = f"{graph.saved_ns / 1000:.1f} of {graph.unfused_ns / 1000:.1f} us"
    near = len(report.near_misses)
    cached = ", from a warm compile cache" if graph.from_cache else ""
    pending = f"; to be verified by all ranks: {len(graph.pending)}" if graph.pending else ""
    head = f"{graph.graph}{at}: {policy_name(report)} applies {applied}; saves {saved}"
    return f"{head}; near misses: {near}{cached}{pending}"


def _lines(graph: GraphReport) -> Iterator[str]:
    for fusion in graph.applied:
        how = "taken to save" if fusion.provenance == ASSUMED else "saves"
        saves = "" if fusion.saving_ns is None else f", {how} {fusion.saving_ns / 1000:.2f} us"
        yield f"applied {fusion.rule} as {fusion.op} by {fusion.provider} at {fusion.source or fusion.anchor}{saves}"
    yield from (f"{each.rule}: {each.detail}" for each in graph.verified if each.unverified)
    for loss in graph.lost:
        winners = ", ".join(dict.fromkeys(winner.rule for winner in loss.blocked_by)) or "no fusion"
        lost = "" if loss.lost_ns is None else f", {loss.lost_ns / 1000:.2f} us less with it"
        fusion = loss.fusion
        yield f"{fusion.rule} by {fusion.provider} lost to {winners} at {fusion.source or fusion.anchor}{lost}"
    stages = ", ".join(f"{stage} {time_ns / 1e6:.1f} ms" for stage, time_ns in graph.stages_ns.items())
    if stages:
        yield stages


def _near_miss(miss: NearMiss) -> str:
    where = " ".join(dict.fromkeys(part for part in (miss.source, miss.line) if part))
    fix = f"; {miss.fix}" if miss.fix else ""
    return f"near miss ({miss.nearness}) of {miss.rule or miss.op}, {miss.count} x, {where}: {miss.detail}{fix}"
