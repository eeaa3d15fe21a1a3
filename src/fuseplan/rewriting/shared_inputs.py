"""What several fused ops read is computed once.

Inductor computes a pointwise value anew for every op that isn't pointwise and reads it, each time into memory of its
own: a mask, or the cosines of a rotary embedding, once for every layer.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import fx

from fuseplan.graph.facts import is_item, tensor_of
from fuseplan.graph.layout import memory_order
from fuseplan.graph.ops.registry import kernel_of
from fuseplan.graph.reach import is_view


def share_inputs(graph: fx.Graph) -> None:
    """Has Inductor put each value that fused ops or attention read more than once into memory, for all of them.

    Args:
        graph: topologically sorted; changed in place.
    """
    from torch._inductor.inductor_prims import force_stride_order  # takes long to import

    readers = defaultdict[fx.Node, set[fx.Node]](set)
    for node in graph.nodes:
        if is_fused(node) or _is_attention(node):
            for value in _read(node):
                readers[_root(value)].add(node)
    for value, found in readers.items():
        fake = tensor_of(value)
        if len(found) > 1 and fake is not None and _is_computed(value, fake):
            with graph.inserting_after(value):
                # Its lowering yields a buffer with these strides.
                shared = graph.call_function(force_stride_order, (value, list(fake.stride())))
            shared.meta = dict(value.meta)
            for user in [user for user in value.users if user in found or is_view(user)]:
                user.replace_input_with(value, shared)


def is_fused(node: fx.Node) -> bool:
    """Whether a node calls a fused op, in place or functionally."""
    return kernel_of(node.args[0] if "_all_bases" in node.kwargs else node.target) is not None


def _is_attention(node: fx.Node) -> bool:
    """Whether a node calls one of torch's kernels for attention, as providers do whose calls are inlined."""
    return str(node.target).startswith("aten._scaled_dot_product_")


def _read(node: fx.Node) -> Iterator[fx.Node]:
    """The values that an op only reads."""
    written = node.kwargs.get("_all_bases", ())
    assert isinstance(written, list | tuple)
    return (value for value in node.all_input_nodes if value not in written)


def _root(value: fx.Node) -> fx.Node:
    """The value of which another one is a view."""
    while is_view(value) and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def _is_computed(root: fx.Node, value: torch.Tensor) -> bool:
    """Whether Inductor may compute a value anew for each reader, and can be had to put it into memory: it is no input
    and no result of an op with several, and its strides are known and leave no gaps.
    """
    if root.op != "call_function" or is_item(root) or is_fused(root):
        return False
    return memory_order(value) is not None and all(isinstance(each, int) for each in value.stride())
