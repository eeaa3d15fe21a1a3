"""Tracing a provider's kernel into its calls, for kernels that are a few aten ops."""

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer


def traced(kernel: Callable[..., Any], args: tuple[Any, ...]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A kernel's calls on given arguments.

    Args:
        kernel: yields one tensor.
        args: nodes with fake values, and plain values.

    Returns:
        (a graph whose output is the kernel's result, for each of its placeholders the node of `args`).
    """
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    proxies: dict[fx.Node, fx.Proxy] = {}

    def proxy(node: fx.Node) -> Any:
        if node not in proxies:
            placeholder = graph.placeholder(node.name)
            placeholder.meta["val"] = node.meta["val"]
            proxies[node] = fx.Proxy(placeholder, tracer)
        return proxies[node]

    result = kernel(*fx.map_arg(args, proxy))
    assert isinstance(result, fx.Proxy), "an inlined kernel yields one tensor that an op computes"
    graph.output(result.node)
    return graph, {each.node: node for node, each in proxies.items()}
