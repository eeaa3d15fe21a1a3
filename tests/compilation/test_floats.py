"""Epsilons that Dynamo made inputs: the second model of a class is fused like the first."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import fuseplan
from fuseplan.compatibility import FLOATS, PrivateApi
from fuseplan.compilation import floats
from fuseplan.rules.parts.rms_norm.mean_square import AUTOMATIC_EPSILON, DYNAMIC_EPSILON

WIDTH = 64
CONFIG = fuseplan.PassConfig(policy="ordered(act_padding)")


class Block(nn.Module):
    """An RMSNorm as models write it, padded and scaled."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.eps = eps
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return F.pad(y, (0, 8)) * self.scale


class BuiltIn(Block):
    """The same by torch's own function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.rms_norm(x, (WIDTH,), self.weight, self.eps), (0, 8)) * self.scale


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        yield


def compiled(block: nn.Module, **arguments: Any) -> tuple[Any, list[fuseplan.Report]]:
    reports: list[fuseplan.Report] = []
    return fuseplan.compile(block, config=CONFIG, on_report=reports.append, **arguments), reports


def ran(block: nn.Module, **arguments: Any) -> list[fuseplan.Report]:
    """The reports of a model that is run once, and computes what it does by itself."""
    (model, reports), x = compiled(block, **arguments), torch.randn(4, WIDTH)
    torch.testing.assert_close(model(x), block(x))
    return reports


def fused(reports: list[fuseplan.Report]) -> list[int]:
    return [report.fused["act_padding"] for report in reports]


def fixes(report: fuseplan.Report) -> set[str | None]:
    return {each.fix for each in report.near_misses}


@pytest.mark.parametrize("kind", [Block, BuiltIn])
def test_models_of_a_class_with_different_epsilons_are_all_fused(kind: type[Block]) -> None:
    blocks = [kind(eps) for eps in (1e-6, 1e-2, 1.0)]
    models = [compiled(block) for block in blocks]
    for _ in range(2):
        for block, (model, reports) in zip(blocks, models, strict=True):
            x = torch.randn(4, WIDTH)
            torch.testing.assert_close(model(x), block(x))
            assert fused(reports) == [1]
            assert [graph.graph for report in reports for graph in report.graphs] == ["graph_0"]
    assert counters["stats"]["unique_graphs"] == len(blocks)
    if kind is Block:  # of the other one torch makes the float a constant itself, and doesn't take that back
        assert not TensorifyState.force_specializations


def test_more_models_than_dynamo_allows_entries_are_all_compiled() -> None:
    with dynamo_config.patch(recompile_limit=2):
        for exponent in range(5):
            assert fused(ran(Block(10.0**-exponent))) == [1]
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 5


def changing(attribute: str, *, ours: bool) -> tuple[int, list[fuseplan.Report]]:
    """How many graphs are compiled of a model one of whose floats changes with each call, and the reports."""
    torch._dynamo.reset()
    counters.clear()
    block, x = Block(1e-6), torch.randn(4, WIDTH)
    model, reports = compiled(block) if ours else (torch.compile(block, backend="aot_eager"), [])
    for index in range(6):
        setattr(block, attribute, 0.5 + index)
        torch.testing.assert_close(model(x), block(x))
    return counters["stats"]["unique_graphs"], reports


def test_a_float_that_no_norm_reads_stays_dynamic() -> None:
    graphs, reports = changing("scale", ours=True)
    assert graphs == changing("scale", ours=False)[0] == 2
    assert fused(reports) == [1, 1]


def test_an_epsilon_that_changes_with_each_call_costs_one_more_compilation() -> None:
    graphs, reports = changing("eps", ours=True)
    assert graphs == changing("eps", ours=False)[0] + 1 == 3
    assert fused(reports) == [1, 1, 0]
    assert fixes(reports[-1]) == {AUTOMATIC_EPSILON}


def test_the_fix_that_the_report_names_works() -> None:
    with dynamo_config.patch(specialize_float=True):
        assert fused(changing("eps", ours=True)[1]) == [1] * 6


def test_explain_and_compile_agree_on_the_second_model() -> None:
    ran(Block(1e-6))
    second = Block(1e-2)
    (report,) = ran(second)
    explained = fuseplan.explain(second, torch.randn(4, WIDTH), config=CONFIG)
    assert explained.fused == report.fused == {"act_padding": 1}


def test_a_warm_cache_of_the_graph_with_a_dynamic_epsilon_does_not_stand_in_the_way() -> None:
    assert fused(changing("eps", ours=True)[1])[-1] == 0
    torch._dynamo.reset()
    for eps in (0.5, 2.5):
        assert fused(ran(Block(eps))) == [1]


def test_who_asked_for_dynamic_floats_keeps_them_and_reads_so() -> None:
    reports = ran(Block(1e-6), dynamic=True)
    assert (fused(reports), fixes(reports[0])) == ([0], {DYNAMIC_EPSILON})


def test_a_torch_that_can_not_start_again_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = PrivateApi("torch._dynamo.symbolic_convert:TensorifyState.gone", ("floats",))
    monkeypatch.setattr(floats, "FLOATS", (*FLOATS, gone))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (ran(Block(eps)) for eps in (1e-6, 1e-2))
    assert (fused(first), fixes(first[0])) == ([1], set())
    assert (fused(second), fixes(second[0])) == ([0], {AUTOMATIC_EPSILON})


def test_options_for_torch_compile_name_the_cause_too() -> None:
    reports: list[fuseplan.Report] = []
    with fresh_cache():  # a warm one skips the pass, and with it the report
        for eps in (1e-6, 1e-2):
            options = fuseplan.inductor_options(CONFIG, on_report=reports.append)
            torch.compile(Block(eps), options=options)(torch.randn(4, WIDTH))
    assert (fused(reports), fixes(reports[1])) == ([1, 0], {AUTOMATIC_EPSILON})
