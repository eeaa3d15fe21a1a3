"""Graphs as Inductor hands them to custom passes, with the arguments that they are called with."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _get_subgraph_names
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fuseplan.explanation.capture import _Recorder
from fuseplan.graph.surgery import copy_graph
from tests.differential.layout import copies
from tests.differential.program import Program


@dataclass
class Recorded:
    """A graph and its calls.

    Attributes:
        graph: a post-grad graph.
        calls: arguments, one list a call.
    """

    graph: fx.GraphModule
    calls: list[list[Any]] = field(default_factory=list)

    def copy(self) -> fx.Graph:
        """A copy of the graph and of those in it, to be changed."""
        return _copy(self.graph).graph


class _Backend(_Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Recorded] = []

    def _inner(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        run = super()._inner(gm, example_inputs, **options)
        recorded = Recorded(self.graphs[-1])
        self.recorded.append(recorded)

        def recording(*args: Any) -> Any:
            recorded.calls.append(copies(args))
            return run(*args)

        return recording


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    result = fx.GraphModule(module, copy_graph(module.graph)[0])
    for name in subgraphs(module):
        setattr(result, name, _copy(getattr(module, name)))
    return result


def owner(graph: fx.Graph) -> fx.GraphModule:
    """The module that a graph is of."""
    assert graph.owning_module is not None
    return graph.owning_module


def subgraphs(module: fx.GraphModule) -> list[str]:
    """The names of the graphs in a graph, which its higher-order ops call."""
    return list(_get_subgraph_names(module))


def modules_of(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph and those in it, in the order in which Inductor hands them to passes: inner ones first."""
    for name in subgraphs(module):
        yield from modules_of(getattr(module, name))
    yield module


def record_program(program: Program, group: str) -> list[Recorded]:
    """Traces a program, and runs it at all of its sizes.

    Torch can't trace all of them with sizes of which it knows nothing, and treats these as dynamic then.
    """
    try:
        return record(program.module(group), map(program.inputs, range(len(program.sizes))))
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode):
        if program.marked != "unbacked":
            raise
        return record_program(replace(program, marked="dynamic"), group)


def record(function: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> list[Recorded]:
    """Traces a model, and runs it with each list of arguments."""
    backend = _Backend()
    compiled = torch.compile(function, backend=backend)
    with uncached(), torch.no_grad():
        for arguments in calls:
            compiled(*arguments)
    return backend.recorded


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """What is compiled is compiled here and now, whatever was compiled before."""
    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False):
        yield
