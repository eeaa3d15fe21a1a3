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


def copied(function: Callable[..., Any], **further: Tensor) -> CanonicalGraph:
    return CanonicalGraph.copy_of(written(function, {"x": X, **further}))


def called(function: Callable[[Any], Any]) -> fx.Node:
    """The last node that is called."""
    return written(function, {"x": X}).output_node().prev


@pytest.mark.parametrize(
    ("function", "changes_nothing"),
    [
        (lambda x: aten.view.default(x, [4, 8]), True),
        (lambda x: aten.expand.default(x, [4, 8]), True),
        (lambda x: aten.slice.Tensor(x, 0, 0, 4), True),
        (lambda x: convert_element_type(x, torch.float32), True),
        (lambda x: aten.permute.default(x, [0, 1]), True),
        (lambda x: aten.permute.default(x, (0, 1)), True),
        (lambda x: aten.view.default(x, [8, 4]), False),
        (lambda x: aten.expand.default(x, [2, 4, 8]), False),
        (lambda x: convert_element_type(x, torch.float16), False),
        (lambda x: aten.permute.default(x, [1, 0]), False),
        (lambda x: aten.transpose.int(x, 0, 0), False),
    ],
)
def test_what_changes_neither_shape_nor_dtype_is_a_noop(function: Callable[[Any], Any], changes_nothing: bool) -> None:
    assert is_noop(called(function)) is changes_nothing


def test_what_is_not_known_is_no_noop() -> None:
    view = called(lambda x: aten.view.default(x, [4, 8]))
    value = view.meta.pop("val")
    assert not is_noop(view)
    view.meta["val"] = value
    del view.all_input_nodes[0].meta["val"]
    assert not is_noop(view)
    turned = called(lambda x: aten.permute.default(x, [0, 1]))
    turned.args = (turned.args[0], None)
    assert not is_noop(turned)


def targets(canonical: CanonicalGraph) -> list[str]:
    return [str(node.target) for node in canonical.graph.nodes if node.op == "call_function"]


def test_noops_are_replaced_by_their_inputs_one_after_the_other() -> None:
    def function(x: Any) -> Any:
        y = aten.permute.default(aten.view.default(aten.neg.default(x), [4, 8]), [0, 1])
        return aten.clone.default(y), aten.permute.default(aten.abs.default(y), [1, 0]), aten.view.default(y, [32])

    canonical = copied(function)
    eliminate_noops(canonical)
    canonical.graph.lint()
    assert targets(canonical) == ["aten.neg.default", "aten.abs.default", "aten.permute.default", "aten.view.default"]
    (negated,), (view,) = canonical.calls(aten.neg.default), canonical.calls(aten.view.default)
    assert canonical.graph.output_node().args[0] == (negated, *canonical.calls(aten.permute.default), view)
    assert view.args[0] is negated


@pytest.mark.parametrize("written_to", ["x", "y", "copy", "a view of y", "a view of the copy", "other"])
def test_a_copy_stays_where_one_of_the_two_is_written_to(written_to: str) -> None:
    def function(x: Any, other: Any) -> Any:
        y = aten.neg.default(x)
        copy = aten.clone.default(y)
        kept = aten.clone.default(aten.abs.default(x))
        views = {f"a view of {name}": aten.view.default(each, [32]) for name, each in (("y", y), ("the copy", copy))}
        aten.add_.Tensor({"x": x, "y": y, "copy": copy, "other": other, **views}[written_to], 1)
        return copy, kept

    canonical = copied(function, other=X)
    eliminate_noops(canonical)
    expected = aten.neg.default if written_to in ("x", "other") else aten.clone.default
    returned: Any = canonical.graph.output_node().args[0]
    assert [each.target for each in returned] == [expected, aten.abs.default]


def test_an_engines_op_is_what_is_called_or_what_is_functionalised() -> None:
    others = (aten.neg.default, torch.ops.higher_order.cond, operator.getitem)
    assert [is_engines(each) for each in (SEEN, auto_functionalized, *others)] == [True, True, False, False, False]
    graph = fx.Graph()
    x = graph.placeholder("x")
    direct, wrapped = graph.call_function(SEEN, (x, 3)), graph.call_function(auto_functionalized, (SEEN,), {"x": x})
    empty, item = graph.call_function(auto_functionalized, ()), graph.call_function(operator.getitem, (SEEN, 0))
    assert [engine_op(each) for each in (direct, wrapped, empty, item, x)] == [SEEN, SEEN, None, None, None]
    assert [engine_op_name(each) for each in (direct, wrapped, x)] == ["vllm_ir::seen", "vllm_ir::seen", ""]


def test_arguments_are_by_name_with_those_that_are_left_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    usual = {"x": x, "size": 3, "eps": 0.5, "scale": None, "flag": True}
    direct = graph.call_function(SEEN, (x, 3, 0.25, x), {"flag": False})
    assert arguments_of(direct, SEEN) == {**usual, "eps": 0.25, "scale": x, "flag": False}
    wrapped = graph.call_function(auto_functionalized, (SEEN,), {"x": x, "size": 3, "scale": x})
    assert arguments_of(wrapped, SEEN) == {**usual, "scale": x}


def test_a_result_that_is_taken_twice_is_one_value() -> None:
    def function(x: Any) -> Any:
        both = SEEN(x, 3)
        return both[1], both[0], aten.neg.default(both[1]), aten.abs.default(both[0]), aten.abs.default(both[1])

    canonical = copied(function)
    (node,) = canonical.calls(SEEN)
    merge_equal_results(canonical, node)
    canonical.graph.lint()
    second, first = canonical.calls(operator.getitem)
    assert (second.args, first.args) == ((node, 1), (node, 0))
    output: Any = canonical.graph.output_node().args[0]
    assert [output[0], output[1], *(each.args[0] for each in output[2:])] == [second, first, second, first, second]
    assert read_at(node) == [node, second, first]
    (reader,) = canonical.calls(aten.neg.default)
    reader.args = (node,)
    merge_equal_results(canonical, node)
    assert set(node.users) == {second, first, reader}
