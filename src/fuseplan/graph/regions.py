"""Graphs inside a graph: regions of `torch.compiler.nested_compile_region`, compiled once and called often, and the
branches and bodies of control flow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fuseplan.graph.facts import module_path


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A graph that another one calls.

    Attributes:
        module: the graph.
        places: the module path of each call, in the order of the graph.
        caller: the op that decides how often it is run; None where each call is one run.
    """

    module: fx.GraphModule
    places: tuple[str | None, ...]
    caller: str | None


def regions_of(graph: fx.Graph) -> list[Subgraph]:
    """The graphs that a graph calls, in the order of their first calls."""
    calls: dict[tuple[fx.GraphModule, str | None], list[str | None]] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            # An op that has effects is an argument of another one, with_effects.
            runs_once = INVOKE in (node.target, *node.args)
            for module in map(_module, node.args):
                if module is not None:
                    caller = None if runs_once else node.target.name()
                    calls.setdefault((module, caller), []).append(module_path(node))
    return [Subgraph(module, tuple(places), caller) for (module, caller), places in calls.items()]


INVOKE = torch.ops.higher_order.invoke_subgraph


def _module(argument: object) -> fx.GraphModule | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    found = getattr(argument.graph.owning_module, str(argument.target), None)
    return found if isinstance(found, fx.GraphModule) else None


def calls_of(graphs: Sequence[fx.GraphModule]) -> list[int]:
    """How often each of these graphs is run in one step, a region of control flow counted once for each that calls it.

    Args:
        graphs: a region before its callers, as Inductor compiles them.
    """
    counts: dict[fx.GraphModule, int] = {}
    for module in reversed(graphs):
        mine = counts.setdefault(module, 1)
        for region in regions_of(module.graph):
            times = len(region.places) if region.caller is None else 1
            counts[region.module] = counts.get(region.module, 0) + mine * times
    return [counts[module] for module in graphs]
