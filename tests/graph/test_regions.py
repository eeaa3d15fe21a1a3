"""Graphs inside a graph: who calls them, where, and how often."""

import torch
from torch import fx, nn

from fuseplan.graph.regions import INVOKE, calls_of, regions_of


def graph_that_calls(*calls: tuple[object, fx.GraphModule, str | None]) -> fx.GraphModule:
    """A graph that calls each of these graphs by an op at a module path."""
    root, graph = nn.Module(), fx.Graph()
    value = graph.placeholder("x")
    names = {module: f"region_{number}" for number, module in enumerate(dict.fromkeys(each for _, each, _ in calls))}
    for module, name in names.items():
        root.add_module(name, module)
    for op, module, path in calls:
        operands = (graph.get_attr(names[module]), "id", value)
        value = graph.call_function(op, operands)  # type: ignore[arg-type]
        if path is not None:
            value.meta["nn_module_stack"] = {"1": (f"L['self'].{path}", nn.Module)}
    graph.output(value)
    return fx.GraphModule(root, graph)


def leaf() -> fx.GraphModule:
    return fx.symbolic_trace(nn.ReLU())


def test_a_region_has_a_place_for_each_call() -> None:
    inner, other = leaf(), leaf()
    outer = graph_that_calls((INVOKE, inner, "layers.0"), (INVOKE, other, None), (INVOKE, inner, "layers.1"))
    found = [(each.module, each.places, each.caller) for each in regions_of(outer.graph)]
    assert found == [(inner, ("layers.0", "layers.1"), None), (other, (None,), None)]
    assert regions_of(inner.graph) == []


def test_control_flow_says_who_decides() -> None:
    inner = leaf()
    (region,) = regions_of(graph_that_calls((torch.ops.higher_order.while_loop, inner, "layers.0")).graph)
    assert (region.module, region.caller) == (inner, "while_loop")


def test_calls_multiply() -> None:
    inner = leaf()
    middle = graph_that_calls((INVOKE, inner, "a"), (INVOKE, inner, "b"))
    outer = graph_that_calls(*((INVOKE, middle, f"layers.{number}") for number in range(3)), (INVOKE, inner, "last"))
    assert calls_of([inner, middle, outer]) == [7, 3, 1]
    looped = graph_that_calls((torch.ops.higher_order.while_loop, middle, None))
    assert calls_of([inner, middle, looped]) == [2, 1, 1]
    assert calls_of([leaf(), leaf()]) == [1, 1]
