"""Graphs as Inductor hands them to custom passes, with the arguments that they are called with."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V
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
    return list(compile_fx._get_subgraph_names(module))


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


# What Inductor does to a graph after custom passes, so that it can be interpreted as it would be compiled.


def lower(module: fx.GraphModule, custom: Callable[[fx.Graph], None] = lambda graph: None) -> None:
    """Runs a custom pass, and then writes in place where nobody sees it, and clones elsewhere by the strides that fake
    values have. Graphs in a graph come first.
    """
    mode = detect_fake_mode([node.meta.get("val") for node in module.graph.nodes])
    with V.set_fake_mode(mode) if mode is not None else contextlib.nullcontext():
        for each in modules_of(module):
            _lower(each, custom)


def _lower(module: fx.GraphModule, custom: Callable[[fx.Graph], None]) -> None:
    takes_module = "gm" in inspect.signature(FakeTensorUpdater).parameters  # a graph before torch 2.13
    updater = FakeTensorUpdater(module if takes_module else module.graph)  # type: ignore[arg-type]
    custom(module.graph)
    updater.incremental_update()
    reinplace_inplaceable_ops(updater, module.graph)
    fix = getattr(post_grad, "fix_auto_functionalized_dtype_views", None)  # new in torch 2.13
    if fix is not None:
        fix(module.graph)
    post_grad.decompose_auto_functionalized(module.graph)
    module.recompile()


class Lowered(fx.Interpreter):
    """Hands tensors to ops of somebody's own as Inductor does: with the strides that they had when the model was
    traced; and contiguous ones to all-reduces, which it writes in place.
    """

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops._c10d_functional.all_reduce_.default:
            (value, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
            return self.call_function(n.target, (value.contiguous(), *rest), kwargs)
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and "eager_input_vals" in n.meta:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if not n.target._schema.is_mutable and n.target.namespace == "differential":
                args = tuple(map(_restrided, args, n.meta["eager_input_vals"][0]))
            return self.call_function(n.target, args, kwargs)
        return super().run_node(n)


def _restrided(value: Any, traced: Any) -> Any:
    if not isinstance(value, Tensor) or not isinstance(traced, Tensor) or not traced.is_contiguous():
        return value
    return value.contiguous()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inductor runs its passes, and then interprets the graph in place of compiling it."""

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], *args: Any, **options: Any) -> Any:
        post_grad.view_to_reshape(gm)
        mode = detect_fake_mode(example_inputs)
        with V.set_fake_mode(mode) if mode is not None else contextlib.nullcontext():
            compile_fx._recursive_post_grad_passes(gm, is_inference=bool(options.get("is_inference", False)))
        return Lowered(gm).run

    with mock.patch.object(compile_fx, "_compile_fx_inner", inner):
        yield
