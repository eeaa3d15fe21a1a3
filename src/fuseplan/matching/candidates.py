"""Every match of every rule on one unmodified canonical graph, and every refusal."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import (
    group_size,
    is_call,
    is_functionalized,
    is_mutation,
    item,
    place_of,
    source_code,
    source_line,
    targets_of,
    tensor_of,
)
from fuseplan.graph.layout import storage_of
from fuseplan.graph.legality import external_inputs, is_convex
from fuseplan.graph.reach import strided_reader
from fuseplan.matching.external import ExternalMatch
from fuseplan.matching.inductor import CompiledPattern, item_of
from fuseplan.matching.layouts import Kind, Layouts, Unkept
from fuseplan.matching.match import Match, Matches, Miss, refusal_of
from fuseplan.matching.offers import Declined, Taken, offers_of, unready_of
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Bindings, Rule
from fuseplan.rules.base import op_text


def compiled_pattern(rule: Rule) -> CompiledPattern:
    """The rule's pattern, made ready to be matched."""
    return CompiledPattern(rule.traced_pattern)


def find_matches(
    canonical: CanonicalGraph,
    rules: Mapping[str, Sequence[Rule]],
    providers: Sequence[Provider],
    device: DeviceProfile | None = None,
    *,
    allow_rounding_changes: bool = False,
    rows_of: Callable[[Tensor], tuple[int, float]] | None = None,
    external: Sequence[ExternalMatch] = (),
) -> Matches:
    """Enumerates, without changing the graph.

    Args:
        canonical: the graph.
        rules: members by rule name.
        providers: those that may run fused ops.
        device: a profile whose providers are assumed present; None: this machine's providers.
        allow_rounding_changes: whether a kernel that rounds elsewhere than the graph may take its place.
        rows_of: up to how many rows of a tensor of the graph are planned for, and how many it has at most, infinity
            where nothing limits them; None: nobody asks.
        external: matches of other people's passes, whose replacements may depend on layouts.
    """
    outside = {node: match.anchor for match in external for node in external_inputs(match.consumed)}
    layouts = Layouts.of(canonical, outside)
    asked = [(each, each.unavailable(device)) for each in sorted(providers, key=lambda each: each.name)]
    available = [provider for provider, why in asked if why is None]
    unready = [(provider, why) for provider, why in asked if why is not None and provider.available is not None]
    candidates: list[Match] = []
    misses: list[Miss] = []
    offers: dict[Kind, tuple[list[Taken], list[Declined]]] = {}
    for rule in (member for _, members in sorted(rules.items()) for member in members):
        for found, refusal in _found(rule, canonical):
            if refusal is not None:
                misses.append(Miss(rule=rule, anchor=found.anchor, consumed=found.consumed, refusal=refusal))
                continue
            kind = layouts.kind_of(found)
            if kind not in offers:
                offers[kind] = offers_of(found, available, device, allow_rounding_changes, rows_of)
            taken, refused = offers[kind]
            declined = [each.of(found) for each in refused]
            declined += unready_of(found, unready, device)
            if not taken and not declined:
                detail = f"no available provider implements {rule.op.name}"
                declined.append(refusal_of(found, Reason.PROVIDER, detail, (found.core.name,), found.core))
            settled = layouts.settle(found) if taken else found
            if isinstance(settled, Unkept):
                refusal = _unkept(canonical, found, settled)
                misses.append(Miss(rule=rule, anchor=found.anchor, consumed=found.consumed, refusal=refusal))
                continue
            candidates += [each.of(settled) for each in taken]
            nearness = Nearness.DECLINED if taken else Nearness.REFUSED
            misses += [
                Miss(rule=rule, anchor=found.anchor, consumed=found.consumed, refusal=replace(each, nearness=nearness))
                for each in declined
            ]
    candidates.sort(key=lambda m: (m.anchor._sort_key, m.rule.name, m.rule.op.name, m.provider))
    return Matches(candidates=tuple(layouts.settle_readers(candidates)), misses=tuple(misses))


def _found(rule: Rule, canonical: CanonicalGraph) -> list[tuple[Match, Refusal | None]]:
    """`matches_of`, computed once a graph."""
    known: dict[Rule, list[tuple[Match, Refusal | None]]] = canonical.known.setdefault(matches_of, {})
    if rule not in known:
        known[rule] = list(matches_of(rule, canonical))
    return known[rule]


