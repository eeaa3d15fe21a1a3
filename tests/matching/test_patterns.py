"""Plain patterns are followed as by Inductor's matcher, and providers are asked once for matches that are alike."""

# ruff: noqa: PLW0108 - patterns are functions whose parameters are read by name

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import compiled_pattern, find_matches
from fuseplan.matching.inductor import CompiledPattern
from fuseplan.providers import provider_of
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Rule, by_name
from fuseplan.rules.base import _NODE, _trace
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import HIDDEN, randn, written
from tests.workload_graphs import workload_graph

aten = torch.ops.aten
PADDING = {"act_padding": by_name(BUILT_IN_RULES)["act_padding"]}


class Pattern(Rule):
    """A pattern alone, of any function."""

    def __init__(self, pattern: Any) -> None:
        self.name, self.pattern = "own", pattern  # type: ignore[method-assign]


def pattern_of(function: Any) -> CompiledPattern:
    rule = Pattern(function)
    return CompiledPattern(_trace(rule, function, dict.fromkeys(rule.variables, _NODE)))


def both(pattern: CompiledPattern, node: fx.Node) -> list[Any]:
    return [pattern.match(node), pattern._match_by_inductor(node)]


@pytest.fixture(scope="module", params=[("gpt-oss-120b", 2), ("llama-3.1-8b", 4)], ids=str)
def graph(request: pytest.FixtureRequest) -> Iterator[fx.Graph]:
    name, tp = request.param
    with workload_graph(name, tp, 2) as traced:
        yield canonicalize(traced).graph


def test_built_in_patterns_match_as_by_inductor(graph: fx.Graph) -> None:
    matched = 0
    for rule in BUILT_IN_RULES:
        pattern = compiled_pattern(rule)
        for node in graph.find_nodes(op="call_function", target=pattern.target):
            ours, theirs = both(pattern, node)
            assert ours == theirs
            if ours is not None:
                assert [list(each) for each in ours] == [list(each) for each in theirs]
                matched += 1
    assert matched > 0


@pytest.mark.parametrize(
    ("pattern", "model", "matches"),
    [
        (lambda x, y: aten.mul.Tensor(aten.relu.default(x), y), lambda x, y: aten.mul.Tensor(aten.relu(x), y), True),
        (lambda x: aten.mul.Tensor(x, x), lambda x, y: aten.mul.Tensor(x, y), False),
        (lambda x, k: aten.add.Tensor(aten.mul.Tensor(x, k), k), lambda x, y: aten.add(aten.mul(x, 2), 2), True),
        (lambda x, k: aten.add.Tensor(aten.mul.Tensor(x, k), k), lambda x, y: aten.add(aten.mul(x, 2), 3), False),
        (lambda x: aten.mul.Tensor(x, 2), lambda x, y: aten.mul.Tensor(x, 2), True),
        (lambda x: aten.mul.Tensor(x, 2), lambda x, y: aten.mul.Tensor(x, y), False),
        (lambda x, y: aten.add.Tensor(x, y), lambda x, y: aten.add.Tensor(x, y, alpha=2), False),
        (lambda x, y: aten.add.Tensor(x, y, alpha=2), lambda x, y: aten.add.Tensor(x, y, alpha=2), True),
        (lambda x, y: aten.add.Tensor(x, y, alpha=2), lambda x, y: aten.add.Tensor(x, y), False),
        (lambda x, y, k: aten.add.Tensor(x, y, alpha=k), lambda x, y: aten.add.Tensor(x, y, alpha=3), True),
        (lambda x, y: aten.cat.default([x, y, x], 1), lambda x, y: aten.cat.default([x, y, x], 1), True),
        (lambda x, y: aten.cat.default([x, y], 1), lambda x, y: aten.cat.default([x, y, x], 1), False),
        (lambda x: aten.permute.default(x, [1, 0]), lambda x, y: aten.permute.default(x, [0, 1]), False),
        (lambda x, dims: aten.permute.default(x, dims), lambda x, y: aten.permute.default(x, [0, 1]), True),
    ],
)
def test_patterns_match_as_by_inductor(pattern: Any, model: Any, matches: bool) -> None:
    compiled = pattern_of(pattern)
    called = fx.symbolic_trace(model).graph
    overloads = {aten.relu: aten.relu.default, aten.mul: aten.mul.Tensor, aten.add: aten.add.Tensor}
    for node in called.nodes:
        node.target = overloads.get(node.target, node.target)
    anchor = called.output_node().args[0]
    assert isinstance(anchor, fx.Node)
    ours, theirs = both(compiled, anchor)
    assert ours == theirs
    assert (ours is not None) is matches


