"""Seeing through views and casts that do nothing."""

from collections.abc import Iterable

from torch import fx

from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import RESHAPES, aten, convert_element_type, equal_shape, mutations, tensor_of
from fuseplan.graph.layout import storage_of

SHAPE_PRESERVING = (
    *RESHAPES,
    aten.expand.default,
    aten.slice.Tensor,
    aten.clone.default,
    aten.alias.default,
    convert_element_type,
)
"""Ops that are the identity whenever neither shape nor dtype changes. (A slice of full length has step 1.)"""


def is_noop(node: fx.Node) -> bool:
    """Whether a node's value is its first argument's. A clone counts: it changes the layout, not the value."""
    if node.target in SHAPE_PRESERVING:
        before, after = tensor_of(node.args[0]), tensor_of(node)
        return before is not None and after is not None and before.dtype is after.dtype and equal_shape(before, after)
    if node.target is aten.permute.default:
        dims = node.args[1]
        return isinstance(dims, (list, tuple)) and list(dims) == list(range(len(dims)))
    return False


def eliminate_noops(canonical: CanonicalGraph) -> None:
    """Replaces every no-op by its input. A copy is no no-op where it or its source is written to, also through views:
    they differ then.
    """
    written = _storages(source for writer in mutations(canonical.graph) for source in writer.all_input_nodes)
    for node in canonical.calls(*SHAPE_PRESERVING, aten.permute.default):
        source = node.args[0]
        if isinstance(source, fx.Node) and is_noop(node) and written.isdisjoint(_storages([source, node])):
            node.replace_all_uses_with(source)
            canonical.graph.erase_node(node)


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {storage_of(value) for node in nodes if (value := tensor_of(node)) is not None}
