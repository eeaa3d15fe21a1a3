"""Which providers take the arguments of a match, and why others don't."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fuseplan.dialect import AttentionRounding, Rounding, falls_back
from fuseplan.graph.facts import tensor_of
from fuseplan.matching.match import Match, refusal_of
from fuseplan.providers import Cost, DeviceProfile, Offer, Provider
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Bindings


@dataclass(frozen=True)
class Taken:
    """A provider that takes the arguments of a match.

    Attributes:
        provider: its name.
        cost: the cost of a call that it declares.
        shares: whether its kernel is collective and uses fuseplan's own workspaces.
        rounding: the convention that it computes, where it is another than the graph's.
        change: then the graph's convention and the kernel's.
    """

    provider: str
    cost: Cost | None
    shares: bool
    rounding: str | None = None
    change: tuple[str, str] | None = None

    def of(self, match: Match) -> Match:
        """A match as this provider runs it."""
        values = match.values if self.rounding is None else {**match.values, "rounding": self.rounding}
        return match.but(
            provider=self.provider, values=values, rounding_change=self.change, cost=self.cost, shares=self.shares
        )  # fmt: skip


@dataclass(frozen=True)
class Declined:
    """Why a provider doesn't take the arguments of a match: the reason, and its text in reports."""

    provider: str
    reason: Reason
    detail: str
    expected: str | None
    found: str | None
    fix: str | None

    def of(self, match: Match) -> Refusal:
        """The refusal of a match."""
        return refusal_of(
            match, self.reason, self.detail, (match.core.name,), match.core, expected=self.expected, found=self.found,
            fix=self.fix, provider=self.provider,
        )  # fmt: skip


def offers_of(
    match: Match, available: Sequence[Provider], device: DeviceProfile | None, allow_rounding_changes: bool,
    rows_of: Callable[[Tensor], tuple[int, float]] | None,
) -> tuple[list[Taken], list[Declined]]:  # fmt: skip
    """The providers that take the arguments of a match, and why others don't: the same for all matches of a kind."""
    rule, taken, declined = match.rule, list[Taken](), list[Declined]()
    for provider in available:
        offer = provider.offers(device).get(rule.op.name)
        if offer is None:
            continue
        bindings, rounding = Bindings(rule.name, match.values), match.values.get("rounding")
        refusal = offer.accepts(bindings) or _beyond(offer, match, provider.name, rows_of)
        fits = offer.roundings is None or rounding in offer.roundings
        shares = rule.op.collective and provider.runs_alone
        near = sorted(each for each in offer.roundings or () if _differs_by_rounding(rounding, each))
        if refusal is not None:
            declined.append(
                Declined(
                    provider.name, refusal.reason, refusal.detail, refusal.expected, refusal.found, refusal.fix
                )
            )  # fmt: skip
        elif fits and offer.leaves_out is None:
            taken.append(Taken(provider.name, offer.cost, shares))
        elif (fits or near) and allow_rounding_changes:
            computed = str(rounding) if fits else near[0]
            change = (str(rounding), f"{computed}, not rounding {offer.leaves_out}" if offer.leaves_out else computed)
            taken.append(Taken(provider.name, offer.cost, shares, computed, change))
        else:
            computed = str(rounding) if fits else " or ".join(near or sorted(offer.roundings or ()))
            differences = [] if fits else [_rounds(computed, rounding)]
            differences += [f"doesn't round {offer.leaves_out}, as the graph does"] if offer.leaves_out else []
            detail = f"{provider.name}'s {rule.op.name} {'; it '.join(differences)}"
            fix = "set allow_rounding_changes" if near or fits else None
            declined.append(Declined(provider.name, Reason.ROUNDING, detail, computed, str(rounding), fix))
    return taken, declined


def unready_of(
    match: Match, unready: Sequence[tuple[Provider, Refusal]], device: DeviceProfile | None
) -> Iterator[Refusal]:
    """Why providers don't run a match whose owners say that they can't run here."""
    for provider, why in unready:
        if match.rule.op.name in provider.offers(device):
            detail = f"{provider.name} can't run here: {why.detail}"
            yield refusal_of(
                match, why.reason, detail, (match.core.name,), match.core, fix=why.fix, provider=provider.name
            )


def _beyond(
    offer: Offer, match: Match, provider: str, rows_of: Callable[[Tensor], tuple[int, float]] | None
) -> Refusal | None:
    """Why a provider can't serve the largest size, if it can't. Where its kernel leaves larger calls to the reference,
    that is the largest size that is planned for; else it is the largest that there can be.
    """
    first = next((value for node in match.values.values() if (value := _tensor(node)) is not None), None)
    if offer.most_rows is None or rows_of is None or first is None:
        return None
    held: Any = offer.most_rows(Bindings(match.rule.name, match.values))
    planned, most = rows_of(first)
    bounded = falls_back(match.rule.op.name, provider)
    if not isinstance(held, int):  # the width is dynamic
        detail = f"{provider} takes as many rows as their width lets it, and the width isn't known"
        return None if bounded else Refusal(reason=Reason.SIZE, detail=detail, fix="mark the width static")
    wanted = planned if bounded else most
    if wanted <= held:
        return None
    found = f"up to {wanted} rows" if wanted < math.inf else "any number of rows"
    has = f"the range has up to {wanted}" if most < math.inf else "nothing limits those of the graph"
    return Refusal(
        reason=Reason.SIZE, detail=f"{provider} takes up to {held} rows of this width, and {has}",
        expected=f"at most {held} rows", found=found, fix=f"end a compile range at {held} tokens",
    )  # fmt: skip


def _tensor(value: object) -> Tensor | None:
    return tensor_of(value) if isinstance(value, fx.Node) else None


def _rounds(computed: str, graph: object) -> str:
    """How a kernel rounds other than the graph, for a person."""
    if (computed, graph) == (AttentionRounding.FLOAT32, AttentionRounding.EAGER):
        return "keeps scores and their softmax in float32, and the graph rounds both"
    return f"rounds as {computed}, and the graph as {graph}"


def _differs_by_rounding(found: object, computed: str) -> bool:
    """Whether two conventions round one formula differently. Activations' have names of norms'; others aren't known."""
    if {found, computed} <= {*AttentionRounding}:
        return found != computed
    known: dict[object, Rounding] = {convention.value: convention for convention in Rounding}
    return found in known and computed in known and known[found].differs_by_rounding(known[computed])
