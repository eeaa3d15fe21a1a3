"""Every match of every rule on one unmodified canonical graph, and what was refused."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import fx

from fuseplan.canonical import CanonicalGraph
from fuseplan.dialect import ops
from fuseplan.graph.facts import item, place_of
from fuseplan.graph.legality import is_convex
from fuseplan.matching.inductor import CompiledPattern
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Bindings, Rule


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
    """

    rule: Rule
    provider: str
    values: Mapping[str, Any]
    consumed: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    core: fx.Node
    rounding_change: tuple[str, str] | None = None

    @property
    def anchor(self) -> fx.Node:
        """The node of the first value that the pattern yields."""
        assert self.outputs[0] is not None
        return self.outputs[0]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What matching found.

    Attributes:
        candidates: all matches, in graph order, then by rule and fused op; the order of rules given has no influence.
        refusals: matches that a rule, the graph or the providers refused.
    """

    candidates: tuple[Match, ...] = ()
    refusals: tuple[Refusal, ...] = field(default=())


@lru_cache(maxsize=256)
def compiled_pattern(rule: Rule) -> CompiledPattern:
    """The rule's pattern for Inductor's matcher. Rules are stateless, so one serves every graph."""
    return CompiledPattern(rule.traced_pattern)


def find_matches(
    canonical: CanonicalGraph,
    rules: Mapping[str, Sequence[Rule]],
    providers: Sequence[Provider],
    device: DeviceProfile | None = None,
    *,
    allow_rounding_changes: bool = False,
) -> Matches:
    """Enumerates, without changing the graph.

    Args:
        canonical: the graph.
        rules: members by rule name.
        providers: who may run fused ops.
        device: a profile whose providers are taken as present; None: those of this machine.
        allow_rounding_changes: whether a kernel that rounds elsewhere than the graph may take its place.
    """
    available = [p for p in sorted(providers, key=lambda p: p.name) if p.unavailable(device) is None]
    candidates: list[Match] = []
    refusals: list[Refusal] = []
    for rule in (member for _, members in sorted(rules.items()) for member in members):
        pattern = compiled_pattern(rule)
        for anchor in canonical.graph.find_nodes(op="call_function", target=pattern.target):
            result = pattern.match(anchor)
            if result is None:
                continue
            found = _complete(canonical, rule, *result)
            if isinstance(found, Refusal):
                refusals.append(found)
                continue
            chosen = _providers_of(found, available, device, allow_rounding_changes)
            candidates += [found_by for found_by in chosen if isinstance(found_by, Match)]
            if not any(isinstance(each, Match) for each in chosen):
                refusals += [each for each in chosen if isinstance(each, Refusal)]
    candidates.sort(key=lambda m: (m.anchor._sort_key, m.rule.name, m.rule.op.name, m.provider))
    return Matches(candidates=tuple(candidates), refusals=tuple(refusals))


def _complete(
    canonical: CanonicalGraph, rule: Rule, values: Mapping[str, Any], found: Mapping[fx.Node, fx.Node]
) -> Match | Refusal:
    """Adds further results to what the pattern matched, and checks what a pattern can't say."""
    traced = rule.traced_pattern
    located: dict[fx.Node, fx.Node | None] = dict(found)
    for node in traced.outputs:
        if node not in located:
            producer, index = node.args
            assert node.target is operator.getitem and isinstance(producer, fx.Node) and isinstance(index, int)
            matched = located[producer]
            located[node] = item(matched, index) if matched is not None else None
    consumed = tuple(sorted(node for node in set(located.values()) if node is not None))
    outputs = tuple(located[node] for node in traced.outputs)
    core = next(target for node, target in found.items() if node.target is rule.core.overload)
    return (
        _stray_user(canonical, rule, consumed, outputs)
        or _illegal(canonical, rule, consumed, values)
        or _placed(canonical, rule, rule.check(Bindings(rule.name, values)), core)
        or Match(rule=rule, provider="", values=values, consumed=consumed, outputs=outputs, core=core)
    )


