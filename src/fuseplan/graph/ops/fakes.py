"""Results of fake implementations."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch


def empty(x: Tensor, shape: Sequence[int | torch.SymInt], dtype: torch.dtype | None = None) -> Tensor:
    """`x.new_empty(shape, dtype=dtype)`.

    For a fake tensor the result is made as the mode makes it, but without the mode, whose cache of results takes four
    times as long where sizes are symbolic.
    """
    if type(x) is not FakeTensor:
        return x.new_empty(shape, dtype=dtype)
    with no_dispatch():
        value = torch.empty(shape, dtype=dtype or x.dtype, device="meta")
    return FakeTensor(x.fake_mode, value, x.device)


def view_of(base: FakeTensor, layout: Tensor) -> Tensor:
    """`base.as_strided(layout.shape, layout.stride(), layout.storage_offset())`, as the mode makes it without its cache
    of results, which takes twenty times as long.
    """
    return _strided(base, layout.shape, layout.stride(), layout.storage_offset())


def slice_of(base: object, *bounds: object) -> Tensor | None:
    """`aten.slice(base, dim, start, end)`, without the mode's cache; None for other arguments, or where the size isn't
    known.
    """
    if type(base) is not FakeTensor or len(bounds) != 3 or not all(type(each) is int for each in bounds):
        return None
    dim, *ends = cast(tuple[int, int, int], bounds)
    shape = list[Any](base.shape)
    if type(shape[dim]) is not int:
        return None
    first, last, _ = slice(*ends).indices(shape[dim])
    shape[dim] = max(0, last - first)
    return _strided(base, shape, base.stride(), base.storage_offset() + first * base.stride(dim))


def _strided(base: FakeTensor, shape: Sequence[Any], strides: Sequence[Any], offset: Any) -> Tensor:
    with in_kernel_invocation_manager(base.fake_mode):
        value = base.as_strided(shape, strides, offset)
    return FakeTensor(base.fake_mode, value, base.device)
