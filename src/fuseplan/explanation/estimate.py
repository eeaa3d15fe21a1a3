"""The time of a whole graph at a device's limits, to relate a saving to a step."""

import operator
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.flop_counter import flop_registry

from fuseplan.devices.hardware import Hardware
from fuseplan.graph.facts import LOW_PRECISION, RESHAPES, aten
from fuseplan.graph.regions import INVOKE
from fuseplan.planner.rows import Rows

GATHERS = (
    aten.index_put,
    aten.index_put_,
    aten.scatter,
    aten.scatter_,
    aten.copy_,
    aten.slice_scatter,
    aten.index_copy,
)
"""Ops that write a part of a tensor in place, once Inductor has lowered them: only the part moves."""


def rest_ns(graph: fx.Graph, claimed: Collection[fx.Node], hardware: Hardware, rows: Rows, tokens: int) -> int | None:
    """`sum over kernels of launch + max(bytes / bandwidth, operations / rate)` of the nodes that no fusion contends
    for.

    Products, attention and other people's ops are a kernel each. The rest is one kernel for each value that these, a
    claimed node or the output read: Inductor fuses the nodes between.

    Args:
        graph: as Inductor compiles it.
        claimed: nodes that aren't counted.
        hardware: of the device.
        rows: of the graph.
        tokens: at which size.

    Returns:
        Nanoseconds. None where an op isn't known: neither torch's nor with a formula in `torch.utils.flop_counter`.
    """
    total = 0.0
    for node in graph.nodes:
        if node.op != "call_function" or node in claimed or _is_view(node) or not isinstance(node.target, _OPS):
            continue
        if node.target is INVOKE:
            continue  # a graph of its own
        packet = getattr(node.target, "overloadpacket", None)
        if packet is None:
            return None
        sized = fx.map_arg((node.args, node.kwargs), lambda each: _sized(each, rows, tokens))
        outputs = list(_tensors(_sized_value(node.meta.get("val"), rows, tokens)))
        operations = _operations(packet, *sized, outputs)
        if operations is not None:
            inputs = list(_tensors(sized))
            read = min(sum(map(_nbytes, inputs)), operations * max((each.itemsize for each in inputs), default=0))
            low = any(each.dtype in LOW_PRECISION for each in inputs)
            rate = hardware.attention.narrow_product_rate if low else hardware.attention.product_rate
            moved = (read + sum(map(_nbytes, outputs))) / hardware.memory_bandwidth.value
            total += hardware.launch.value + max(moved, operations / rate.value)
        elif not _is_torchs(packet):
            return None
        elif _is_materialised(node, claimed):
            parts = list(_tensors(sized))[1:] if packet in GATHERS else outputs
            total += hardware.launch.value + hardware.memory_ns(2 * sum(map(_nbytes, parts)))
    return round(total)


_OPS = (OpOverload, HigherOrderOperator)


def _operations(packet: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> float | None:
    """Multiplications with their additions; None where unknown, or where the op isn't made of products."""
    name = packet.__name__
    if name.startswith("_scaled_dot_product_"):
        queries, keys = args[0], args[1]
        return float(2 * queries.numel() * keys.shape[-2])
    if name == "_grouped_mm":
        return float(outputs[0].numel() * args[0].shape[-1])
    formula = flop_registry.get(packet)
    if formula is None:
        return None
    return float(formula(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else tuple(outputs))) / 2


def _is_torchs(packet: Any) -> bool:
    return str(packet).partition(".")[0] in ("aten", "prims", "_c10d_functional", "inductor_prims")


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in RESHAPES or bool(getattr(node.target, "is_view", False))


def _is_materialised(node: fx.Node, claimed: Collection[fx.Node]) -> bool:
    """Whether a reader that Inductor doesn't fuse with the node reads it, through views."""
    for user in node.users:
        if user.op == "output" or user in claimed or (_is_view(user) and _is_materialised(user, claimed)):
            return True
        if user.target is INVOKE:
            return True
        packet = getattr(user.target, "overloadpacket", None)
        if packet is not None and (packet in flop_registry or packet in GATHERS or not _is_torchs(packet)):
            return True
        if str(packet).startswith(("aten._scaled_dot_product_", "aten._grouped_mm")):
            return True
    return False


def _sized(node: fx.Node, rows: Rows, tokens: int) -> Any:
    return _sized_value(node.meta.get("val"), rows, tokens)


def _sized_value(value: Any, rows: Rows, tokens: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_sized_value(each, rows, tokens) for each in value)
    return rows.sized(value, tokens) if isinstance(value, Tensor) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.itemsize
