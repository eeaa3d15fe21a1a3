"""Counters of a static cache: each layer has one, the position of its next token, and each step advances all.

    position = arange(1) + counter;  ...;  counter.copy_(counter + 1)

Inductor makes a kernel of these for each layer, which gets in the way of that layer's own.
"""

from collections import defaultdict
from collections.abc import Sequence
from operator import getitem
from typing import Final

import torch
from torch import fx

from fuseplan.graph.facts import Call, aten, is_call, tensor_of
from fuseplan.graph.surgery import erase_dead
from fuseplan.rewriting.shared_inputs import is_fused

_ADVANCE: Final = torch.ops.aten._foreach_add.Scalar


def merge_counters(graph: fx.Graph) -> None:
    """Advances all counters in one kernel, after the fused ops, which read them as the positions of their one token.

    Args:
        graph: topologically sorted; changed in place.
    """
    groups = defaultdict[tuple[torch.device, int], list[Call]](list)
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        if is_call(write, aten.copy_.default) and _advances(write):
            counter, advanced = write.args[:2]
            groups[counter.meta["val"].device, advanced.args[1]].append(write)
    for (_, step), writes in groups.items():
        read = [_read_directly(graph, write.args[0]) for write in writes]
        if len(writes) > 1 and any(read):
            _advance_together(graph, step, writes)


def _advances(write: Call) -> bool:
    """Whether a node adds a constant to an input of one integer, in place."""
    counter, advanced = write.args[:2]
    value = tensor_of(counter)
    return (
        value is not None and value.dim() == 0 and value.dtype is torch.int64 and counter.op == "placeholder"
        and is_call(advanced, aten.add.Tensor) and not advanced.kwargs and [*advanced.users] == [write]
        and advanced.args[0] is counter and type(advanced.args[1]) is int
    )  # fmt: skip


def _read_directly(graph: fx.Graph, counter: fx.Node) -> bool:
    """Whether fused ops read `arange(1) + counter`; from now on they read the counter."""
    positions = [user for user in counter.users if _is_position(user, counter)]
    found = False
    for position in positions:
        readers = [user for user in position.users if is_fused(user)]
        if readers:
            with graph.inserting_before(position):
                same = graph.call_function(aten.reshape.default, (counter, [1]))
            same.meta = dict(position.meta)
            for reader in readers:
                reader.replace_input_with(position, same)
            erase_dead(graph, [position])
            found = True
    return found


def _is_position(node: fx.Node, counter: fx.Node) -> bool:
    """Whether a node is `arange(1) + counter`, of the counter's dtype and device."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or node.args[1] is not counter:
        return False
    zero = node.args[0]
    is_zero = is_call(zero, torch.ops.prims.iota.default) and zero.args[0] == 1 and zero.kwargs.get("start") == 0
    return is_zero and _made(zero) == _made(node) == _made(counter)


def _made(node: fx.Node) -> tuple[torch.dtype, torch.device]:
    value = node.meta["val"]
    return value.dtype, value.device


def _advance_together(graph: fx.Graph, step: int, writes: Sequence[Call]) -> None:
    counters, sums = zip(*(write.args[:2] for write in writes), strict=True)
    with graph.inserting_before(min(writes)):
        together = graph.call_function(_ADVANCE, ([*counters], step))
        together.meta["val"] = [each.meta["val"] for each in sums]
        for index, (write, advanced) in enumerate(zip(writes, sums, strict=True)):
            each = graph.call_function(getitem, (together, index))
            each.meta = dict(advanced.meta)
            write.update_arg(1, each)
            graph.erase_node(advanced)
