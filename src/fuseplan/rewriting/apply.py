"""Puts the chosen fusions into the original graph and leaves its other nodes unchanged.

Nothing has to be lowered back: ops that were raised and not fused were raised on a copy.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fuseplan.dialect import is_inlined
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.view import PROVENANCE
from fuseplan.graph.facts import aten, tensor_of
from fuseplan.graph.layout import carriers, computed, is_reordered, is_view_of, memory_order, same_layout
from fuseplan.graph.ops.fakes import view_of
from fuseplan.graph.reach import is_view
from fuseplan.graph.sharing import Shared
from fuseplan.graph.surgery import erase_dead, sort_topologically
from fuseplan.matching import Match
from fuseplan.rewriting.counters import merge_counters
from fuseplan.rewriting.fallbacks import add_fallbacks
from fuseplan.rewriting.functional import functionalized
from fuseplan.rewriting.inlining import traced as traced_calls
from fuseplan.rewriting.shared_inputs import share_inputs
from fuseplan.rules.base import Traced

NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


def apply(canonical: CanonicalGraph, chosen: Sequence[Match]) -> None:
    """Rewrites `canonical.original` in place.

    Args:
        canonical: the raised copy, and the original of each of its values.
        chosen: matches that share no nodes and form no cycle, in graph order.

    Raises:
        ValueError: the matches form a cycle after all; the original graph is then broken, so callers check before.
    """
    rewriter = _Rewriter(canonical, chosen)
    for match in chosen:
        rewriter.replace(match)
    rewriter.erase_unread()
    sort_topologically(canonical.original)
    merge_counters(canonical.original)
    share_inputs(canonical.original)
    add_fallbacks(canonical.original)
    canonical.original.lint()


class _Rewriter:
    """Maps values of the canonical graph to nodes of the original one, making missing ones."""

    def __init__(self, canonical: CanonicalGraph, chosen: Sequence[Match]) -> None:
        self.canonical = canonical
        self.graph = canonical.original
        self.placed: dict[fx.Node, fx.Node] = {}
        self.results: list[fx.Node] = []
        self.shared, self.repeated = Shared(self.graph), list[fx.Node]()
        self._traced: dict[tuple[Any, ...], Traced] = {}
        self.consumed = {node for match in chosen for node in match.consumed}
        self.replaced = canonical.claims(self.consumed)

    def replace(self, match: Match) -> None:
        """Emits the fused op of one match and gives its results to the readers of the values it replaces."""
        originals = [self.canonical.origin[node] for node in match.consumed if node in self.canonical.origin]
        inputs = {name: value for name, value in match.values.items() if isinstance(value, fx.Node)}
        first = min(originals) if originals else self.canonical.source_node(match.anchor)
        arguments = {name: self._shared(self._value(node, first), first) for name, node in inputs.items()}
        place = _Place.after_inputs(first, list(arguments.values()))
        results = self._emit(match, arguments, place)
        for node, result in zip(match.outputs, results, strict=True):
            if node is not None:
                self._settle(node, result, match)
        self.results += results
        again = [node for original in originals for node in self.canonical.repeated.get(original, ())]
        erase_dead(self.graph, [node for node in (*originals, *again) if not node._erased])

    def erase_unread(self) -> None:
        """Erases unread results, recomputed values, and nodes that only led to replaced values. It runs after all
        matches are placed, since one of them may read a value that the original graph's readers reach through moved
        views.
        """
        unread = (*self.results, *self.repeated, *sorted(node for node in self.replaced if not node._erased))
        erase_dead(self.graph, [node for node in unread if not node._erased])

    def _shared(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """An equal value that was computed before for another match."""
        first = value if value in self.replaced else self.shared.first(value, reader)
        if first is not value:
            self.repeated.append(value)
        return first

    def _emit(self, match: Match, arguments: dict[str, fx.Node], place: "_Place") -> list[fx.Node]:
        traced = self._replacement(match)
        mapping = {traced.inputs[name]: node for name, node in arguments.items()}
        fused = match.rule.op.overload
        known = _known_values(traced, match)
        inlines = is_inlined(match.rule.op, match.provider)
        for node in traced.graph.nodes:
            if node.target is fused and inlines:
                args = fx.map_arg(node.args, lambda source: mapping[source])
                mapping[node] = self._inline(place, match, args)
            elif node.op == "call_function":
                target = match.rule.op.implementation(match.provider) if node.target is fused else node.target
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: mapping[source])
                if node.target is fused and match.rule.op.writes:
                    target, args, kwargs = functionalized(match.rule.op, target, args)
                value = None if kwargs else known.get(node)
                if value is None and node.target is fused and not kwargs:
                    value = _fake_value(
                        match.rule.op.fake, args
                    )  # the dispatcher would call it too, and doubles the time
                mapping[node] = self._create(place, target, args, kwargs, match.core, value)
        return [mapping[node] for node in traced.outputs]

    def _replacement(self, match: Match) -> Traced:
        """The replacement as a graph, traced once for all matches of a rule with the same plain values."""
        plain = ((type(each), None if isinstance(each, fx.Node) else repr(each)) for each in match.values.values())
        key = match.rule, *match.values, *plain
        if key not in self._traced:
            self._traced[key] = match.rule.trace_replacement(match.values)
        return self._traced[key]

    def _inline(self, place: "_Place", match: Match, args: tuple[Any, ...]) -> fx.Node:
        """Emits the calls that a provider's kernel makes."""
        graph, mapping = traced_calls(match.rule.op.kernel(match.provider), args)
        for node in graph.nodes:
            if node.op == "call_function":
                given = fx.map_arg((node.args, node.kwargs), lambda source: mapping[source])
                mapping[node] = self._create(place, node.target, *given, match.core)
        (result,) = graph.output_node().args
        assert isinstance(result, fx.Node)
        return mapping[result]

    def _create(
        self, place: "_Place", target: Any, args: Any, kwargs: Any, provenance: fx.Node, value: Any = None
    ) -> fx.Node:
        with self.graph.inserting_before(place.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: provenance.meta[key] for key in PROVENANCE if key in provenance.meta}
        node.meta["val"] = _fake_value(target, args, kwargs) if value is None else value
        return node

    def _value(self, node: fx.Node, place: fx.Node) -> fx.Node:
        """The node of the original graph that has a canonical node's value."""
        if node in self.placed:
            return self.placed[node]
        if node in self.canonical.origin:
            return self.canonical.origin[node]
        args = fx.map_arg(node.args, lambda source: self._value(source, place))
        kwargs = fx.map_arg(node.kwargs, lambda source: self._value(source, place))
        inputs: list[fx.Node] = []
        fx.map_arg((args, kwargs), inputs.append)
        # A constant has no fake tensor among its inputs to compute its own with.
        known = None if inputs else node.meta["val"]
        self.placed[node] = self._create(_Place.after_inputs(place, inputs), node.target, args, kwargs, node, known)
        return self.placed[node]

    def _settle(self, node: fx.Node, result: fx.Node, match: Match) -> None:
        """Replaces a canonical node by `result`, or a copy of it; if the node has no original, the values computed from
        it as well.
        """
        original = self.canonical.origin.get(node)
        if original is not None and node in match.copied:
            result = self._copy(result, original)
        self.placed[node] = result
        if original is not None:
            for each in (original, *self.canonical.repeated.get(original, ())):
                each.replace_all_uses_with(result)
                self.repeated.append(each)
                if node in match.loose:
                    self._tell_readers(result, each, self.canonical.claims(match.consumed))
            return
        for user in list(node.users):
            if user not in self.consumed:
                args = fx.map_arg(user.args, lambda source: self._value(source, result.next))
                kwargs = fx.map_arg(user.kwargs, lambda source: self._value(source, result.next))
                inputs: list[fx.Node] = []
                fx.map_arg((args, kwargs), inputs.append)
                place = _Place.after_inputs(result.next, inputs)
                self._settle(user, self._create(place, user.target, args, kwargs, user), match)

    def _copy(self, result: fx.Node, original: fx.Node) -> fx.Node:
        """A value in memory of its own, with the strides of the value that it replaces."""
        promise = tensor_of(original)
        order = memory_order(promise) if promise is not None else None
        assert order is not None, original.format_node()
        place, row_major = _Place(result.next), list(range(len(order)))
        if list(order) == row_major:
            return self._contiguous(place, result, original)
        turned = self._create(place, aten.permute.default, (result, list(order)), {}, original)
        copied = self._contiguous(place, turned, original)
        back = sorted(row_major, key=lambda dim: order[dim])
        return self._create(place, aten.permute.default, (copied, back), {}, original)

    def _contiguous(self, place: "_Place", value: fx.Node, provenance: fx.Node) -> fx.Node:
        kwargs = {"memory_format": torch.contiguous_format}
        return self._create(place, aten.clone.default, (value,), kwargs, provenance)

    def _tell_readers(self, result: fx.Node, original: fx.Node, gone: Collection[fx.Node]) -> None:
        """Updates the fake values of views of, and values computed from, a result with another layout than the value it
        replaces: Inductor reads strides and aliasing off them.
        """
        promise, value = tensor_of(original), tensor_of(result)
        assert promise is not None and value is not None
        for reader in sorted(carriers(result, gone, reordered=is_reordered(value, promise))):
            if reader is not result and all("val" in source.meta for source in reader.all_input_nodes):
                value = _fake_value(reader.target, reader.args, reader.kwargs)
                reader.meta = {**reader.meta, "val": value}  # the canonical graph keeps the old value


