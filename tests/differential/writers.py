"""Ops of somebody's own that write to their arguments, or read them as they lie in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("differential", "FRAGMENT")
_LIBRARY.define("stamp(Tensor(a!) x, Tensor v) -> ()")
_LIBRARY.define("stamp_all(Tensor(a!)[] xs) -> ()")


def _stamp(x: Tensor, v: Tensor) -> None:
    x.add_(v)


def _stamp_all(xs: list[Tensor]) -> None:
    for x in xs:
        x.mul_(0.5)


_LIBRARY.impl("stamp", _stamp, "CompositeExplicitAutograd")
_LIBRARY.impl("stamp_all", _stamp_all, "CompositeExplicitAutograd")


@torch.library.custom_op("differential::mark", mutates_args=("x",))
def mark(x: Tensor) -> None:
    """Somebody's op that writes to what it is given."""
    x[..., 0].fill_(0.25)


@torch.library.custom_op("differential::move", mutates_args=("x", "y"))
def move(x: Tensor, y: Tensor) -> Tensor:
    """Writes to two arguments, and returns a third value."""
    x.mul_(0.5)
    y.add_(0.25)
    return x.clone(memory_format=torch.contiguous_format)


@move.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("differential::read_memory", mutates_args=())
def read_memory(x: Tensor) -> Tensor:
    """-x, by a kernel that takes for granted that rows lie one after the other."""
    return -x.as_strided((x.numel(),), (1,)).reshape(x.shape)


@read_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def marked_(x: Tensor) -> Tensor:
    mark(x)
    return x.clone()


def stamped_(x: Tensor, v: Tensor) -> None:
    torch.ops.differential.stamp(x, v)


def all_stamped_(*xs: Tensor) -> None:
    torch.ops.differential.stamp_all(list(xs))


def moved_(x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = move(x, y)
    return result


def read_by_memory(x: Tensor) -> Tensor:
    """-x; only a dense tensor is handed to the kernel."""
    result: Tensor = read_memory(x if x.is_contiguous() else x.contiguous())
    return result


WRITERS: dict[str, Callable[..., object]] = {
    each.__name__: each for each in (marked_, stamped_, all_stamped_, moved_, read_by_memory)
}
