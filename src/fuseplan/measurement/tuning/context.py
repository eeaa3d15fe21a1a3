"""The part of a graph around a component, cut out, so that Inductor's kernels for it in the model can run alone."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten, is_call, is_mutation, tensor_of
from fuseplan.graph.legality import external_inputs
from fuseplan.graph.reach import is_view
from fuseplan.graph.surgery import COLLECTIVES
from fuseplan.matching import Match
from fuseplan.planner import Problem
from fuseplan.rewriting import apply
from fuseplan.rules.families import find_sites

MOST_NEIGHBOURS = 64
"""The most nodes around a component that are cut out with it: Inductor doesn't put more into its kernels."""

FUSED_BY_INDUCTOR = frozenset(
    {
        aten.amax.default,
        aten.amin.default,
        aten.cat.default,
        aten.constant_pad_nd.default,
        aten.full.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
    }
)
"""Ops that Inductor generates code for, and so fuses with their neighbours, beside views and pointwise ones."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """A component and its neighbours, by their nodes in the graph that Inductor made.

    Attributes:
        canonical: the graph.
        inputs: nodes from outside that it reads, in the order of their use.
        nodes: the component and its neighbours, in graph order.
        outputs: those of `nodes` that others read, in graph order.
    """

    canonical: CanonicalGraph
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @cached_property
    def produced(self) -> frozenset[str]:
        """Names of inputs that an op of the model writes and an all-reduce reads: Inductor reduces such a value in
        place, while it copies an argument of the model first.
        """
        inside, found = set(self.nodes), set()
        for node in self.nodes:
            if node.target is not COLLECTIVES[0]:
                continue
            source = node.all_input_nodes[0]
            while source in inside and is_view(source):
                source = source.all_input_nodes[0]
            if source not in inside and source.op == "call_function":
                found.add(source.name)
        return frozenset(found)

    @property
    def text(self) -> str:
        """The part without names: equal ones are compiled to equal code."""
        names = {node: f"%{number}" for number, node in enumerate((*self.inputs, *self.nodes))}
        lines = [f"{names[node]} = {_described(node)}" for node in self.inputs]
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: names[source])
            lines.append(f"{names[node]} = {node.target} {args} {kwargs}")
        return "\n".join([*lines, str([names[node] for node in self.outputs])])

    def fused(self, matches: Sequence[Match]) -> fx.Graph:
        """A graph of its own, in which matches are applied.

        Args:
            matches: of the component, compatible with each other.

        Returns:
            The inputs are its placeholders, by name; its results are the outputs. Sizes are those of the model's graph,
            with their symbols.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(tuple(copies[node] for node in self.outputs))
        origin = {node: copies[old] for node, old in self.canonical.origin.items() if old in copies}
        if matches:
            apply(
                replace(self.canonical, original=graph, origin=origin), sorted(matches, key=lambda match: match.anchor)
            )
        return graph


def context_of(problem: Problem, component: Iterable[int], places: Collection[int]) -> Context:
    """The part of a graph around a component.

    It has the component's sites, the nodes that its candidates consume, and the nodes that Inductor may put into one
    kernel with any of these: views, pointwise ops and reductions before and after them, unless they belong to another
    site. A result that the model writes back to an input is written back here as well, or Inductor would copy the
    input.

    Args:
        problem: the graph's problem.
        component: its candidates.
        places: ordinals of its sites.
    """
    canonical = problem.canonical
    sites = find_sites(canonical)
    core = {node for index in component for node in problem.candidates[index].consumed}
    core |= canonical.claims(part for site in sites if site.ordinal in places for part in site.parts)
    others = canonical.claims(part for site in sites if site.ordinal not in places for part in site.parts) - core
    core = {node for node in core if node.op == "call_function" and not _is_size(node)}
    region = _grown(canonical.original, core, others)
    region |= {user for node in region for user in node.users if _writes_input(user)}
    nodes = [node for node in canonical.original.nodes if node in region]
    return Context(
        canonical=canonical,
        inputs=tuple(external_inputs(nodes)),
        nodes=tuple(nodes),
        outputs=tuple(node for node in nodes if any(user not in region for user in node.users)),
    )


def _grown(graph: fx.Graph, core: set[fx.Node], others: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of `core`, those after it and those before it, nearest first."""
    nodes = list(graph.nodes)
    region, behind = set(core), set[fx.Node]()
    for node in nodes:
        if node not in core and any(source in core or source in behind for source in node.all_input_nodes):
            behind.add(node)
    most = len(core) + MOST_NEIGHBOURS
    for node in nodes:
        sources = node.all_input_nodes
        # A node that also waits for a node behind the component that isn't cut out is no neighbour.
        waits = any(source in behind and source not in region for source in sources)
        if node in behind and not waits and len(region) < most and _is_neighbour(node, others):
            region.add(node)
    for node in reversed(nodes):
        is_read = any(user in region for user in node.users)
        if is_read and node not in behind and node not in region and len(region) < most and _is_neighbour(node, others):
            region.add(node)
    return region


def _is_neighbour(node: fx.Node, others: Collection[fx.Node]) -> bool:
    """Whether Inductor may fuse it, and it belongs to no other site."""
    target = node.target
    if node in others or not isinstance(target, OpOverload) or is_mutation(node) or tensor_of(node) is None:
        return False
    return is_view(node) or torch.Tag.pointwise in target.tags or target in FUSED_BY_INDUCTOR


def _writes_input(node: fx.Node) -> bool:
    return is_call(node, aten.copy_.default) and node.args[0].op == "placeholder"


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _described(node: fx.Node) -> str:
    value: Any = tensor_of(node)
    return f"{value.dtype} {tuple(value.shape)} {value.stride()}" if value is not None else str(node.meta.get("val"))
