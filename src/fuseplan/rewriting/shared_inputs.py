"""Computes shared inputs of fused ops once.

Inductor recomputes a pointwise value for every reader that isn't pointwise, each time into memory of its own: a mask,
or the cosines of a rotary embedding, once for every layer.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fuseplan.graph.canonical.view import PROVENANCE
from fuseplan.graph.facts import aten, convert_element_type, equal_size, is_attention, is_call, tensor_of
from fuseplan.graph.layout import memory_order
from fuseplan.graph.ops.registry import kernel_of
from fuseplan.graph.reach import is_view


def share_inputs(graph: fx.Graph) -> None:
    """Makes Inductor materialise each pointwise value that fused ops or attention read more than once, for all readers.

    Args:
        graph: topologically sorted; changed in place.
    """
    from torch._inductor.inductor_prims import force_stride_order  # takes long to import

    readers = defaultdict[fx.Node, set[fx.Node]](set)
    for node in graph.nodes:
        if is_fused(node) or is_attention(node):
            for value in _read(node):
                readers[_root(value)].add(node)
    for value, found in readers.items():
        fake = tensor_of(value)
        if len(found) > 1 and fake is not None and _is_pointwise(value) and _has_plain_strides(fake):
            with graph.inserting_after(value):
                # Its lowering yields a buffer with these strides: the value's own, if it has one. So all readers read
                # this node: a reader that writes to a copy must not write to the others' input.
                shared = graph.call_function(force_stride_order, (value, list(fake.stride())))
            shared.meta = {key: value.meta[key] for key in (*PROVENANCE, "val") if key in value.meta}
            for user in [user for user in value.users if user is not shared]:
                user.replace_input_with(value, shared)
            _multiply(graph, value)


def _multiply(graph: fx.Graph, value: fx.Node) -> None:
    """Multiplies where a matrix product over one element is part of a pointwise value: the angles of a rotary embedding
    are positions times frequencies, and their product is a kernel of its own, with another before it.
    """
    pending, seen = [value], {value}
    while pending:
        node = pending.pop()
        for source in [each for each in node.all_input_nodes if each not in seen]:
            seen.add(source)
            if _is_outer_product(source) and all(_is_elementwise(user) for user in source.users):
                with graph.inserting_before(source):
                    product = graph.call_function(aten.mul.Tensor, source.args)
                product.meta = dict(source.meta)
                source.replace_all_uses_with(product)
                graph.erase_node(source)
            elif _is_elementwise(source):
                pending.append(source)


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a node only depends on the elements of its inputs, whatever their strides, and not on the sign of
    zeros.
    """
    is_plain_view = is_view(node) and node.target is not aten.as_strided.default
    return is_plain_view or _is_pointwise(node) or node.target is aten.cat.default


def _is_outer_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product over one element, in float32: each element is one product, rounded once."""
    if not is_call(node, aten.bmm.default, aten.mm.default) or node.kwargs:
        return False
    first = tensor_of(node.args[0])
    return first is not None and first.dtype is torch.float32 and equal_size(first.shape[-1], 1)


def called_by(node: fx.Node) -> Any:
    """The function that a node calls, in place or functionally."""
    return node.args[0] if "_all_bases" in node.kwargs else node.target


def is_fused(node: fx.Node) -> bool:
    """Whether a node calls a fused op."""
    return kernel_of(called_by(node)) is not None


def _read(node: fx.Node) -> Iterator[fx.Node]:
    """The values that an op reads without writing to them."""
    written = node.kwargs.get("_all_bases", ())
    assert isinstance(written, list | tuple)
    return (value for value in node.all_input_nodes if value not in written)


def _root(value: fx.Node) -> fx.Node:
    """The base of a view."""
    while is_view(value) and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def _is_pointwise(node: fx.Node) -> bool:
    """Whether Inductor may compute a value anew for each reader, element by element."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target.is_view:
        return False
    return torch.Tag.pointwise in target.tags or target is convert_element_type


def _has_plain_strides(value: torch.Tensor) -> bool:
    """Whether strides are known when the graph is compiled, and leave no gaps."""
    return memory_order(value) is not None and all(isinstance(each, int) for each in value.stride())
