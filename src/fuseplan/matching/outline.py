"""A rule's pattern as a tree of calls: cheaper to follow than its FX graph, and built once a rule."""

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from fuseplan.graph.facts import arguments, item
from fuseplan.rules import Rule
from fuseplan.rules.base import op_text


@dataclass(frozen=True, eq=False)
class Outline:
    """One call of a pattern.

    Attributes:
        target: the function that is called.
        index: which of its results is meant, None where it has one.
        name: the op's.
        is_core: whether it is the op that fusions contend for.
        inputs: calls that it reads, by the place of the argument; variables are left out.
    """

    target: Any
    index: Any
    name: str
    is_core: bool
    inputs: tuple[tuple[int, "Outline"], ...]

    @cached_property
    def size(self) -> int:
        """How many calls it is, with all that it reads."""
        return 1 + sum(part.size for _, part in self.inputs)

    def fits(self, node: fx.Node) -> bool:
        """Whether a node is this call, or the meant one of its results."""
        if self.index is None:
            return node.target is self.target
        if node.target is not operator.getitem:
            return False
        source, index = node.args
        return bool(index == self.index) and isinstance(source, fx.Node) and source.target is self.target

    def nodes(self, graph: fx.Graph) -> list[fx.Node]:
        """All fitting nodes, in graph order."""
        calls = graph.find_nodes(op="call_function", target=self.target)
        if self.index is None:
            return list(calls)
        # Most `getitem`s of a graph belong to other calls, so they are looked up from their producer.
        found = (item(call, self.index) for call in calls)
        return [node for node in found if node is not None]

    def call_of(self, node: fx.Node) -> fx.Node:
        """The call that a fitting node is, or is a result of."""
        source = node if self.index is None else node.args[0]
        assert isinstance(source, fx.Node)
        return source


def outline_of(rule: Rule) -> Outline:
    """The pattern from its anchor on."""
    return _outline(rule, rule.traced_pattern.outputs[0])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An argument that keeps calls from matching whose ops are all those of the pattern.

    Attributes:
        node: the node with the argument.
        detail: for a person.
        expected: the pattern's argument.
        found: the graph's argument.
    """

    node: fx.Node
    detail: str
    expected: str
    found: str


def difference(rule: Rule, anchor: fx.Node) -> Difference | None:
    """The first argument that differs from the pattern's constant, or from the value bound to its variable
    elsewhere.
    """
    bound: dict[fx.Node, object] = {}

    def follow(pattern: fx.Node, node: fx.Node) -> Difference | None:
        for wanted, given in zip(arguments(pattern), arguments(node), strict=False):
            if not isinstance(wanted, fx.Node):
                if wanted != given:
                    what = op_text(node.target)
                    detail = f"{what} takes {given}, and the rule has {wanted} there"
                    return Difference(node=node, detail=detail, expected=str(wanted), found=str(given))
            elif wanted.op == "placeholder":
                before = bound.setdefault(wanted, given)
                if before is not given and before != given:
                    detail = (
                        f"{wanted.name} is {before} in one place and {given} in another, and {rule.op.name} takes one"
                    )
                    return Difference(node=node, detail=detail, expected=f"{wanted.name} {before}", found=str(given))
            elif isinstance(given, fx.Node) and (found := follow(wanted, given)) is not None:
                return found
        return None

    return follow(rule.traced_pattern.outputs[0], anchor)


def _outline(rule: Rule, node: fx.Node) -> Outline:
    index: Any = None
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        node = source
    parts = [(i, arg) for i, arg in enumerate(arguments(node)) if isinstance(arg, fx.Node) and arg.op != "placeholder"]
    return Outline(
        target=node.target, index=index, name=op_text(node.target), is_core=node.target is rule.core.overload,
        inputs=tuple((place, _outline(rule, arg)) for place, arg in parts),
    )  # fmt: skip
