"""What is planned in a graph, and what graphs and compiled functions compute."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.providers import device_profile
from fuseplan.record import GraphReport, Report
from tests.interpreted import no_code


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


def providers_of(report: GraphReport, rule: str) -> list[str]:
    """Whose kernels a rule was applied with."""
    return [fusion.provider for fusion in report.applied if fusion.rule == rule]


def run(graph: fx.Graph, *arguments: Tensor) -> Tensor:
    """The first result. Graphs take their inputs in the order in which they read them: by shapes, of which equal ones
    are in order.
    """
    left = list(arguments)
    given = []
    for node in graph.find_nodes(op="placeholder"):
        place = next(at for at, each in enumerate(left) if each.shape == node.meta["val"].shape)
        given.append(left.pop(place))
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*given)[0]  # type: ignore[no-any-return]


def compiled_and_eager(
    function: Callable[..., Any], *inputs: Any, policy: str | fuseplan.Policy, coded: bool = True, **how: Any
) -> tuple[Report, list[tuple[Tensor, Tensor]]]:
    """The report of a function that is compiled by the rules of a policy, and each tensor that it yields beside eager
    PyTorch's. What isn't to be coded is interpreted.
    """
    reports: list[Report] = []
    torch._dynamo.reset()
    with torch.inference_mode(), nullcontext() if coded else no_code():
        config = PassConfig(policy=policy)
        compiled: Any = fuseplan.compile(function, config=config, on_report=reports.append, **how)
        pairs = list(zip(tree_leaves(compiled(*inputs)), tree_leaves(function(*inputs)), strict=True))
    return reports[-1], pairs
