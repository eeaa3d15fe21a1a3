"""fp8 as vLLM's own layers compute it: in plain torch, which is what they do where Inductor compiles them, and with
`+quant_fp8` by ops for groups that its CPU builds lack. These are declared by their published schemas, with references
in plain torch, and vLLM is told that it runs on a GPU.
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

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.devices import device_profile
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from tests.graph.canonical.test_vllm_quantisation import COMPUTED, SCHEMAS
from tests.graph.canonical.test_vllm_quantisation import LEAST as CUSTOM_LEAST
from tests.helpers import post_grad, randn
from tests.rules.parts.test_fp8_spellings import behind_a_norm, bits, inputs

WIDTH, FP8, LEAST = 256, torch.float8_e4m3fn, 1 / (448 * 512)
GROUP, ROW = "per_token_group_fp8_quant", "dynamic_per_token_scaled_fp8_quant"
Kinds = dict[str, tuple[dict[str, Any], tuple[Any, ...]]]


def of_groups(least: float, *, powers: bool = False, bound: float = 0.0, lies: str = "rows") -> tuple[Any, ...]:
    """The arguments of the op."""
    return 128, FP8, least, 0.0, powers, bound, 0.0, None, "divide", lies


KINDS: Kinds = {
    "of rows": ({}, (FP8, LEAST, 0.0, 0.0, None, "multiply")),
    "of groups": ({"use_ue8m0": False}, of_groups(LEAST)),
    "by powers": ({"use_ue8m0": True}, of_groups(0.0, powers=True, bound=LEAST)),
    "by columns": ({"use_ue8m0": False, "column_major_scales": True}, of_groups(LEAST, lies="columns")),
}
"""Its layers: with what they are made, and the arguments of the op that each is raised to."""

TENTH = float(torch.tensor(1e-10))
CUSTOM: Kinds = {
    "rows": ({"use_ue8m0": False}, of_groups(CUSTOM_LEAST)),
    "powers": ({"use_ue8m0": True}, of_groups(TENTH, powers=True)),
    "columns": ({"use_ue8m0": False, "column_major_scales": True}, of_groups(CUSTOM_LEAST, lies="columns")),
    "aligned": (
        {"use_ue8m0": False, "column_major_scales": True, "tma_aligned_scales": True},
        of_groups(CUSTOM_LEAST, lies="aligned"),
    ),
    "packed": ({}, of_groups(TENTH, powers=True, lies="packed")),
}
"""The same, by its own ops."""


def layer_of(kind: str) -> Any:
    shape = GroupShape.PER_TOKEN if kind == "of rows" else GroupShape(1, 128)
    with set_current_vllm_config(VllmConfig()):
        return QuantFP8(static=False, group_shape=shape, compile_native=False, **{**KINDS, **CUSTOM}[kind][0])


def quantize(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """vLLM's layer, where no kernel of its own is switched on."""
    result: Callable[..., tuple[Tensor, Tensor]] = layer_of(kind).forward_native
    return result


def customly(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same where one is."""
    if kind == "packed":
        return lambda x: fp8_utils.per_token_group_quant_fp8_packed_for_deepgemm(x, 128, use_ue8m0=True)
    result: Callable[..., tuple[Tensor, Tensor]] = layer_of(kind).forward_cuda
    return result


def normed(
    adds: bool, layer: Callable[..., tuple[Tensor, Tensor]], width: int = WIDTH, layers: int = 1
) -> Callable[..., list[Tensor]]:
    """vLLM's norm before each of some layers."""
    weight = 1 + randn(width, seed=9) / 10
    norm, add_norm = (each.impls["native"].impl_fn for each in (rms_norm, fused_add_rms_norm))

    def model(x: Tensor, residual: Tensor) -> list[Tensor]:
        found = list[Tensor]()
        for _ in range(layers):
            if adds:
                y, residual = add_norm(x, residual, weight, 1e-5)
            else:
                y = norm(x, weight, 1e-5)
            codes, scales = layer(y)
            found += [codes, scales]
            x = codes.to(x.dtype)
        return [*found, residual] if adds else found

    return model


@pytest.mark.parametrize("kind", KINDS)
def test_its_layer_is_one_op(kind: str) -> None:
    graph = canonicalize(post_grad(behind_a_norm(quantize(kind)), randn(5, WIDTH), dynamic=True))
    (node,) = graph.calls(ops[ROW if kind == "of rows" else GROUP].overload)
    assert node.args[1:] == KINDS[kind][1]
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
    (node,) = graph.calls(ops[ROW].overload)
    bound = node.args[ops[ROW].arguments.index("scale_ub")]
    assert isinstance(bound, fx.Node)
    assert bound.op == "placeholder"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds", [False, True])
def test_it_is_fused_with_its_norms(kind: str, adds: bool) -> None:
    reports: list[fuseplan.Report] = []
    torch._dynamo.reset()
    model, given = normed(adds, quantize(kind)), (randn(5, WIDTH), randn(5, WIDTH, seed=1))
    with torch.inference_mode():
        config = PassConfig(policy="ordered(norm_quant)")
        compiled: Any = fuseplan.compile(model, config=config, on_report=reports.append)
        for got, wanted in zip(compiled(*given), model(*given), strict=True):
            assert torch.equal(bits(got), bits(wanted))
            assert got.stride() == wanted.stride()
    assert reports[0].fused["norm_quant"] == 1


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Declares the ops, and leaves functionalised calls as vLLM has them."""
    libraries = []
    for name in (GROUP, f"{GROUP}_packed"):
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


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", CUSTOM)
def test_its_own_op_is_one_op_that_computes_the_same(kind: str, dynamic: bool) -> None:
    layer, shape = customly(kind), (6, 512)
    raised = canonicalize(post_grad(layer, randn(*shape), dynamic=dynamic))
    (node,) = raised.calls(ops[GROUP].overload)
    assert node.args[1:] == CUSTOM[kind][1]
    assert not raised.refusals
    if not dynamic:
        x = randn(*shape, seed=3) * torch.tensor([1e-3, 1e3, 1.0, 0.0, 7.0, 1.0])[:, None].bfloat16()
        for got, wanted in zip(fx.GraphModule({}, raised.graph)(x), layer(x), strict=True):
            assert (got.dtype, got.stride()) == (wanted.dtype, wanted.stride())
            assert torch.equal(got.float(), wanted.float())


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", CUSTOM)
def test_every_op_of_its_own_is_fused_with_its_norm(kind: str, adds: bool, dynamic: bool) -> None:
    model = normed(adds, customly(kind), 512, layers=3)
    graph = post_grad(model, randn(6, 512), randn(6, 512, seed=1), dynamic=dynamic)
    reports: list[Any] = []
    config = PassConfig(policy="ordered(norm_quant)", verify="off", costs="modelled")
    PostGradPassManager(config, on_report=reports.append, device=device_profile("h200"))(graph)
    assert reports[0].fused["norm_quant"] == 3
    assert not [node for node in graph.nodes if "auto_functionalized" in str(node.target)]
