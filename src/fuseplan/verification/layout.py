"""Whether what leaves a region lies in memory as the graph's own values do: strides, offsets, and what is shared."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from fuseplan.verification.compare import described


def significant_strides(tensor: Tensor) -> list[int]:
    """Of the dimensions in which there is more than one element; others' mean nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def misplaced(
    actual: Sequence[Tensor],
    wanted: Sequence[Tensor | None],
    inputs: Mapping[str, Any],
    free: Collection[int],
    given: Mapping[str, Any] | None = None,
) -> str | None:
    """How results lie in memory otherwise than the graph's own do, or None.

    Args:
        actual: what the replacement yields.
        wanted: what the graph computes; None where no node has it.
        inputs: by variable, of both.
        free: places of results whose layout nobody reads, or of which a copy is made.
        given: by variable, what the graph's own values were computed from, where that isn't `inputs`.
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
        # Only now, since arguments lie inside guarded memory: what shares theirs has an offset that nobody else sees.
        if got.storage_offset() != own.storage_offset():
            return _elsewhere(index, got, own)
        others.append((f"result {index}", got, own))
    return None


def shares(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are parts of the same memory."""
    same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    return same and left.numel() > 0 and right.numel() > 0


def _elsewhere(index: int, got: Tensor, own: Tensor) -> str:
    return f"result {index} is {_placed(got)}, and the graph's own value is {_placed(own)}"


def _placed(tensor: Tensor) -> str:
    offset = tensor.storage_offset()
    return described([tensor]) + (f" from element {offset} on" if offset else "")
