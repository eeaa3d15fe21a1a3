"""Where values lie in memory: what a caller sees who reads by strides, or writes to one result and looks at another."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


def copies(values: Iterable[Any]) -> list[Any]:
    """Tensors that may be written to. Strides, offsets and what shares memory are kept."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        own = storages.setdefault(storage._cdata, storage.clone())
        result = torch.empty(0, dtype=value.dtype)
        return result.set_(own, value.storage_offset(), value.size(), value.stride())

    return [copied(value) if isinstance(value, Tensor) else value for value in values]


@dataclass(frozen=True)
class Layout:
    """How values lie in memory.

    Attributes:
        strides: of each tensor, in elements; None: no tensor.
        offsets: of each tensor in its storage, in elements.
        overlapping: pairs of indices whose memory overlaps, so that who writes to one may change the other.
    """

    strides: tuple[list[int] | None, ...]
    offsets: tuple[int | None, ...]
    overlapping: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Self:
        """The layout of values as they are now."""
        tensors = {index: value for index, value in enumerate(values) if isinstance(value, Tensor)}
        spans = {index: _span(value) for index, value in tensors.items() if value.numel()}
        return cls(
            strides=tuple(strides_of(each) if isinstance(each, Tensor) else None for each in values),
            offsets=tuple(int(each.storage_offset()) if isinstance(each, Tensor) else None for each in values),
            overlapping=frozenset(
                (left, right)
                for left, (start, stop) in spans.items()
                for right, (begin, end) in spans.items()
                if left < right and start < end and begin < stop
            ),
        )

    def differences(self, *right: "Layout") -> Iterator[str]:
        """What is as in none of several layouts that are right; the first of them is named."""
        for index, (strides, offset) in enumerate(zip(self.strides, self.offsets, strict=True)):
            if all(strides != each.strides[index] for each in right):
                yield f"result {index} has the strides {strides}, not {right[0].strides[index]}"
            if all(offset != each.offsets[index] for each in right):
                yield f"result {index} begins at element {offset} of its storage, not {right[0].offsets[index]}"
        if all(self.overlapping != each.overlapping for each in right):
            for left, other in sorted(self.overlapping - right[0].overlapping):
                yield f"results {left} and {other} overlap in memory"
            for left, other in sorted(right[0].overlapping - self.overlapping):
                yield f"results {left} and {other} don't overlap in memory any more"


def strides_of(value: Tensor) -> list[int]:
    """Of the dimensions in which there is more than one element; others' mean nothing."""
    return [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]


def _span(value: Tensor) -> tuple[int, int]:
    """The first address of a tensor's elements and the one behind its last element's last byte."""
    reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (reach + 1) * value.element_size()
