"""torchao's fp8 linear layers: the graphs that its own code leaves to Inductor."""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseplan
from benchmarks import quantised as benchmark
from benchmarks.decode_one_gpu import Step, Workload
from benchmarks.published_shapes import SMALL, model_of
from fuseplan.dialect.raising import canonicalize
from fuseplan.rules.parts.mx_fp4 import per_token_mx_fp4_quant
from fuseplan.rules.parts.mx_fp8 import per_token_mx_fp8_quant
from fuseplan.rules.parts.nv_fp4 import per_token_nv_fp4_quant
from tests.helpers import post_grad, randn
from tests.integrations.quantised import LAYERS, RULES, blocks, fused, quiet, refusals_of
from tests.interpreted import no_code
from tests.rules.parts.microscaling import inputs

WIDTH, INNER = 128, 256


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def torchao() -> Iterator[Any]:
    with quiet("torchao.quantization") as library:
        yield library


def module(name: str) -> Any:
    return importlib.import_module(f"torchao.{name}")


@pytest.fixture
def on_cpu(torchao: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchao without a look at the hardware, and with a product of blocks that a CPU can do."""
    layers = module("quantization.quantize_.workflows.float8.float8_tensor")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(layers, "blockwise_fp8_gemm", multiplied)
    return torchao


def multiplied(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, block_size: int) -> Tensor:
    """Stands in for the Triton kernel of the product, with its arguments: groups of x, blocks of the weight."""
    groups = x.float().unflatten(-1, (-1, block_size)) * x_scale.view(len(x), -1, 1)
    blocks = weight_scale.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    product: Tensor = groups.flatten(-2) @ (weight.float() * blocks).t()
    return product.bfloat16()


def kinds_in(model: nn.Module, code: AbstractContextManager[None] | None = None) -> set[str]:
    """The ops that all norms and activations of compiled blocks become, held to what the blocks compute."""
    counts, kinds, got, wanted = fused(model, randn(6, WIDTH), code)
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
    assert counts == dict.fromkeys(RULES, LAYERS)
    return kinds


def quantized(torchao: Any, granularity: Any, **more: Any) -> nn.Module:
    model = blocks(WIDTH, INNER)
    torchao.quantize_(model, torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity, **more))
    return model


@pytest.mark.parametrize("bounds", [{}, {"activation_value_lb": 1e-4, "activation_value_ub": 1.5}])
def test_every_row_is_quantised_by_the_norm_and_the_activation_before_it(on_cpu: Any, bounds: Any) -> None:
    assert kinds_in(quantized(on_cpu, on_cpu.PerRow(), **bounds)) == {
        "rms_norm_dynamic_fp8_quant", "fused_add_rms_norm_dynamic_fp8_quant", "silu_and_mul_dynamic_fp8_quant",
    }  # fmt: skip


def test_codes_in_e5m2_are_fused(on_cpu: Any) -> None:
    """Its product is left out: torch has none of e5m2 by e4m3 on a CPU."""
    model = quantized(on_cpu, on_cpu.PerRow(), activation_dtype=torch.float8_e5m2)
    report = fuseplan.explain(model, randn(6, WIDTH), device="h200")
    assert (report.fused["norm_quant"], report.fused["act_quant"]) == (LAYERS, LAYERS)
    assert not [miss for miss in report.near_misses if "e5m2" in miss.detail]


def test_one_scale_of_all_rows_is_named(on_cpu: Any) -> None:
    details = refusals_of(quantized(on_cpu, on_cpu.PerTensor()), randn(6, WIDTH), "h200")
    assert any("the scale is computed from all rows at once" in detail for detail in details)


def test_every_group_is_quantised_where_rows_have_several(on_cpu: Any) -> None:
    """A row of the norm is one group here."""
    kinds = kinds_in(quantized(on_cpu, [on_cpu.PerBlock([1, WIDTH]), on_cpu.PerBlock([WIDTH, WIDTH])]))
    assert {"rms_norm_dynamic_fp8_quant", "silu_and_mul_group_fp8_quant"} <= kinds


every_model = pytest.mark.parametrize("model_name", ["llama-3.1-8b", "qwen3-8b"])


def decoded(
    monkeypatch: pytest.MonkeyPatch, model_name: str, how: str, rules: dict[str, int]
) -> tuple[Any, Step, fuseplan.Report]:
    """A whole model of transformers, a compiled decode step of it, and its report: so many of rules a layer."""
    smaller = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4}
    monkeypatch.setattr("benchmarks.published_shapes.SMALL", {**SMALL, **smaller})
    with torch.inference_mode():
        model: Any = model_of(model_name, LAYERS, torch.device("cpu"), torch.bfloat16)
        assert benchmark.quantised(model, how).startswith("torchao 0.18.0")
        reports = list[fuseplan.Report]()
        config = fuseplan.PassConfig(policy=f"ordered({', '.join(rules)})")
        torch._dynamo.reset()
        work = Workload(batch=2, position=8, cache=16)
        compiled = Step(model, work, fuseplan.compile(model, config=config, on_report=reports.append))
        got, wanted = compiled(), Step(model, work, model)()
        assert (got - wanted).norm() < 0.1 * wanted.norm()
    assert +Counter(reports[-1].fused) == {rule: count * LAYERS for rule, count in rules.items()}
    return model, compiled, reports[-1]


@every_model
@pytest.mark.parametrize("how", benchmark.FORMATS)
def test_a_decode_step_quantises_in_every_norm_and_activation_before_a_layer(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, model_name: str, how: str
) -> None:
    """Attention's result alone is quantised by itself."""
    model, compiled, _ = decoded(monkeypatch, model_name, how, {"norm_quant": 2, "act_quant": 1})
    with torch.inference_mode():
        planned = fuseplan.explain(model, device="h200", **compiled.arguments).fused
    assert (planned["norm_quant"], planned["act_quant"]) == (2 * LAYERS, LAYERS)


@every_model
def test_layers_of_a_decode_step_that_read_one_quantised_value_are_one_op(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, model_name: str
) -> None:
    """q, k and v, and gate and up; o and down by themselves."""
    rules = {"norm_quant": 2, "act_quant": 1, "merged_scaled_linear": 2, "skinny_scaled_linear": 2}
    (graph,) = decoded(monkeypatch, model_name, "fp8_rows", rules)[2].graphs
    counts = Counter(one.op for one in graph.applied)
    assert (counts["merged_scaled_linear_triple"], counts["merged_scaled_linear_pair"]) == (LAYERS, LAYERS)


every_scaling = pytest.mark.parametrize("scaling", ["FLOOR", "CEIL", "EVEN", "RCEIL"])


@every_scaling
@pytest.mark.parametrize("bits", [8, 4])
def test_every_norm_and_activation_is_quantised_to_microscaled_formats(torchao: Any, scaling: str, bits: int) -> None:
    """Products are emulated: the kernels of others take Blackwell. Inductor makes no code for E8M0 on a CPU."""
    mx = module("prototype.mx_formats")
    config = module("prototype.mx_formats.config")
    kernels = module("quantization.quantize_.common")
    model = blocks(WIDTH, INNER)
    dtype = torch.float8_e4m3fn if bits == 8 else torch.float4_e2m1fn_x2
    how = mx.MXDynamicActivationMXWeightConfig(
        activation_dtype=dtype, weight_dtype=dtype, scaling_mode=config.ScaleCalculationMode[scaling],
        kernel_preference=kernels.KernelPreference.EMULATED,
    )  # fmt: skip
    torchao.quantize_(model, how)
    # Products add the residual.
    assert kinds_in(model, no_code()) == {f"rms_norm_mx_fp{bits}_quant", f"silu_and_mul_mx_fp{bits}_quant"}


@pytest.mark.parametrize(("dtype", "scaling"), [("float8_e4m3fn", "FLOOR"), ("float8_e5m2", "RCEIL"), ("fp4", "EVEN")])
def test_its_scales_in_tiles_are_written_by_the_norm(torchao: Any, dtype: str, scaling: str) -> None:
    """By its own `to_mx` with `is_swizzled_scales`, and by its `to_blocked` behind it."""
    tensors = module("prototype.mx_formats.mx_tensor")
    utils = module("prototype.mx_formats.utils")
    mode = module("prototype.mx_formats.config").ScaleCalculationMode[scaling]
    code = torch.float4_e2m1fn_x2 if dtype == "fp4" else getattr(torch, dtype)
    norm = nn.RMSNorm(WIDTH, eps=1e-6).bfloat16()

    def by_itself(x: Tensor) -> tuple[Tensor, ...]:
        scale, codes = tensors.to_mx(norm(x), code, 32, mode, True)
        return codes, scale

    def behind_it(x: Tensor) -> tuple[Tensor, ...]:
        scale, codes = tensors.to_mx(norm(x), code, 32, mode)
        return codes, utils.to_blocked(scale)

    op = per_token_mx_fp4_quant if dtype == "fp4" else per_token_mx_fp8_quant
    for function in (by_itself, behind_it):
        reports, x = list[fuseplan.Report](), randn(6, WIDTH)
        (node,) = canonicalize(post_grad(function, x)).calls(op.overload)
        assert node.args[-1] == "swizzled"
        with torch.inference_mode(), no_code():
            torch._dynamo.reset()
            config = fuseplan.PassConfig(policy="ordered(norm_quant)")
            codes, scale = fuseplan.compile(function, config=config, on_report=reports.append)(x)
            for got, wanted in zip((codes, scale), function(x), strict=True):
                assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
                assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
        assert reports[0].fused["norm_quant"] == 1


@every_scaling
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 96), (2, 6, WIDTH)])
def test_codes_in_fp4_are_those_of_its_own_function(
    torchao: Any, scaling: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Zeros, infinity, NaN, numbers below the normal ones, ties and their neighbours, and rows apart in memory."""
    tensors = module("prototype.mx_formats.mx_tensor")
    mode = module("prototype.mx_formats.config").ScaleCalculationMode[scaling]
    for kind, given in {**inputs(), "apart": randn(6, 2 * WIDTH, dtype=torch.float32)[:, ::2]}.items():
        x = given[..., : shape[-1]].to(dtype)
        x = x.expand(2, *x.shape) if len(shape) == 3 else x
        scales, codes = tensors.to_mx(x.contiguous(), torch.float4_e2m1fn_x2, 32, mode)
        got = per_token_mx_fp4_quant.reference(x, 32, scaling.lower(), "rows")
        if scaling != "RCEIL" or dtype is not torch.float32:  # log2 rounds there, and graphs of it are left alone
            assert torch.equal(got[1], scales.view(torch.uint8)), kind
            assert torch.equal(got[0], codes), kind


def product_in_float(a: Any, b: Any, op: Any, bias: Tensor | None = None) -> Tensor:
    """Stands in for torch's product of tensors in NVFP4, which takes Blackwell."""
    product: Tensor = a.dequantize(torch.float32) @ b.dequantize(torch.float32)
    return product.bfloat16()


def in_nvfp4(torchao: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> nn.Module:
    mx = module("prototype.mx_formats")
    workflow = "torchao.prototype.mx_formats.inference_workflow"
    monkeypatch.setattr(f"{workflow}.is_sm_at_least_100", lambda: True)
    monkeypatch.setattr("torchao.prototype.mx_formats.nvfp4_tensor._addmm_nvfp4_dispatch", product_in_float)
    model = blocks(WIDTH, INNER)

    def quantise(**more: Any) -> None:
        config = mx.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, **more)
        torchao.quantize_(model, config)

    if options.get("step") == "convert":
        quantise(step="prepare")
        model(randn(6, WIDTH, seed=5))
    quantise(**options)
    block: Any
    for block in model.children() if options.get("step") == "convert" else ():
        # A scale is of what is read, not of who reads it.
        block.up.weight.act_per_tensor_scale = block.gate.weight.act_per_tensor_scale
    return model


@pytest.mark.parametrize("options", [{"step": "convert"}, {"use_dynamic_per_tensor_scale": False}])
def test_every_norm_and_activation_is_quantised_to_nvfp4(
    torchao: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """By a global scale that was calibrated, and without one."""
    kinds = kinds_in(in_nvfp4(torchao, monkeypatch, **options), no_code())
    assert {kind.removeprefix("fused_add_") for kind in kinds} == {"rms_norm_nv_fp4_quant", "silu_and_mul_nv_fp4_quant"}


def test_a_global_scale_of_all_rows_is_named(torchao: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    details = refusals_of(in_nvfp4(torchao, monkeypatch), randn(6, WIDTH), "b200")
    assert any("the global scale is computed from all rows at once" in detail for detail in details), details


@pytest.mark.parametrize("whole", [None, 0.02])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_in_nvfp4_are_those_of_its_own_function(torchao: Any, whole: float | None, dtype: torch.dtype) -> None:
    nvfp4 = module("prototype.mx_formats.nvfp4_tensor")
    utils = module("prototype.mx_formats.utils")
    scale = None if whole is None else torch.tensor(whole)
    for kind, given in {**inputs(), "apart": randn(6, 2 * WIDTH, dtype=torch.float32)[:, ::2]}.items():
        x = given[:, :112].to(dtype)
        scales, codes = nvfp4.nvfp4_quantize(x.contiguous(), 16, scale)
        least = torch.finfo(torch.float8_e4m3fn).tiny
        got = per_token_nv_fp4_quant.reference(x, 16, scale, least, "rows")
        tiles = per_token_nv_fp4_quant.reference(x, 16, scale, least, "swizzled")[1]
        assert torch.equal(tiles.flatten().view(torch.uint8), utils.to_blocked(scales).view(torch.uint8)), kind
        assert torch.equal(got[1].view(torch.uint8), scales.view(torch.uint8)), kind
        assert torch.equal(got[0], codes), kind
