"""Operands as libraries' row kernels read and write them: rows of elements side by side, by loads of 16 bytes."""

from typing import Final

from torch import Tensor

ACCESS_BYTES: Final = 16
"""Of one load or store."""


def rows_of(x: Tensor) -> Tensor:
    """[rows, width], contiguous: a view wherever it can be one."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def aligned(x: Tensor) -> Tensor:
    """x where a load may start."""
    return x if x.data_ptr() % ACCESS_BYTES == 0 else x.clone()
