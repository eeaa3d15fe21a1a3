"""The part of Inductor's graph that a match replaces."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.engines import engine_op_name
from fuseplan.graph.facts import RESHAPES, aten, fill_of, is_call, tensor_of
from fuseplan.matching import Match
from fuseplan.rules.parts import PARTS, Prologue
from fuseplan.verification.sides import Side, run_node
from fuseplan.verification.specs import concrete

ENGINE_COLLECTIVES = frozenset(name for part in PARTS if isinstance(part, Prologue) for name in part.engine_ops)
EVALUATED = frozenset(name for part in PARTS for name in part.evaluated)
"""Engine ops that verification runs as they are; the results of others are read off their sources."""
MOST_NODES = 128
"""The most nodes of a region; a larger one doesn't belong to a single fusion."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MatchedRegion(Side):
    """Nodes of the original graph between a match's inputs and its results. `outputs` has the node of each result, or
    None where no node has it.

    Attributes:
        shaped: the pattern's node of each result; the node in `outputs` may be a reshape of it.
        views: for variables that are views of the graph's own values, these views by variable, the last one first.
    """

    shaped: tuple[fx.Node | None, ...]
    views: Mapping[str, tuple[fx.Node, ...]]

    @classmethod
    def of(cls, canonical: CanonicalGraph, match: Match) -> "MatchedRegion | None":
        """The region, or None: an input that the canonical graph moved has no original."""
        bound = {name: value for name, value in match.values.items() if isinstance(value, fx.Node)}
        inputs: dict[fx.Node, str] = {}
        views: dict[str, tuple[fx.Node, ...]] = {}
        for name, node in bound.items():
            if node not in canonical.origin and fill_of(node) is not None:
                continue  # fuseplan's own constants have no original in the graph
            views[name] = tuple(_views(canonical, node))
            source = views[name][-1].args[0] if views[name] else node
            if not isinstance(source, fx.Node) or source not in canonical.origin:
                return None
            inputs.setdefault(canonical.origin[source], name)
        outputs = tuple(_original(canonical, node) if node is not None else None for node in match.outputs)
        found: set[fx.Node] = set()
        stack = [node for node in outputs if node is not None]
        while stack:
            node = stack.pop()
            if node in inputs or node in found or _is_size(node):
                continue
            if node.op != "call_function" or len(found) == MOST_NODES:
                return None
            if isinstance(node.target, HigherOrderOperator) and engine_op_name(node) not in EVALUATED:
                return None
            if isinstance(node.target, OpOverload) and node.target.name() in ENGINE_COLLECTIVES:
                return None  # a rank can't run that alone
            found.add(node)
            stack += node.all_input_nodes
        if not found:
            return None
        return cls(names=inputs, nodes=tuple(sorted(found)), outputs=outputs, shaped=match.outputs, views=views)

    def evaluate(self, arguments: Mapping[str, Any], symbols: Mapping[Any, int]) -> list[Tensor | None]:
        """The region's results.

        Args:
            arguments: arguments by variable.
            symbols: the values of symbolic sizes.
        """
        given = {**arguments, **{name: _seen(arguments[name], views, symbols) for name, views in self.views.items()}}
        values = self.run(given, symbols, call=run_node)
        return [_shaped(value, shaped, symbols) for value, shaped in zip(values, self.shaped, strict=True)]


def _views(canonical: CanonicalGraph, node: fx.Node) -> Iterator[fx.Node]:
    """The views between a node and the value of the original graph that it is made from."""
    while node not in canonical.origin and is_call(node, aten.permute.default, *RESHAPES):
        yield node
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source


def _seen(value: Any, views: Sequence[fx.Node], symbols: Mapping[Any, int]) -> Any:
    """The base of a value, with views undone."""
    for view in views:
        if is_call(view, aten.permute.default):
            dims: Any = view.args[1]
            value = value.permute([dims.index(dim) for dim in range(len(dims))])
        else:
            source = tensor_of(view.args[0])
            assert source is not None
            value = value.reshape([concrete(size, symbols) for size in source.shape])
    return value


def _original(canonical: CanonicalGraph, node: fx.Node) -> fx.Node | None:
    """The node of the original graph for a result, or for a reshape of it."""
    reshapes = [user for user in node.users if is_call(user, *RESHAPES) and user in canonical.origin]
    known = node if node in canonical.origin else reshapes[0] if reshapes else None
    return canonical.origin[known] if known is not None else None


def _shaped(value: Any, result: fx.Node | None, symbols: Mapping[Any, int]) -> Any:
    """A value in the shape of a result."""
    tensor = tensor_of(result) if result is not None else None
    if tensor is None or not isinstance(value, Tensor):
        return value
    shape = [concrete(size, symbols) for size in tensor.shape]
    return value if list(value.shape) == shape else value.reshape(shape)


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return tensor_of(node) is None and isinstance(value, (int, torch.SymInt))
