"""The copy of a graph that is raised: what stands for what in it, where, and what is shared."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import aten
from fuseplan.record import Nearness, Reason
from tests.helpers import written

FP8 = torch.float8_e4m3fn
X = torch.zeros(4, 8, dtype=torch.bfloat16)
W = torch.ones(8, dtype=torch.bfloat16)
ROWS = ops.dynamic_per_token_scaled_fp8_quant


def copied(function: Callable[..., Any], **inputs: Tensor) -> CanonicalGraph:
    return CanonicalGraph.copy_of(written(function, inputs or {"x": X}))


def copies(canonical: CanonicalGraph) -> dict[str, fx.Node]:
    """The nodes of a copy in which nothing is raised yet, by name."""
    return {node.name: node for node in canonical.graph.nodes}


def names(nodes: Any) -> list[str]:
    return [node.name for node in nodes]


def norm(x: Any, weight: Any) -> Any:
    return ops.rms_norm(x, weight, 1e-6, "llama")


def quantised(x: Any) -> tuple[Any, Any]:
    both = ROWS(x, FP8, 0.0, 0.0, 0.0, None, "divide")
    return both[0], both[1]


def scale_of(x: Any) -> Any:
    """The codes have no node."""
    return ROWS(x, FP8, 0.0, 0.0, 0.0, None, "divide")[1]


def read(x: Any) -> Any:
    """By an op that writes to nothing and has memory of its own."""
    return aten.relu.default(x)


def wide(codes: Any) -> Any:
    return torch.ops.prims.convert_element_type.default(codes, torch.float32)


def test_calls_come_in_the_order_of_the_graph_and_dialect_nodes_op_by_op() -> None:
    canonical = copied(lambda x, w: norm(ops.pad(norm(ops.pad(x, 0), w), 0), w), x=X, w=W)
    first, last, *norms = canonical.dialect_nodes
    assert names([first, last, *norms]) == ["pad_default", "pad_default_1", "rms_norm_default", "rms_norm_default_1"]
    pad = ops.pad.overload
    early = canonical.insert_before(first, pad, first.args, None)
    assert canonical.calls(pad) == [early, first, last]
    assert canonical.calls(pad, ops.rms_norm.overload) == [early, first, norms[0], last, norms[1]]
    assert canonical.calls(aten.abs.default) == canonical.calls() == []


def test_what_is_recognised_is_counted_by_width() -> None:
    def function(x: Any, y: Any, w: Any, s: Any) -> Any:
        return norm(x, w), ops.pad(x, 8), norm(x, w), ops.pad(y, 8), ops.pad(s, 8)

    canonical = copied(function, x=X, y=torch.zeros(4, 16), w=W, s=torch.zeros(1))
    assert [*canonical.recognized().items()] == [("pad[16]", 1), ("pad[1]", 1), ("pad[8]", 1), ("rms_norm[8]", 2)]
    copies(canonical)["s"].meta["val"] = torch.zeros(())
    del copies(canonical)["y"].meta["val"]
    assert canonical.recognized() == {"pad[]": 2, "pad[8]": 1, "rms_norm[8]": 2}


@pytest.mark.parametrize(
    ("stack", "line", "code"),
    [
        ('File "/m/node.py", line 3, in f\n    y = relu(x)', "node.py:3", "y = relu(x)"),
        ('File "/m/bare.py", line 7, in h', "bare.py:7", "z = norm(x)"),
        ("", "place.py:5", "z = norm(x)"),
    ],
)
def test_a_refusal_is_where_the_node_in_the_way_is_or_else_where_the_op_is(stack: str, line: str, code: str) -> None:
    canonical = copied(lambda x: aten.tanh.default(aten.relu.default(x)))
    x, relu, tanh, _ = canonical.graph.nodes
    relu.meta["stack_trace"] = stack
    tanh.meta["stack_trace"] = 'File "/m/place.py", line 5, in g\n    z = norm(x)'
    canonical.refuse(ops.rms_norm, [x, relu], Reason.OP, "why", node=relu, place=tanh, fix="fix", found="b")
    (refusal,) = canonical.refusals
    assert canonical.unraised == {x: refusal, relu: refusal}
    assert (refusal.line, refusal.code, refusal.source) == (line, code, "place.py:5")
    assert (refusal.nodes, refusal.nearness, refusal.fix) == ((relu.name,), Nearness.UNRECOGNIZED, "fix")
    assert (refusal.op, refusal.expected, refusal.found) == ("rms_norm", None, "b")


def test_one_result_takes_the_place_the_value_and_the_original_of_what_computed_it() -> None:
    canonical = copied(lambda x, w: read(aten.mul.Tensor(aten.tanh.default(x), w)), x=X, w=W)
    given = copies(canonical)
    mul, relu = given["mul_tensor"], given["relu_default"]
    tanh, product, outer = (canonical.origin[node] for node in (given["tanh_default"], mul, relu))
    mul.meta.update(stack_trace="mul", nn_module_stack={"a": 1}, custom={"b": 2}, other=3)
    value, depth, args = mul.meta["val"], canonical.depth(mul), (given["x"], given["w"], 1e-6, "llama")
    raised = canonical.raise_op(ops.rms_norm, args, [mul])
    assert (relu.args, raised.args) == ((raised,), args)
    assert raised.meta == {"stack_trace": "mul", "nn_module_stack": {"a": 1}, "custom": {"b": 2}, "val": value}
    assert relu.meta is outer.meta, "only what is copied shares its metadata"
    assert canonical.origin[raised] is product
    assert canonical.interior[raised] == canonical.claims([raised]) == {tanh, product}
    assert (canonical.depth(raised), canonical.region[raised]) == (depth, 0)
    assert names(canonical.graph.nodes) == ["x", "w", raised.name, "relu_default", "output"]
    over = canonical.raise_op(ops.pad, (given["x"], 0), [relu])
    over = canonical.raise_op(ops.pad, (given["x"], 1), [over])
    assert raised._erased
    assert canonical.claims([over]) == {tanh, product, outer}
    assert canonical.origin[over] is outer


@pytest.mark.parametrize("dead", [None, 0, 1])
def test_several_results_are_items_and_dead_ones_have_none(dead: int | None) -> None:
    def function(x: Any, residual: Any, w: Any) -> Any:
        total = aten.add.Tensor(x, residual)
        aten.add_.Tensor(w, 1)
        y = aten.mul.Tensor(total, w)
        return (read(y) if dead != 0 else None), (aten.tanh.default(total) if dead != 1 else None)

    canonical = copied(function, x=X, residual=X, w=W)
    given = copies(canonical)
    both = enumerate((given["mul_tensor"], given["add_tensor"]))
    results = [None if index == dead else node for index, node in both]
    live = [node for node in results if node is not None]
    for node in live:
        node.meta["stack_trace"] = node.name
    wanted = [(canonical.origin[node], node.meta["val"], node.name) for node in live]
    place = canonical.depth(live[0]), canonical.region[live[0]]
    args = given["x"], given["residual"], given["w"], 1e-6, "llama"
    raised = canonical.raise_op(ops.fused_add_rms_norm, args, results)
    items = canonical.calls(operator.getitem)
    assert [(canonical.origin[each], each.meta["val"], each.meta["stack_trace"]) for each in items] == wanted
    assert [each.args for each in items] == [(raised, index) for index in range(2) if index != dead]
    assert raised.meta["stack_trace"] == live[0].name
    assert [value is None for value in raised.meta["val"]] == [index == dead for index in range(2)]
    assert (canonical.depth(raised), canonical.region[raised]) == place
    assert canonical.claims([raised, *items]) == canonical.interior[raised]
    assert len(canonical.interior[raised]) == 2 - (dead == 0)
    assert raised not in canonical.origin
    assert raised.prev.name == ("add__tensor" if dead == 1 else "w")


def test_an_op_stands_where_the_first_of_its_results_stood_and_behind_all_of_its_arguments() -> None:
    def function(x: Any, w: Any) -> Any:
        y = aten.relu.default(aten.tanh.default(x))
        return y, aten.abs.default(x), aten.neg.default(w)

    for late, behind in (("w", "tanh_default"), ("abs_default", "abs_default"), ("neg_default", "neg_default")):
        given = copies(canonical := copied(function, x=X, w=W))
        args = given["tanh_default"], given[late], 1e-6, "llama"
        assert canonical.raise_op(ops.rms_norm, args, [given["relu_default"]]).prev.name == behind


def test_a_constant_comes_before_all_that_computes_and_serves_all_readers() -> None:
    canonical = copied(lambda x, w: norm(aten.relu.default(x), w), x=X, w=W)
    made = canonical.constant(2.0, (8,), like=X.double())
    assert (made.prev.name, made.next.name) == ("w", "relu_default")
    assert torch.equal(made.meta["val"], torch.full((8,), 2.0, dtype=torch.float64))
    assert (made.target, made.args, made.kwargs["dtype"]) == (aten.full.default, ([8], 2.0), torch.float64)
    assert made.kwargs["device"] == X.device
    assert canonical.constant(2.0, [8], like=X.double()) is made
    others = ((1.0, 8, X.double()), (2.0, 5, X.double()), (2.0, 8, X), (2.0, 8, X.double().to("meta")))
    assert len({made, *(canonical.constant(value, (size,), like=like) for value, size, like in others)}) == 5


def test_a_new_node_comes_from_where_it_is_put() -> None:
    canonical = copied(lambda x: aten.tanh.default(aten.relu.default(x)))
    given = copies(canonical)
    tanh = given["tanh_default"]
    tanh.meta.update(stack_trace="tanh", other=1)
    made = canonical.insert_before(tanh, aten.clamp.default, [given["x"], 0], "value", {"max": 1})
    assert (made.next, made.args, made.kwargs) == (tanh, (given["x"], 0), {"max": 1})
    assert made.meta == {"stack_trace": "tanh", "val": "value"}
    assert (canonical.depth(made), canonical.region[made]) == (canonical.depth(tanh), 0)
    assert made not in canonical.origin


def test_what_stands_for_another_has_its_original_and_replaces_what_that_replaced() -> None:
    canonical = copied(lambda x: read(aten.tanh.default(aten.abs.default(x))))
    given = copies(canonical)
    tanh, originals = given["tanh_default"], [canonical.origin[given[each]] for each in ("tanh_default", "abs_default")]
    made = canonical.insert_before(tanh, aten.sin.default, (given["x"],), None)
    canonical.replace(tanh, made)
    other = canonical.insert_before(made, aten.cos.default, (given["x"],), None)
    canonical.replace(made, other)
    assert canonical.origin[other] is originals[0]
    assert canonical.interior[other] == {*originals}
    assert given["relu_default"].args == (other,)
    nameless = canonical.insert_before(given["relu_default"], aten.abs.default, (other,), None)
    fresh = canonical.insert_before(nameless, aten.neg.default, (other,), None)
    canonical.replace(nameless, fresh)
    assert fresh not in canonical.origin
    assert canonical.interior[fresh] == frozenset()
    assert nameless._erased


def test_the_original_of_what_has_none_is_that_of_its_first_reader_that_has_one() -> None:
    canonical = copied(lambda x: (aten.tanh.default(x), aten.sin.default(x)))
    given = copies(canonical)
    x, tanh, sin = (given[name] for name in ("x", "tanh_default", "sin_default"))
    made = canonical.insert_before(tanh, aten.abs.default, (x,), None)
    canonical.insert_before(tanh, aten.neg.default, (made,), None)
    assert canonical.source_node(made) is made
    sin.args, tanh.args = (made,), (made,)
    assert canonical.source_node(made) is canonical.origin[sin]
    assert canonical.source_node(x) is canonical.origin[x]


def merged(function: Callable[..., Any], op: Any = ROWS, **inputs: Tensor) -> CanonicalGraph:
    canonical = copied(function, **inputs)
    canonical.merge_equal(op)
    canonical.graph.lint()
    return canonical


def test_equal_calls_of_one_result_are_one() -> None:
    def function(x: Any, w: Any) -> Any:
        return aten.tanh.default(norm(x, w)), read(norm(x, w)), aten.abs.default(norm(x, w)), read(norm(w, w))

    canonical = merged(function, ops.rms_norm, x=X, w=W)
    first, other = canonical.calls(ops.rms_norm.overload)
    originals = canonical.original.find_nodes(op="call_function", target=ops.rms_norm.overload)
    assert (canonical.origin[first], canonical.origin[other]) == (originals[0], originals[3])
    assert canonical.repeated == {originals[0]: originals[1:3]}
    assert names(first.users) == ["tanh_default", "relu_default", "abs_default"]


def test_equal_calls_of_several_results_are_one_result_by_result() -> None:
    def function(x: Any) -> Any:
        codes, scale = quantised(x)
        again = ROWS(x, FP8, 0.0, 0.0, 0.0, None, "divide")
        return wide(codes), read(scale), aten.tanh.default(again[1]), aten.abs.default(wide(again[0]))

    canonical = merged(function)
    (quant,) = canonical.calls(ROWS.overload)
    items = {node.args[1]: node for node in quant.users}
    assert names(items[1].users) == ["relu_default", "tanh_default"]
    assert len(items[0].users) == 2
    first, second = canonical.original.find_nodes(op="call_function", target=ROWS.overload)
    twice = {node.args[1]: node for node in second.users}
    assert canonical.repeated == {node: [twice[node.args[1]]] for node in first.users}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (read(scale_of(x)), [read(each) for each in quantised(x)][1]),  # the first has no codes
        lambda x: (read(quantised(x)[1]), quantised(x)[1]),  # memory of its own would be one
        lambda x: (quantised(x)[1], read(quantised(x)[1])),
        lambda x: (read(quantised(x)[1]), aten.add_.Tensor(quantised(x)[1], 1)),
        lambda x: (read(quantised(x)[1]), aten.view.default(quantised(x)[1], [4])),
        lambda x: (read(quantised(x)[1]), read(quantised(aten.relu.default(x))[1])),
        lambda x: (read(quantised(x)[1]), aten.add_.Tensor(x, 1), read(quantised(x)[1])),
    ],
)
def test_what_is_not_the_same_is_not_merged(function: Any) -> None:
    canonical = merged(function)
    assert len(canonical.calls(ROWS.overload)) == 2
    assert not canonical.repeated


def viewed(*shapes: list[int]) -> Callable[[Any], Any]:
    """Each reads views of codes of its own."""
    return lambda x: tuple(wide(aten.view.default(quantised(x)[0], shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("shapes", "left"),
    [([[2, 16], [2, 16]], [[2, 16]]), ([[2, 16], [4, 8]], [[2, 16], [4, 8]]),
     ([[2, 16], [4, 8], [2, 16], [4, 8], [2, 16]], [[2, 16], [4, 8]])],
)  # fmt: skip
def test_equal_views_of_what_is_merged_are_one_too(shapes: list[list[int]], left: list[list[int]]) -> None:
    canonical = copied(viewed(*shapes))
    for node in canonical.calls(operator.getitem):
        del canonical.origin[node]  # where quantisations are raised, views of the codes stand for values of the graph
    canonical.merge_equal(ROWS)
    canonical.graph.lint()
    assert len(canonical.calls(ROWS.overload)) == 1
    views = canonical.calls(aten.view.default)
    assert [view.args[1] for view in views] == left
    originals = canonical.original.find_nodes(op="call_function", target=aten.view.default)
    alike = {str(shape): [each for each in originals if each.args[1] == shape] for shape in left}
    assert [canonical.origin[view] for view in views] == [each[0] for each in alike.values()]
    assert canonical.repeated == {first: rest for first, *rest in alike.values() if rest}
    assert sum(len(view.users) for view in views) == len(shapes)


def test_views_of_what_stands_for_a_value_of_the_graph_are_left() -> None:
    canonical = merged(viewed([2, 16], [2, 16]))
    assert len(canonical.calls(ROWS.overload)) == 1
    assert len(canonical.calls(aten.view.default)) == 2


@pytest.mark.parametrize("index", [0, 1])
def test_a_result_with_an_original_is_not_merged_with_one_without(index: int) -> None:
    canonical = copied(viewed([2, 16], [2, 16]))
    del canonical.origin[canonical.calls(operator.getitem)[index]]
    canonical.merge_equal(ROWS)
    assert len(canonical.calls(ROWS.overload)) == 2
    assert not canonical.repeated