class _Place:
    """The place of new nodes: before `before`."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before

    @classmethod
    def after_inputs(cls, preferred: fx.Node, inputs: Sequence[fx.Node]) -> "_Place":
        """Before `preferred`, or right after the last of the inputs where one of them comes later."""
        late = [node for node in inputs if node is preferred or preferred < node]
        return cls(max(late).next if late else preferred)


def _known_values(traced: Traced, match: Match) -> dict[fx.Node, Any]:
    """The fake values of a fused op and its results, where the nodes that they replace have them: running the op's fake
    implementation again takes longer than everything else.
    """
    known: dict[fx.Node, Any] = {}
    yielded = dict(zip(traced.outputs, match.yields, strict=True))
    for node, output, made in zip(traced.outputs, match.outputs, match.yields, strict=True):
        value = tensor_of(output)
        # Nodes that share memory need values that do.
        direct = node.target in (operator.getitem, match.rule.op.overload) and traced.outputs.count(node) == 1
        if value is not None and direct and output not in match.loose and same_layout(value, made):
            known[node] = value
    for node, made in yielded.items():
        base = node.args[0] if is_view(node) else None
        if isinstance(base, fx.Node) and base in known and is_view_of(made, yielded[base], known[base]):
            known[node] = view_of(known[base], made)
    for node in traced.graph.find_nodes(op="call_function", target=match.rule.op.overload):
        count = len(match.rule.op.overload._schema.returns)
        items = {user.args[1]: known.get(user) for user in node.users if user.target is operator.getitem}
        values = tuple(items.get(index) for index in range(count))
        if count > 1 and all(value is not None for value in values):
            known[node] = values
    return known


def _fake_value(target: Any, args: Any, kwargs: Any = NO_KWARGS) -> Any:
    """A call's result, computed on fake tensors."""
    return computed(target, *fx.map_arg((args, dict(kwargs)), lambda source: source.meta["val"]))