def matches_of(rule: Rule, canonical: CanonicalGraph) -> Iterator[tuple[Match, Refusal | None]]:
    """(a match of one member of a rule's family, without a provider; why it is refused, or None), in graph order."""
    calls = _Calls.of(canonical)
    if not rule.required_ops <= calls.targets:
        return
    pattern = compiled_pattern(rule)
    for anchor in calls.anchors(pattern):
        result = pattern.match(anchor)
        if result is not None:
            match = _complete(rule, *result)
            if rule.takes(match.core, match.consumed):
                yield match, _refused(canonical, match)


class _Calls:
    """The functions that the nodes of one graph call.

    Attributes:
        targets: all functions that are called.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self.targets = {*targets_of(graph)}
        self._items: dict[Any, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=operator.getitem):
            self._items.setdefault(item_of(node), []).append(node)

    @classmethod
    def of(cls, canonical: CanonicalGraph) -> "_Calls":
        """The calls of a graph, read once for all rules."""
        known: _Calls | None = canonical.known.get(cls)
        if known is None:
            canonical.known[cls] = known = cls(canonical.graph)
        return known

    def anchors(self, pattern: CompiledPattern) -> list[fx.Node]:
        """The nodes that a pattern may end at. Most that take an item take it of something else."""
        if pattern.item is not None:
            return self._items.get(pattern.item, [])
        return list(self._graph.find_nodes(op="call_function", target=pattern.target))


def _complete(rule: Rule, values: Mapping[str, Any], found: Mapping[fx.Node, fx.Node]) -> Match:
    """Adds further results to the nodes that the pattern matched."""
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
    return Match(rule=rule, provider="", values=values, consumed=consumed, outputs=outputs, core=core)


def _refused(canonical: CanonicalGraph, match: Match) -> Refusal | None:
    """Checks the conditions that a pattern can't express."""
    rule = match.rule
    return (
        _stray_user(canonical, match)
        or _own_input(canonical, match)
        or _restrided(canonical, match)
        or _illegal(canonical, match)
        or _unknown_group(match)
        or _placed(canonical, match, rule.check(Bindings(rule.name, match.values)))
    )


def _stray_user(canonical: CanonicalGraph, match: Match) -> Refusal | None:
    inside = {*match.consumed}
    for node in match.consumed:
        user = next((user for user in node.users if user not in inside), None)
        if node not in match.outputs and user is not None:
            names = (canonical.source_node(user).name, canonical.source_node(node).name)
            reader, read = (f"{op_name(each)} ({name})" for each, name in zip((user, node), names, strict=True))
            how = "returned from the graph, too" if user.op == "output" else f"also read by {reader}"
            return refusal_of(
                match, Reason.USERS, f"{read} is {how}, and {match.rule.op.name} doesn't yield it", names,
                node if user.op == "output" else user, expected=f"no other reader of {op_name(node)}",
                found=op_name(user),
            )  # fmt: skip
    return None


def _own_input(canonical: CanonicalGraph, match: Match) -> Refusal | None:
    """A value that is computed inside and given to the fused op, too: it would have to be computed twice."""
    inside = {*match.consumed}
    for name, node in match.values.items():
        if isinstance(node, fx.Node) and node in inside:
            original = canonical.source_node(node).name
            return refusal_of(
                match, Reason.USERS, f"{op_name(node)} ({original}) is the {name} of {match.rule.op.name}, too",
                (original,), node, expected=f"no other reader of {op_name(node)}", found=op_name(match.core),
            )  # fmt: skip
    return None


def _restrided(canonical: CanonicalGraph, match: Match) -> Refusal | None:
    """The fused op's result may have other strides than the value it replaces, and a reader uses those."""
    for node in match.outputs:
        reader = strided_reader(node) if node is not None else None
        if node is not None and reader is not None:
            names = (canonical.source_node(reader).name, canonical.source_node(node).name)
            detail = f"{op_name(reader)} ({names[0]}) reads the memory of {op_name(node)} ({names[1]}) by its strides"
            return refusal_of(
                match, Reason.LAYOUT, detail, names, reader, expected="readers by shape", found=op_name(reader),
                fix="index, slice or reshape instead",
            )  # fmt: skip
    return None


