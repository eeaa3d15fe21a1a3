"""`fuseplan.compile` without generated code: graphs go through Inductor's passes, fuseplan's among them, and are then
interpreted. A compilation takes tenths of a second in place of seconds, and all of fuseplan is in it.

`python -m tests.interpreted PATH ARGUMENTS...` runs a program so.
"""

import contextlib
import operator
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.virtualized import V


@contextlib.contextmanager
def no_code() -> Iterator[None]:
    """Inductor as torch.compile calls it makes no code meanwhile, and has no cache."""
    with (
        mock.patch.object(torch._TorchCompileInductorWrapper, "__call__", _compile),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def _compile(wrapper: Any, gm: fx.GraphModule, inputs: Sequence[Any], **further: Any) -> Callable[..., Any]:
    with inductor_config.patch(wrapper.config):
        compiled: Callable[..., Any] = compile_fx(gm, inputs, inner_compile=_interpret)  # type: ignore[arg-type,assignment]
    return compiled


def _interpret(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    view_to_reshape(gm)
    mode = detect_fake_mode(inputs)
    with V.set_fake_mode(mode) if mode is not None else contextlib.nullcontext():
        _recursive_post_grad_passes(gm, is_inference=bool(options.get("is_inference", False)))
    for node in reversed(gm.graph.find_nodes(op="call_function", target=operator.getitem)):
        if not node.users:  # left over where an op of several tensors writes in place now, and yields none
            gm.graph.erase_node(node)
    gm.recompile()
    run: Callable[..., Any] = make_boxed_func(fx.Interpreter(gm).run)
    return run


if __name__ == "__main__":
    del sys.argv[0]
    with no_code():
        runpy.run_path(sys.argv[0], run_name="__main__")