def _stray_user(
    canonical: CanonicalGraph, rule: Rule, consumed: Sequence[fx.Node], outputs: Sequence[fx.Node | None]
) -> Refusal | None:
    inside = {*consumed}
    for node in consumed:
        if node in outputs:
            continue
        for user in node.users:
            if user not in inside:
                return Refusal(
                    reason=Reason.USERS,
                    rule=rule.name,
                    op=rule.core.name,
                    detail=f"{_describe(node)} is also read by {_describe(user)}, and {rule.op.name} doesn't yield it",
                    nodes=(canonical.source_node(user).name, canonical.source_node(node).name),
                    source=place_of(user),
                )
    return None


def _illegal(
    canonical: CanonicalGraph, rule: Rule, consumed: Sequence[fx.Node], values: Mapping[str, Any]
) -> Refusal | None:
    names = tuple(canonical.source_node(node).name for node in consumed)
    if len({canonical.region[node] for node in consumed}) > 1:
        detail = "an in-place op stands between two nodes of the match"
        return _refusal(rule, Reason.MUTATION, detail, names, consumed[-1])
    inputs = [value for value in values.values() if isinstance(value, fx.Node)]
    if not is_convex(consumed, inputs):
        detail = "an input of the fused op depends on one of its results"
        return _refusal(rule, Reason.CYCLE, detail, names, consumed[-1])
    return None


def _refusal(rule: Rule, reason: Reason, detail: str, nodes: tuple[str, ...], place: fx.Node) -> Refusal:
    return Refusal(reason=reason, rule=rule.name, op=rule.core.name, detail=detail, nodes=nodes, source=place_of(place))


def _placed(canonical: CanonicalGraph, rule: Rule, refusal: Refusal | None, core: fx.Node) -> Refusal | None:
    """A rule's refusal with the names of the user's graph, and its place."""
    if refusal is None:
        return None
    by_name = {node.name: canonical.source_node(node).name for node in core.all_input_nodes}
    nodes = tuple(by_name.get(name, name) for name in refusal.nodes)
    return replace(refusal, op=rule.core.name, nodes=nodes, source=refusal.source or place_of(core))


def _providers_of(
    match: Match, available: Sequence[Provider], device: DeviceProfile | None, allow_rounding_changes: bool
) -> list[Match | Refusal]:
    """The match once for each provider that accepts its arguments; where none does, why not."""
    rule, results = match.rule, list[Match | Refusal]()
    for provider in available:
        offer = provider.offers(device).get(rule.op.name)
        if offer is None:
            continue
        refusal = offer.accepts(Bindings(rule.name, match.values))
        rounding = match.values.get("rounding")
        fits = offer.roundings is None or rounding in offer.roundings
        if refusal is not None:
            results.append(refusal)
        elif fits:
            results.append(replace(match, provider=provider.name))
        elif offer.roundings and allow_rounding_changes:
            other = min(offer.roundings)
            values = {**match.values, "rounding": other}
            change = (str(rounding), other)
            results.append(replace(match, provider=provider.name, values=values, rounding_change=change))
        else:
            computed = " or ".join(sorted(offer.roundings or ()))
            detail = f"{provider.name}'s {rule.op.name} rounds as {computed}, and the graph as {rounding}"
            refused = _refusal(rule, Reason.ROUNDING, detail, (match.core.name,), match.core)
            results.append(replace(refused, mend="set allow_rounding_changes"))
    if not results:
        detail = f"no available provider implements {rule.op.name}"
        results.append(_refusal(rule, Reason.PROVIDER, detail, (), match.core))
    return results


def missing_ops(canonical: CanonicalGraph, members: Iterable[Rule]) -> list[str]:
    """The dialect ops that every member of a rule needs and the graph doesn't have: why the rule can do nothing
    here."""
    missing: list[set[str]] = []
    for rule in members:
        calls = [ops.of(node.target) for node in rule.traced_pattern.graph.nodes if node.op == "call_function"]
        missing.append(
            {op.name for op in calls if op and not canonical.graph.find_nodes(op="call_function", target=op.overload)}
        )
    return min((sorted(names) for names in missing), key=len) if all(missing) else []


def _describe(node: fx.Node) -> str:
    op = ops.of(node.target)
    return f"{op.name if op else node.target} ({node.name})"