def _unkept(canonical: CanonicalGraph, match: Match, unkept: Unkept) -> Refusal:
    """A reader can tell that the fused op's result has another layout than the value it replaces."""
    reader, node = unkept.reader, unkept.node
    names = (reader.name, canonical.source_node(node).name)
    how = "is returned from the graph" if reader.op == "output" else f"{op_name(reader)} ({names[0]}) reads it"
    detail = f"{op_name(node)} ({names[1]}) can't lie in memory as the graph promises, and {how}: {unkept.detail}"
    return refusal_of(
        match, Reason.LAYOUT, detail, names, node if reader.op == "output" else reader,
        expected="readers by shape", found=op_name(reader),
        fix=f"read what {op_name(node)} yields through .contiguous()",
    )  # fmt: skip


def _illegal(canonical: CanonicalGraph, match: Match) -> Refusal | None:
    consumed, last = match.consumed, match.consumed[-1]

    def names() -> tuple[str, ...]:
        return tuple(canonical.source_node(node).name for node in consumed)

    if len({canonical.region[node] for node in consumed}) > 1:
        # The copy of the graph has the writing node too: nothing of it is raised.
        first, end = canonical.region[consumed[0]], canonical.region[last]
        writers = [
            each for each in canonical.graph.nodes if is_mutation(each) and first < canonical.region[each] <= end
        ]
        writer = writers[0]
        detail = f"{op_name(writer)} ({writer.name}), an in-place op, stands between two nodes of the match"
        return refusal_of(
            match, Reason.MUTATION, detail, (canonical.source_node(writer).name, *names()), writer,
            expected="no in-place op", found=op_name(writer),
            fix=None if _write_to(writers, consumed) else "write in place before or after all of them",
        )  # fmt: skip
    inputs = [value for value in match.values.values() if isinstance(value, fx.Node)]
    if not is_convex(consumed, inputs):
        detail = "an input of the fused op depends on one of its results"
        return refusal_of(match, Reason.CYCLE, detail, names(), last)
    return None


def _write_to(writers: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> bool:
    """Whether in-place ops may write to inputs or outputs of some nodes."""
    memory = _storages([each for node in nodes for each in (node, *node.all_input_nodes)])
    return not memory.isdisjoint(_storages([source for writer in writers for source in writer.all_input_nodes]))


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {storage_of(value) for node in nodes if (value := tensor_of(node)) is not None}


def _unknown_group(match: Match) -> Refusal | None:
    name = match.values.get("group_name")
    if name is None or group_size(name) is not None:
        return None
    detail = f"the process group {name!r} of the all-reduce isn't known in this process"
    fix = "initialise torch.distributed and the group before the model is compiled"
    return refusal_of(
        match, Reason.GROUP, detail, (match.core.name,), match.core, expected="a group of this process",
        found=f"group {name!r}", fix=fix,
    )  # fmt: skip


def _placed(canonical: CanonicalGraph, match: Match, refusal: Refusal | None) -> Refusal | None:
    """A rule's refusal with the names of the user's graph, and its place: the line that reads the refused value."""
    if refusal is None:
        return None
    read = {value.name: (value, node) for node in reversed(match.consumed) for value in node.all_input_nodes}
    nodes = tuple(canonical.source_node(read[name][0]).name if name in read else name for name in refusal.nodes)
    place = next((read[name][1] for name in refusal.nodes if name in read), match.core)
    return replace(
        refusal, op=match.rule.core.name, nodes=nodes, source=refusal.source or place_of(match.core),
        nearness=Nearness.REFUSED, site=place_of(match.core), line=source_line(place), code=source_code(place),
    )  # fmt: skip


def missing_ops(canonical: CanonicalGraph, members: Iterable[Rule]) -> list[str]:
    """The ops that every member of a rule needs and the graph doesn't have: why the rule can do nothing here."""
    targets = _Calls.of(canonical).targets
    missing = [{op_text(node.target) for node in rule.calls if node.target not in targets} for rule in members]
    return min((sorted(names) for names in missing), key=len) if all(missing) else []


def op_name(node: fx.Node) -> str:
    """The name of a node's op: a dialect op's own, a functionalised op's in-place one."""
    if isinstance(node.target, torch._ops.OpOverload):  # nearly all
        return op_text(node.target)
    if is_call(node, operator.getitem) and isinstance(node.args[0], fx.Node):
        return op_name(node.args[0])
    if is_functionalized(node.target):
        return str(node.args[0])
    return op_text(node.target)
