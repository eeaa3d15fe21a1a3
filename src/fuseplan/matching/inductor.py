"""The one place that touches Inductor's private pattern matcher."""

import operator
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    MatchContext,
    PatternExpr,
    is_match,
)

from fuseplan.rules.base import Traced


class CompiledPattern:
    """A rule's pattern as an Inductor pattern expression, rooted at its anchor.

    Every node of it may have other users (`MULTIPLE`); whether they matter is decided after the match, since a fused
    op can yield more than its first result.

    Attributes:
        target: what an anchor calls.
        expression: for `PatternMatcherPass` and its like.
        by_node: the expression of each node of the traced pattern that leads to the anchor.
    """

    def __init__(self, traced: Traced) -> None:
        self.by_node: dict[fx.Node, PatternExpr] = {}
        anchor = traced.outputs[0]
        for name, node in traced.inputs.items():
            self.by_node[node] = KeywordArg(name)
        self.expression = self._convert(anchor)
        self.target = anchor.target
        self._item = _item_of(anchor)

    def _convert(self, node: fx.Node) -> PatternExpr:
        if node not in self.by_node:
            args = fx.map_arg(node.args, self._convert)  # type: ignore[arg-type]
            assert callable(node.target)
            self.by_node[node] = CallFunction(node.target, *args, _users=MULTIPLE)
        return self.by_node[node]

    def fits(self, anchor: fx.Node) -> bool:
        """Whether a node that calls `target` can be the pattern's anchor. Most are items of something else: a look at
        what they are items of is cheaper than a match.
        """
        return self._item is None or _item_of(anchor) == self._item

    def match(self, anchor: fx.Node) -> tuple[dict[str, Any], dict[fx.Node, fx.Node]] | None:
        """Matches the pattern at `anchor`.

        Returns:
            (value by variable, graph node by pattern node), or None.
        """
        if not self.fits(anchor):
            return None
        context = MatchContext([self.expression], graph=anchor.graph)
        result = context.match(self.expression, anchor)
        if not is_match(result):
            return None
        found = {
            node: context.pattern_to_node[expression]
            for node, expression in self.by_node.items()
            if node.op == "call_function"
        }
        return dict(result.kwargs), {node: target for node, target in found.items() if target is not None}


def _item_of(node: fx.Node) -> tuple[Any, Any] | None:
    """(what the producer calls, index) of a `getitem`, None of any other node."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0].target, node.args[1]
