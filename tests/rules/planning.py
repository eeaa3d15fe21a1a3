"""What is planned in a graph."""

from typing import Any

from torch import fx

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.providers import device_profile
from fuseplan.record import GraphReport


def planned(
    graph: fx.Graph, device: str = "cpu", compile_range: CompileRange | None = None, verify: str = "off", **config: Any
) -> GraphReport:
    """The report of a graph, which is rewritten as for a device."""
    reports: list[Any] = []
    manager = PostGradPassManager(
        PassConfig(verify=verify, **config), device=device_profile(device), compile_range=compile_range,
        on_report=reports.append,
    )  # fmt: skip
    manager(graph)
    graph.lint()
    report: GraphReport = reports[-1].graphs[0]
    return report


def fused(report: GraphReport) -> dict[str, int]:
    """How often each op was."""
    names = [fusion.op for fusion in report.applied]
    return {name: names.count(name) for name in sorted(set(names))}
