"""Whether a compile range needs machine code that its verification didn't run. Skipped without a GPU."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseplan
from fuseplan.dialect import registered_kernel
from fuseplan.providers.triton.replay import compile_ahead

triton = pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WIDTH, LAST, FP8 = 4096, 8192, torch.float8_e4m3fn


def quantised(y: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-6)
    return (wide * scale.reciprocal()).clamp(-448, 448).to(FP8), scale


def block(x: Tensor, residual: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    wide = total.float()
    normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return *quantised(normed), total, *quantised(F.silu(gate) * up)


def test_no_size_of_a_range_compiles_a_kernel_later(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = torch.randn(2 * 14336, WIDTH, device="cuda").bfloat16() / 64

    def arguments(rows: int) -> tuple[Tensor, ...]:
        x, residual = (torch.randn(rows, WIDTH, device="cuda").bfloat16() for _ in range(2))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
        return x, residual, torch.ones(WIDTH, device="cuda").bfloat16(), gate_up

    reports: list[fuseplan.Report] = []
    ranges = [fuseplan.CompileRange(start=1, end=LAST)]
    config = fuseplan.PassConfig(compile_ranges=ranges, force=["norm_quant", "act_quant"])
    compiled = fuseplan.compile(block, config=config, on_report=reports.append)
    compiled(*arguments(64))
    assert {rule: count for rule, count in reports[-1].fused.items() if count} == {"norm_quant": 1, "act_quant": 1}
    later: list[tuple[int, str]] = []

    def note(*, fn: Any, **_: Any) -> None:
        later.append((rows, fn.name))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    for rows in (*range(2, 1200, 13), *range(1200, LAST, 401), LAST):
        compiled(*arguments(rows))
    assert not later


def test_what_is_compiled_ahead_is_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    of = functools.partial(torch.ones, device="cuda", dtype=torch.bfloat16)
    norm, linears = (registered_kernel(name, "triton") for name in ("fused_add_rms_norm_pad", "skinny_linear"))
    assert norm is not None
    assert linears is not None
    calls = [
        functools.partial(norm, of(2, 4032), of(2, 4032), of(4032), 1e-5, "llama", 8),
        functools.partial(linears, of(3, 4032), of(1056, 4032), None),
    ]
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    compile_ahead(calls)
    assert sorted(name.rpartition(".")[2] for name in compiled) == ["_linears", "_norm"]
    results = [call() for call in calls]
    assert len(compiled) == 2
    assert torch.equal(results[1], of(3, 1056) * 4032)
