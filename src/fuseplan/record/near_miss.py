"""Near misses: refusals of places, one row a cause."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fuseplan.record.refusal import Nearness, Reason, Refusal
from fuseplan.record.serialization import JSON_NAME


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """Places at which a rule doesn't match for one cause, counted.

    Attributes:
        rule: the rule, None for a lookalike of a dialect op.
        reason: the kind of obstacle.
        op: the dialect op at the heart of it.
        detail: the first of them, for a person.
        source: the first place in the user's model.
        count: in how many places, over all graphs and ranges.
        fix: how to fix it, if known.
        nearness: how much of a match there is.
        expected: the op or condition that the pattern or predicate requires, the same in all of them.
        found: the actual op or value, the same in all of them.
        provider: who declines, if it is a provider.
        sources: all places in the user's model, of the nodes in the way.
        sites: all places of the ops that would have been fused.
        line: the line of the user's model that the first node in the way comes from, if known.
        code: the text of that line, if known.
        nodes: of the first, names of the FX nodes concerned, the one in the way first.
    """

    rule: str | None
    reason: Reason
    op: str | None
    detail: str
    source: str | None
    count: int
    fix: str | None = field(metadata={JSON_NAME: "mend"})
    nearness: Nearness
    expected: str | None = None
    found: str | None = None
    provider: str | None = None
    sources: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    line: str | None = None
    code: str | None = None
    nodes: tuple[str, ...] = ()


def near_misses_of(refusals: Iterable[Refusal]) -> tuple[NearMiss, ...]:
    """One row a cause: the nearest first, then the most frequent; ops without a provider come after fixable ones."""
    causes: dict[tuple[object, ...], list[Refusal]] = {}
    for refusal in refusals:
        causes.setdefault(cause_of(refusal), []).append(refusal)
    return tuple(sorted(map(_row, causes.values()), key=_distance))


def is_of_a_place(refusal: Refusal) -> bool:
    """Whether a refusal concerns one place, and not a whole graph or rule."""
    return refusal.nearness is not None or refusal.reason not in _OF_A_WHOLE


_OF_A_WHOLE = frozenset(
    {
        Reason.NO_EFFECT,
        Reason.TRAINING,
        Reason.DISABLED,
        Reason.UNPRICED,
        Reason.COUPLED,
        Reason.LIMIT,
        Reason.VERIFICATION,
        Reason.FAULT,
        Reason.RANKS,
        Reason.REPEATS,
        Reason.PACKAGE,
    }
)


def cause_of(refusal: Refusal | NearMiss) -> tuple[object, ...]:
    """The key of a cause: equal for refusals that differ only in places, names of nodes and symbols of sizes.

    Two lines of the model with the same op in the way are two obstacles: both have to be changed. Where no node is in
    the way, lines don't count.
    """
    nearness = refusal.nearness or Nearness.REFUSED
    in_the_way = nearness is Nearness.OBSTRUCTED or refusal.reason is Reason.USERS
    detail = _NUMBERED.sub("", refusal.detail)
    line = refusal.line if in_the_way else None
    return nearness, refusal.rule, refusal.reason, refusal.provider, detail, refusal.found, line


_NUMBERED = re.compile(r"(?<=[a-z])_\d+\b|\bs\d+\b")
"""The number in `add_12`, and that of a symbolic size."""


def _distance(row: NearMiss) -> tuple[int, bool, int, str, str]:
    nobody = row.reason is Reason.PROVIDER
    return list(Nearness).index(row.nearness), nobody, -row.count, row.rule or "", row.detail


def _row(refusals: Sequence[Refusal]) -> NearMiss:
    first = refusals[0]
    alike: dict[str, Any] = {each.name: getattr(first, each.name) for each in fields(first) if each.name != "site"}
    return NearMiss(
        **{**alike, "nearness": first.nearness or Nearness.REFUSED},
        count=len(refusals),
        sources=tuple(dict.fromkeys(refusal.source for refusal in refusals if refusal.source is not None)),
        sites=tuple(dict.fromkeys(refusal.site for refusal in refusals if refusal.site is not None)),
    )
