"""How far two computations of one model may be apart.

The exact result is the model in float64 without a cast: nothing is rounded, and fp8 values are what was quantised. A
result may be off it by a few times of what the model itself is off in its own dtypes, and by some units in the last
place, of which one is one code of fp8.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR, ULPS = 4.0, 2.0
"""Rounding errors are random: of two ways to round, each as good as the other, one may be off this much more in its
worst element. (A dialect op's own factor is 2 and one unit, for one op and many elements.)"""

FEW = 16
"""Of fewer elements, such as the scales of a few rows, the worst of one way may be lucky: twice as much is let pass.
Seed 63 has four scales behind a product in bfloat16, one of them 4.5 times as far off as the model's own worst."""


class Exact(TorchDispatchMode):
    """Runs everything in float64, whatever dtype is asked for."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CALLS:
            with self:
                return _CALLS[func](*args)
        if func is torch.ops.aten.view.dtype:
            # Bits of other numbers mean nothing: such a view is read as the values that it is of.
            return torch.ops.aten.alias.default(args[0])
        args, kwargs = torch.utils._pytree.tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _cond(pred: Any, true: Any, false: Any, operands: Any) -> Any:
    return (true if bool(pred) else false)(*operands)


def _while_loop(cond: Any, body: Any, carried: Any, additional: Any) -> Any:
    while bool(cond(*carried, *additional)):
        carried = body(*carried, *additional)
    return carried


_CALLS: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.cond: _cond,
    torch.ops.higher_order.while_loop: _while_loop,
    torch.ops.higher_order.invoke_subgraph: lambda graph, _, *operands: graph(*operands),
}
"""Higher-order ops, whose graphs have to run exactly too."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def widened(value: Any) -> Any:
    """A copy of a tensor in float64; what isn't of floating point stays as it is."""
    return value.to(_wide(value.dtype), copy=True) if isinstance(value, Tensor) else value


def exactly(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What a function yields without rounding, and its arguments as they are afterwards."""
    wide = [widened(each) for each in arguments]
    with torch.no_grad(), Exact():
        return torch.utils._pytree.tree_leaves(function(*wide)), wide


def excess(actual: Tensor, exact: Tensor, known: Sequence[Tensor]) -> float:
    """How many times more a result is off than it may be, in its worst row; 1 and less is fine.

    Errors are taken relative to the largest value of their row, so that a small row is held to its own size.

    Args:
        actual: the result.
        exact: the same, exact.
        known: the same, computed in its own dtypes in ways that are right.
    """
    if not actual.numel():
        return 0.0
    if not actual.dtype.is_floating_point:
        return 0.0 if torch.equal(actual, exact) else float("inf")
    truth = _rows(exact)
    size = truth.abs().amax(-1, keepdim=True) + torch.finfo(actual.dtype).tiny
    usual = max(_relative(each, truth, size) for each in known)
    factor = FACTOR if actual.numel() >= FEW else 2 * FACTOR
    return _relative(actual, truth, size) / (factor * usual + ULPS * torch.finfo(actual.dtype).eps)


def _rows(value: Tensor) -> Tensor:
    """[rows, elements] in float64."""
    wide = value.double()
    return wide.reshape(-1, wide.shape[-1]) if wide.dim() else wide.reshape(1, 1)


def _relative(value: Tensor, truth: Tensor, size: Tensor) -> float:
    """The largest error, in units of the largest value of its row; infinite where something is no number."""
    return float(((_rows(value) - truth).abs() / size).nan_to_num(nan=float("inf")).amax())


def same(left: Any, right: Any) -> bool:
    """Whether two results are equal bit for bit."""
    if not isinstance(left, Tensor):
        return bool(left == right)
    if left.dtype is not right.dtype or left.shape != right.shape:
        return False
    return bool(torch.equal(left.double(), right.double()))
