"""Graphs: what is known of their nodes, how they are copied and changed, and values that they compute twice."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.graph.facts import depths, is_pure, module_path, mutation_regions, source_line, targets_of
from fuseplan.graph.legality import Contraction, external_inputs, is_computed_from, is_convex
from fuseplan.graph.sharing import Shared
from fuseplan.graph.surgery import call_function, copy_graph, erase_dead, is_sorted, sort_topologically
from tests.helpers import quickly_traced

aten = torch.ops.aten


def diamond() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """x -> a -> (b, c) -> d, and e, which reads b alone."""
    graph = fx.Graph()
    nodes = {"x": graph.placeholder("x")}

    def call(name: str, *sources: str) -> None:
        target = aten.add.Tensor if len(sources) == 2 else aten.relu.default
        nodes[name] = graph.call_function(target, tuple(nodes[source] for source in sources))

    call("a", "x")
    call("b", "a")
    call("c", "a")
    call("d", "b", "c")
    call("e", "b")
    graph.output((nodes["d"], nodes["e"]))
    return graph, nodes


@pytest.mark.parametrize(
    ("region", "extra", "convex"),
    [
        ("ad", "", False),
        ("abcd", "", True),
        ("bc", "", True),
        ("a", "d", False),
        ("b", "c", True),
        ("be", "d", False),
        ("a", "e", False),
        ("e", "d", True),
    ],
)
def test_convexity(region: str, extra: str, convex: bool) -> None:
    _, nodes = diamond()
    assert is_convex([nodes[name] for name in region], [nodes[name] for name in extra]) is convex


@pytest.mark.parametrize(
    ("node", "other", "most", "found"),
    [
        ("d", "a", 100, True),
        ("a", "d", 100, False),
        ("e", "c", 100, False),
        ("a", "a", 100, False),
        ("d", "x", 3, False),
        ("d", "x", 4, True),
    ],
)
def test_what_a_node_is_computed_from(node: str, other: str, most: int, found: bool) -> None:
    _, nodes = diamond()
    assert is_computed_from(nodes[node], nodes[other], most) is found


def test_external_inputs_in_order_of_use() -> None:
    _, nodes = diamond()
    assert external_inputs([nodes["d"], nodes["e"]]) == [nodes["b"], nodes["c"]]


def test_groups_that_are_convex_can_be_cyclic_together() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b = (graph.call_function(aten.relu.default, (x,)) for _ in range(2))
    c, d = graph.call_function(aten.sin.default, (b,)), graph.call_function(aten.cos.default, (a,))
    graph.output((c, d))
    assert is_convex([a, c], [])
    assert is_convex([b, d], [])
    assert Contraction(graph).cycles([[a, c]]) == []
    assert Contraction(graph).cycles([[a, c], [b, d]]) == [(0, 1)]


def test_sorting_moves_only_what_must_and_refuses_cycles() -> None:
    graph, nodes = diamond()
    nodes["late"] = graph.call_function(aten.sin.default, (nodes["x"],))
    nodes["e"].append(nodes["late"])
    nodes["b"].replace_input_with(nodes["a"], nodes["late"])
    assert not is_sorted(graph)
    sort_topologically(graph)
    graph.lint()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert calls == [nodes[name] for name in ("a", "c", "late", "b", "d", "e")]
    nodes["a"].replace_input_with(nodes["x"], nodes["d"])
    with pytest.raises(ValueError, match="the graph is cyclic"):
        sort_topologically(graph)


def test_copies_are_of_the_same_calls_and_stand_alone() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", default_value=2)
    both = graph.call_function(aten.cat.default, ([x, y],), {"dim": 0})
    both.meta["val"] = "a value"
    graph.output(((both, x),))
    copy, origin = copy_graph(graph)
    copy.lint()
    for node in copy.nodes:
        original = origin[node]
        assert (node.name, node.op, node.target) == (original.name, original.op, original.target)
        assert fx.map_arg((node.args, node.kwargs), origin.__getitem__) == (original.args, original.kwargs)
        assert [origin[user] for user in node.users] == [*original.users]
        assert node.meta == original.meta
    assert [*origin.values()] == [*graph.nodes]
    (call,) = copy.find_nodes(op="call_function", target=aten.cat.default)
    call.meta["val"] = "another"
    call.args = ([call.args[0][0]],)
    assert (both.meta["val"], both.args) == ("a value", ([x, y],))
    sharing, origin = copy_graph(graph, shares_meta=True)
    assert all(node.meta is origin[node].meta for node in sharing.nodes)


def test_names_in_a_copy_are_taken() -> None:
    graph, nodes = diamond()
    copy, _ = copy_graph(graph)
    added = copy.create_node("call_function", aten.relu.default, (), {}, nodes["a"].name)
    assert added.name not in {node.name for node in graph.nodes}


@pytest.mark.parametrize(
    ("target", "pure"),
    [
        (aten.relu.default, True),
        (aten.view.default, True),
        (aten.add_.Tensor, False),
        (aten.bernoulli.default, False),
        (aten._assert_async.msg, False),
        (operator.getitem, False),
        ("add", False),
    ],
)
def test_what_surely_has_no_effect(target: object, pure: bool) -> None:
    assert is_pure(target) is pure


def test_what_a_graph_calls_is_known_without_a_walk_over_its_nodes() -> None:
    graph, nodes = diamond()
    assert set(targets_of(graph)) == {aten.add.Tensor, aten.relu.default}
    graph.output_node().args = ((nodes["e"],),)
    graph.erase_node(nodes["d"])
    nodes["e"].target = aten.neg.default
    assert set(targets_of(graph)) == {aten.relu.default, aten.neg.default}


def test_a_call_is_as_torch_makes_it() -> None:
    graph, nodes = diamond()
    args: tuple[Any, ...] = ([nodes["b"], nodes["c"]], -1)
    with graph.inserting_after(nodes["c"]):
        theirs = graph.call_function(aten.cat.default, args)
    before, after = (call_function(nodes[place], aten.cat.default, args, before=place == "d") for place in "dc")
    for node in (before, after, theirs):
        assert (node.op, node.target, node.args, node.kwargs) == ("call_function", aten.cat.default, args, {})
        assert {nodes["b"], nodes["c"]} <= {each for each in graph.nodes if node in each.users}
        assert type(node.args[0]) is type(theirs.args[0])
    assert [before.name, after.name, theirs.name] == ["cat_default_1", "cat_default_2", "cat_default"]
    assert [nodes["c"].next, nodes["c"].next.next, nodes["d"].prev] == [after, theirs, before]
    assert graph.find_nodes(op="call_function", target=aten.cat.default) == [after, theirs, before]
    assert len(graph.nodes) == len([*graph.nodes])
    assert call_function(nodes["d"], aten.cat.default, args[:1], {"dim": -1}).kwargs == {"dim": -1}
    graph.lint()


def test_a_call_is_erased_as_torch_erases_it() -> None:
    graph, nodes = diamond()
    hooked: list[str] = []
    module, size = fx.GraphModule({}, graph), len(graph.nodes)
    both = graph.call_function(aten.cat.default, ([nodes["b"], nodes["c"]],), {"dim": -1})
    assert erase_dead(graph, [both]) == [both]
    assert (both._erased, both.args, both.kwargs) == (True, ([None, None],), {"dim": -1})
    assert both not in nodes["b"].users
    assert not graph.find_nodes(op="call_function", target=aten.cat.default)
    assert len(graph.nodes) == len([*graph.nodes]) == size
    module._erase_node_hooks = [lambda node: hooked.append(node.name)]
    erase_dead(graph, [graph.create_node("call_function", aten.relu.default, (nodes["x"],), name="unread")])
    assert hooked == ["unread"]
    graph.lint()


def test_dead_nodes_go_and_side_effects_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, nodes = diamond()
    output = graph.output_node()
    written = graph.call_function(aten.copy_.default, (nodes["x"], nodes["d"]))
    declared = graph.call_function(operator.neg, (nodes["x"],))
    output.prepend(written)
    output.args = ((nodes["e"],),)
    monkeypatch.setattr(fx.node, "_side_effectful_functions", {*fx.node._side_effectful_functions, operator.neg})
    assert erase_dead(graph, [nodes["d"], written, declared]) == []
    graph.erase_node(written)
    assert set(erase_dead(graph, [nodes["d"]])) == {nodes["d"], nodes["c"]}
    graph.erase_node(declared)
    graph.lint()


def test_regions_are_split_by_mutations_and_depth_is_the_longest_path() -> None:
    graph, nodes = diamond()
    assert [depths(graph)[nodes[name]] for name in "xabde"] == [0, 1, 2, 3, 3]
    nodes["a"].append(graph.call_function(aten.copy_.default, (nodes["x"], nodes["a"])))
    assert [mutation_regions(graph)[nodes[name]] for name in "xab"] == [0, 0, 1]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']", None),
        ("L['fn'].0.fn.norm", "0.fn.norm"),  # the root is called fn, and so is a module in it
        ("L['fn'].__self__.layers.1._orig_mod.self", "layers.1.self"),
        ("G['model'].L.norm", "model.L.norm"),
        ("L['self']._modules['layers']._modules['3'].norm", "layers.3.norm"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
    ],
)
def test_places_in_the_user_model(path: str, expected: str | None) -> None:
    node = fx.Graph().call_function(operator.add, (1, 2))
    assert (module_path(node), source_line(node)) == (None, None)
    node.meta["nn_module_stack"] = {"k": ("L['self'].an.outer", None), "m": (path, None)}
    node.meta["stack_trace"] = '  File "a/model.py", line 12, in forward\n    y = f(x)\n'
    assert (module_path(node), source_line(node)) == (expected, "model.py:12")


# Values that a graph computes more than once.

LENGTH, X = torch.tensor(3), torch.zeros(2, 4)


def mask(length: Tensor, hidden: float = float("-inf"), zero: float = 0.0) -> Tensor:
    return torch.where(torch.arange(4) <= length, torch.tensor(zero), torch.tensor(hidden))


def equal(length: Tensor, x: Tensor) -> list[Tensor]:
    return [x + mask(length), x - mask(length)]


def readers(graph: fx.Graph) -> list[fx.Node]:
    found = (graph.find_nodes(op="call_function", target=getattr(aten, name).Tensor) for name in ("add", "sub"))
    return [next(node for node in nodes if node.meta["val"].shape == X.shape) for nodes in found]


def shared(graph: fx.Graph) -> bool:
    """Whether the second reader is given what the first one reads."""
    found, (first, second) = Shared(graph), readers(graph)
    assert found.first(value_of(first), first) is value_of(first)
    given = found.first(value_of(second), second)
    assert given in (value_of(first), value_of(second))
    return given is value_of(first)


def value_of(reader: fx.Node) -> fx.Node:
    (value,) = (each for each in reader.all_input_nodes if each.op != "placeholder")
    return value


@pytest.mark.parametrize(
    ("function", "is_shared"),
    [
        (equal, True),
        (lambda length, x: [x + mask(length, -1e9), x - mask(length, -1e8)], False),
        (lambda length, x: [x + mask(length, zero=0.0), x - mask(length, zero=-0.0)], False),
        (lambda length, x: [x + mask(length), x - mask(length + 1)], False),
        (lambda length, x: [x + torch.bernoulli(x), x - torch.bernoulli(x)], False),
        (lambda length, x: [x + torch.relu(x @ x.T)[:, :1], x - torch.relu(x @ x.T)[:, :1]], False),
    ],
    ids=["equal", "other numbers", "other signs", "another input", "drawn", "products"],
)
def test_values_are_shared_that_the_same_calls_compute(function: Callable[..., Any], is_shared: bool) -> None:
    assert shared(quickly_traced(function, LENGTH, X)) == is_shared


@pytest.mark.parametrize("place", ["between the values", "before the second reader"])
def test_nothing_is_shared_across_a_mutation(place: str) -> None:
    graph = quickly_traced(equal, LENGTH, X)
    length = graph.find_nodes(op="placeholder")[0]
    second = graph.find_nodes(op="call_function", target=aten.where.self)[-1]
    before = readers(graph)[1] if place == "before the second reader" else second
    with graph.inserting_before(before):
        written = graph.call_function(aten.add_.Tensor, (length, 1))
        written.meta["val"] = length.meta["val"]
    assert not shared(graph)


def test_what_is_used_twice_at_each_step_is_looked_at_once() -> None:
    """Otherwise 2 ** 30 times."""

    def squared(length: Tensor, x: Tensor) -> list[Tensor]:
        hidden = mask(length)
        for _ in range(30):
            hidden = hidden * hidden
        return [x + hidden, x - hidden * 2]

    graph = quickly_traced(squared, LENGTH, X)
    found = Shared(graph)
    reader = readers(graph)[0]
    for value in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        assert found.first(value, reader) is value


def test_what_is_erased_is_no_longer_shared() -> None:
    graph = quickly_traced(equal, LENGTH, X)
    found, (first, second) = Shared(graph), readers(graph)
    value = found.first(value_of(first), first)
    first.replace_all_uses_with(graph.find_nodes(op="placeholder")[1])
    graph.erase_node(first)
    graph.erase_node(value)
    assert found.first(value_of(second), second) is value_of(second)
