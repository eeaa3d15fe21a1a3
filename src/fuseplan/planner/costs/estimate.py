"""A modelled time with the sources of its error, and the interval of a sum or a difference of such times.

Errors of different sources are independent, and one source shifts all times alike: so common errors cancel in a
difference, and those of equal layers add up.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fuseplan.devices.errors import sources_of
from fuseplan.devices.hardware import Error
from fuseplan.rules.parts.traffic import Kernel, total_ns

HALF_WIDTH = 1.2816
"""Standard deviations from the middle to either end of the interval of 80 %."""
ROW = "row "
"""The prefix of a source that is a measured row: its exposure is the standard deviation in ns."""
OWN = Error(less=1.0, more=1.0)

Exposure = Mapping[str, float]
"""The ns that err alike, by the source of the error; negative where a longer time makes the sum less."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A time, or a difference of times.

    Attributes:
        ns: the time.
        exposure: its errors, by source.
    """

    ns: int
    exposure: Exposure

    @classmethod
    def of(cls, kernels: tuple[Kernel, ...]) -> "Estimate":
        """Kernels one after the other."""
        exposure: dict[str, float] = {}
        for kernel in kernels:
            times = kernel.fixed, kernel.moved
            for names in sources_of(kernel.kind):
                for part, ns in zip(names, times, strict=True):
                    if ns:
                        exposure[part] = exposure.get(part, 0.0) + ns
        return cls(total_ns(kernels), exposure)

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.ns + other.ns, combined([(self.exposure, 1.0), (other.exposure, 1.0)]))

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.ns - other.ns, combined([(self.exposure, 1.0), (other.exposure, -1.0)]))


EXACT = Estimate(0, {})
"""No time at all."""


def combined(parts: Iterable[tuple[Exposure, float]]) -> Exposure:
    """The exposure of a sum.

    Args:
        parts: each with its factor.
    """
    result: dict[str, float] = {}
    for exposure, factor in parts:
        for source, ns in exposure.items():
            result[source] = result.get(source, 0.0) + factor * ns
    return result


def ends(value_ns: int, exposure: Exposure, errors: Mapping[str, Error]) -> tuple[int, int]:
    """The ends of the interval that holds a value in 80 of 100 cases, in ns.

    Args:
        value_ns: as modelled or measured.
        exposure: of the value.
        errors: of the device.
    """
    below = above = 0.0
    for source, ns in exposure.items():
        error = OWN if source.startswith(ROW) else errors.get(source)
        if error is not None:
            less, more = (error.less, error.more) if ns >= 0 else (error.more, error.less)
            below += (ns * less) ** 2
            above += (ns * more) ** 2
    return round(value_ns - HALF_WIDTH * math.sqrt(below)), round(value_ns + HALF_WIDTH * math.sqrt(above))
