"""References against the code they stand for, fakes against references, symbolic sizes, exactness in float64."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fuseplan.dialect import DialectOp, Rounding, Sample, ops
from tests.helpers import SPELLINGS, quantize, quantize_rows, randn

CPU = torch.device("cpu")


def case_id(value: Any) -> str:
    return str(value.name)


def arguments(sample: Sample) -> tuple[Any, ...]:
    return sample.make(CPU, torch.Generator().manual_seed(0))


def leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def samples_of(op: DialectOp) -> Iterator[tuple[Any, ...]]:
    """The arguments of each sample, whose name is the last one that is printed where a test fails."""
    for sample in op.samples:
        print(f"with {sample.name}")
        yield arguments(sample)


@pytest.mark.parametrize("op", ops.values(), ids=case_id)
def test_fake_agrees_with_reference(op: DialectOp, one_rank: str) -> None:
    for inputs in samples_of(op):
        for real, fake in zip(leaves(op(*inputs)), leaves(op.fake(*inputs)), strict=True):
            assert (real.dtype, real.shape, real.stride()) == (fake.dtype, fake.shape, fake.stride())
            assert real.is_contiguous() or "layout" in op.arguments


@pytest.mark.parametrize("op", [op for op in ops.values() if not op.collective], ids=case_id)
def test_torch_accepts_the_registration(op: DialectOp) -> None:
    for given in samples_of(op):
        codes = [each for each in given if isinstance(each, Tensor) and each.dtype.itemsize == 1]
        if not codes:
            torch.library.opcheck(op.overload, given, test_utils=("test_schema", "test_faketensor"))
            continue
        # That compares arguments by arithmetic, which a CPU doesn't have for fp8.
        torch.library.opcheck(op.overload, given, test_utils="test_faketensor")
        before = [each.clone() if isinstance(each, Tensor) else each for each in given]
        op.overload(*given)
        for was, each in zip(before, given, strict=True):
            if isinstance(each, Tensor):
                assert torch.equal(was.view(torch.uint8), each.view(torch.uint8))


@pytest.mark.parametrize("op", [op for op in ops.values() if not op.collective], ids=case_id)
def test_symbolic_sizes_stay_symbolic(op: DialectOp) -> None:
    inputs = [_with_rows(each, 6) for each in arguments(op.samples[0])]
    given = [isinstance(each, Tensor) for each in inputs]

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        return leaves(op(*(next(rest) if is_tensor else each for is_tensor, each in zip(given, inputs, strict=True))))

    tensors = [each for each in inputs if isinstance(each, Tensor)]
    traced = make_fx(function, tracing_mode="symbolic")(*tensors)
    for node in traced.graph.output_node().args[0]:  # type: ignore[union-attr]
        assert isinstance(node.meta["val"].shape[0], torch.SymInt)  # type: ignore[union-attr]


def _with_rows(value: Any, rows: int) -> Any:
    return value[:1].expand(rows, -1).clone() if isinstance(value, Tensor) and value.dim() == 2 else value


@pytest.mark.parametrize("name", ["rms_norm", "fused_add_rms_norm", "silu_and_mul"])
def test_references_are_exact_in_float64(name: str) -> None:
    """Run on float64 inputs, all conventions are one, but for gemma's 1 + weight."""
    op = ops[name]
    for sample in op.samples:
        wide = [each.double() if isinstance(each, Tensor) else each for each in arguments(sample)]
        for result in leaves(op(*wide)):
            assert result.dtype is torch.float64
    x, residual, weight = (randn(3, 32, seed=seed).double() for seed in range(3))
    conventions = [rounding for rounding in Rounding if not rounding.adds_one]
    results = [ops.fused_add_rms_norm(x, residual, weight[0], 1e-5, rounding.value) for rounding in conventions]
    total = x + residual
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight[0]
    for y, residual_out in results:
        torch.testing.assert_close(y, expected)
        assert torch.equal(residual_out, total)


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_bit_for_bit_what_models_write(spelling: str, dtype: torch.dtype) -> None:
    convention = {"built_in": "gpt_oss"}.get(spelling, spelling)
    x, residual = randn(7, 320, dtype=dtype), randn(7, 320, dtype=dtype, seed=1)
    weight = randn(320, dtype=dtype, seed=2)
    eps = {"gpt_oss": 1e-5, "vllm": 1e-5}.get(spelling, 1e-6)
    expected, total = SPELLINGS[spelling](x, residual, weight)
    y, residual_out = ops.fused_add_rms_norm(x, residual, weight, eps, convention)
    assert torch.equal(residual_out, total)
    if spelling == "built_in":  # the CPU kernel of F.rms_norm sums in another order
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)
        assert torch.equal(ops.rms_norm(x, weight, eps, convention), SPELLINGS[spelling](x, None, weight)[0])


@pytest.mark.parametrize("name", ["Llama", "GptOss", "Gemma"])
def test_norms_are_bit_for_bit_those_of_transformers(name: str) -> None:
    convention = {"Llama": "llama", "GptOss": "gpt_oss", "Gemma": "gemma"}[name]
    models = importlib.import_module(f"transformers.models.{convention}.modeling_{convention}")
    module = getattr(models, f"{name}RMSNorm")(64).bfloat16()
    weight = randn(64, seed=1)
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    module.load_state_dict({"weight": weight})
    with torch.no_grad():
        assert torch.equal(module(randn(5, 64)), ops.rms_norm(randn(5, 64), weight, eps, convention))


def test_quantisation_is_bit_for_bit_what_models_write() -> None:
    x, scale, code = randn(7, 64), torch.tensor([0.013]), torch.float8_e4m3fn
    for reciprocal, rounding in ((False, "divide"), (True, "multiply")):
        q = ops.static_scaled_fp8_quant(x, scale, code, rounding)
        assert torch.equal(q.float(), quantize(x, scale, reciprocal=reciprocal).float())
    found = ops.dynamic_per_token_scaled_fp8_quant(x, code, 1 / (448 * 512), 0.0, 0.0, None, "multiply")
    for got, wanted in zip(found, quantize_rows(x), strict=True):
        assert torch.equal(got.float(), wanted.float())
    q = ops.static_scaled_fp8_quant(torch.tensor([[1e4]]), torch.ones(1), torch.float8_e4m3fnuz, "divide")
    assert q.float().item() == 240, "its own largest value"


def test_unknown_conventions_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'ours' is not a valid Rounding"):
        ops.rms_norm(randn(2, 8), randn(8), 1e-5, "ours")
    with pytest.raises(AttributeError, match="no dialect op named 'rms'; there are add_rms_norm, all_reduce, "):
        _ = ops.rms
