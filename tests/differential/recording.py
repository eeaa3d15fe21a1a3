"""Graphs as Inductor hands them to custom passes, with the arguments that they are called with."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fuseplan.capture import _Recorder
from fuseplan.graph.surgery import copy_graph
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
        """A copy of the graph, to be changed."""
        return fx.GraphModule(self.graph, copy_graph(self.graph.graph)[0]).graph


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


def copies(values: Iterable[Any]) -> list[Any]:
    """Tensors that may be written to; strides are kept."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


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
