"""A cut-out graph at one size, compiled by Inductor, and sets of arguments to run it on in turns."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import compile as inductor_compile

from fuseplan.graph.facts import tensor_of
from fuseplan.verification.specs import TensorSpec, concrete

MOST_SETS = 32
"""The most sets of arguments: with small tensors, even more would still fit into a cache of tens of megabytes."""

MOST_BYTES = 4 * 2**30
"""The most bytes of all sets together."""

_LIBRARY = torch.library.Library("fuseplan_tuning", "DEF")
_LIBRARY.define("produced(Tensor x) -> Tensor")
_LIBRARY.impl("produced", lambda x: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("produced", torch.empty_like, "Meta")
PRODUCED = torch.ops.fuseplan_tuning.produced.default
"""A value that an op of the model has just written, which Inductor may overwrite like any op's result."""


def at_size(graph: fx.Graph, symbols: Mapping[Any, int], produced: Collection[str] = ()) -> fx.GraphModule:
    """The same graph with numbers in place of its symbolic sizes.

    Args:
        graph: of `Context.fused`.
        symbols: the value of each symbol.
        produced: the names of inputs that are written by an op of the graph's own before they are read.
    """
    new = fx.Graph()
    values: dict[fx.Node, Any] = {}

    def settle(argument: Any) -> Any:
        return values[argument] if isinstance(argument, fx.Node) else concrete(argument, symbols)

    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "output":
            new.output(fx.node.map_aggregate(node.args[0], settle))
        elif isinstance(value, (int, float, torch.SymInt)):
            values[node] = concrete(value, symbols)
        elif node.op == "placeholder":
            values[node] = new.placeholder(node.name)
            if node.name in produced:
                values[node] = new.call_function(PRODUCED, (values[node],))
        else:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), settle)
            values[node] = new.call_function(node.target, args, kwargs)
    return fx.GraphModule({}, new)


def producers(graph: fx.Graph, produced: Collection[str]) -> fx.GraphModule:
    """Only the ops that `at_size` adds to a graph: their time isn't the component's."""
    new = fx.Graph()
    inputs = {node.name: new.placeholder(node.name) for node in graph.find_nodes(op="placeholder") if _is_tensor(node)}
    new.output(tuple(new.call_function(PRODUCED, (inputs[name],)) for name in sorted(produced)))
    return fx.GraphModule({}, new)


def specs_of(graph: fx.Graph, symbols: Mapping[Any, int]) -> list[TensorSpec]:
    """The specs of the tensors among a graph's inputs at a size."""
    return [
        _spec(value, symbols) for node in graph.find_nodes(op="placeholder") if (value := tensor_of(node)) is not None
    ]


def _is_tensor(node: fx.Node) -> bool:
    return tensor_of(node) is not None


def _spec(value: Tensor, symbols: Mapping[Any, int]) -> TensorSpec:
    return TensorSpec(
        dtype=value.dtype,
        shape=tuple(concrete(size, symbols) for size in value.shape),
        stride=tuple(concrete(step, symbols) for step in value.stride()),
        misalignment=0,
        device=value.device,
    )


def argument_sets(specs: Sequence[TensorSpec], cache_bytes: int) -> list[list[Tensor]]:
    """Several sets of random arguments: used in turns, they come from memory and not from a cache, unless all of them
    together fit into it.

    Args:
        specs: one for each argument.
        cache_bytes: of the device's last cache.
    """
    size = max(1, sum(spec.extent * spec.dtype.itemsize for spec in specs))
    count = min(MOST_SETS, 1 + math.ceil(2 * cache_bytes / size), max(1, MOST_BYTES // size))
    generators = {spec.device: torch.Generator(spec.device).manual_seed(0) for spec in specs}
    return [[_random(spec, generators[spec.device]) for spec in specs] for _ in range(count)]


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        values = torch.randn(spec.extent, device=spec.device, generator=generator).to(spec.dtype)
    else:
        values = torch.randint(0, 2, (spec.extent,), device=spec.device, generator=generator).to(spec.dtype)
    return values.as_strided(spec.shape, spec.stride)


def compiled(
    gm: fx.GraphModule, arguments: Sequence[Tensor], lower: Callable[[fx.Graph], None] | None = None
) -> Callable[..., Any]:
    """The graph as Inductor compiles it, without any custom pass but `lower`.

    Args:
        gm: of `at_size`.
        arguments: like those that it will be called with.
        lower: replaces an engine's own ops by ops that Inductor knows; None: there are none.

    Raises:
        Exception: whatever Inductor raises.
    """
    with torch.no_grad():
        call: Callable[..., Any] = inductor_compile(gm, list(arguments), options={"post_grad_custom_post_pass": lower})
        return call
