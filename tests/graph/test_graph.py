import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.graph.facts import depths, equal_size, is_pure, module_path, mutation_regions, source_line, targets_of
from fuseplan.graph.legality import Contraction, external_inputs, is_computed_from, is_convex
from fuseplan.graph.surgery import call_function, copy_graph, erase_dead, is_sorted, sort_topologically

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
        ("ab", "", True),
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
        ("d", "x", 100, True),
        ("a", "d", 100, False),
        ("e", "d", 100, False),
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


def test_sorting_moves_only_what_must() -> None:
    graph, nodes = diamond()
    late = graph.call_function(aten.sin.default, (nodes["x"],))
    nodes["e"].append(late)
    nodes["b"].replace_input_with(nodes["a"], late)
    assert not is_sorted(graph)
    sort_topologically(graph)
    graph.lint()
    assert [node.name for node in graph.nodes if node.op == "call_function"] == [
        nodes[name].name if name in nodes else late.name for name in ("a", "c", "late", "b", "d", "e")
    ]


def test_cycles_can_not_be_sorted() -> None:
    graph, nodes = diamond()
    nodes["a"].replace_input_with(nodes["x"], nodes["d"])
    with pytest.raises(ValueError, match="the graph is cyclic"):
        sort_topologically(graph)


def test_copies_know_their_originals() -> None:
    graph, nodes = diamond()
    copy, origin = copy_graph(graph)
    assert str(copy) == str(graph)
    assert {origin[node] for node in copy.nodes} == set(graph.nodes)
    copy.erase_node(copy.output_node())
    graph.lint()
    assert nodes["d"].users


def test_copies_are_of_the_same_calls_and_stand_alone() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", default_value=2)
    both = graph.call_function(aten.cat.default, ([x, y],), {"dim": 0})
    both.meta["val"] = "a value"
    graph.output(((both, x),))
    graph.output_node().meta["seen"] = True
    copy, origin = copy_graph(graph)
    copy.lint()
    assert [(n.name, n.op, n.target, n.meta) for n in copy.nodes] == [
        (n.name, n.op, n.target, n.meta) for n in graph.nodes
    ]
    assert [fx.map_arg((n.args, n.kwargs), origin.__getitem__) for n in copy.nodes] == [
        (n.args, n.kwargs) for n in graph.nodes
    ]
    assert [[origin[user] for user in n.users] for n in copy.nodes] == [[*n.users] for n in graph.nodes]
    (call,) = copy.find_nodes(op="call_function", target=aten.cat.default)
    call.meta["val"] = "another"
    call.args = ([call.args[0][0]],)
    assert both.meta["val"] == "a value"
    assert both.args == ([x, y],)


def test_names_in_a_copy_are_taken() -> None:
    graph, _ = diamond()
    copy, _ = copy_graph(graph)
    assert len(copy.nodes) == len(graph.nodes)
    names = [node.name for node in graph.nodes]
    with copy.inserting_before(copy.output_node()):
        added = [copy.create_node("call_function", aten.relu.default, (), {}, name) for name in names]
    assert len({node.name for node in copy.nodes}) == 2 * len(names)
    copied = [node for node in copy.nodes if node not in added]
    copied[0]._rename(names[1])
    assert copied[0].name not in names
    assert [node.name for node in graph.nodes] == names


def test_what_was_declared_to_have_effects_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    kept = graph.call_function(operator.neg, (x,))
    gone = graph.call_function(aten.relu.default, (x,))
    graph.output(x)
    monkeypatch.setattr(fx.node, "_side_effectful_functions", {*fx.node._side_effectful_functions, operator.neg})
    assert erase_dead(graph, [kept, gone]) == [gone]


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
    output = graph.output_node()
    output.args = ((nodes["e"],),)
    graph.erase_node(nodes["d"])
    assert targets_of(graph) == [aten.relu.default]
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
        assert node in nodes["b"].users
        assert node in nodes["c"].users
        assert type(node.args[0]) is type(theirs.args[0])
    assert [before.name, after.name, theirs.name] == ["cat_default_1", "cat_default_2", "cat_default"]
    assert [nodes["c"].next, nodes["c"].next.next, nodes["d"].prev] == [after, theirs, before]
    assert graph.find_nodes(op="call_function", target=aten.cat.default) == [after, theirs, before]
    assert len(graph.nodes) == len([*graph.nodes])
    assert call_function(nodes["d"], aten.cat.default, args[:1], {"dim": -1}).kwargs == {"dim": -1}
    graph.lint()


