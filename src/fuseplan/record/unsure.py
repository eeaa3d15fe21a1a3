"""Where measuring could change a plan: the deciding alternatives, and how long it takes to measure them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

SECONDS = {"cpu": 4.0}
"""Seconds that tuning takes for one alternative at one size, verifying and compiling included: measured on a norm and
pad on two busy cores, 2026-11-29.
"""
A_GPUS = 3.0
"""The seconds on a GPU, an order of magnitude: most of it is Inductor's, on the host."""


@dataclass(frozen=True, kw_only=True)
class Unsure:
    """One class of places whose prices leave open which alternative is the best.

    Attributes:
        site: the class, as cost tables have it.
        places: how many places of a graph belong to it.
        alternatives: those that could be the best, the one that is applied first; `unfused` where nothing is.
        tokens: the sizes at which they are measured.
        ahead_ns: the margin of the first over the next one, weighted over the sizes; negative where another one saves
            more, but not surely; None where a price isn't known.
        low_ns: the lower end of the interval that holds the margin in 80 of 100 cases; below zero.
        high_ns: its upper end.
        device: the profile used for pricing.
    """

    site: str
    places: int
    alternatives: tuple[str, ...]
    tokens: tuple[int, ...]
    ahead_ns: int | None
    low_ns: int | None
    high_ns: int | None
    device: str

    @property
    def tuning_s(self) -> float:
        """About how many seconds it takes to measure them."""
        return seconds_of(len({*self.alternatives, "unfused"}) * len(self.tokens), self.device)


def seconds_of(times: int, device: str) -> float:
    """About how many seconds so many measurements take on a device."""
    return times * SECONDS.get(device, A_GPUS)


def all_of(found: Iterable[Unsure]) -> tuple[Unsure, ...]:
    """Each class once, whatever the graph and the range: with all sizes, and the most places."""
    result: dict[tuple[str, tuple[str, ...]], Unsure] = {}
    for each in found:
        key = each.site, tuple(sorted(each.alternatives))
        known = result.get(key, each)
        tokens = tuple(sorted({*known.tokens, *each.tokens}))
        result[key] = replace(known, tokens=tokens, places=max(known.places, each.places))
    return tuple(result.values())
