"""Candidates: matches with stable names, and their conflicts and couplings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import place_of, signature_text, tensor_of
from fuseplan.matching import ExternalMatch, Match
from fuseplan.rules import Rule
from fuseplan.rules.families.sites import Site, Taken

EXTERNAL = "external"
"""The provider of other people's replacements."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """A match that could be applied, by one provider.

    Attributes:
        name: unique and the same on every rank and in every order of registration: place, rule, fused op, provider.
        rule: its rule, or the name of an external pass.
        op: the fused op.
        provider: runs the kernel; `external` for an external pass.
        match: the match.
        site: the site that it contends for; None for an external pass.
        taken: the parts of the site that it fuses; None where it fuses more than parts, or there is no site.
        others: further sites that it fuses parts of, in the order of its site's `Taken.also`.
        consumed: nodes of the original graph that disappear.
        context: nodes of the canonical graph that must stay as they are.
        re_emitted: nodes of the canonical graph that it consumes and yields again.
        source: the place in the user's model, if known.
        signature: its computation, without names: two graphs with equal signatures at equal places can share a plan.
    """

    name: str
    rule: str
    op: str
    provider: str
    match: Match | ExternalMatch
    site: Site | None
    consumed: frozenset[fx.Node]
    context: frozenset[fx.Node] = frozenset()
    re_emitted: frozenset[fx.Node] = frozenset()
    source: str | None = None
    signature: str = ""
    others: tuple[Site, ...] = ()
    taken: Taken | None = None

    @property
    def places(self) -> frozenset[int]:
        """The ordinals of its sites."""
        return frozenset(site.ordinal for site in (self.site, *self.others) if site is not None)

    @property
    def anchor(self) -> fx.Node:
        """The node that the match is named after; sorts in graph order among matches of one kind."""
        return self.match.anchor


class _Spot(NamedTuple):
    """The fields that candidates of one core share which consume the same nodes: one rule's, by every provider."""

    site: Site | None
    place: str
    claims: frozenset[fx.Node]
    context: frozenset[fx.Node]
    re_emitted: frozenset[fx.Node]
    source: str | None
    taken: Taken | None
    others: tuple[Site, ...]

    @classmethod
    def of(cls, match: Match, canonical: CanonicalGraph, by_core: Mapping[fx.Node, Site]) -> "_Spot":
        """The spot of a match."""
        site, consumed = by_core.get(match.core), frozenset(match.consumed)
        taken = site.taken(match.consumed) if site else None
        return cls(
            site=site,
            place=f"{site.ordinal:05}" if site else match.core.name,
            claims=canonical.claims(match.consumed),
            context=frozenset(v for v in match.values.values() if isinstance(v, fx.Node)) - consumed,
            re_emitted=consumed.intersection(match.outputs),
            source=place_of(match.core),
            taken=taken,
            others=tuple(by_core[core] for core, _ in taken.also) if taken else (),
        )


def _is_opt_in(match: Match | ExternalMatch) -> bool:
    return isinstance(match, Match) and match.rule.opt_in is not None


def candidates_of(
    canonical: CanonicalGraph, sites: Sequence[Site], matches: Sequence[Match], external: Sequence[ExternalMatch]
) -> tuple[Candidate, ...]:
    """Every match as a candidate, in order of name, whatever the order of the matches; those of opt-in rules come last.
    Of fusions that save the same, the earlier ones are chosen: a rule that is on unasked gives way to any other.
    """
    by_core = {site.core: site for site in sites}
    spots, texts = dict[tuple[Rule, fx.Node, tuple[fx.Node, ...]], _Spot](), dict[fx.Node, str]()
    signatures = dict[tuple[int, int], str]()  # providers of one match share its values
    result = []
    for match in matches:
        rule = match.rule
        key = rule, match.core, match.consumed
        if key not in spots:
            spots[key] = _Spot.of(match, canonical, by_core)
        spot, own = spots[key], (id(match.values), len(match.copied))
        if own not in signatures:
            signatures[own] = _signature(match, texts)
        result.append(
            Candidate(
                name=f"{spot.place} {rule.name} {rule.op.name} {match.provider}",
                rule=rule.name,
                op=rule.op.name,
                provider=match.provider,
                match=match,
                site=spot.site,
                taken=spot.taken,
                consumed=spot.claims,
                context=spot.context,
                re_emitted=spot.re_emitted,
                source=spot.source,
                signature=signatures[own],
                others=spot.others,
            )
        )
    result += [
        Candidate(
            name=f"{EXTERNAL} {other.owner.name} {other.ordinal:05}",
            rule=other.owner.name,
            op=" ".join(other.emits) or other.owner.name,
            provider=EXTERNAL,
            match=other,
            site=None,
            consumed=frozenset(other.consumed),
            source=place_of(other.anchor),
            signature=f"{other.owner.name} {' '.join(str(node.target) for node in other.consumed)}",
        )
        for other in external
    ]
    result.sort(key=lambda candidate: (_is_opt_in(candidate.match), candidate.name))
    return _unique(result)


