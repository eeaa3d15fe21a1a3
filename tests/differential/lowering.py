"""What Inductor does to a graph after custom passes, so that it can be interpreted as it would be compiled."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V

from tests.differential.recording import modules_of


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
