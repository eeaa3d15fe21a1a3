"""What programs do through higher-order ops of torch, and views of other dtypes.

Outside of a compiled model each function does the same in plain Python, so that it can be computed without rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

from tests.helpers import llama


def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a norm's padded twin, the norm, the sum): what can be fused."""
    y, total = llama(x, residual, weight)
    return F.pad(y, (0, 8)), y, total


def padded_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, _ = llama(x, None, weight)
    return F.pad(y, (0, 8)), y


def padded_half(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 0.5
    return F.pad(y, (0, 8)), y


def either(ids: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One of two branches, which the ids choose."""
    if not torch.compiler.is_compiling():
        return (padded_norm if bool(ids.sum() % 2 == 0) else padded_half)(x, weight)
    result: tuple[Tensor, Tensor] = torch.cond(ids.sum() % 2 == 0, padded_norm, padded_half, (x, weight))
    return result


def repeated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Three norms, one after the other. x: dense."""
    padded = F.pad(x, (0, 8))
    if not torch.compiler.is_compiling():
        for _ in range(3):
            padded, x = padded_norm(x * 0.5, weight)
        return padded, x
    count = torch.zeros((), dtype=torch.int64)
    _, padded, x = while_loop(
        lambda i, padded, y: i < 3, lambda i, padded, y: (i + 1, *padded_norm(y * 0.5, weight)), (count, padded, x)
    )  # fmt: skip
    return padded, x


_nested = torch.compiler.nested_compile_region(block)


def region(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block that is compiled once, however often it is called."""
    if not torch.compiler.is_compiling():
        return block(x, residual, weight)
    result: tuple[Tensor, Tensor, Tensor] = _nested(x, residual, weight)
    return result


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def reversed_bits(x: Tensor) -> Tensor:
    """x from right to left, moved as whole numbers."""
    return x.view(_BITS[x.element_size()]).flip(-1).view(x.dtype)


def through_bytes(x: Tensor) -> Tensor:
    """A copy of x, byte by byte."""
    return x.view(torch.uint8).clone().view(x.dtype)


def cleared_bits_(x: Tensor) -> Tensor:
    """Zeroes the first column of x by a view of it as whole numbers."""
    x.view(_BITS[x.element_size()])[..., :1].zero_()
    return x + 1


STRUCTURES: dict[str, Callable[..., object]] = {
    each.__name__: each for each in (either, repeated, region, reversed_bits, through_bytes, cleared_bits_)
}