@pytest.mark.parametrize(
    ("pattern", "model", "bound"),
    [
        (lambda x, y: aten.add.Tensor(x, y, alpha=1), lambda x, y: aten.add.Tensor(x, y), {}),
        (lambda x, y: aten.add.Tensor(x, y), lambda x, y: aten.add.Tensor(x, y, alpha=1), {}),
        (lambda x, y, k: aten.add.Tensor(x, y, alpha=k), lambda x, y: aten.add.Tensor(x, y), {"k": 1}),
        (lambda x: aten.mean.dim(x, [1], False), lambda x, y: aten.mean.dim(x, [1]), {}),
        (lambda x: aten.mean.dim(x, [1]), lambda x, y: aten.mean.dim(x, [1], True), None),
        (lambda x, kept: aten.mean.dim(x, [1], kept), lambda x, y: aten.mean.dim(x, [1], keepdim=True), {"kept": True}),
        (lambda x: aten.mean.dim(x, [1]), lambda x, y: aten.mean.dim(x, [1], dtype=torch.float64), None),
    ],
)
def test_arguments_that_are_left_out_are_their_defaults(pattern: Any, model: Any, bound: dict[str, Any] | None) -> None:
    """Of which Inductor's matcher makes something else, or nothing."""
    anchor = fx.symbolic_trace(model).graph.output_node().args[0]
    assert isinstance(anchor, fx.Node)
    found = pattern_of(pattern).match(anchor)
    plain = (
        None if found is None else {name: value for name, value in found[0].items() if not isinstance(value, fx.Node)}
    )
    assert plain == bound


def test_a_name_that_a_pattern_of_all_overloads_leaves_out_is_looked_at() -> None:
    """Which is matched by Inductor."""
    by_name: Any
    for by_name, matches in (({}, True), ({"alpha": 2}, False)):
        graph = fx.Graph()
        x, y = map(graph.placeholder, "xy")
        total = graph.call_function(aten.add.Tensor, (x, y), by_name)
        anchor = graph.call_function(aten.relu.default, (total,))
        found = pattern_of(lambda x, y: aten.relu.default(aten.add(x, y))).match(anchor)
        assert (found is not None) is matches


def test_the_same_value_of_the_pattern_is_the_same_node() -> None:
    def shared(x: Any) -> Any:
        y = aten.relu.default(x)
        return aten.mul.Tensor(y, y)

    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = (graph.call_function(aten.relu.default, (x,)) for _ in range(2))
    once, twice = (graph.call_function(aten.mul.Tensor, (first, each)) for each in (first, second))
    pattern = pattern_of(shared)
    assert all(each is not None for each in both(pattern, once))
    assert both(pattern, twice) == [None, None]


def pads(x: Any, w: Any, wide: Any, v: Any) -> Any:
    """Four norms that are padded, two of them alike."""
    normed = [ops.rms_norm(each, w, 1e-6, "llama") for each in (x, ops.rms_norm(x, w, 1e-6, "llama"))]
    normed += [ops.rms_norm(wide, v, 1e-6, "llama"), ops.rms_norm(x, w, 1e-5, "llama")]
    return [ops.pad(each, 64) for each in normed]


def test_providers_are_asked_once_for_each_kind() -> None:
    asked: list[tuple[Any, ...]] = []

    def accepts(m: Any) -> Refusal | None:
        asked.append((*m.x.shape, m.eps))
        width = m.x.shape[-1]
        return None if width == HIDDEN else m.refuse(Reason.SIZE, "x", f"{width} is too wide")

    own = provider_of("asked_once", {ops.rms_norm_pad: ops.rms_norm_pad.reference}, accepts=accepts, cost=0.0)
    inputs: Mapping[str, Tensor] = {
        "x": randn(6, HIDDEN), "w": randn(HIDDEN), "wide": randn(6, 2 * HIDDEN), "v": randn(2 * HIDDEN)
    }  # fmt: skip
    found = find_matches(canonicalize(written(pads, inputs)), PADDING, [own])
    assert len(asked) == len(set(asked)) == 3
    assert len(found.candidates) == 3
    (miss,) = found.misses
    assert f"{2 * HIDDEN} is too wide" in miss.refusal.detail
    assert len({match.core for match in found.candidates} | {miss.consumed[0]}) == 4


def test_a_rule_that_calls_an_op_by_all_its_overloads_is_looked_for() -> None:
    """Which overload stands in the graph isn't known before it is matched."""
    assert Pattern(lambda x: aten.mul(aten.relu(x), 2)).required_ops == frozenset()
    assert Pattern(lambda x: aten.mul.Tensor(aten.relu(x), 2)).required_ops == {aten.mul.Tensor}
