"""Whether a rule would match without some obstacles: they are removed from a copy of a part of the graph, which is then
raised and matched anew.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import NamedTuple

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import is_item, tensor_of
from fuseplan.graph.surgery import erase_dead
from fuseplan.matching.candidates import matches_of
from fuseplan.rules import Rule
from fuseplan.rules.parts import Prologue, part_at

MOST_TRIALS = 32
"""Sets of obstacles that are tried at one place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Way:
    """The nodes between an op and the one that should be next to it.

    Attributes:
        nodes: the obstacles, from the side of the op that should read the goal.
        goal: the op that should be read.
    """

    nodes: Sequence[fx.Node]
    goal: fx.Node

    @property
    def steps(self) -> list[tuple[fx.Node, ...]]:
        """The obstacles; one of several results of an op is one step together with that op."""
        steps: list[tuple[fx.Node, ...]] = []
        for before, node in zip((None, *self.nodes), self.nodes, strict=False):
            if is_item(before) and before.args[0] is node:
                steps[-1] = (*steps[-1], node)
            else:
                steps.append((node,))
        return steps


@dataclass(frozen=True, eq=False, kw_only=True)
class Place:
    """A place at which a rule nearly matches.

    Attributes:
        members: of the rule.
        anchor: the node at which their patterns would end.
        ways: the one in question, then those at other edges of the pattern.
        calls: the calls of the pattern that are there already.
    """

    members: Sequence[Rule]
    anchor: fx.Node
    ways: Sequence[Way]
    calls: Sequence[fx.Node] = ()


class Decisive(NamedTuple):
    """The reason why a rule doesn't match.

    Attributes:
        nodes: the fewest obstacles without which it would.
        suffices: whether nothing else is in the way; else the values between have other readers, too.
    """

    nodes: Sequence[fx.Node]
    suffices: bool


def decisive(canonical: CanonicalGraph, place: Place, likely: Sequence[fx.Node]) -> Decisive:
    """The decisive obstacles of the first way; all of them where none suffice.

    Args:
        canonical: the graph.
        place: where the rule nearly matches.
        likely: the obstacles, in the order to try them.
    """
    part, (way, *others) = _Part(canonical, place), place.ways
    elsewhere = {step[0] for each in others for step in each.steps}
    order = {node: index for index, node in enumerate(likely)}
    heads = sorted((step[0] for step in way.steps), key=lambda node: order.get(node, len(order)))
    for read_elsewhere in (True, False):
        sets = (chosen for count in range(len(heads) + 1) for chosen in combinations(heads, count))
        for chosen in islice(sets, MOST_TRIALS):
            if part.matches_without({*chosen, *elsewhere}, read_elsewhere=read_elsewhere):
                # Views that could be moved if their base had no other reader are in the way all the same.
                nodes = [node for step in way.steps if step[0] in chosen or not chosen for node in step]
                return Decisive(nodes, suffices=read_elsewhere)
    return Decisive(way.nodes, suffices=False)


class _Part:
    """The nodes of the original graph that the rule would fuse, and the nodes between."""

    def __init__(self, canonical: CanonicalGraph, place: Place) -> None:
        self.canonical, self.place = canonical, place
        on_ways = [node for way in place.ways for node in (*way.nodes, way.goal)]
        starts = canonical.claims(_with_producers([*place.calls, *(way.goal for way in place.ways)]))
        ends = canonical.claims(_with_producers([place.anchor]))
        last = max(ends, default=None)
        ahead = _reached(starts, lambda node: node.users, lambda node: last is not None and not last < node)
        between = _reached(ends, lambda node: node.all_input_nodes, ahead.__contains__)
        nodes = {*starts, *canonical.claims(_with_producers(on_ways)), *ends, *between}
        items = {user for node in nodes for user in node.users if is_item(user)}  # others may read further results
        self.nodes = sorted(nodes | items)
        self.on_ways = {canonical.origin.get(node) for node in on_ways}

    def matches_without(self, removed: Collection[fx.Node], *, read_elsewhere: bool) -> bool:
        """Whether the rule matches a copy without some steps of its ways.

        Args:
            removed: the first node of each of these steps.
            read_elsewhere: whether nodes outside the copy still read values on the ways.
        """
        graph, copies = self._copy(read_elsewhere)
        for way in self.place.ways:
            if not way.nodes:  # the goal is next to its reader, and is in the way itself
                continue
            moved_before = isinstance(part_at(way.goal), Prologue)
            heads = [copies.get(self.canonical.origin.get(step[0], step[0])) for step in way.steps]
            behind = copies.get(self.canonical.origin.get(way.goal, way.goal))
            for step, old, new in zip(way.steps, heads, [*heads[1:], behind], strict=True):
                if step[0] not in removed:
                    continue
                if old is None or new is None:
                    return False
                if moved_before:
                    _look_like(new, old.meta.get("val"))
                old.replace_all_uses_with(new)
                erase_dead(graph, [old])
        raised = self.canonical.raised_alike(graph)
        return any(refusal is None for rule in self.place.members for _, refusal in matches_of(rule, raised))

    def _copy(self, read_elsewhere: bool) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        graph, copies, inside = fx.Graph(), dict[fx.Node, fx.Node](), {*self.nodes}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in copies:
                    copies[source] = graph.placeholder(source.name)
                    copies[source].meta = dict(source.meta)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        seen = [node for node in self.nodes if read_elsewhere or node not in self.on_ways]
        graph.output(tuple(copies[node] for node in seen if not node.users.keys() <= inside))
        return graph, copies


def _with_producers(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    for node in nodes:
        yield node
        if is_item(node):
            yield node.args[0]


def _reached(
    starts: Collection[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]], admits: Callable[[fx.Node], bool]
) -> set[fx.Node]:
    stack, seen = [*starts], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in seen and node.op == "call_function" and admits(node):
            seen.add(node)
            stack.extend(onward(node))
    return seen


def _look_like(node: fx.Node, value: object) -> None:
    """Gives a node, and its elementwise inputs, another fake value: that of the op before it now."""
    before = _looks(node)
    node.meta["val"] = value
    for source in node.all_input_nodes:
        if _looks(source) == before:
            _look_like(source, value)


def _looks(node: fx.Node) -> object:
    value = tensor_of(node)
    return None if value is None else (value.dtype, tuple(map(str, value.shape)))
