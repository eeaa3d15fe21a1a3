"""How much longer one call takes than another, from alternating repeats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95

EVEN = 0.01
"""As a share of a time: two times that surely differ by less count as equal."""

MOST_REPEATS = 1000
"""More aren't worth advising."""

EXACT = 40
"""Repeats up to which the signed-rank distribution is exact; beyond, it is approximated by a normal one."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The difference of two calls, repeat by repeat, so that a slow phase affects both.

    Attributes:
        difference_ns: the median of the means of all pairs of differences (Hodges and Lehmann).
        low_ns: the lower end of its 95 % confidence interval, by Wilcoxon's signed ranks. With 5 repeats it is one of
            94 %, the most that they give.
        high_ns: the upper end.
        repeats: how many there were.
    """

    difference_ns: int
    low_ns: int
    high_ns: int
    repeats: int

    @classmethod
    def of(cls, times: Sequence[int], others: Sequence[int]) -> "Paired":
        """How much longer `times` are than `others`, in ns, both by repeat."""
        differences = [time - other for time, other in zip(times, others, strict=True)]
        means = sorted((a + b) / 2 for i, a in enumerate(differences) for b in differences[i:])
        skipped = _skipped(len(differences))
        middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
        return cls(
            difference_ns=round(middle), low_ns=round(means[skipped]), high_ns=round(means[-1 - skipped]),
            repeats=len(differences),
        )  # fmt: skip

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low_ns > 0 or self.high_ns < 0

    def is_even(self, time_ns: int) -> bool:
        """Whether the difference is surely below 1 % of a time."""
        return max(abs(self.low_ns), abs(self.high_ns)) <= EVEN * time_ns

    @property
    def repeats_needed(self) -> int | None:
        """How many repeats would make the difference clear, if it stays the same; None where so many aren't
        worth it.
        """
        half = (self.high_ns - self.low_ns) / 2
        needed = math.ceil(1.2 * self.repeats * (half / max(1, abs(self.difference_ns))) ** 2)
        return max(needed, self.repeats + 1) if needed <= MOST_REPEATS else None


def _skipped(count: int) -> int:
    """How many of the sorted means lie outside of the interval, at each end."""
    tail, total = (1 - CONFIDENCE) / 2, count * (count + 1) // 2
    if count > EXACT:
        deviation = math.sqrt(total * (2 * count + 1) / 12)
        return max(0, math.floor(total / 2 + NormalDist().inv_cdf(tail) * deviation))
    ways = [1] + [0] * total
    for rank in range(1, count + 1):
        for place in range(total, rank - 1, -1):
            ways[place] += ways[place - rank]
    below = 0
    for place, each in enumerate(ways):
        below += each
        if below > tail * 2**count:
            return place
    return 0
