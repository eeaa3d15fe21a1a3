"""Gate and up as the halves of rows of one tensor."""

from typing import Any

from torch import Tensor

from fuseplan.graph.facts import equal_size


def are_halves(gate: Tensor, up: Tensor) -> bool:
    """Whether they are the two halves of contiguous rows."""
    width, step = gate.shape[-1], gate.element_size()
    return up.data_ptr() == gate.data_ptr() + width * step and is_half(gate) and is_half(up)


def is_half(x: Tensor) -> bool:
    """Whether rows of x are halves of contiguous rows."""
    expected: Any = 2 * x.shape[-1]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if not equal_size(stride, expected) and not equal_size(size, 1):
            return False
        expected = expected * size
    return equal_size(x.stride(-1), 1)
