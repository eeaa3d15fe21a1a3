"""The copy of a graph that is raised: what stands for what in it, where, and what is shared."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.graph.canonical.view import CanonicalGraph, is_dialect
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


def numbered(node: fx.Node) -> dict[int, fx.Node]:
    """The items of what has several results."""
    return {int(str(user.args[1])): user for user in node.users}


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


def test_calls_come_in_the_order_of_the_graph_however_they_were_made() -> None:
    canonical = copied(lambda x: aten.relu.default(aten.tanh.default(aten.relu.default(x))))
    (tanh,) = canonical.calls(aten.tanh.default)
    first, last = canonical.calls(aten.relu.default)
    early = canonical.insert_before(first, aten.relu.default, (first.args[0],), None)
    assert canonical.calls(aten.relu.default) == [early, first, last]
    assert canonical.calls(aten.relu.default, aten.tanh.default) == [early, first, tanh, last]
    assert canonical.calls(aten.abs.default) == canonical.calls() == []


def test_dialect_nodes_come_op_by_op() -> None:
    canonical = copied(lambda x, w: norm(ops.pad(norm(ops.pad(x, 0), w), 0), w), x=X, w=W)
    found = canonical.dialect_nodes
    assert names(found) == ["pad_default", "pad_default_1", "rms_norm_default", "rms_norm_default_1"]
    assert [is_dialect(node, ops.pad) for node in found] == [True, True, False, False]
    assert all(is_dialect(node, ops.pad, ops.rms_norm) for node in found)
    assert not is_dialect(found[0])
    assert not is_dialect("x", ops.pad)


def test_what_is_recognised_is_counted_by_width() -> None:
    def function(x: Any, y: Any, w: Any, s: Any) -> Any:
        return norm(x, w), ops.pad(x, 8), norm(x, w), ops.pad(y, 8), ops.pad(s, 8)

    canonical = copied(function, x=X, y=torch.zeros(4, 16), w=W, s=torch.zeros(1))
    assert canonical.recognized() == {"pad[16]": 1, "pad[1]": 1, "pad[8]": 1, "rms_norm[8]": 2}
    assert list(canonical.recognized()) == sorted(canonical.recognized())
    copies(canonical)["s"].meta["val"] = torch.zeros(())
    del copies(canonical)["y"].meta["val"]
    assert canonical.recognized() == {"pad[]": 2, "pad[8]": 1, "rms_norm[8]": 2}
    assert not [key for key in canonical.recognized() if "relu" in key]


STACKS = {
    "node": 'File "/m/node.py", line 3, in f\n    y = relu(x)',
    "place": 'File "/m/place.py", line 5, in g\n    z = norm(x)',
    "without text": 'File "/m/bare.py", line 7, in h',
}


@pytest.mark.parametrize(
    ("stack", "line", "code"),
    [
        ("node", "node.py:3", "y = relu(x)"), (None, "place.py:5", "z = norm(x)"),
        ("without text", "bare.py:7", "z = norm(x)"),
    ],
)  # fmt: skip
def test_a_refusal_is_where_the_node_in_the_way_is_or_else_where_the_op_is(
    stack: str | None, line: str, code: str
) -> None:
    canonical = copied(lambda x: aten.tanh.default(aten.relu.default(x)))
    x, relu, tanh, _ = canonical.graph.nodes
    if stack:
        relu.meta["stack_trace"] = STACKS[stack]
    tanh.meta["stack_trace"] = STACKS["place"]
    canonical.refuse(ops.rms_norm, [x, relu], Reason.OP, "why", node=relu, place=tanh, mend="mend")
    (refusal,) = canonical.refusals
    assert canonical.unraised == {x: refusal, relu: refusal}
    assert (refusal.line, refusal.code, refusal.source) == (line, code, "place.py:5")
    assert (refusal.nodes, refusal.nearness, refusal.mend) == ((relu.name,), Nearness.UNRECOGNIZED, "mend")
    assert (refusal.expected, refusal.found) == (None, None)
    canonical.refuse(ops.pad, [tanh], Reason.OP, "why", node=relu, place=tanh, expected="a", found="b")
    assert [(each.op, each.expected, each.found) for each in canonical.refusals] == [
        ("rms_norm", None, None), ("pad", "a", "b"),
    ]  # fmt: skip


def test_only_what_is_copied_shares_its_metadata_with_the_original() -> None:
    canonical = copied(read)
    assert all(node.meta is canonical.origin[node].meta for node in canonical.graph.nodes)
    relu = copies(canonical)["relu_default"]
    made = canonical.insert_before(relu, aten.sin.default, (relu.args[0],), relu.meta["val"])
    raised = canonical.raise_op(ops.pad, (made, 1), [relu])
    assert {id(node.meta) for node in (made, raised)}.isdisjoint(id(node.meta) for node in canonical.original.nodes)


def test_one_result_takes_the_place_the_value_and_the_original_of_what_computed_it() -> None:
    canonical = copied(lambda x, w: read(aten.mul.Tensor(aten.tanh.default(x), w)), x=X, w=W)
    given = copies(canonical)
    tanh, mul, relu = given["tanh_default"], given["mul_tensor"], given["relu_default"]
    originals = [canonical.origin[node] for node in (tanh, mul)]
    mul.meta.update(stack_trace="mul", nn_module_stack={"a": 1}, custom={"b": 2}, other=3)
    tanh.meta.update(stack_trace="tanh")
    value, depth = mul.meta["val"], canonical.depth(mul)
    raised = canonical.raise_op(ops.rms_norm, (given["x"], given["w"], 1e-6, "llama"), [mul])
    assert relu.args == (raised,)
    assert raised.args == (given["x"], given["w"], 1e-6, "llama")
    assert raised.meta == {"stack_trace": "mul", "nn_module_stack": {"a": 1}, "custom": {"b": 2}, "val": value}
    assert canonical.origin[raised] is originals[1]
    assert canonical.interior[raised] == canonical.claims([raised]) == {*originals}
    assert (canonical.depth(raised), canonical.region[raised]) == (depth, 0)
    assert names(canonical.graph.nodes) == ["x", "w", raised.name, "relu_default", "output"]
    assert canonical.claims([relu]) == {canonical.origin[relu]}
    assert canonical.claims([]) == frozenset()


def test_what_is_raised_over_what_was_raised_replaces_what_that_replaced() -> None:
    canonical = copied(lambda x, w: read(aten.mul.Tensor(aten.tanh.default(x), w)), x=X, w=W)
    given = copies(canonical)
    originals = [canonical.origin[given[name]] for name in ("tanh_default", "mul_tensor", "relu_default")]
    inner = canonical.raise_op(ops.rms_norm, (given["x"], given["w"], 1e-6, "llama"), [given["mul_tensor"]])
    outer = canonical.raise_op(ops.pad, (given["x"], 0), [given["relu_default"]])
    assert inner._erased
    assert canonical.interior[outer] == {*originals}
    again = canonical.raise_op(ops.pad, (given["x"], 1), [outer])
    assert canonical.claims([again]) == {*originals}
    assert canonical.origin[again] is originals[-1]


@pytest.mark.parametrize("dead", [None, 0, 1])
def test_several_results_are_items_and_dead_ones_have_none(dead: int | None) -> None:
    def function(x: Any, residual: Any, w: Any) -> Any:
        total = aten.add.Tensor(x, residual)
        aten.add_.Tensor(w, 1)
        y = aten.mul.Tensor(total, w)
        return (read(y) if dead != 0 else None), (aten.tanh.default(total) if dead != 1 else None)

    canonical = copied(function, x=X, residual=X, w=W)
    given = copies(canonical)
    y, total = given["mul_tensor"], given["add_tensor"]
    y.meta["stack_trace"], total.meta["stack_trace"] = "y", "total"
    results = [None if index == dead else node for index, node in enumerate((y, total))]
    first = y if dead != 0 else total
    wanted = {index: (canonical.origin[each], each.meta["val"]) for index, each in enumerate(results) if each}
    computed = {canonical.origin[each] for each in (total, *([y] if dead != 0 else []))}
    depth, region = canonical.depth(first), canonical.region[first]
    raised = canonical.raise_op(
        ops.fused_add_rms_norm, (given["x"], given["residual"], given["w"], 1e-6, "llama"), results
    )
    items = numbered(raised)
    assert {index: (canonical.origin[node], node.meta["val"]) for index, node in items.items()} == wanted
    assert [node.meta["stack_trace"] for node in (raised, *(items[index] for index in sorted(items)))] == [
        first.meta["stack_trace"], *(each.meta["stack_trace"] for each in results if each),
    ]  # fmt: skip
    assert [None if value is None else value.shape for value in raised.meta["val"]] == [
        None if index == dead else X.shape for index in range(2)
    ]
    assert (canonical.depth(raised), canonical.region[raised]) == (depth, region)
    assert region == (dead != 0)
    assert canonical.interior[raised] == computed
    assert canonical.claims([raised, *items.values()]) == computed
    assert raised not in canonical.origin
    assert raised.prev.name == ("add__tensor" if dead == 1 else "w")
    following = [raised.next, raised.next.next][: len(items)]
    assert following == [items[index] for index in sorted(items)]


def test_an_op_stands_where_the_first_of_its_results_stood_and_behind_all_of_its_arguments() -> None:
    def function(x: Any, w: Any) -> Any:
        early = aten.tanh.default(x)
        y = aten.relu.default(early)
        return y, aten.abs.default(x), aten.neg.default(w), aten.sin.default(w)

    for late, behind in ((None, "tanh_default"), ("abs_default", "abs_default"), ("neg_default", "neg_default")):
        canonical = copied(function, x=X, w=W)
        given = copies(canonical)
        args = given["tanh_default"], given[late or "w"]
        raised = canonical.raise_op(ops.rms_norm, (*args, 1e-6, "llama"), [given["relu_default"]])
        assert raised.prev.name == behind
        args = given["sin_default"], given["neg_default"]
        both = canonical.raise_op(ops.rms_norm, (*args, 1e-6, "llama"), [raised])
        assert both.prev is given["sin_default"]


def test_a_constant_comes_before_all_that_computes_and_after_the_inputs() -> None:
    canonical = copied(lambda x, w: norm(aten.relu.default(x), w), x=X, w=W)
    canonical.graph.owning_module = fx.GraphModule({"weight": W}, fx.Graph())
    with canonical.graph.inserting_before(copies(canonical)["relu_default"]):
        canonical.graph.create_node("get_attr", "weight")
    made = canonical.constant(2.0, (8,), like=X.double())
    relu = copies(canonical)["relu_default"]
    assert (made.prev.op, made.next) == ("get_attr", relu)
    assert (made.target, made.args) == (aten.full.default, ([8], 2.0))
    assert made.kwargs == {"dtype": torch.float64, "device": X.device, "pin_memory": False}
    assert torch.equal(made.meta["val"], torch.full((8,), 2.0, dtype=torch.float64))
    assert (canonical.depth(made), canonical.region[made]) == (canonical.depth(relu), canonical.region[relu])
    assert made not in canonical.origin
    assert canonical.constant(2.0, [8], like=X.double()) is made
    others = [
        canonical.constant(value, (size,), like=like)
        for value, size, like in (
            (1.0, 8, X.double()),
            (2.0, 5, X.double()),
            (2.0, 8, X),
            (2.0, 8, X.double().to("meta")),
        )
    ]
    assert len({made, *others}) == 5
    assert all(each < relu for each in others)
    assert others[-1].kwargs["device"] == torch.device("meta")


def test_a_new_node_comes_from_where_it_is_put() -> None:
    canonical = copied(lambda x: aten.tanh.default(aten.relu.default(x)))
    given = copies(canonical)
    tanh = given["tanh_default"]
    tanh.meta.update(stack_trace="tanh", other=1)
    made = canonical.insert_before(tanh, aten.clamp.default, (given["x"], 0), "value", {"max": 1})
    assert (made.next, made.args, made.kwargs) == (tanh, (given["x"], 0), {"max": 1})
    assert made.meta == {"stack_trace": "tanh", "val": "value"}
    plain = canonical.insert_before(given["relu_default"], aten.abs.default, [given["x"]], None)
    assert (plain.args, plain.kwargs, plain.meta) == ((given["x"],), {}, {"val": None})
    assert made not in canonical.origin
    assert plain not in canonical.interior


def test_what_stands_for_another_has_its_original_and_replaces_what_that_replaced() -> None:
    canonical = copied(lambda x: read(aten.tanh.default(aten.abs.default(x))))
    given = copies(canonical)
    tanh, absolute = given["tanh_default"], given["abs_default"]
    originals = {canonical.origin[tanh], canonical.origin[absolute]}
    made = canonical.insert_before(tanh, aten.sin.default, (given["x"],), None)
    canonical.replace(tanh, made)
    assert canonical.origin[made] is canonical.original.find_nodes(op="call_function", target=aten.tanh.default)[0]
    assert given["relu_default"].args == (made,)
    assert canonical.interior[made] == originals
    other = canonical.insert_before(made, aten.cos.default, (given["x"],), None)
    canonical.replace(made, other)
    assert canonical.interior[other] == originals
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
    assert canonical.source_node(made) is made
    reader = canonical.insert_before(tanh, aten.neg.default, (made,), None)
    assert canonical.source_node(made) is made
    sin.args, tanh.args = (made,), (made,)
    assert canonical.source_node(made) is canonical.origin[sin]
    assert canonical.source_node(reader) is reader
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
    assert names(other.users) == ["relu_default_1"]


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
    first, second = (
        list(each.users) for each in canonical.original.find_nodes(op="call_function", target=ROWS.overload)
    )
    twice = {node.args[1]: node for node in second}
    assert canonical.repeated == {node: [twice[node.args[1]]] for node in first}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (read(scale_of(x)), [read(each) for each in quantised(x)][1]),  # the first has no codes
        lambda x: (read(quantised(x)[1]), aten.tanh.default(scale_of(aten.relu.default(x)))),
        lambda x: (read(quantised(x)[1]), quantised(x)[1]),  # memory of its own would be one
        lambda x: (quantised(x)[1], read(quantised(x)[1])),
        lambda x: (read(quantised(x)[1]), aten.add_.Tensor(quantised(x)[1], 1)),
        lambda x: (read(quantised(x)[1]), aten.view.default(quantised(x)[1], [4])),
        lambda x: (read(quantised(x)[1]), read(quantised(aten.relu.default(x))[1])),
    ],
)
def test_what_is_not_the_same_is_not_merged(function: Any) -> None:
    canonical = merged(function)
    assert len(canonical.calls(ROWS.overload)) == 2
    assert not canonical.repeated


def test_what_is_written_between_two_calls_keeps_them_apart() -> None:
    def function(x: Any, w: Any) -> Any:
        first = read(norm(x, w))
        aten.add_.Tensor(x, 1)
        return first, read(norm(x, w)), aten.tanh.default(norm(x, w))

    canonical = merged(function, ops.rms_norm, x=X, w=W)
    assert len(canonical.calls(ops.rms_norm.overload)) == 2


def viewed(*shapes: list[int], inside: bool = True) -> Callable[[Any], Any]:
    """Each reads views of codes of its own."""

    def function(x: Any) -> Any:
        found = []
        for shape in shapes:
            codes = aten.view.default(quantised(x)[0], shape)
            found.append(wide(codes) if inside else codes)
        return tuple(found)

    return function


def without_originals(canonical: CanonicalGraph) -> None:
    """As codes are where quantisations are raised: views of them stand for values of the graph."""
    for node in canonical.calls(operator.getitem):
        del canonical.origin[node]


@pytest.mark.parametrize(
    ("shapes", "left"),
    [([[2, 16], [2, 16]], [[2, 16]]), ([[2, 16], [4, 8]], [[2, 16], [4, 8]]),
     ([[2, 16], [4, 8], [2, 16], [4, 8], [2, 16]], [[2, 16], [4, 8]])],
)  # fmt: skip
def test_equal_views_of_what_is_merged_are_one_too(shapes: list[list[int]], left: list[list[int]]) -> None:
    canonical = copied(viewed(*shapes))
    without_originals(canonical)
    canonical.merge_equal(ROWS)
    canonical.graph.lint()
    assert [len(canonical.calls(each)) for each in (ROWS.overload, operator.getitem)] == [1, 2]
    views = canonical.calls(aten.view.default)
    assert [view.args[1] for view in views] == left
    originals = canonical.original.find_nodes(op="call_function", target=aten.view.default)
    alike = {str(shape): [each for each in originals if each.args[1] == shape] for shape in left}
    assert [canonical.origin[view] for view in views] == [each[0] for each in alike.values()]
    assert canonical.repeated == {first: rest for first, *rest in alike.values() if rest}
    assert sum(len(view.users) for view in views) == len(shapes)


def test_views_of_another_op_and_what_else_reads_a_value_stay() -> None:
    def function(x: Any) -> Any:
        first, second, third = (quantised(x)[0] for _ in range(3))
        views = aten.view.default(first, [2, 16]), aten.reshape.default(second, [2, 16])
        return *map(wide, views), wide(third), wide(third)

    canonical = copied(function)
    without_originals(canonical)
    canonical.merge_equal(ROWS)
    codes, _ = canonical.calls(operator.getitem)
    assert [str(user.target) for user in codes.users] == [
        "aten.view.default", "aten.reshape.default", *["prims.convert_element_type.default"] * 2,
    ]  # fmt: skip
    assert not canonical.repeated


def test_views_that_leave_the_graph_stay_apart() -> None:
    """So do calls, one of which leaves it through a view."""
    canonical = copied(viewed([2, 16], [2, 16], inside=False))
    without_originals(canonical)
    canonical.merge_equal(ROWS)
    assert len(canonical.calls(ROWS.overload)) == 2


def test_views_of_what_stands_for_a_value_of_the_graph_are_left() -> None:
    """The graph has them, each by itself, and reads them."""
    canonical = merged(viewed([2, 16], [2, 16]))
    assert len(canonical.calls(ROWS.overload)) == 1
    assert len(canonical.calls(aten.view.default)) == 2


def test_a_result_with_an_original_is_not_merged_with_one_without() -> None:
    for index in range(2):
        canonical = copied(viewed([2, 16], [2, 16]))
        del canonical.origin[canonical.calls(operator.getitem)[index]]
        canonical.merge_equal(ROWS)
        assert len(canonical.calls(ROWS.overload)) == 2
        assert not canonical.repeated
