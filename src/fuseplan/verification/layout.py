"""Whether a region's outputs keep the strides, offsets and aliasing of the graph's own values."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from fuseplan.verification.compare import described


def significant_strides(tensor: Tensor) -> list[int]:
    """The strides of dimensions with more than one element; others are meaningless."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def misplaced(
    actual: Sequence[Tensor],
    wanted: Sequence[Tensor | None],
    inputs: Mapping[str, Any],
    free: Collection[int],
    given: Mapping[str, Any] | None = None,
) -> str | None:
    """The first difference in strides, offset or aliasing from the graph's own values, or None.

    Args:
        actual: results of the replacement.
        wanted: the graph's values; None where no node has one.
        inputs: the inputs of both, by variable.
        free: indices of results whose layout nothing reads, or that are copied.
        given: the inputs of the graph's own values, by variable, if they differ from `inputs`.
    """
    others: list[tuple[str, Tensor, Tensor]]
    tensors = [(name, each, (given or inputs)[name]) for name, each in inputs.items() if isinstance(each, Tensor)]
    others = [(f"its argument {name}", each, own) for name, each, own in tensors]
    for index, (got, own) in enumerate(zip(actual, wanted, strict=True)):
        if own is None or index in free or not own.numel():
            continue
        if significant_strides(got) != significant_strides(own):
            return _elsewhere(index, got, own)
        for name, after, before in others:
            if shares(got, after) and not shares(own, before):
                return f"result {index} shares memory with {name}, and the graph's own value doesn't"
            if shares(own, before) and not shares(got, after):
                return f"result {index} shares no memory with {name}, and the graph's own value does"
        # Only now: arguments are inside guarded buffers, so offsets of their aliases differ from those in the graph.
        if got.storage_offset() != own.storage_offset():
            return _elsewhere(index, got, own)
        others.append((f"result {index}", got, own))
    return None


def shares(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors share a storage."""
    same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    return same and left.numel() > 0 and right.numel() > 0


def _elsewhere(index: int, got: Tensor, own: Tensor) -> str:
    return f"result {index} is {_placed(got)}, and the graph's own value is {_placed(own)}"


def _placed(tensor: Tensor) -> str:
    offset = tensor.storage_offset()
    return described([tensor]) + (f" from element {offset} on" if offset else "")
