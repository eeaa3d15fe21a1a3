"""fp8 by groups as vLLM's `QuantFP8` calls it with `+quant_fp8`: its own Python, around ops that its CPU builds lack.

These are declared by their published schemas, with references in plain torch, and vLLM is told that it runs on a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.ir.ops.layernorm import fused_add_rms_norm, rms_norm
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.devices import device_profile
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from tests.graph.canonical.test_vllm_quantisation import COMPUTED, FP8, LEAST, SCHEMAS
from tests.helpers import post_grad, randn

WIDTH, ROWS = 512, 6
OPS = ("per_token_group_fp8_quant", "per_token_group_fp8_quant_packed")
POWERS = (128, FP8, float(torch.tensor(1e-10)), 0.0, True, 0.0, 0.0, None, "divide")
PLAIN = (128, FP8, LEAST, 0.0, False, 0.0, 0.0, None, "divide")
KINDS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "rows": ({"use_ue8m0": False}, (*PLAIN, "rows")),
    "powers": ({"use_ue8m0": True}, (*POWERS, "rows")),
    "columns": ({"use_ue8m0": False, "column_major_scales": True}, (*PLAIN, "columns")),
    "aligned": (
        {"use_ue8m0": False, "column_major_scales": True, "tma_aligned_scales": True}, (*PLAIN, "aligned"),
    ),
    "packed": ({}, (*POWERS, "packed")),
}  # fmt: skip
Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Declares the ops, and leaves functionalised calls as vLLM has them."""
    libraries = []
    for name in OPS:
        library = torch.library.Library("_C", "FRAGMENT")
        libraries.append(library)
        with contextlib.suppress(RuntimeError):  # another file's tests may have declared it in this process
            library.define(f"{name}{SCHEMAS[name]}")
        library.impl(name, COMPUTED[name], "CPU", allow_override=True)
        library.impl(name, lambda *arguments: None, "Meta", allow_override=True)
    monkeypatch.setattr(type(fp8_utils.current_platform), "is_cuda_alike", lambda self: True)
    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        torch._dynamo.reset()
        yield
    for library in libraries:
        library._destroy()


def quantiser(kind: str) -> Quantise:
    if kind == "packed":
        return lambda x: fp8_utils.per_token_group_quant_fp8_packed_for_deepgemm(x, 128, use_ue8m0=True)
    with set_current_vllm_config(VllmConfig()):
        layer = QuantFP8(static=False, group_shape=GroupShape(1, 128), compile_native=False, **KINDS[kind][0])
    result: Quantise = layer.forward_cuda
    return result


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_its_layer_is_one_op_that_computes_the_same(kind: str, dynamic: bool) -> None:
    quantise = quantiser(kind)
    graph = post_grad(quantise, randn(ROWS, WIDTH), dynamic=dynamic)
    raised = canonicalize(graph)
    (node,) = raised.calls(ops.per_token_group_fp8_quant.overload)
    assert node.args[1:] == KINDS[kind][1]
    assert not raised.refusals
    if not dynamic:
        x = randn(ROWS, WIDTH, seed=3) * torch.tensor([1e-3, 1e3, 1.0, 0.0, 7.0, 1.0])[:, None].bfloat16()
        for got, wanted in zip(fx.GraphModule({}, raised.graph)(x), quantise(x), strict=True):
            assert (got.dtype, got.stride()) == (wanted.dtype, wanted.stride())
            assert torch.equal(got.float(), wanted.float())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_fused_with_its_norm(kind: str, adds: bool, dynamic: bool) -> None:
    quantise, weight, n_layers = quantiser(kind), 1 + randn(WIDTH, seed=9) / 10, 3
    norm, add_norm = (each.impls["native"].impl_fn for each in (rms_norm, fused_add_rms_norm))

    def model(x: Tensor, residual: Tensor) -> list[Tensor]:
        found = list[Tensor]()
        for _ in range(n_layers):
            if adds:
                y, residual = add_norm(x, residual, weight, 1e-5)
            else:
                y = norm(x, weight, 1e-5)
            codes, scales = quantise(y)
            found += [codes, scales]
            x = codes.to(x.dtype)
        return [*found, residual]

    graph = post_grad(model, randn(ROWS, WIDTH), randn(ROWS, WIDTH, seed=1), dynamic=dynamic)
    reports: list[Any] = []
    config = PassConfig(policy="ordered(norm_quant)", verify="off", costs="modelled")
    PostGradPassManager(config, on_report=reports.append, device=device_profile("h200"))(graph)
    assert reports[0].fused["norm_quant"] == n_layers
    assert not [node for node in graph.nodes if "auto_functionalized" in str(node.target)]
