"""Costs that a provider declares for its kernels, by which a plan prices them until they are measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from fuseplan.errors import ConfigError
from fuseplan.record.text import one_line

MOST_US = 3.6e9
"""An hour: no call takes longer, so a larger number is in the wrong unit."""


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """The price of a call in the cost model, on any device:

        kernels * launch + passes * bytes / bandwidth

    `launch` and `bandwidth` are the device's (`fuseplan devices`); `bytes` counts all tensors among the arguments, each
    once, and all results that are used.

    Attributes:
        kernels: the number of kernels that a call launches, at least 1.
        passes: the number of passes over its arguments and results: 1 for a kernel that holds a row in registers.

    Raises:
        ConfigError: fewer kernels than 1, or a number of passes that isn't positive and finite.
    """

    kernels: int = 1
    passes: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.kernels, int) or isinstance(self.kernels, bool) or self.kernels < 1:
            raise ConfigError(f"kernels={self.kernels!r}: allowed are integers of at least 1")
        if not _is_number(self.passes) or not 0 < self.passes < math.inf:
            raise ConfigError(f"passes={self.passes!r}: allowed are numbers, more than 0 and finite")


Cost: TypeAlias = KernelCost | float | Callable[[Any], float]
"""A description, a number of microseconds a call, or a function of the arguments, as `Bindings`, that returns one."""


def checked_cost(cost: object) -> None:
    """Refuses a value that isn't a `Cost`.

    Raises:
        ConfigError: it isn't one; the text says what is allowed.
    """
    if cost is None or isinstance(cost, KernelCost) or (callable(cost) and not isinstance(cost, type)):
        return
    if not _is_time(cost):
        raise ConfigError(
            f"cost={cost!r}: allowed are a KernelCost, microseconds from 0 to {MOST_US:.0f}, and a function of the "
            "arguments that returns microseconds"
        )


def declared_us(cost: Callable[[Any], float] | float, m: Any, whose: str) -> float:
    """Microseconds of a call with given arguments.

    Args:
        cost: a number or a function.
        m: the arguments, as `Bindings`; tensors have no data, and all of their sizes are numbers.
        whose: provider and op, for errors.

    Raises:
        ConfigError: the function raises, or doesn't return microseconds.
    """
    if not callable(cost):
        return float(cost)
    try:
        result = cost(m)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"the cost of {whose} can't be computed: {reason}") from error
    if not _is_time(result):
        raise ConfigError(
            f"the cost of {whose} is {one_line(repr(result), 80)}: allowed are microseconds from 0 to {MOST_US:.0f}"
        )
    return float(result)


def _is_time(value: object) -> bool:
    return _is_number(value) and 0 <= value <= MOST_US  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
