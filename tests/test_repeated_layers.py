"""Layers that are compiled once and called often count as often as a step runs them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.analysis import Regions
from fuseplan.config import CompileRange
from fuseplan.explanation.capture import capture
from fuseplan.explanation.explanation import Explanation
from fuseplan.graph.regions import INVOKE
from fuseplan.providers import BUILT_IN_PROVIDERS, device_profile
from fuseplan.record import Fusion, GraphReport, Reason, Report
from fuseplan.report.lock import placed_in
from tests.graph.test_regions import graph_that_calls, leaf
from tests.helpers import randn

CONFIG = fuseplan.PassConfig(policy="ordered(act_padding)")
N_LAYERS = 3


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with torch._inductor.utils.fresh_cache():
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.RMSNorm(64, eps=1e-6), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.pad(self.norm(x), (0, 32)))
        return y


class Nested(Layer):
    forward = torch.compiler.nested_compile_region(Layer.forward)


class Looped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        def body(step: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return step + 1, Layer.forward(self, x)

        y: Tensor = while_loop(lambda step, x: step < 3, body, (torch.tensor(0), x))[1]
        return y


def model_of(kind: type[Layer], n_layers: int = N_LAYERS) -> nn.Module:
    return nn.Sequential(*(kind() for _ in range(n_layers))).bfloat16().eval().requires_grad_(False)


X = randn(16, 64)


def facts(report: Report) -> list[Any]:
    """What a reader counts, and what a lock pins."""
    return [
        report.fused, report.matched, report.recognized, round(report.saved_us, 3), round(report.region_us, 3),
        report.per_range, [placed_in(report, span) for span in report.per_range],
    ]  # fmt: skip


SPANS = CompileRange(start=1, end=16), CompileRange(start=17, end=64)


@pytest.mark.parametrize("config", [CONFIG, fuseplan.PassConfig(compile_ranges=SPANS)], ids=["ordered", "ranges"])
def test_regions_count_as_layers_do(config: fuseplan.PassConfig) -> None:
    flat, nested = (fuseplan.explain(model_of(each), X, device="h200", config=config) for each in (Layer, Nested))
    assert facts(nested) == facts(flat)
    assert nested.fused["act_padding"] == N_LAYERS * len(nested.per_range)


def test_compiled_regions_count_as_layers_do() -> None:
    found = []
    for kind in (Layer, Nested):
        reports, model = list[Report](), model_of(kind)
        with torch.inference_mode():
            compiled = fuseplan.compile(model, config=CONFIG, on_report=reports.append)
            torch.testing.assert_close(compiled(X), model(X), rtol=2**-6, atol=2**-6)
        found.append(facts(reports[0]))
    assert found[0] == found[1]


def test_options_report_each_call_too() -> None:
    reports, model = list[Report](), model_of(Nested)
    with torch.inference_mode():
        torch.compile(model, options=fuseplan.inductor_options(CONFIG, on_report=reports.append))(X)
    graphs = [graph for report in reports for graph in report.graphs]
    assert [graph.graph for graph in graphs] == ["graph_0", "graph_0.1", "graph_0.2", "graph_1"]
    assert sum(report.fused["act_padding"] for report in reports) == N_LAYERS


def test_other_sizes_and_saved_plans_know_of_calls() -> None:
    config = fuseplan.PassConfig(compile_ranges=(CompileRange(start=1, end=64),))
    points, plans = [], []
    for kind in (Layer, Nested):
        traced = capture(model_of(kind), [X], {}, dynamic=True)
        explanation = Explanation(traced, config, device_profile("h200"), BUILT_IN_PROVIDERS)
        points.append(explanation.evidence([config.chosen_policy]).sizes)
        report = explanation.report(config.chosen_policy)
        comparison = fuseplan.record.Comparison(workload="w", tp=1, device="h200", ranges=((1, 64),), reports=(report,))
        plans.append(comparison.plans().plans)
    flat, nested = points
    assert [replace(each, step_ns=None) for each in flat] == [replace(each, step_ns=None) for each in nested]
    steps = [each.step_ns for each in nested if each.step_ns is not None]
    assert [each.step_ns for each in flat] == pytest.approx(steps, abs=len(flat))
    assert [plan.graph for plan in plans[1]] == ["graph_0", "graph_1"]


def test_what_data_repeats_is_counted_once_and_said_to_be() -> None:
    report = fuseplan.explain(model_of(Looped, 1), X, device="h200", config=CONFIG)
    assert report.fused["act_padding"] == 1
    (refusal,) = [each for graph in report.graphs for each in graph.refusals if each.reason is Reason.REPEATS]
    assert refusal.detail == "data decides how often while_loop runs graph_1, whose fusions are counted once"
    assert not report.near_misses


def test_regions_of_regions_multiply() -> None:
    inner, regions, found = leaf(), Regions(), list[GraphReport]()
    middle = graph_that_calls(*((INVOKE, inner, f"layers.0.{name}") for name in ("norm1", "norm2")))
    outer = graph_that_calls(*((INVOKE, middle, f"layers.{number}") for number in range(2)))
    one = Fusion(rule="r", op="o", provider="torch", anchor="a", consumed=("a",), contested_op="c", site="a")
    for name, gm, source in (("0", inner, "layers.0.norm1"), ("1", middle, "layers.0.mlp"), ("2", outer, "head")):
        report = GraphReport(graph=f"graph_{name}", applied=(replace(one, source=source),), saved_ns=5)
        found += regions.with_calls(gm.graph, report)
    assert len({each.graph for each in found}) == len(found)
    assert sorted(str(each.applied[0].source) for each in found) == [
        "head", "layers.0.mlp", "layers.0.norm1", "layers.0.norm2", "layers.1.mlp", "layers.1.norm1", "layers.1.norm2"
    ]  # fmt: skip
