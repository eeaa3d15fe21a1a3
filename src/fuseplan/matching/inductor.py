"""The one place that touches Inductor's private pattern matcher."""

import operator
from collections.abc import Sequence
from functools import cached_property
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
from torch._ops import OpOverload

from fuseplan.graph.facts import arguments, is_call
from fuseplan.rules.base import Traced


class CompiledPattern:
    """A rule's pattern, rooted at its anchor.

    Every node of it may have other users; whether they matter is decided after the match, since a fused op can yield
    more than its first result.

    Attributes:
        target: the function that an anchor calls.
        item: for a `getitem`, (the producer's function, index).
    """

    def __init__(self, traced: Traced) -> None:
        self._anchor = anchor = traced.outputs[0]
        self._names = {node: name for name, node in traced.inputs.items()}
        self._calls = [node for node in traced.graph.nodes if node.op == "call_function"]
        self.target, self.item = anchor.target, item_of(anchor)

    @cached_property
    def expression(self) -> PatternExpr:
        """The pattern as an Inductor pattern expression, for `PatternMatcherPass` and the like."""
        return self._by_node[self._anchor]

    @cached_property
    def _by_node(self) -> dict[fx.Node, PatternExpr]:
        """The expression of each node of the traced pattern that leads to the anchor."""
        by_node: dict[fx.Node, PatternExpr] = {node: KeywordArg(name) for node, name in self._names.items()}

        def convert(node: fx.Node) -> PatternExpr:
            if node not in by_node:
                args, kwargs = fx.map_arg((node.args, node.kwargs), convert)  # type: ignore[arg-type]
                assert callable(node.target)
                by_node[node] = CallFunction(node.target, *args, _users=MULTIPLE, **kwargs)
            return by_node[node]

        convert(self._anchor)
        return by_node

    def match(self, anchor: fx.Node) -> tuple[dict[str, Any], dict[fx.Node, fx.Node]] | None:
        """Matches the pattern at `anchor`.

        Returns:
            (value by variable, graph node by pattern node), or None.
        """
        if not self._is_plain:
            return self._match_by_inductor(anchor)
        values, found = dict[str, Any](), dict[fx.Node, fx.Node]()
        return (values, found) if self._fits(self._anchor, anchor, values, found) else None

    @cached_property
    def _is_plain(self) -> bool:
        """Whether all it calls are single overloads or items."""
        return all(node.target is operator.getitem or isinstance(node.target, OpOverload) for node in self._calls)

    @cached_property
    def _arguments(self) -> dict[fx.Node, tuple[Any, ...]]:
        return {node: arguments(node) for node in self._calls}

    def _fits(self, expected: Any, found: Any, values: dict[str, Any], nodes: dict[fx.Node, fx.Node]) -> bool:
        """Holds a plain pattern against a graph as Inductor's matcher does, which takes several times as long, and
        doesn't look at arguments by name that the pattern leaves out.
        """
        if isinstance(expected, (list, tuple)):
            return isinstance(found, (list, tuple)) and self._all_fit(expected, found, values, nodes)
        if not isinstance(expected, fx.Node):
            return not isinstance(found, fx.Node) and bool(found == expected)
        name = self._names.get(expected)
        if name is not None and name not in values:
            values[name] = found
            return True
        if name is not None:
            return bool(values[name] == found)
        if expected in nodes:
            return nodes[expected] is found
        if not is_call(found, expected.target):
            return False
        if not self._all_fit(self._arguments[expected], arguments(found), values, nodes):
            return False
        nodes[expected] = found
        return True

    def _all_fit(
        self, expected: Sequence[Any], found: Sequence[Any], values: dict[str, Any], nodes: dict[fx.Node, fx.Node]
    ) -> bool:  # fmt: skip
        return len(expected) == len(found) and all(
            self._fits(*pair, values, nodes) for pair in zip(expected, found, strict=True)
        )

    def _match_by_inductor(self, anchor: fx.Node) -> tuple[dict[str, Any], dict[fx.Node, fx.Node]] | None:
        context = MatchContext([self.expression], graph=anchor.graph)
        result = context.match(self.expression, anchor)
        if not is_match(result):
            return None
        found = {
            node: context.pattern_to_node[expression]
            for node, expression in self._by_node.items()
            if node.op == "call_function"
        }
        matched = {node: target for node, target in found.items() if target is not None}
        if not all(target.kwargs.keys() <= node.kwargs.keys() for node, target in matched.items()):
            return None  # by a name that the pattern leaves out, which the matcher doesn't look at
        return dict(result.kwargs), matched


def item_of(node: fx.Node) -> tuple[Any, Any] | None:
    """(the producer's function, index) of a `getitem`, None of any other node."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0].target, node.args[1]
