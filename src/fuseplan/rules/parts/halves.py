"""Halves of a tensor's last dimension, as graphs spell them: slices, splits, or every other element."""

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fuseplan.graph.facts import Call, aten, is_call, tensor_of

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Half:
    """One of the two parts of a tensor's last dimension: a half, or every other element.

    Attributes:
        source: the tensor.
        index: 0 or 1.
        interleaved: whether it is every other element.
    """

    source: fx.Node
    index: int
    interleaved: bool = False


def half_of(node: object) -> Half | None:
    """The half that a node takes; None where it takes none, or the last dimension has no constant size."""
    if is_call(node, aten.slice.Tensor):
        return _sliced(node)
    if is_call(node, aten.select.int) and is_last(node.args[0], node.args[1]) and width_of(node.args[0]) == 2:
        return Half(node.args[0], int(node.args[2]), interleaved=True)
    if is_call(node, operator.getitem) and is_call(node.args[0], *SPLITS):
        source, sizes, dim = (*node.args[0].args, 0)[:3]
        width = width_of(source)
        halves = (width // 2,) * 2 if width is not None and width % 2 == 0 else None
        given = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes, sizes)
        if halves is not None and given == halves and is_last(source, dim):
            return Half(source, node.args[1])
    return None


def _sliced(node: Call) -> Half | None:
    defaults: tuple[Any, ...] = (0, None, None, 1)
    source, dim, start, end, step = *node.args, *defaults[len(node.args) - 1 :]
    width = width_of(source)
    if width is None or width % 2 or not is_last(source, dim):
        return None
    start, end = start or 0, width if end is None else end
    if step == 2:
        return Half(source, start, interleaved=True) if start in (0, 1) else None
    if step != 1 or not isinstance(end, int):
        return None
    half = width // 2
    return {(0, half): Half(source, 0), (half, width): Half(source, 1)}.get((start, min(end, width)))


def width_of(node: object) -> int | None:
    """The size of the last dimension, where it is a constant."""
    value = tensor_of(node)
    size = value.shape[-1] if value is not None and value.dim() else None
    return size if isinstance(size, int) else None


def is_last(node: object, dim: object) -> bool:
    """Whether a dimension is the last one."""
    value = tensor_of(node)
    return value is not None and dim in (-1, value.dim() - 1)
