"""Between a graph's compilation and its first run: ranks settle on one plan, or on none."""

import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fuseplan.config import PassConfig
from fuseplan.distributed import Agreement, agree_in_groups
from fuseplan.distributed.agreement import apart
from fuseplan.distributed.workspace import check_workspaces, prepare
from fuseplan.errors import CollectiveError, FuseplanError
from fuseplan.record import GraphReport, Pending, Reason, Refusal, Report
from fuseplan.record.text import one_line
from fuseplan.rules import Rule
from fuseplan.verification import verify_together

Runnable = Callable[..., Any]


class AgreedGraph:
    """A compiled graph with collectives in it: its first call settles whether it is run, or the graph without fusions.

    Args:
        compiled: with this rank's fusions.
        unfused: compiles the graph without.
        apart: compiles it with the fusions that need no memory shared between ranks, given why they can't share any.
        settle: asks the other ranks.
        tell: called with a verdict that is against the fusions, or has outcomes of verification by all ranks.
    """

    def __init__(
        self, compiled: Runnable, unfused: Callable[[], Runnable], apart: Callable[[str], Runnable],
        settle: Callable[[], Agreement], tell: Callable[[Agreement], None],
    ) -> None:  # fmt: skip
        self._compiled, self._unfused, self._apart = compiled, unfused, apart
        self._settle, self._tell = settle, tell
        self._chosen: Runnable | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Runs the graph.

        Raises:
            CollectiveError: a kernel of an earlier call gave up waiting for another rank, or one was left in a kernel
                when the ranks settled.
        """
        check_workspaces()
        if self._chosen is None:
            with self._lock:
                if self._chosen is None:
                    self._chosen = self._choose()
        return self._chosen(*args)

    def _choose(self) -> Runnable:
        try:
            verdict = self._settle()
        except CollectiveError as error:
            return functools.partial(_refuse, error)
        if verdict.verified or not verdict.fused:
            self._tell(verdict)
        if verdict.apart:
            return self._planned_apart(verdict)
        return self._compiled if verdict.fused else self._unfused()

    def _planned_apart(self, verdict: Agreement) -> Runnable:
        try:
            return self._apart(verdict.reason or "")
        except FuseplanError:  # e.g. a forced fusion needs such memory
            return self._unfused()


def _refuse(error: CollectiveError, *args: Any) -> Any:
    raise error


def groups_of(report: Report) -> tuple[str, ...]:
    """The process groups whose ranks run collectives in these graphs."""
    return tuple(dict.fromkeys(group for graph in report.graphs for group in graph.groups))


def settle(gm: fx.GraphModule, report: Report, digest: str, config: PassConfig, rules: Sequence[Rule]) -> Agreement:
    """`agree_in_groups` on a graph as Dynamo made it. Ranks that agree share the memory that their kernels need, agree
    once more that they do, and verify collective kernels together.

    Args:
        gm: the graph.
        report: on it.
        digest: of this rank's fusions, or `failed(why)`.
        config: has the deadlines.
        rules: contain the report's.

    Raises:
        CollectiveError: a rank is left in a kernel that was verified.
        UnsupportedError: the groups' store doesn't answer.
    """
    groups, graph = groups_of(report), _name(gm.graph.nodes)
    ask = functools.partial(agree_in_groups, groups, deadline_s=config.agreement_timeout_s)
    verdict = ask(graph=graph, digest=digest)
    wanted = tuple(dict.fromkeys(each for found in report.graphs for each in found.workspaces))
    if verdict.fused and wanted:
        try:
            said = f"{digest} {prepare(wanted)}"
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one's answer
            said = apart(f"can't share memory: {type(error).__name__}: {one_line(error, 300)}")
        verdict = ask(graph=graph, digest=said)
    pending = pending_in([report])
    return verify_pending(pending, rules, ask, graph, config) if verdict.fused and pending else verdict


def pending_in(reports: Iterable[Report]) -> tuple[Pending, ...]:
    """The fusions that all ranks have to verify together, each once."""
    return tuple(dict.fromkeys(each for report in reports for graph in report.graphs for each in graph.pending))


def verify_pending(
    pending: Sequence[Pending], rules: Sequence[Rule], ask: Callable[..., Agreement], graph: str, config: PassConfig
) -> Agreement:
    """Verifies pending fusions, at least one, together with all ranks that agree on them.

    Args:
        pending: in the order of all ranks.
        rules: contain theirs.
        ask: `agree_in_groups` of their groups.
        graph: names the steps in the groups' store.
        config: has the deadlines.

    Returns:
        Whether all of it is right, on all ranks, with the outcomes.

    Raises:
        CollectiveError: a rank is left in a kernel that was verified.
        UnsupportedError: the groups' store doesn't answer.
    """
    steps = itertools.count()

    def meet(said: str, awaited: str) -> Agreement:
        step = f"{graph}-{next(steps)}"
        return ask(graph=step, digest=said, work_s=config.verify_timeout_s, awaited=awaited)

    verified = verify_together(pending, rules, meet, config.verify_timeout_s)
    return Agreement(fused=verified[-1].passed, reason=verified[-1].detail, verified=tuple(verified))


def digest_of(report: Report | None) -> str:
    """The digest that has to be equal on all ranks: of the applied fusions and those to verify together. None: the
    report is lost.
    """
    if report is None:
        return "unknown"
    parts = [[graph.digest, [each.common for each in graph.pending]] for graph in report.graphs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def settled(report: Report, verdict: Agreement) -> Report:
    """The report of a graph whose ranks have settled: with the outcomes of verification by all ranks, and, where they
    run it without its fusions after all, why.
    """
    report = replace(report, graphs=tuple(_verified(graph, verdict) for graph in report.graphs))
    if verdict.fused:
        return report
    refusal = Refusal(
        reason=Reason.RANKS,
        detail=f"the graph is run unfused on all ranks of its group: {verdict.reason}",
        fix="give all ranks one configuration and one cost table, and see what the rank named above reports",
    )
    if verdict.apart:
        refusal = replace(
            refusal, fix="forbid those kernels, or run the ranks of a group where they reach each other's memory",
            detail=f"the graph is planned again without kernels that share memory between ranks: {verdict.reason}",
        )  # fmt: skip
    if verdict.verified:
        wrong = verdict.verified[-1]
        refusal = replace(
            refusal, reason=Reason.VERIFICATION, rule=wrong.rule, provider=wrong.provider,
            fix=f"see what the rank named above reports, or forbid {wrong.rule}:{wrong.provider}",
        )  # fmt: skip
    graphs = tuple(
        replace(graph, applied=(), lost=(), rewritten=False, refusals=(*graph.refusals, refusal))
        for graph in report.graphs
    )
    return replace(report, graphs=graphs, warnings=(*report.warnings, refusal))


def _verified(graph: GraphReport, verdict: Agreement) -> GraphReport:
    kinds = {(each.rule, each.op, each.provider, each.signature) for each in graph.pending}
    found = [each for each in verdict.verified if (each.rule, each.op, each.provider, each.signature) in kinds]
    return replace(graph, verified=(*graph.verified, *found), pending=())


def _name(nodes: Iterable[fx.Node]) -> str:
    """The ops of a graph: ranks' graphs differ in names, constants and devices."""
    targets = [str(getattr(node.target, "__name__", node.target)) for node in nodes if node.op.startswith("call_")]
    return hashlib.sha256("\0".join(targets).encode()).hexdigest()[:16]
