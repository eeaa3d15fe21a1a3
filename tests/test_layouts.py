"""Compiled models: results lie in memory as those of eager mode do, and are written to as those are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fuseplan
from tests.helpers import HIDDEN, llama, randn
from tests.matching.test_layouts import layout, second_in_memory, stamp

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


@pytest.fixture(scope="module", autouse=True)
def own_ops() -> Iterator[None]:
    with torch.library._scoped_library("compiled_layouts", "DEF") as library:
        library.define("stamp(Tensor(a!) x, Tensor v) -> ()")
        library.define("second_in_memory(Tensor x) -> Tensor")
        for kernel in (stamp, second_in_memory):
            library.impl(kernel.__name__, kernel, "CompositeExplicitAutograd")
        library.impl("second_in_memory", lambda x: x.new_empty((3,)), "Meta")
        yield


def compare(function: Callable[..., Any], *, fusions: int = 1, **options: Any) -> None:
    """Values, strides, offsets and what shares memory, against eager mode."""
    torch._dynamo.reset()
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)")
    compiled = fuseplan.compile(function, config=config, on_report=reports.append, **options)
    for rows in (6, 9) if options.get("dynamic") else (6,):
        inputs = [randn(rows, HIDDEN), randn(rows, HIDDEN, seed=1), W]
        with torch.inference_mode():
            expected, seen = function(*map(torch.clone, inputs)), compiled(*map(torch.clone, inputs))
        for got, wanted in zip(seen, expected, strict=True):
            assert (got.stride(), got.storage_offset()) == (wanted.stride(), wanted.storage_offset())
            torch.testing.assert_close(got, wanted, rtol=2**-5, atol=2**-5)
        assert layout(seen) == layout(expected)
    assert sum(report.fused["act_padding"] for report in reports) == fusions


def test_in_place_ops_work_on_what_they_work_on_in_eager_mode() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, residual, weight)
        padded = F.pad(y, (0, 64))
        torch.ops.compiled_layouts.stamp(y, residual)
        torch.ops.compiled_layouts.stamp(total[1:], residual)
        return padded, total, y

    compare(function)


def test_results_and_views_of_them_lie_as_in_eager_mode() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, residual, weight)
        by_layout = torch.ops.compiled_layouts.second_in_memory(y)
        return F.pad(y, (0, 64)), y, y[:, 2:], total, by_layout, y.view(torch.int16)

    compare(function, dynamic=True)


def test_what_is_written_after_a_graph_break_is_no_other_result() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, residual, weight)
        padded = F.pad(y, (0, 64))
        torch._dynamo.graph_break()
        y.mul_(2)
        return padded, y, total

    compare(function)


def test_a_norm_that_is_returned_beside_its_padded_twin_is_its_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return F.pad(y, (0, 64)), y

    torch._dynamo.reset()
    compiled = fuseplan.compile(Block(), config=fuseplan.PassConfig(policy="ordered(act_padding)"))
    with torch.inference_mode():
        padded, y = compiled(torch.ones(6, HIDDEN))
        before = padded.clone()
        y.zero_()
    assert y.stride() == (HIDDEN, 1)
    assert torch.equal(padded, before)
