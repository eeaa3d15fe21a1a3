"""`Match`: one place at which one rule matches, and `Matches`, the result of matching."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fuseplan.graph.facts import place_of, source_code, source_line
from fuseplan.providers import Cost
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule


@dataclass(frozen=True, eq=False, kw_only=True)
class Match:
    """One place at which one rule fits.

    Attributes:
        rule: the member of the rule's family.
        provider: whose kernel would run.
        values: nodes and plain values by variable.
        consumed: the nodes that the fusion takes, in graph order.
        outputs: for each value that the pattern yields the node that has it, None where it is dead.
        core: the node of the dialect op that fusions contend for.
        rounding_change: the graph's convention and the kernel's, where the configuration lets them differ.
        cost: the cost of a call that the provider declares.
        shares: whether its kernel is collective and uses fuseplan's own workspaces.
        yields: the replacement's results, as fake tensors, for each value of the pattern: dtype, sizes and strides
            count; the storage may be another match's.
        copied: the values that a copy replaces, since a reader can tell that the fused op's own result has another
            layout than the graph promised. They have originals.
        loose: the values with another layout than promised that no reader can tell. They have originals too.
    """

    rule: Rule
    provider: str
    values: Mapping[str, Any]
    consumed: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    core: fx.Node
    rounding_change: tuple[str, str] | None = None
    cost: Cost | None = None
    shares: bool = False
    yields: tuple[Tensor, ...] = ()
    copied: tuple[fx.Node, ...] = ()
    loose: tuple[fx.Node, ...] = ()

    @property
    def anchor(self) -> fx.Node:
        """The node of the first value that the pattern yields."""
        assert self.outputs[0] is not None
        return self.outputs[0]

    @property
    def runs_reference(self) -> bool:
        """Whether the provider's kernel is the op's own reference."""
        return self.rule.op.runs_reference(self.provider)

    def but(self, **changes: Any) -> "Match":
        """`dataclasses.replace`, in a fifth of the time: there are many matches."""
        result = object.__new__(Match)
        result.__dict__.update(self.__dict__, **changes)
        return result


@dataclass(frozen=True, eq=False, kw_only=True)
class Miss:
    """One place at which one rule has all of its ops, and why it doesn't match, or not by one of the providers.

    Attributes:
        rule: the member of the rule's family.
        anchor: the node of the first value that the pattern yields.
        consumed: the nodes that the fusion would have taken.
        refusal: why.
    """

    rule: Rule
    anchor: fx.Node
    consumed: tuple[fx.Node, ...]
    refusal: Refusal


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The result of matching.

    Attributes:
        candidates: all matches, in graph order, then by rule and fused op; the order of rules given has no influence.
        misses: matches that a rule, the graph or the providers refused.
    """

    candidates: tuple[Match, ...] = ()
    misses: tuple[Miss, ...] = field(default=())

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why, for each of the misses that no provider takes."""
        return tuple(miss.refusal for miss in self.misses if miss.refusal.nearness is Nearness.REFUSED)


def refusal_of(
    match: Match, reason: Reason, detail: str, nodes: tuple[str, ...], place: fx.Node, *, expected: str | None = None,
    found: str | None = None, fix: str | None = None, provider: str | None = None,
) -> Refusal:  # fmt: skip
    """The refusal of a match that has all ops of the pattern."""
    return Refusal(
        reason=reason, rule=match.rule.name, op=match.rule.core.name, detail=detail, nodes=nodes,
        source=place_of(place), fix=fix, nearness=Nearness.REFUSED, expected=expected, found=found,
        provider=provider, site=place_of(match.core), line=source_line(place), code=source_code(place),
    )  # fmt: skip
