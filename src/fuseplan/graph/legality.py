"""Whether a set of nodes may become one node."""

from collections.abc import Collection, Iterable, Sequence

from torch import fx


def external_inputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes outside a region that it reads, each once, in the order of their first use."""
    region = set(nodes)
    return list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in region))


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


def groups_on_cycle(graph: fx.Graph, groups: Sequence[Collection[fx.Node]]) -> list[int]:
    """Contracts each group of nodes to one and returns the groups that lie on or behind a cycle; empty if there is
    none.

    Groups can each be convex and still form a cycle together.
    """
    owner = {node: index for index, group in enumerate(groups) for node in group}

    def unit(node: fx.Node) -> object:
        return owner.get(node, node)

    units = dict.fromkeys(unit(node) for node in graph.nodes)
    successors: dict[object, set[object]] = {key: set() for key in units}
    for node in graph.nodes:
        for user in node.users:
            if unit(user) != unit(node):
                successors[unit(node)].add(unit(user))
    missing = dict.fromkeys(units, 0)
    for targets in successors.values():
        for target in targets:
            missing[target] += 1
    ready = [key for key, count in missing.items() if not count]
    while ready:
        for target in successors[ready.pop()]:
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)
    return sorted(key for key, count in missing.items() if count and isinstance(key, int))
