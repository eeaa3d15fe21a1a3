"""Written graphs whose nodes come from lines and modules of a model, by which refusals can be told, and a rule."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from fuseplan.dialect import ops
from fuseplan.graph.facts import aten, source_code
from fuseplan.rules.base import Rule


def placed(graph: fx.Graph, modules: Mapping[str, str] | None = None) -> fx.Graph:
    """The graph; each node gets a line of its own, whose text is the node's name, and a module where `modules` has one
    for that name.
    """
    for number, node in enumerate(graph.nodes):
        node.meta["stack_trace"] = f'  File "/somewhere/model.py", line {number}\n    {node.name}'
        if modules and node.name in modules:
            node.meta["nn_module_stack"] = {node.name: (modules[node.name], object)}
        assert source_code(node) == node.name
    return graph


def line_of(graph: fx.Graph, name: str) -> str:
    """The line of a node of such a graph, by its name."""
    return f"model.py:{[node.name for node in graph.nodes].index(name)}"


class NormAdded(Rule):
    """rms_norm -> + other, with what the norm yields."""

    name, flags, op, core = "norm_added", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, weight: Any, other: Any, eps: Any, rounding: Any) -> Any:
        y = ops.rms_norm(x, weight, eps, rounding)
        return aten.add.Tensor(y, other), y


class NormTanh(Rule):
    """rms_norm -> tanh, without what the norm yields."""

    name, flags, op, core = "norm_tanh", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return aten.tanh.default(ops.rms_norm(x, weight, eps, rounding))

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return (ops.rms_norm_pad(x, weight, eps, rounding, 0),)
