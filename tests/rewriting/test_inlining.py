"""The calls that a kernel makes, as a graph."""

from typing import Any

import torch
from torch import fx

from fuseplan.rewriting.inlining import traced

aten = torch.ops.aten


def test_each_argument_is_read_by_one_placeholder() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for index, node in enumerate((x, y)):
        node.meta["val"] = torch.full((2,), index + 3.0)

    def kernel(a: Any, b: Any, scale: Any, *again: Any) -> Any:
        return aten.sub.Tensor(aten.mul.Tensor(a, scale), aten.add.Tensor(b, again[0]))

    calls, read = traced(kernel, (x, y, 10.0, x))
    assert [*read.values()] == [x, y]
    assert [*read] == [node for node in calls.nodes if node.op == "placeholder"]
    assert all(own.meta["val"] is node.meta["val"] for own, node in read.items())
    found = fx.Interpreter(fx.GraphModule({}, calls)).run(*(node.meta["val"] for node in read.values()))
    assert torch.equal(found, torch.full((2,), 3.0 * 10 - (4 + 3)))
