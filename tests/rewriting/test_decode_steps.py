"""What fused ops of several layers share is computed once, and the counters of a static cache are advanced together."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config
from torch._inductor.inductor_prims import force_stride_order
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.surgery import copy_graph
from fuseplan.matching import find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rewriting import apply
from fuseplan.rewriting.shared_inputs import share_inputs
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.cached import arguments, attending, layer
from tests.helpers import quickly_traced, randn, written
from tests.rules.planning import compiled_and_eager

aten = torch.ops.aten
RULES = by_name([rule for rule in BUILT_IN_RULES if rule.name == "cached_attention"])
TOGETHER, ALONE = aten._foreach_add.Scalar, aten.add.Tensor
COUNTERS, CACHES = slice(5, 8), slice(8, None)


def step(
    *, by: Callable[[int], int] = lambda index: 1, read: Callable[..., Any] = lambda *given: (),
    position: Callable[..., Tensor] = torch.add,
) -> Callable[..., Any]:  # fmt: skip
    """Three layers, each with a counter and caches of its own; what else is read of the mask and the positions."""
    attended = attending(layer(read=lambda cache: cache))

    def function(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, scale: Tensor, *rest: Tensor) -> Any:
        counters, caches = rest[:3], rest[3:]
        # A graph has its inputs in the order in which they are used first.
        first = torch.stack([each.reshape(-1)[0].float() for each in (q, k, v, angles, scale, *counters)])
        places = torch.arange(caches[0].shape[2])
        mask = torch.where(places <= counters[0], 0.0, -65504.0).to(q.dtype)[None, None, None]
        found = []
        for index, counter in enumerate(counters):
            positions = position(torch.arange(q.shape[1]), counter)
            found += read(mask, positions)
            counter.add_(by(index))
            own = caches[2 * index : 2 * index + 2]
            q = scale * attended(q, k, v, *own, angles.cos(), angles.sin(), positions, mask)
        return q, first, *found

    return function


def inputs(tokens: int = 1) -> list[Tensor]:
    q, k, v, k_cache, v_cache, angles, *_ = arguments(tokens)
    counters = [torch.tensor(3 + index) for index in range(3)]
    return [q, k, v, angles, torch.tensor(2.0), *counters, *(each.clone() for each in [k_cache, v_cache] * 3)]


def rewritten(function: Callable[..., Any], given: Sequence[Tensor]) -> fx.Graph:
    """The graph of a step whose layers are fused, which computes and leaves behind what it did."""
    graph = quickly_traced(function, *given)
    before, canonical = copy_graph(graph)[0], canonicalize(graph)
    chosen = list(find_matches(canonical, RULES, BUILT_IN_PROVIDERS[:1]).candidates)
    assert len(chosen) == 3
    apply(canonical, chosen)
    for actual, expected in zip(outcome(graph, given), outcome(before, given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)
    return graph


def outcome(graph: fx.Graph, given: Sequence[Tensor]) -> list[Any]:
    """Results, and what inputs hold afterwards."""
    own = [each.clone() for each in given]
    with torch.no_grad():
        found = fx.Interpreter(fx.GraphModule({}, graph)).run(*own)
    return [*tree_leaves(found), *own]


def calls(graph: fx.Graph, target: Any) -> list[Any]:
    return list(graph.find_nodes(op="call_function", target=target))


def attentions(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if "_all_bases" in node.kwargs]


def behind_views(node: Any) -> Any:
    return behind_views(node.args[0]) if node.target is aten.unsqueeze.default else node


SHARED = {torch.ops.prims.convert_element_type.default, aten.cos.default, aten.sin.default}
"""What computes the mask, which is cast last, and the cosines and sines."""


@pytest.mark.parametrize("read", [lambda *given: (), lambda mask, positions: [mask * 2]], ids=["alone", "with others"])
def test_mask_cosines_and_sines_are_computed_once(read: Callable[..., Any]) -> None:
    graph = rewritten(step(read=read), inputs())
    shared = calls(graph, force_stride_order)
    assert {node.args[0].target for node in shared} == SHARED
    for node in shared:
        assert node.meta["val"].stride() == tuple(node.args[1]) == node.args[0].meta["val"].stride()
    for node in attentions(graph):
        assert {behind_views(node.kwargs[name]) for name in ("mask", "cos", "sin")} == {*shared}


def test_counters_are_advanced_in_one_op() -> None:
    graph = rewritten(step(), inputs())
    (together,) = calls(graph, TOGETHER)
    counters = [node for node in graph.nodes if node.op == "placeholder"][COUNTERS]
    assert together.args == (counters, 1)
    for node, counter in zip(attentions(graph), counters, strict=True):
        assert node.kwargs["positions"].args[0] is counter
        assert node < together
    assert not [node for node in calls(graph, ALONE) if node.args[0] in counters]


@pytest.mark.parametrize(
    ("function", "tokens"), [(step(by=lambda index: index), 1), (step(), 2)], ids=["by different numbers", "two tokens"]
)
def test_others_are_advanced_apart(function: Callable[..., Any], tokens: int) -> None:
    assert not calls(rewritten(function, inputs(tokens)), TOGETHER)


def test_positions_that_are_yielded_stay_in_memory_of_their_own() -> None:
    """A result that is a view of a counter would be advanced with it."""
    given = inputs()
    graph = rewritten(step(read=lambda mask, positions: [positions]), given)
    assert len(calls(graph, TOGETHER)) == 1
    output: Any = graph.output_node().args[0]
    assert [node.target for node in output[2:]] == [aten.add.Tensor] * 3


@pytest.mark.parametrize(
    "position",
    [
        lambda zero, counter: torch.add(zero, counter, alpha=-1),
        lambda zero, counter: zero.int() + counter.int(),
        lambda zero, counter: zero + 1 + counter,
    ],
    ids=["scaled", "of another dtype", "behind the next"],
)
def test_other_positions_are_not_taken_for_the_counter(position: Callable[..., Tensor]) -> None:
    graph = rewritten(step(position=position), inputs())
    assert not [node for node in attentions(graph) if node.kwargs["positions"].target is aten.reshape.default]


# Compiled, since it is Inductor that writes in place.


def padded(h: Tensor, weight: Tensor) -> list[Tensor]:
    return [F.pad(F.rms_norm(h, (64,), each, 1e-6), (0, 64)) for each in (weight, weight + 1)]


def written_meanwhile(x: Tensor, weight: Tensor, rows: Tensor) -> list[Tensor]:
    """A copy of what is shared is written to before all of it was read."""
    h = x.relu()
    copied = h.clone()
    copied[rows] = 7.0
    weight = weight + copied.float().softmax(-1).sum().to(weight.dtype) * 0
    return [copied, *padded(h, weight)]


def of_some_rows(x: Tensor, weight: Tensor, rows: Tensor) -> list[Tensor]:
    """How many of them isn't known before it runs."""
    return padded(x[rows > 1].relu(), weight)


