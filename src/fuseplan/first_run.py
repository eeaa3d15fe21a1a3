"""Between a graph's compilation and its first run: ranks settle on one plan, or on none."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fuseplan.distributed import Verdict, agree_in_groups
from fuseplan.distributed.agreement import failed
from fuseplan.distributed.workspace import check_workspaces, prepare
from fuseplan.errors import CollectiveError
from fuseplan.record import Reason, Refusal, Report

Runnable = Callable[..., Any]


class AgreedGraph:
    """A compiled graph with collectives in it: its first call settles whether it is run, or the graph without fusions.

    Args:
        compiled: with this rank's fusions.
        unfused: compiles the graph without.
        settle: asks the other ranks.
        tell: is told of a verdict against the fusions.
    """

    def __init__(
        self, compiled: Runnable, unfused: Callable[[], Runnable], settle: Callable[[], Verdict],
        tell: Callable[[Verdict], None],
    ) -> None:  # fmt: skip
        self._compiled, self._unfused, self._settle, self._tell = compiled, unfused, settle, tell
        self._chosen: Runnable | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Runs the graph.

        Raises:
            CollectiveError: a kernel of an earlier call gave up waiting for another rank.
        """
        check_workspaces()
        if self._chosen is None:
            with self._lock:
                if self._chosen is None:
                    self._chosen = self._choose()
        return self._chosen(*args)

    def _choose(self) -> Runnable:
        verdict = self._settle()
        if verdict.fused:
            return self._compiled
        self._tell(verdict)
        return self._unfused()


def groups_of(report: Report) -> tuple[str, ...]:
    """The process groups whose ranks run collectives in these graphs."""
    return tuple(dict.fromkeys(group for graph in report.graphs for group in graph.groups))


def settle(gm: fx.GraphModule, report: Report, digest: str, deadline_s: float | None) -> Verdict:
    """`agree_in_groups` on a graph as Dynamo made it. Ranks that agree share the memory that their kernels need, and
    agree once more that they do.
    """
    groups, graph = groups_of(report), _name(gm.graph.nodes)
    verdict = agree_in_groups(groups, graph=graph, digest=digest, deadline_s=deadline_s)
    wanted = tuple(dict.fromkeys(each for found in report.graphs for each in found.workspaces))
    if not verdict.fused or not wanted:
        return verdict
    try:
        prepare(wanted, torch.device("cuda", torch.cuda.current_device()))
    except CollectiveError as error:
        agree_in_groups(groups, graph=graph, digest=failed(error), deadline_s=deadline_s)
        return Verdict(fused=False, reason=str(error))
    return agree_in_groups(groups, graph=graph, digest=digest, deadline_s=deadline_s)


def digest_of(report: Report | None) -> str:
    """What has to be equal on all ranks: what is applied where. None: nobody knows any more."""
    if report is None:
        return "unknown"
    return hashlib.sha256(json.dumps([graph.digest for graph in report.graphs]).encode()).hexdigest()


def unfused(report: Report, verdict: Verdict) -> Report:
    """The report of a graph that is run without its fusions after all."""
    refusal = Refusal(
        reason=Reason.RANKS,
        detail=f"the graph is run unfused on all ranks of its group: {verdict.reason}",
        mend="give all ranks one configuration and one cost table, and look at what the rank that is named reports",
    )
    graphs = tuple(
        replace(graph, applied=(), lost=(), rewritten=False, refusals=(*graph.refusals, refusal))
        for graph in report.graphs
    )
    return replace(report, graphs=graphs, warnings=(*report.warnings, refusal))


def _name(nodes: Iterable[fx.Node]) -> str:
    """The ops of a graph: ranks' graphs differ in names, constants and devices."""
    targets = [str(getattr(node.target, "__name__", node.target)) for node in nodes if node.op.startswith("call_")]
    return hashlib.sha256("\0".join(targets).encode()).hexdigest()[:16]
