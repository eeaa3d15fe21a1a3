"""Times of a model's steps under several policies."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fuseplan.record.paired import Paired

PLAIN = "torch.compile"
"""The name, in place of a policy, of the model compiled without fuseplan."""


@dataclass(frozen=True, kw_only=True)
class PolicyTime:
    """One policy at one batch size.

    Attributes:
        policy: its text, or `torch.compile`.
        step_ns: the time of a step, the median over repeats.
        spread_ns: the interquartile range.
        fused: replacements by rule, those that fired alone; empty for `torch.compile`.
        prices: where the plan's prices are from.
        same_as: an earlier policy that applies the same fusions; the figures are its.
        beside_plain: how much longer than plain `torch.compile` it takes; None for that itself.
    """

    policy: str
    step_ns: int
    spread_ns: int
    fused: Mapping[str, int] = field(default_factory=dict)
    prices: tuple[str, ...] = ()
    same_as: str | None = None
    beside_plain: Paired | None = None


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """All policies at one batch size.

    Attributes:
        batch: sequences; a step decodes a token for each.
        steps: in one repeat.
        policies: in the order in which they are shown; the last is `torch.compile`.
    """

    batch: int
    steps: int
    policies: tuple[PolicyTime, ...]

    @property
    def plain(self) -> PolicyTime:
        """The model without fuseplan."""
        return next(each for each in self.policies if each.policy == PLAIN)

    def tokens_per_s(self, each: PolicyTime) -> float:
        """Tokens that all sequences together get in a second."""
        return self.batch * 1e9 / max(1, each.step_ns)

    def change(self, each: PolicyTime) -> float:
        """The extra time of a step over plain `torch.compile`, as a share: -0.05 is 5 % less."""
        return self._share(each.beside_plain.difference_ns) if each.beside_plain else 0.0

    def interval(self, each: PolicyTime) -> tuple[float, float]:
        """The confidence interval of `change`."""
        beside = each.beside_plain
        return (self._share(beside.low_ns), self._share(beside.high_ns)) if beside else (0.0, 0.0)

    def is_noise(self, each: PolicyTime) -> bool:
        """Whether the repeats can't distinguish it from plain `torch.compile`."""
        return each.beside_plain is None or not each.beside_plain.is_clear

    def is_even(self, each: PolicyTime) -> bool:
        """Whether the repeats show that the difference to plain `torch.compile` is below 1 %."""
        return each.beside_plain is None or each.beside_plain.is_even(self.plain.step_ns)

    def is_same(self, each: PolicyTime) -> bool:
        """Whether nothing is fused, so that Inductor makes the code of plain `torch.compile`."""
        return each.policy != PLAIN and not each.fused

    def _share(self, time_ns: int) -> float:
        return time_ns / max(1, self.plain.step_ns)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All policies at all batch sizes, from one run of one process for each rank.

    Attributes:
        workload: its name.
        tp: ranks of tensor parallelism; the slowest one counts.
        device: as its maker names it.
        torch: torch's version.
        triton: Triton's, empty where it isn't installed.
        date: of the run, ISO 8601, in UTC.
        repeats: interleaved ones; the median counts.
        batches: in ascending order.
        notes: caveats, one line each.
        command: the one that was run; empty where there was none.
    """

    workload: str
    tp: int
    device: str
    torch: str
    triton: str
    date: str
    repeats: int
    batches: tuple[BatchTimes, ...]
    notes: tuple[str, ...] = ()
    command: str = ""
