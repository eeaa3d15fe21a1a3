"""What libraries quantise in their tests, and how they are imported."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseplan

LAYERS = 2
RULES = ("norm_quant", "act_quant")


class Block(nn.Module):
    """A norm whose result two layers quantise, each by itself, and an activation that a third one does."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        down: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + down


def blocks(width: int, inner: int) -> nn.Sequential:
    """LAYERS of them, in bfloat16, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, inner) for _ in range(LAYERS))).eval().bfloat16()


def fused(
    model: nn.Module, x: Tensor, code: AbstractContextManager[None] | None = None
) -> tuple[dict[str, int], set[str], Any, Any]:
    """Counts by rule, fused ops, and results of the compiled model and of the model itself."""
    reports = list[fuseplan.Report]()
    with torch.inference_mode(), warnings.catch_warnings(), code or nullcontext():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        config = fuseplan.PassConfig(policy=f"ordered({', '.join(RULES)})")
        compiled = fuseplan.compile(model, config=config, on_report=reports.append)
        got, wanted = compiled(x), model(x)
    counts = {rule: sum(report.fused[rule] for report in reports) for rule in RULES}
    applied = {str(one.op) for report in reports for graph in report.graphs for one in graph.applied}
    return counts, applied, got, wanted


def refusals_of(model: nn.Module, x: Tensor, device: str) -> set[str]:
    """Why nothing of it is quantised by what stands before."""
    report = fuseplan.explain(model, x, device=device)
    assert not [rule for rule in RULES if report.fused[rule]]
    return {refusal.detail for graph in report.graphs for refusal in graph.refusals}


@contextmanager
def quiet(library: str) -> Iterator[Any]:
    """A library, if it is installed, without what it logs of other versions and platforms."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield pytest.importorskip(library)
    finally:
        logging.disable(before)
