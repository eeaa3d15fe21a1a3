"""How sure savings are: the sources of their errors, and the alternatives that could yet be the best."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fuseplan.devices.hardware import Error
from fuseplan.planner.alternatives import compatible
from fuseplan.planner.costs import Exposure, Provenance, combined, ends
from fuseplan.planner.program import IntegerProgram


class Doubt(NamedTuple):
    """The sources of a saving's error.

    Attributes:
        exposures: of the saving at each size; empty where it counts as exact.
        weights: of the sizes.
    """

    exposures: tuple[Exposure, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def parts(self) -> list[tuple[Exposure, float]]:
        """The exposures of the weighted saving, each with its factor."""
        return list(zip(self.exposures, self.weights, strict=True)) if self.exposures else []


LEAST_NS = 50
"""The loss of a plan from which on measuring is worth it: reports round a smaller one to nothing."""

SURE = Doubt()
"""The doubt of a saving that counts as exact."""


class Price(NamedTuple):
    """The price of one candidate.

    Attributes:
        value: its saving, weighted over sizes, in ns.
        provenance: how the saving is known.
        savings: at each size; empty where unknown.
        cost: the time of its op and of the copies of its results at the middle size; None where unknown.
        doubt: of the saving.
    """

    value: int
    provenance: Provenance
    savings: tuple[int, ...]
    cost: int | None
    doubt: Doubt

    def is_sure(self, errors: Mapping[str, Error]) -> bool:
        """Whether a plan may apply it: the saving's interval stays at zero or above, or its owner vouches for it."""
        return self.provenance is Provenance.DECLARED or ends(self.value, combined(self.doubt.parts), errors)[0] >= 0


def weighted(savings: Sequence[int], unfused: Sequence[int]) -> int:
    """The mean over sizes of saving / unfused time, times the unfused time of the middle size: ns, and additive.

    Args:
        savings: by size.
        unfused: of the whole component, by size.
    """
    if len(savings) == 1:
        return savings[0]
    mean = statistics.fmean(saving / max(1, time) for saving, time in zip(savings, unfused, strict=True))
    return round(mean * unfused[len(unfused) // 2])


def weights_of(unfused: Sequence[int]) -> tuple[float, ...]:
    """The factors by which `weighted` multiplies the saving at each size.

    Args:
        unfused: of the whole component, by size.
    """
    middle, count = unfused[len(unfused) // 2], len(unfused)
    return (1.0,) if count == 1 else tuple(middle / (count * max(1, time)) for time in unfused)


def contenders(
    component: Sequence[int], structure: IntegerProgram, prices: Mapping[int, Price], errors: Mapping[str, Error]
) -> list[tuple[int, ...]]:
    """The alternatives of a component that could be the best. The one that would be applied comes first; then those
    that aren't surely behind it, and those without a known price.

    Args:
        component: its candidates.
        structure: their conflicts and couplings.
        prices: of the candidates, by the model.
        errors: of the model.
    """

    def value(subset: Iterable[int]) -> int:
        return sum(prices[index].value for index in subset)

    def parts(subset: Iterable[int], sign: int) -> list[tuple[Exposure, float]]:
        return [(each, sign * factor) for index in subset for each, factor in prices[index].doubt.parts]

    every = [(), *compatible(component, structure)]
    unpriced = {index for index in component if prices[index].provenance is Provenance.ASSUMED}
    sure = {index for index in component if prices[index].is_sure(errors)} - unpriced
    best = max((subset for subset in every if sure.issuperset(subset)), key=lambda s: (value(s), -len(s)))
    found = [best]
    for subset in every:
        if subset != best:
            ahead = value(best) - value(subset)
            between = combined([*parts(best, 1), *parts(subset, -1)])
            if not unpriced.isdisjoint(subset) or ends(ahead, between, errors)[0] < -LEAST_NS:
                found.append(subset)
    return found
