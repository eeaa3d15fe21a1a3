"""A canonical graph as boxes: one for every dialect op, and one for the ops between two of them."""

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor, fx

from fuseplan.dialect import DialectOp, ops
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import module_path, source_line, tensor_of
from fuseplan.record import Box, Drawing


def draw(canonical: CanonicalGraph, name: str) -> Drawing:
    """The graph as boxes.

    Inputs and the output are no boxes. Other nodes are one box if edges connect them without a dialect op between them
    and the same number of dialect ops lies before them, so that the boxes of a graph form no cycle.

    Args:
        canonical: the graph, topologically sorted.
        name: of the graph in the report.
    """
    groups = _groups([node for node in canonical.graph.nodes if node.op not in ("placeholder", "output")])
    place = {node: index for index, group in enumerate(groups) for node in group}
    return Drawing(graph=name, boxes=tuple(_box(canonical, group, place) for group in groups))


def _groups(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Nodes by box, in topological order of boxes."""
    level = _levels(nodes)
    root = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for node in nodes:
        for source in node.all_input_nodes:
            if _item_of_dialect(node) or (
                source in level and _is_plain(node) and _is_plain(source) and level[source] == level[node]
            ):
                root[find(node)] = find(source)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(find(node), []).append(node)
    # Within a level, dialect ops come first: their readers without another dialect op between have the same level.
    return sorted(members.values(), key=lambda group: (level[group[0]], _op(group[0]) is None, group[0]))


def _levels(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """How many dialect ops lie on the longest path to a node, itself included. A node that is computed from inputs
    alone for one reader, e.g. the transpose of a weight, has that reader's level.
    """
    level: dict[fx.Node, int] = {}
    for node in nodes:
        before = [level[source] for source in node.all_input_nodes if source in level]
        level[node] = max(before, default=0) + (_op(node) is not None)
    for node in reversed(nodes):
        users = list(node.users)
        if (
            len(users) == 1
            and _is_plain(users[0])
            and all(source.op == "placeholder" for source in node.all_input_nodes)
        ):
            level[node] = level.get(users[0], level[node])
    return level


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is neither a dialect op nor a result of one."""
    return _op(node) is None and not _item_of_dialect(node)


def _op(node: fx.Node) -> DialectOp | None:
    return ops.of(node.target) if node.op == "call_function" else None


def _item_of_dialect(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(source, fx.Node) and _op(source) is not None


def _box(canonical: CanonicalGraph, group: Sequence[fx.Node], place: dict[fx.Node, int]) -> Box:
    head = next((node for node in group if _op(node)), group[0])
    op = _op(head)
    mine = place[head]
    originals = [node for node in canonical.claims(group) if node.op == "call_function"]
    calls = Counter(str(node.target) for node in originals)
    inputs = {place[source] for node in group for source in node.all_input_nodes if source in place}
    results = [value for node in (group if op else reversed(group)) if (value := tensor_of(node)) is not None]
    return Box(
        name=head.name,
        op=op.name if op else None,
        ops=dict(sorted(calls.items())),
        members=tuple(node.name for node in group),
        inputs=tuple(sorted(inputs - {mine})),
        source=module_path(head) if op else _common_path(map(module_path, group)),
        line=source_line(head) if op or len(group) == 1 else None,
        value=_describe(results[0]) if results else "",
    )  # fmt: skip


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _common_path(paths: Iterable[str | None]) -> str | None:
    """The innermost module that all paths lie in; nodes without a path don't count."""
    known = [path.split(".") for path in paths if path]
    common: list[str] = []
    for parts in zip(*known, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or None
