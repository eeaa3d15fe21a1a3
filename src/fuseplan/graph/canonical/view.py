"""`CanonicalGraph`: a copy of a graph in the dialect, and the original of each of its values."""

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard, cast

import torch
from torch import fx

from fuseplan.graph.facts import (
    RESHAPES,
    Call,
    aten,
    depths,
    is_call,
    item,
    mutation_regions,
    place_of,
    source_code,
    source_line,
    targets_of,
    tensor_of,
)
from fuseplan.graph.legality import is_computed_from
from fuseplan.graph.ops import DialectOp, ops
from fuseplan.graph.reach import stays_inside
from fuseplan.graph.surgery import call_function, copy_graph, erase_dead
from fuseplan.record import Nearness, Reason, Refusal


@dataclass(eq=False)
class CanonicalGraph:
    """The graph that matching reads. The original stays untouched.

    Attributes:
        original: the graph as Inductor handed it over.
        graph: its copy, raised. Copied nodes share `Node.meta` with the original: neither writes to it.
        origin: for a node of `graph` the node of `original` with the same value. Nodes without one, e.g. a slice that
            was hoisted over an all-reduce, come into being only when a fusion needs them.
        region: the number of mutations before a node; see `facts.mutation_regions`.
        repeated: for a node of `original` the nodes that compute its value again, all represented by its one node of
            `graph`.
        interior: for a raised node the nodes of `original` that it replaces.
        unraised: why a lookalike of a dialect op wasn't raised, by the nodes that a search from its neighbours would
            reach.
        raised_alike: raises another graph under the same settings.
        dynamic_epsilons: inputs of `original` that are Python floats, each all that keeps a norm from being raised.
        known: findings that hold for every range, device and policy, by the function or class that made them.
    """

    original: fx.Graph
    graph: fx.Graph
    origin: dict[fx.Node, fx.Node]
    region: dict[fx.Node, int]
    repeated: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    interior: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    unraised: dict[fx.Node, Refusal] = field(default_factory=dict)
    dynamic_epsilons: list[fx.Node] = field(default_factory=list)
    raised_alike: "Callable[[fx.Graph], CanonicalGraph]" = field(kw_only=True)
    known: dict[Any, Any] = field(default_factory=dict)
    _constants: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    _copied: dict[fx.Node, fx.Node] = field(kw_only=True)

    @classmethod
    def copy_of(
        cls, original: fx.Graph, raised_alike: "Callable[[fx.Graph], CanonicalGraph] | None" = None
    ) -> "CanonicalGraph":
        """A copy in which nothing is raised yet.

        Args:
            original: the graph.
            raised_alike: raises other graphs the same way; None: nothing in them is raised, either.
        """
        graph, origin = copy_graph(original, shares_meta=True)
        return cls(
            original=original, graph=graph, origin=origin, region=mutation_regions(graph),
            raised_alike=raised_alike or cls.copy_of, _copied=dict(origin),
        )  # fmt: skip

    @property
    def dialect_nodes(self) -> list[fx.Node]:
        """The nodes that call a dialect op, op by op, each in graph order."""
        called = {op: target for target in targets_of(self.graph) if (op := ops.of(target)) is not None}
        return [node for op in ops.values() if op in called for node in self.calls(called[op])]

    def calls(self, *targets: Any) -> list[Call]:
        """The nodes that call one of `targets`, in graph order."""
        found = (self.graph.find_nodes(op="call_function", target=target, sort=False) for target in targets)
        return cast(list[Call], sorted(itertools.chain.from_iterable(found)))

    @property
    def refusals(self) -> list[Refusal]:
        """Why lookalikes of dialect ops weren't raised, each refusal once."""
        return list({id(refusal): refusal for refusal in self.unraised.values()}.values())

    def refuse(
        self, op: DialectOp, at: Sequence[fx.Node], reason: Reason, detail: str, *, node: fx.Node, place: fx.Node,
        expected: str | None = None, found: str | None = None, fix: str | None = None,
    ) -> None:  # fmt: skip
        """Records that nodes look like a dialect op and aren't one.

        Args:
            op: the dialect op.
            at: the nodes by which a search from the op's neighbours would find it.
            reason: its kind.
            detail: for a person.
            node: the node in the way.
            place: where in the user's model it is looked for, if the node in the way has no place.
            expected: the op that should be there.
            found: the op there instead.
            fix: how to fix it.
        """
        refusal = Refusal(
            reason=reason, op=op.name, detail=detail, nodes=(self.source_node(node).name,), source=place_of(place),
            fix=fix, nearness=Nearness.UNRECOGNIZED, expected=expected, found=found,
            line=source_line(node) or source_line(place), code=source_code(node) or source_code(place),
        )  # fmt: skip
        self.unraised.update(dict.fromkeys(at, refusal))

    def raise_op(self, op: DialectOp, args: Sequence[Any], results: Sequence[fx.Node | None]) -> fx.Node:
        """Puts one dialect op in the place of the nodes that compute `results`.

        Args:
            op: the dialect op.
            args: its arguments, nodes of `graph` among them.
            results: the nodes whose values the op yields, in its order; None where a result is dead.

        Returns:
            The new node. It stands where the first of `results` did, or after its last argument where that comes later;
            the caller has made sure that the region is convex, and `canonicalize` sorts the graph afterwards.
        """
        live = [result for result in results if result is not None]
        place = min(live)
        last = max([place, *(arg for arg in args if isinstance(arg, fx.Node))])
        node = call_function(last, op.overload, tuple(args))
        if len(results) == 1:
            self._stand_in(node, place)
        else:
            node.meta.update(_provenance(live[0]), val=tuple(tensor_of(result) for result in results))
            self._take_place(node, live[0])
            for index in reversed(range(len(results))):
                result = results[index]
                if result is not None:
                    self._stand_in(call_function(node, operator.getitem, (node, index)), result)
        self._claim(node, erase_dead(self.graph, live))
        return node

    def _claim(self, node: fx.Node, erased: Iterable[fx.Node]) -> None:
        """Records that `node` replaces the erased nodes."""
        self.interior[node] = self.interior.get(node, frozenset()) | self.claims(erased)

    def claims(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The nodes of the original graph that a set of canonical nodes replaces."""
        claimed: set[fx.Node] = set()
        for node in nodes:
            if inside := self.interior.get(node):
                claimed |= inside
            if (original := self.origin.get(node)) is not None:
                claimed.add(original)
        return frozenset(claimed)

    def _stand_in(self, node: fx.Node, replaced: fx.Node) -> None:
        node.meta.update(_provenance(replaced))
        if "val" in replaced.meta:
            node.meta["val"] = replaced.meta["val"]
        self._take_place(node, replaced)
        if replaced in self.origin:
            self.origin[node] = self.origin[replaced]
        replaced.replace_all_uses_with(node)

    def constant(self, value: float, shape: Sequence[int], *, like: torch.Tensor) -> fx.Node:
        """A tensor that is `value` everywhere, in the dtype and on the device of another; one node serves all
        readers.
        """
        key = (value, tuple(shape), like.dtype, like.device)
        if key not in self._constants:
            first = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
            kwargs = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
            fake = like.new_full(tuple(shape), value)
            args = ([*shape], value)
            self._constants[key] = self.insert_before(first, aten.full.default, args, fake, kwargs)
        return self._constants[key]

    def insert_before(
        self, place: fx.Node, target: Any, args: Sequence[Any], value: Any, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A new node without an original: a value that no node of the original graph has."""
        node = call_function(place, target, tuple(args), kwargs, before=True)
        node.meta.update(_provenance(place), val=value)
        self._take_place(node, place)
        return node

    def _take_place(self, node: fx.Node, place: fx.Node) -> None:
        self._copied[node], self.region[node] = self._copied[place], self.region[place]

    def depth(self, node: fx.Node) -> int:
        """The longest path from an input to a node of `graph`, or to the node that it replaced."""
        return self._depths[self._copied[node]]

    def is_deeper(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether a node is deeper than another one, as all values computed from the other one are."""
        return is_computed_from(self._copied[node], self._copied[other]) or self.depth(node) > self.depth(other)

    @cached_property
    def _depths(self) -> dict[fx.Node, int]:
        return depths(self.original)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Replaces `old` by `new`, which has the same value."""
        if old in self.origin:
            self.origin[new] = self.origin[old]
        old.replace_all_uses_with(new)
        self._claim(new, erase_dead(self.graph, [old]))

    def merge_equal(self, op: DialectOp) -> None:
        """Merges nodes that call an op on the same values: several layers may quantise the same input."""
        found: dict[tuple[Any, ...], fx.Node] = {}
        for node in self.calls(op.overload):
            first = found.setdefault((self.region[node], *node.args), node)
            if first is not node:
                several = len(op.overload._schema.returns) > 1
                self._merge(self._results(node, first) if several else [(node, first)])

    def _results(self, node: fx.Node, first: fx.Node) -> list[tuple[fx.Node, fx.Node | None]]:
        return [(result, item(first, cast(int, result.args[1]))) for result in node.users]

    def _merge(self, pairs: Sequence[tuple[fx.Node, fx.Node | None]]) -> None:
        results = [(result, known) for result, known in pairs if known is not None]
        if len(results) < len(pairs) or not all(stays_inside(each) for pair in results for each in pair):
            return  # their separate memory would become one
        if any((result in self.origin) is not (known in self.origin) for result, known in results):
            return  # one of them is a view that the other's readers don't have
        for result, known in results:
            if result in self.origin:
                self.repeated.setdefault(self.origin[known], []).append(self.origin[result])
            result.replace_all_uses_with(known)
        erase_dead(self.graph, [result for result, _ in results])
        for _, known in results:
            if known not in self.origin:
                self._merge_views(known)

    def _merge_views(self, value: fx.Node) -> None:
        """Merges a value's equal views, which represent values of the original graph."""
        found: dict[tuple[Any, ...], fx.Node] = {}
        for user in [user for user in value.users if is_call(user, *RESHAPES)]:
            first = found.setdefault((user.target, *user.args[1]), user)
            if first is not user:
                self._merge([(user, first)])

    def source_node(self, node: fx.Node) -> fx.Node:
        """The original of a node, or of the nearest value computed from it that has one, or the node itself."""
        if node in self.origin:
            return self.origin[node]
        return next((self.origin[user] for user in node.users if user in self.origin), node)

    def recognized(self) -> dict[str, int]:
        """How many of each dialect op there are, as `op[last dimension]`."""
        counts: Counter[str] = Counter()
        for node in self.dialect_nodes:
            op = ops.of(node.target)
            assert op is not None
            first = tensor_of(node.args[0])
            width = first.shape[-1] if first is not None and first.dim() else ""
            counts[f"{op.name}[{width}]"] += 1
        return dict(sorted(counts.items()))


PROVENANCE = ("stack_trace", "nn_module_stack", "custom")
"""Metadata that says where in the user's model a node comes from."""


def _provenance(node: fx.Node) -> dict[str, Any]:
    meta = node.meta
    return {key: meta[key] for key in PROVENANCE if key in meta}


def is_dialect(node: object, *operations: DialectOp) -> TypeGuard[Call]:
    """Whether a node calls one of the dialect ops."""
    return is_call(node, *(op.overload for op in operations))
