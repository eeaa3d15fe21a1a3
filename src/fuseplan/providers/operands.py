"""Operands in the form that libraries' row kernels need: contiguous rows, aligned to loads of 16 bytes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

from torch import Tensor

from fuseplan.dialect import DialectOp

ACCESS_BYTES: Final = 16
"""Bytes of one load or store."""


def rows_of(x: Tensor) -> Tensor:
    """[rows, width], contiguous: a view where possible."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def aligned(x: Tensor) -> Tensor:
    """x, or a copy at an address that loads may start at."""
    return x if x.data_ptr() % ACCESS_BYTES == 0 else x.clone()


def by_names(op: DialectOp, run: Callable[[Any], Any]) -> Callable[..., Any]:
    """Turns a kernel that takes an op's arguments as named attributes into one that takes them in the op's order."""
    names = op.arguments

    def kernel(*arguments: Any) -> Any:
        return run(SimpleNamespace(**dict(zip(names, arguments, strict=True))))

    return kernel
