"""Nodes that a search sees through or asks about: no-ops, and calls of engines' ops, on graphs that are written."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from fuseplan.graph.canonical.engines import (
    arguments_of,
    engine_op,
    engine_op_name,
    is_engines,
    merge_equal_results,
    read_at,
)
from fuseplan.graph.canonical.noops import eliminate_noops, is_noop
from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import aten, convert_element_type
from tests.helpers import written

X = torch.zeros(4, 8)
LIBRARY = torch.library.Library("vllm_ir", "FRAGMENT")
LIBRARY.define("seen(Tensor x, int size, float eps=0.5, Tensor? scale=None, *, bool flag=True) -> (Tensor, Tensor)")
LIBRARY.impl("seen", lambda x, size, *rest, **named: (x.clone(), x.clone()), "Meta")
SEEN = torch.ops.vllm_ir.seen.default


def only(function: Callable[[Any], Any], **inputs: Tensor) -> fx.Node:
    """The last node that is called."""
    return written(function, inputs or {"x": X}).output_node().prev


NOOPS: list[Callable[[Any], Any]] = [
    lambda x: aten.view.default(x, [4, 8]),
    lambda x: aten.reshape.default(x, [4, 8]),
    lambda x: aten.expand.default(x, [4, 8]),
    lambda x: aten.slice.Tensor(x, 0, 0, 4),
    lambda x: aten.clone.default(x),  # noqa: PLW0108 - named arguments
    lambda x: aten.alias.default(x),  # noqa: PLW0108 - named arguments
    lambda x: convert_element_type(x, torch.float32),
    lambda x: aten.permute.default(x, [0, 1]),
    lambda x: aten.permute.default(x, (0, 1)),
]
OTHERS: list[Callable[[Any], Any]] = [
    lambda x: aten.view.default(x, [8, 4]),
    lambda x: aten.expand.default(x, [2, 4, 8]),
    lambda x: aten.slice.Tensor(x, 0, 0, 3),
    lambda x: convert_element_type(x, torch.float16),
    lambda x: aten.permute.default(x, [1, 0]),
    lambda x: aten.neg.default(x),  # noqa: PLW0108 - named arguments
    lambda x: aten.transpose.int(x, 0, 0),
]


@pytest.mark.parametrize("function", NOOPS)
def test_what_changes_neither_shape_nor_dtype_is_a_noop(function: Callable[[Any], Any]) -> None:
    assert is_noop(only(function))


@pytest.mark.parametrize("function", OTHERS)
def test_what_computes_or_arranges_is_none(function: Callable[[Any], Any]) -> None:
    assert not is_noop(only(function))


def test_what_is_not_known_is_no_noop() -> None:
    node = only(NOOPS[0])
    del node.meta["val"]
    assert not is_noop(node)
    node = only(NOOPS[0])
    del node.args[0].meta["val"]  # type: ignore[union-attr]
    assert not is_noop(node)
    node = only(NOOPS[-2])
    node.args = (node.args[0], None)
    assert not is_noop(node)
    assert not is_noop(node.args[0])  # type: ignore[arg-type]


def called(canonical: CanonicalGraph) -> list[str]:
    return [str(node.target) for node in canonical.graph.nodes if node.op == "call_function"]


def test_noops_are_replaced_by_their_inputs_one_after_the_other() -> None:
    def function(x: Any) -> Any:
        y = aten.permute.default(aten.view.default(aten.neg.default(x), [4, 8]), [0, 1])
        return aten.clone.default(y), aten.permute.default(aten.abs.default(y), [1, 0]), aten.view.default(y, [32])

    canonical = CanonicalGraph.copy_of(written(function, {"x": X}))
    eliminate_noops(canonical)
    canonical.graph.lint()
    assert called(canonical) == ["aten.neg.default", "aten.abs.default", "aten.permute.default", "aten.view.default"]
    (negated,) = canonical.calls(aten.neg.default)
    returned: Any = canonical.graph.output_node().args[0]
    assert returned == (negated, *canonical.calls(aten.permute.default), *canonical.calls(aten.view.default))
    assert canonical.calls(aten.view.default)[0].args[0] is negated


@pytest.mark.parametrize("written_to", ["x", "y", "copy", "a view of y", "a view of the copy", "other"])
def test_a_copy_stays_where_one_of_the_two_is_written_to(written_to: str) -> None:
    def function(x: Any, other: Any) -> Any:
        y = aten.neg.default(x)
        copy = aten.clone.default(y)
        kept = aten.clone.default(aten.abs.default(x))
        views = {f"a view of {name}": aten.view.default(each, [32]) for name, each in (("y", y), ("the copy", copy))}
        targets = {"x": x, "y": y, "copy": copy, "other": other, **views}
        aten.add_.Tensor(targets[written_to], 1)
        return copy, kept

    canonical = CanonicalGraph.copy_of(written(function, {"x": X, "other": X}))
    eliminate_noops(canonical)
    stays = written_to not in ("x", "other")
    assert called(canonical).count("aten.clone.default") == stays
    returned: Any = canonical.graph.output_node().args[0]
    assert [each.target for each in returned] == [aten.clone.default if stays else aten.neg.default, aten.abs.default]


def test_engines_ops_are_those_of_their_namespaces_or_functionalised() -> None:
    assert is_engines(SEEN)
    assert is_engines(auto_functionalized)
    assert not is_engines(aten.neg.default)
    assert not is_engines(torch.ops.higher_order.cond)
    assert not is_engines(operator.getitem)


def test_the_op_is_what_is_called_or_what_is_functionalised() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    direct = graph.call_function(SEEN, (x, 3))
    wrapped = graph.call_function(auto_functionalized, (SEEN,), {"x": x, "size": 3})
    assert engine_op(direct) is engine_op(wrapped) is SEEN
    assert engine_op(graph.call_function(auto_functionalized, (SEEN, aten.neg.default))) is SEEN
    assert engine_op(graph.call_function(auto_functionalized, ())) is None
    assert engine_op(graph.call_function(operator.getitem, (SEEN, 0))) is None
    assert engine_op(x) is None
    assert [engine_op_name(each) for each in (direct, wrapped, x)] == ["vllm_ir::seen", "vllm_ir::seen", ""]


def test_arguments_are_by_name_with_those_that_are_left_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    usual = {"eps": 0.5, "scale": None, "flag": True}
    given: list[tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
        ((x, 3), {}, {"x": x, "size": 3, **usual}),
        ((x, 3, 0.25, x), {"flag": False}, {"x": x, "size": 3, "eps": 0.25, "scale": x, "flag": False}),
        ((x,), {"size": 4, "eps": 1.0}, {"x": x, "size": 4, **usual, "eps": 1.0}),
    ]
    for args, kwargs, expected in given:
        assert arguments_of(graph.call_function(SEEN, args, kwargs), SEEN) == expected
    wrapped = graph.call_function(auto_functionalized, (SEEN,), {"x": x, "size": 5, "scale": x})
    assert arguments_of(wrapped, SEEN) == {"x": x, "size": 5, **usual, "scale": x}


def test_a_result_that_is_taken_twice_is_one_value() -> None:
    def function(x: Any) -> Any:
        both = SEEN(x, 3)
        return both[1], both[0], aten.neg.default(both[1]), aten.abs.default(both[0]), aten.abs.default(both[1])

    canonical = CanonicalGraph.copy_of(written(function, {"x": X}))
    (node,) = canonical.calls(SEEN)
    merge_equal_results(canonical, node)
    canonical.graph.lint()
    second, first = canonical.calls(operator.getitem)
    assert (second.args, first.args) == ((node, 1), (node, 0))
    output: Any = canonical.graph.output_node().args[0]
    assert [output[0], output[1], *(each.args[0] for each in output[2:])] == [second, first, second, first, second]
    assert read_at(node) == [node, second, first]
    twice = canonical.original.find_nodes(op="call_function", target=operator.getitem)
    assert canonical.origin[second] is [each for each in twice if each.args[1] == 1][-1]
    (reader,) = canonical.calls(aten.neg.default)
    reader.args = (node,)
    merge_equal_results(canonical, node)
    assert set(node.users) == {second, first, reader}
