"""Whether a set of nodes may become one node."""

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence

from torch import fx


def external_inputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes outside a region that it reads, each once, in the order of their first use."""
    region = set(nodes)
    return list(dict.fromkeys(s for node in nodes for s in node._input_nodes if s not in region))


def is_convex(nodes: Collection[fx.Node], extra_inputs: Iterable[fx.Node] = ()) -> bool:
    """Whether no path leaves a region and enters it again, so that contracting it keeps the graph acyclic.

    Args:
        nodes: the region, of a topologically sorted graph.
        extra_inputs: nodes that the contracted node would read beside the region's own inputs.
    """
    region = set(nodes)
    inputs = [*external_inputs(nodes), *(node for node in extra_inputs if node not in region)]
    first = min(region)
    late = {node for node in inputs if first < node}
    if not late:
        return True
    last = max(late)
    stack = [user for node in region for user in node.users if user not in region]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or last < node:
            continue
        if node in late:
            return False
        seen.add(node)
        stack.extend(node.users)
    return True


def is_computed_from(node: fx.Node, other: fx.Node, most: int = 100) -> bool:
    """Whether a node of a sorted graph is known to depend on another one, by looking at a limited number of nodes.

    Args:
        node: the possible reader.
        other: the node that it may depend on.
        most: where more nodes than these lie between them, nothing is known.
    """
    stack, seen = [node], {node}
    while stack and len(seen) <= most:
        for source in stack.pop()._input_nodes:
            if source is other:
                return True
            if source not in seen and other < source:
                seen.add(source)
                stack.append(source)
    return False


class Contraction:
    """Finds groups of nodes of one graph that can't all become one node each, because of a cycle.

    Groups can each be convex and still form a cycle together.

    Args:
        graph: topologically sorted, and not changed afterwards.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self._position = {node: index for index, node in enumerate(self._nodes)}

    def cycles(self, groups: Sequence[Collection[fx.Node]]) -> list[tuple[int, ...]]:
        """For every cycle found the groups on it, ascending; no group occurs twice. Empty only if there is no cycle.

        Args:
            groups: disjoint and each of them convex. Of such groups only those whose spans in the order of the graph
                overlap can form a cycle: a path between two others can't come back.
        """
        spans = []
        for index, group in enumerate(groups):
            positions = [self._position[node] for node in group]
            spans.append((min(positions), max(positions), index))
        found: list[tuple[int, ...]] = []
        cluster: list[int] = []
        first = last = -1
        for start, end, index in sorted(spans):
            if start > last:
                found += self._cycles_within(first, last, groups, cluster)
                cluster, first = [], start
            cluster.append(index)
            last = max(last, end)
        return found + self._cycles_within(first, last, groups, cluster)

    def _cycles_within(
        self, first: int, last: int, groups: Sequence[Collection[fx.Node]], cluster: Sequence[int]
    ) -> list[tuple[int, ...]]:
        if len(cluster) < 2:
            return []
        owner: dict[fx.Node, Hashable] = {node: index for index in cluster for node in groups[index]}
        successors: dict[Hashable, dict[Hashable, None]] = {}
        for node in self._nodes[first : last + 1]:
            unit = owner.get(node, node)
            targets = successors.setdefault(unit, {})
            for user in node.users:
                if self._position[user] <= last and (target := owner.get(user, user)) != unit:
                    targets[target] = None
        _drop_acyclic(successors)
        found: list[tuple[int, ...]] = []
        used: set[int] = set()
        for index in sorted(cluster):
            if index not in used and (cycle := _shortest_cycle(successors, index)):
                found.append(cycle)
                used.update(cycle)
                for each in cycle:
                    successors.pop(each, None)
        return found


def _drop_acyclic(successors: dict[Hashable, dict[Hashable, None]]) -> None:
    """Leaves only the units on a cycle or behind one."""
    missing = dict.fromkeys(successors, 0)
    for targets in successors.values():
        for target in targets:
            missing[target] += 1
    ready = [unit for unit, count in missing.items() if not count]
    while ready:
        for target in successors.pop(ready.pop()):
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)


def _shortest_cycle(successors: dict[Hashable, dict[Hashable, None]], start: int) -> tuple[int, ...]:
    """The groups (integers among the units) on a cycle through `start` that has the fewest of them; empty if none."""
    if start not in successors:
        return ()
    parent: dict[Hashable, Hashable] = {}
    queue: deque[Hashable] = deque([start])
    done: set[Hashable] = set()
    while queue:
        unit = queue.popleft()
        if unit in done:
            continue
        done.add(unit)
        for target in successors[unit]:
            if target == start:
                path = [unit]
                while path[-1] != start:
                    path.append(parent[path[-1]])
                return tuple(sorted(each for each in path if isinstance(each, int)))
            if target in successors and target not in done:
                parent[target] = unit
                queue.append(target) if isinstance(target, int) else queue.appendleft(target)
    return ()