def _unique(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    """Matches of one rule at one core, e.g. two pads of one norm, are distinguished by their order in the graph."""
    counts: dict[str, int] = {}
    for candidate in candidates:
        counts[candidate.name] = counts.get(candidate.name, 0) + 1
    if all(count == 1 for count in counts.values()):
        return tuple(candidates)
    result, seen = [], dict.fromkeys(counts, 0)
    for candidate in sorted(candidates, key=lambda c: (_is_opt_in(c.match), c.name, c.anchor._sort_key)):
        seen[candidate.name] += 1
        suffix = f" {seen[candidate.name]}" if counts[candidate.name] > 1 else ""
        result.append(replace(candidate, name=f"{candidate.name}{suffix}"))
    return tuple(result)


def _signature(match: Match, texts: dict[fx.Node, str]) -> str:
    """The signature of a match; `texts` has those of nodes so far."""
    parts = []
    for name, value in match.values.items():
        if not isinstance(value, fx.Node):
            parts += [f"{name}={value}"] if name != "group_name" else []
            continue
        if value not in texts:
            tensor = tensor_of(value)
            texts[value] = "" if tensor is None else signature_text(tensor)
        parts += [f"{name}:{texts[value]}"] if texts[value] else []
    return f"{match.rule.op.name}({', '.join(parts)}){copies_text(len(match.copied))}"


def copies_text(count: int) -> str:
    """The suffix of a name for copied results: ` + 1 copy`; empty where there are none."""
    return f" + {count} {'copy' if count == 1 else 'copies'}" if count else ""


def conflicts_of(candidates: Sequence[Candidate]) -> frozenset[tuple[int, int]]:
    """Pairs that consume a common node, or one of which consumes an input of the other without yielding it again."""
    conflicts: set[tuple[int, int]] = set()
    consumers: dict[fx.Node, list[int]] = {}
    lost: dict[fx.Node, list[int]] = {}
    for index, candidate in enumerate(candidates):
        for node in candidate.consumed:
            consumers.setdefault(node, []).append(index)
        if isinstance(candidate.match, Match):
            for node in candidate.match.consumed:
                if node not in candidate.re_emitted:
                    lost.setdefault(node, []).append(index)
    for group in set(map(tuple, consumers.values())):
        conflicts.update((i, j) for k, j in enumerate(group) for i in group[:k])
    for index, candidate in enumerate(candidates):
        for node in candidate.context:
            conflicts.update((min(index, o), max(index, o)) for o in lost.get(node, ()) if o != index)
    return frozenset(conflicts)


class Couplings(NamedTuple):
    """The couplings that rules require beside their own matches; they hold between candidates of one provider.

    Attributes:
        requires: pairs `(i, j)`: `i` only together with `j`.
        together: groups that are applied whole or not at all.
        unmet: candidates that need a rule which matches there only by other providers, and why they can't be applied.
    """

    requires: frozenset[tuple[int, int]]
    together: tuple[frozenset[int], ...]
    unmet: Mapping[int, str]


def couplings_of(candidates: Sequence[Candidate]) -> Couplings:
    """The couplings as the rules ask for them."""
    ours = [(i, c, c.match.rule) for i, c in enumerate(candidates) if isinstance(c.match, Match)]
    together: dict[tuple[str, str], set[int]] = {}
    requires: set[tuple[int, int]] = set()
    unmet: dict[int, str] = {}
    for index, candidate, rule in ours:
        if rule.together:
            together.setdefault((candidate.rule, candidate.provider), set()).add(index)
        for name in rule.requires:
            needed = [(i, each) for i, each, _ in ours if each.rule == name and _touch(candidate, each)]
            requires.update((index, i) for i, each in needed if each.provider == candidate.provider)
            met = {each.anchor for _, each in needed if each.provider == candidate.provider}
            if others := sorted({each.provider for _, each in needed if each.anchor not in met}):
                by = " and ".join(others)
                unmet[index] = f"it needs {name} by {candidate.provider}, which matches there by {by} alone"
    groups = tuple(frozenset(group) for _, group in sorted(together.items()))
    return Couplings(requires=frozenset(requires), together=groups, unmet=unmet)


def _touch(left: Candidate, right: Candidate) -> bool:
    """Whether one reads a result of the other."""
    return not (left.context.isdisjoint(right.re_emitted) and right.context.isdisjoint(left.re_emitted))
