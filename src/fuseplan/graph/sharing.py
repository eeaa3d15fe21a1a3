"""Common subexpressions: inference graphs come with them, as when every layer's attention recomputes its mask from the
one comparison that all layers share.
"""

import functools
from typing import Any, Final

import torch
from torch import fx

from fuseplan.graph.facts import RESHAPES, aten, mutation_regions

MADE: Final = (
    aten.arange.start_step,
    aten.full.default,
    aten.scalar_tensor.default,
    torch.ops.prims.iota.default,
)
"""Ops without inputs whose results are equal for equal arguments."""

MOST_DEEP: Final = 32
"""Ops one behind the other up to which expressions are compared."""


class Shared:
    """The first of equal values.

    Args:
        graph: topologically sorted. Nodes that come later are never shared.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._region = mutation_regions(graph)
        self._first: dict[tuple[int, int], fx.Node] = {}
        self._numbers: dict[Any, int] = {}
        self._known: dict[fx.Node, int] = {}

    def first(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The first node that was asked for before and has the same value; `node` itself where there is none.

        Both, and the reader of the value, lie between the same two mutations, so that nothing was written in between.

        Args:
            node: a value.
            reader: of the value; both of the graph as it was.
        """
        region = self._region.get(node)
        if region is None or region != self._region.get(reader):
            return node
        key = region, self._number(node, 0)
        if key not in self._first or self._first[key]._erased:
            self._first[key] = node
        return self._first[key]

    def _number(self, node: fx.Node, depth: int) -> int:
        """Equal for nodes that compute the same: by ops and constants, down to inputs and to expensive ops."""
        if node not in self._known:
            if depth == MOST_DEEP or node not in self._region or not _is_cheap(node.target):
                expression: Any = node
            else:
                expression = node.target, self._frozen(node.args, depth), self._frozen(node.kwargs, depth)
            self._known[node] = self._numbers.setdefault(expression, len(self._numbers))
        return self._known[node]

    def _frozen(self, value: Any, depth: int) -> Any:
        if isinstance(value, fx.Node):
            return self._number(value, depth + 1)
        if isinstance(value, list | tuple):
            return tuple(self._frozen(each, depth) for each in value)
        if isinstance(value, dict):
            return tuple((name, self._frozen(each, depth)) for name, each in value.items())
        return type(value), repr(value)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0


@functools.lru_cache(maxsize=4096)
def _is_cheap(target: Any) -> bool:
    """Whether an op's result follows from its arguments, element by element."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return target.is_view or torch.Tag.pointwise in target.tags or target in MADE or target in RESHAPES