@pytest.mark.parametrize("function", [written_meanwhile, of_some_rows])
def test_what_is_shared_stays_what_it_is(function: Callable[..., list[Tensor]]) -> None:
    given = randn(4, 64), randn(64, seed=1), torch.tensor([1, 2, 0, 3])
    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        report, pairs = compiled_and_eager(function, *given, policy="ordered(act_padding)")
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)
    assert report.fused["act_padding"] == 2


def shared_cosines(product: Any) -> Callable[..., Any]:
    """Cosines of what a matrix product yields, which two fused ops read."""

    def function(frequencies: Any, positions: Any, weight: Any) -> Any:
        angles = aten.cat.default([product(frequencies, positions)] * 2, -1)
        cosines = aten.cos.default(aten.view.default(angles, [6, 8]))
        return ops.skinny_linear(cosines, weight, None), ops.skinny_linear(cosines, weight, None)

    return function


@pytest.mark.parametrize(
    ("product", "shapes", "dtype", "products"),
    [
        (aten.mm.default, ((6, 1), (1, 4)), torch.float32, 0),
        (aten.bmm.default, ((2, 3, 1), (2, 1, 4)), torch.float32, 0),
        (aten.bmm.default, ((2, 3, 2), (2, 2, 4)), torch.float32, 1),
        (aten.mm.default, ((6, 1), (1, 4)), torch.bfloat16, 1),
    ],
    ids=["one element", "batched", "two elements", "rounded"],
)
def test_products_over_one_element_are_multiplied(
    product: Any, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, products: int
) -> None:
    """As the angles of a rotary embedding: on a GPU such a product is a kernel of its own."""
    frequencies, positions = (randn(*shape, dtype=dtype, seed=index) for index, shape in enumerate(shapes))
    given = {"frequencies": frequencies, "positions": positions, "weight": randn(16, 8, dtype=dtype)}
    graph = written(shared_cosines(product), given)
    before = outcome(graph, [*given.values()])
    share_inputs(graph)
    graph.lint()
    assert len(calls(graph, product)) == products
    assert len(calls(graph, aten.mul.Tensor)) == 1 - products
    assert len(calls(graph, force_stride_order)) == 1
    for actual, expected in zip(outcome(graph, [*given.values()]), before, strict=True):
        assert torch.equal(actual, expected)
