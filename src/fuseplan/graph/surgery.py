"""Changing FX graphs: copying, erasing dead nodes, restoring topological order."""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fuseplan.graph.facts import drops_nothing, is_mutation, is_pure

COLLECTIVES = (torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default)


def copy_graph(graph: fx.Graph, *, shares_meta: bool = False) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and the original of each of its nodes. The graphs share their owning module and fake
    tensors.

    Args:
        graph: the graph.
        shares_meta: whether they share the dictionaries `Node.meta`, too, which neither may write to then.
    """
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copy_of, map_arg, append, set_plainly = copies.__getitem__, fx.map_arg, copy._root.prepend, object.__setattr__
    for node in graph.nodes:
        # `Graph.create_node`, one by one, takes twice as long, and `Graph.graph_copy` four times.
        kwargs = node.kwargs
        args, kwargs = map_arg(node.args, copy_of), map_arg(kwargs, copy_of) if kwargs else kwargs
        copies[node] = new = fx.Node(copy, node.name, node.op, node.target, args, kwargs, node.type)
        append(new)
        set_plainly(new, "meta", node.meta if shares_meta else dict(node.meta))
    copy._len = len(copies)
    copy._graph_namespace._obj_to_name = {new: node.name for node, new in copies.items()}
    copy._graph_namespace._used_names = {node.name for node in copies}
    for called, nodes in graph._find_nodes_lookup_table.table.items():
        copy._find_nodes_lookup_table.table[called] = dict.fromkeys(map(copy_of, nodes))
    copy.owning_module = graph.owning_module
    return copy, dict(zip(copies.values(), copies, strict=True))


def call_function(
    place: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, before: bool = False
) -> fx.Node:
    """A new call right after, or before, a node of a graph.

    `Graph.call_function` at a point of insertion takes twice as long: it looks for symbols among the arguments.
    """
    graph = place.graph
    names = graph._graph_namespace
    name = names.create_name(graph._target_to_str(target), None)
    node = fx.Node(graph, name, "call_function", target, args, kwargs or {})
    names._obj_to_name[node] = name
    (place.prepend if before else place.append)(node)
    graph._find_nodes_lookup_table.table["call_function", target][node] = None
    graph._len += 1
    return node


@contextmanager
def undone_on_error(graph: fx.Graph) -> Iterator[None]:
    """Restores a graph, names included, if the block that changes it raises."""
    copy = copy_graph(graph)[0]
    try:
        yield
    except Exception:
        _clear(graph)
        output = graph.graph_copy(copy, {})
        graph.output(output).meta = dict(copy.output_node().meta)
        raise


def _clear(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        for user in list(node.users):
            user.args, user.kwargs = (), {}
        graph.erase_node(node)
    graph._graph_namespace = type(graph._graph_namespace)()


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Erases those of `nodes` that no node uses, and whatever becomes unused by that.

    Nodes with side effects stay, but for functional all-reduces, which only serve their results.

    Returns:
        The erased nodes.
    """
    stack = list(nodes)
    erased: list[fx.Node] = []
    while stack:
        node = stack.pop()
        if node._erased or node.users or node.op != "call_function":
            continue
        if not is_pure(node.target) and (
            is_mutation(node) or (node.is_impure() and node.target not in COLLECTIVES and not drops_nothing(node))
        ):
            continue
        stack += node._input_nodes
        _erase(graph, node)
        erased.append(node)
    return erased


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """`graph.erase_node(node)` of a call that no other node uses, which takes 1.7 times as long: it looks for the node
    each time that it sets one of its attributes.
    """
    if getattr(graph.owning_module, "_erase_node_hooks", None):
        graph.erase_node(node)
        return
    del graph._find_nodes_lookup_table.table["call_function", node.target][node]
    node._remove_from_list()
    object.__setattr__(node, "_erased", True)
    graph._len -= 1
    kwargs = node.kwargs
    node._update_args_kwargs(fx.map_arg(node.args, _nothing), fx.map_arg(kwargs, _nothing) if kwargs else kwargs)


def _nothing(node: fx.Node) -> None:
    return None


def is_sorted(graph: fx.Graph) -> bool:
    """Whether every node comes after its inputs."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if not seen.issuperset(node._input_nodes):
            return False
        seen.add(node)
    return True


def sort_topologically(graph: fx.Graph) -> None:
    """Moves nodes so that each comes after its inputs, and otherwise leaves them in the order they are in.

    Raises:
        ValueError: the graph is cyclic; the text names nodes on the cycle.
    """
    if is_sorted(graph):
        return
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [position[node] for node in nodes if not missing[node]]
    heapq.heapify(ready)
    ordered: list[fx.Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        ordered.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, position[user])
    if len(ordered) < len(nodes):
        stuck = ", ".join(node.name for node in nodes if missing[node])
        raise ValueError(f"the graph is cyclic; nodes on or behind the cycle: {stuck[:200]}")
    cursor = graph._root
    for node in ordered:
        cursor.append(node)
        cursor = node
