"""Written graphs whose nodes come from lines and modules of a model, by which refusals can be told, and a rule."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fuseplan.dialect import DialectOp, ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten, source_code
from fuseplan.record import Reason, Refusal
from fuseplan.rules import by_name
from fuseplan.rules.base import Rule
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import randn, written

RULES = by_name(BUILT_IN_RULES)
INPUTS = {"x": randn(12, 64), "r": randn(12, 64, seed=1), "w": torch.ones(64, dtype=torch.bfloat16)}
Model = Callable[[Any, Any, Any], Any]


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


def canonical_of(model: Model, modules: Mapping[str, str] | None = None) -> CanonicalGraph:
    """The graph of a model of `INPUTS`, raised."""
    return canonicalize(placed(written(model, INPUTS), modules))


def norm(x: Any, w: Any, eps: float = 1e-5) -> Any:
    return ops.rms_norm(x, w, eps, "llama")


def look_like(canonical: CanonicalGraph, op: DialectOp, *names: str) -> Refusal:
    """Notes that nodes look like an op and aren't one, once for all of them."""
    nodes = [node for node in canonical.graph.nodes if node.name in names]
    assert len(nodes) == len(names)
    detail = f"{' and '.join(names)}: no {op.name}"
    canonical.refuse(op, nodes, Reason.OP, detail, node=nodes[0], place=nodes[0])
    return canonical.unraised[nodes[0]]


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