def test_a_call_is_erased_as_torch_erases_it() -> None:
    (ours, mine), (theirs, other) = diamond(), diamond()
    hooked: list[str] = []
    module = fx.GraphModule({}, ours)
    for graph, nodes in ((ours, mine), (theirs, other)):
        graph.output_node().args = ((nodes["e"], nodes["d"]),)
        both = graph.call_function(aten.cat.default, ([nodes["b"], nodes["c"]],), {"dim": -1})
        erase_dead(graph, [both]) if graph is ours else graph.erase_node(both)
        assert both._erased
        assert (both.args, both.kwargs, both.all_input_nodes) == (([None, None],), {"dim": -1}, [])
        assert both not in nodes["b"].users
        assert not graph.find_nodes(op="call_function", target=aten.cat.default)
    assert (str(ours), len(ours.nodes)) == (str(theirs), len(theirs.nodes))
    module._erase_node_hooks = [lambda node: hooked.append(node.name)]
    assert erase_dead(ours, [ours.create_node("call_function", aten.relu.default, (mine["x"],), name="unread")])
    assert hooked == ["unread"]
    ours.lint()


def test_a_copy_that_shares_metadata_has_the_same_dictionaries() -> None:
    graph, _ = diamond()
    copy, origin = copy_graph(graph, shares_meta=True)
    assert all(node.meta is origin[node].meta for node in copy.nodes)
    copy.lint()


def test_sizes_are_equal_whatever_their_symbols_are() -> None:
    environment = ShapeEnv()
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * 2)
    fake = FakeTensorMode(shape_env=environment).from_tensor(torch.empty(6, 8), symbolic_context=context)
    rows, width = fake.shape
    guards = len(environment.guards)
    assert equal_size(rows, rows)
    assert equal_size(rows + width, width + rows)
    assert equal_size(2 * rows // 2, rows)
    assert not equal_size(rows, width)
    assert not equal_size(rows, 6)
    assert not equal_size(6, 8)
    assert equal_size(8, 8)
    assert len(environment.guards) == guards


def test_dead_nodes_go_and_side_effects_stay() -> None:
    graph, nodes = diamond()
    output = graph.output_node()
    written = graph.call_function(aten.copy_.default, (nodes["x"], nodes["d"]))
    output.prepend(written)
    output.args = ((nodes["e"],),)
    assert erase_dead(graph, [nodes["d"], written]) == []
    graph.erase_node(written)
    assert set(erase_dead(graph, [nodes["d"]])) == {nodes["d"], nodes["c"]}
    graph.lint()


def test_regions_are_split_by_mutations() -> None:
    graph, nodes = diamond()
    written = graph.call_function(aten.copy_.default, (nodes["x"], nodes["a"]))
    nodes["a"].append(written)
    regions = mutation_regions(graph)
    assert [regions[nodes[name]] for name in "xab"] == [0, 0, 1]


def test_depth_is_the_longest_path() -> None:
    graph, nodes = diamond()
    assert [depths(graph)[nodes[name]] for name in "xabde"] == [0, 1, 2, 3, 3]


PATHS = {
    "L['self']": None,
    "L['fn'].0.fn.norm": "0.fn.norm",  # the root is called fn, and so is a module in it
    "L['fn'].__self__.layers.1._orig_mod.self": "layers.1.self",
    "G['model'].L.norm": "model.L.norm",
    "L['self']._modules['layers']._modules['3'].norm": "layers.3.norm",
}


def test_places_in_the_user_model() -> None:
    graph = fx.Graph()
    node = graph.call_function(operator.add, (1, 2))
    assert module_path(node) is None
    assert source_line(node) is None
    node.meta["nn_module_stack"] = {
        "k": ("L['self']._modules['layers']._modules['3']", None),
        "m": ("L['self'].layers[3].mlp", None),
    }
    assert module_path(node) == "layers.3.mlp"
    for path, expected in PATHS.items():
        node.meta["nn_module_stack"] = {"k": (path, None)}
        assert module_path(node) == expected
    node.meta["stack_trace"] = '  File "a/model.py", line 12, in forward\n    y = f(x)\n'
    assert source_line(node) == "model.py:12"
