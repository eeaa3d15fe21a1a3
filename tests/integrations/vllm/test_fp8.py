"""fp8 as vLLM's own layers compute it in plain torch, which is what they do where Inductor compiles them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.ir.ops.layernorm import fused_add_rms_norm, rms_norm
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

import fuseplan
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from tests.helpers import post_grad, randn
from tests.rules.parts.test_fp8_spellings import behind_a_norm, bits, inputs

WIDTH, FP8, LEAST = 256, torch.float8_e4m3fn, 1 / (448 * 512)
GROUPED = (128, FP8, LEAST, 0.0, False, 0.0, 0.0, None, "divide")
POWERS = (128, FP8, 0.0, 0.0, True, LEAST, 0.0, None, "divide")
KINDS: dict[str, tuple[dict[str, Any], str, tuple[Any, ...]]] = {
    "of rows": ({}, "dynamic_per_token_scaled_fp8_quant", (FP8, LEAST, 0.0, 0.0, None, "multiply")),
    "of groups": ({"use_ue8m0": False}, "per_token_group_fp8_quant", (*GROUPED, "rows")),
    "by powers": ({"use_ue8m0": True}, "per_token_group_fp8_quant", (*POWERS, "rows")),
    "by columns": (
        {"use_ue8m0": False, "column_major_scales": True}, "per_token_group_fp8_quant", (*GROUPED, "columns"),
    ),
}  # fmt: skip


def quantize(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """vLLM's layer, where no kernel of its own is switched on."""
    shape = GroupShape.PER_TOKEN if kind == "of rows" else GroupShape(1, 128)
    with set_current_vllm_config(VllmConfig()):
        layer = QuantFP8(static=False, group_shape=shape, compile_native=False, **KINDS[kind][0])
    result: Callable[..., tuple[Tensor, Tensor]] = layer.forward_native
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_its_layer_is_one_op(kind: str) -> None:
    _, name, arguments = KINDS[kind]
    graph = canonicalize(post_grad(behind_a_norm(quantize(kind)), randn(5, WIDTH), dynamic=True))
    (node,) = graph.calls(ops[name].overload)
    assert node.args[1:] == arguments
    assert node.args[0].target is ops.rms_norm.overload


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_layer_does(kind: str, dtype: torch.dtype) -> None:
    layer = quantize(kind)
    raised = canonicalize(post_grad(layer, randn(6, WIDTH).to(dtype)))
    assert len(raised.dialect_nodes) == 1
    for name, value in inputs(dtype).items():
        for got, wanted in zip(fx.GraphModule({}, raised.graph)(value), layer(value), strict=True):
            assert torch.equal(bits(got), bits(wanted)), name


def test_a_static_scale_of_its_layer_is_an_op() -> None:
    with set_current_vllm_config(VllmConfig()):
        layer = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, compile_native=False)
    graph = canonicalize(post_grad(lambda x, s: layer.forward_native(x, s)[0], randn(5, WIDTH), torch.tensor([0.02])))
    assert graph.recognized() == {f"static_scaled_fp8_quant[{WIDTH}]": 1}


def test_an_upper_bound_of_its_layer_is_the_ops() -> None:
    layer = quantize("of rows")
    graph = canonicalize(post_grad(lambda x, s: layer(x, None, s), randn(5, WIDTH), torch.ones(1)))
    (node,) = graph.calls(ops.dynamic_per_token_scaled_fp8_quant.overload)
    bound = node.args[ops.dynamic_per_token_scaled_fp8_quant.arguments.index("scale_ub")]
    assert isinstance(bound, fx.Node)
    assert bound.op == "placeholder"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds", [False, True])
def test_it_is_fused_with_its_norms(kind: str, adds: bool) -> None:
    layer, weight = quantize(kind), 1 + randn(WIDTH, seed=9) / 10
    norm, add_norm = (each.impls["native"].impl_fn for each in (rms_norm, fused_add_rms_norm))

    def model(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        if not adds:
            return layer(norm(x, weight, 1e-5))
        y, total = add_norm(x, residual, weight, 1e-5)
        return *layer(y), total

    reports: list[fuseplan.Report] = []
    torch._dynamo.reset()
    given = randn(5, WIDTH), randn(5, WIDTH, seed=1)
    with torch.inference_mode():
        config = fuseplan.PassConfig(policy="ordered(norm_quant)")
        compiled: Any = fuseplan.compile(model, config=config, on_report=reports.append)
        for got, wanted in zip(compiled(*given), model(*given), strict=True):
            assert torch.equal(bits(got), bits(wanted))
            assert got.stride() == wanted.stride()
    assert reports[0].fused["norm_quant"] == 1
