"""torchao's fp8 linear layers: the graphs that its own code leaves to Inductor."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseplan
from tests.helpers import randn

WIDTH, INNER, LAYERS = 128, 256, 2
HAS_NO_KERNELS = "torchao.quantization.quant_api._check_hardware_support"
"""It asks for a GPU; all else of it runs on a CPU."""


class Block(nn.Module):
    """A norm whose result two layers quantise, each by itself, and an activation that a third one does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        down: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + down


@pytest.fixture(scope="module")
def torchao() -> Iterator[Any]:
    """Quiet about its libraries of other platforms."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield pytest.importorskip("torchao.quantization")
    finally:
        logging.disable(before)


def quantized(torchao: Any, granularity: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).eval().bfloat16()
    torchao.quantize_(model, torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity))
    return model


@pytest.mark.filterwarnings("ignore")
def test_every_row_is_quantised_by_the_norm_and_the_activation_before_it(
    torchao: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HAS_NO_KERNELS, lambda granularity: None)
    model, reports = quantized(torchao, torchao.PerRow()), list[fuseplan.Report]()
    x = randn(6, WIDTH)
    with torch.inference_mode():
        torch._dynamo.reset()
        config = fuseplan.PassConfig(policy="ordered(norm_quant, act_quant)")
        compiled = fuseplan.compile(model, config=config, on_report=reports.append)
        got, wanted = compiled(x), model(x)
    fused = {rule: count for rule, count in reports[-1].fused.items() if count}
    assert fused == {"norm_quant": LAYERS, "act_quant": LAYERS}
    kinds = {str(one.op) for graph in reports[-1].graphs for one in graph.applied}
    assert kinds == {
        "rms_norm_dynamic_fp8_quant",
        "fused_add_rms_norm_dynamic_fp8_quant",
        "silu_and_mul_dynamic_fp8_quant",
    }
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore")
def test_one_scale_of_all_rows_is_named(torchao: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HAS_NO_KERNELS, lambda granularity: None)
    report = fuseplan.explain(quantized(torchao, torchao.PerTensor()), randn(6, WIDTH), device="h200")
    assert not any(report.fused.values())
    details = {refusal.detail for graph in report.graphs for refusal in graph.refusals}
    assert any("the scale has the shape [1, 1], and what it scales [6, 128]" in detail for detail in details)
