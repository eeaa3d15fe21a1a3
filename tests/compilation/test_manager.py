"""The pass as Inductor sees it: what it leaves alone, its key, its dumps, and who it shares the hook with."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, Environment
from fuseplan.devices import PROFILES
from fuseplan.errors import ConfigError
from fuseplan.planner import prices_of
from fuseplan.record import Reason, Report, from_json
from fuseplan.record.report import GraphReport
from tests.helpers import HIDDEN, all_reduce, llama, post_grad, randn, vllm

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
INPUTS = (randn(5, HIDDEN), randn(5, HIDDEN, seed=1), W)
PAD = fuseplan.PassConfig(policy="ordered(act_padding)")


def padded(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, total = vllm(x, residual, weight)
    y2, total = vllm(F.pad(y, (0, 8))[..., 8:], total, weight)
    return F.pad(y2, (0, 8)), total


def code_of(function: Callable[..., Any], *inputs: Tensor) -> str:
    """The code that Inductor generates, with ids that differ from run to run made equal."""
    torch._dynamo.reset()
    with fresh_cache(), torch.inference_mode():
        _, codes = run_and_get_code(function, *inputs)
    text = "\n".join(codes)
    text = re.sub(r"# AOT ID: .*", "", text)
    return re.sub(r"c[a-z0-9]{50,}", "HASH", text)


@pytest.mark.parametrize("policy", ["off", "ordered(norm_quant, act_quant)"])
def test_nothing_fused_nothing_changed(policy: str) -> None:
    plain = code_of(torch.compile(padded), *INPUTS)
    config = fuseplan.PassConfig(policy=policy)
    assert code_of(fuseplan.compile(padded, config=config), *INPUTS) == plain
    assert code_of(fuseplan.compile(padded, config=PAD), *INPUTS) != plain


def planned(
    config: fuseplan.PassConfig, function: Callable[..., Any] = padded, inputs: tuple[Tensor, ...] = INPUTS,
    **options: Any,
) -> tuple[fx.Graph, str, Report]:  # fmt: skip
    """A graph that the pass was given, its text before, and what was reported of it."""
    reports, graph = list[Report](), post_grad(function, *inputs)
    before = str(graph)
    PostGradPassManager(config, on_report=reports.append, **options)(graph)
    (report,) = reports
    return graph, before, report


def test_what_is_raised_and_not_fused_stays_as_it_was() -> None:
    graph = post_grad(padded, *INPUTS)
    before = [node.name for node in graph.nodes if node.op == "call_function"]
    PostGradPassManager(dataclasses.replace(PAD, max_fusions=1))(graph)
    after = [node.name for node in graph.nodes if node.op == "call_function"]
    second_norm = before[before.index("pow_2") :]
    assert {"rsqrt_1", "constant_pad_nd_1"} <= {*second_norm}
    assert after[-len(second_norm) :] == second_norm


def test_switched_off_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the policy it still says what would match."""
    graph, before, report = planned(fuseplan.PassConfig(policy="off"))
    assert str(graph) == before
    assert (report.matched["act_padding"], {*report.fused.values()}, report.graphs[0].rewritten) == (2, {0}, False)
    monkeypatch.setenv("FUSEPLAN", "0")
    graph, before, report = planned(PAD)
    assert str(graph) == before
    assert [refusal.reason for refusal in report.graphs[0].refusals] == [Reason.DISABLED]
    monkeypatch.setenv("FUSEPLAN", "perhaps")
    with pytest.raises(ConfigError, match=r"FUSEPLAN='perhaps': allowed are 0 \(off\) and 1 \(on\)"):
        PostGradPassManager(PAD)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_max_fusions_applies_the_first_n(limit: int) -> None:
    graph, _, report = planned(dataclasses.replace(PAD, max_fusions=limit))
    assert report.fused == {"act_padding": min(limit, 2)}
    given_up = [refusal for refusal in report.graphs[0].refusals if refusal.reason is Reason.LIMIT]
    assert len(given_up) == max(0, 2 - limit)
    fused = graph.find_nodes(op="call_function", target=torch.ops.fuseplan.fused_add_rms_norm_pad.default)
    assert len(fused) == min(limit, 2)


class Counting(CustomGraphPass):
    """Somebody else's pass."""

    calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "counting"


def test_passes_in_the_hook_are_chained() -> None:
    mine, seen = Counting(), list[fx.Graph]()
    for given in (mine, seen.append, [mine, seen.append]):
        options = fuseplan.inductor_options(PAD, options={"post_grad_custom_post_pass": given})
        options["post_grad_custom_post_pass"](post_grad(padded, *INPUTS))
    assert (mine.calls, len(seen)) == (2, 2)
    with torch._inductor.config.patch(post_grad_custom_post_pass=mine):
        fuseplan.inductor_options(PAD)["post_grad_custom_post_pass"](post_grad(padded, *INPUTS))
    assert mine.calls == 3


def test_copies_of_inductors_configuration_share_the_manager() -> None:
    manager = PostGradPassManager(PAD)
    assert copy.deepcopy({"post_grad_custom_post_pass": manager})["post_grad_custom_post_pass"] is manager


def test_debug_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPLAN_DEBUG_DIR", str(tmp_path / "dumps"))
    manager = PostGradPassManager(PAD, compile_range=CompileRange(start=1, end=8))
    for _ in range(2):
        manager(post_grad(padded, *INPUTS))
    folders = sorted((tmp_path / "dumps").iterdir())
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == ["graph_0-1-8", "graph_1-1-8"]
    texts = {path.name: path.read_text() for path in folders[0].iterdir()}
    assert sorted(texts) == [
        "1-before.txt", "2-canonical.txt", "3-after.txt", "matches.txt", "patterns.txt", "report.json",
    ]  # fmt: skip
    assert "aten.constant_pad_nd" in texts["1-before.txt"]
    assert "fuseplan.fused_add_rms_norm.default" in texts["2-canonical.txt"]
    assert "fuseplan.fused_add_rms_norm_pad.default" in texts["3-after.txt"]
    assert len(re.findall(r"^chosen .* us act_padding ", texts["matches.txt"], re.MULTILINE)) == 2
    assert "fused_add_rms_norm -> pad  =>  fused_add_rms_norm_pad" in texts["patterns.txt"]
    assert from_json(GraphReport, json.loads(texts["report.json"])).count(["act_padding"]) == {"act_padding": 2}


def test_fusions_that_would_form_a_cycle_together_are_given_up(one_rank: str) -> None:
    """Each is convex; together each would need the other's sum before it starts."""

    def crossing(x: Tensor) -> tuple[Tensor, ...]:
        a, b = all_reduce(x.sin(), one_rank), all_reduce(x.cos(), one_rank)
        return llama(a, None, b[0])[0], llama(b, None, a[0])[0]

    graph, _, report = planned(fuseplan.PassConfig(policy="ordered(allreduce_rms)"), crossing, INPUTS[:1])
    graph.lint()
    assert report.matched == {"allreduce_rms": 2}
    assert report.fused == {"allreduce_rms": 1}
    assert [refusal.reason for refusal in report.graphs[0].refusals] == [Reason.CYCLE]


def test_inputs_that_come_late_are_waited_for() -> None:
    def late(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        early = total.relu()
        y = weight.sigmoid() * F.rms_norm(total, (HIDDEN,)).to(x.dtype)
        return F.pad(y, (0, 8)), early

    with torch.inference_mode():
        actual = fuseplan.compile(late, config=PAD)(*INPUTS)
    for left, right in zip(actual, late(*INPUTS), strict=True):
        torch.testing.assert_close(left, right, rtol=2**-6, atol=2**-6)


def test_a_graph_of_the_cpu_is_planned_for_it_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fuseplan.compilation.home", "fuseplan.providers.provider"):
        monkeypatch.setattr(f"{module}.local_vendor", lambda: "nvidia")
    reports: list[Report] = []
    for config in (PAD, fuseplan.PassConfig()):
        prices = prices_of(config, Environment(), PROFILES["h200"])
        manager = PostGradPassManager(config, prices=prices, on_report=reports.append)
        assert {each.name for each in manager.providers if each.unavailable() is None} > {"torch", "triton"}
        manager(post_grad(padded, *INPUTS))
    (in_order,), (planned,) = (report.graphs for report in reports)
    assert [(each.rule, each.provider) for each in in_order.applied] == 2 * [("act_padding", "torch")]
    assert planned.plan is not None
    assert planned.plan.device == "cpu"
    assert not in_order.refusals


def test_a_fault_in_what_the_cpu_has_leaves_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("a bug in prices")

    monkeypatch.setattr("fuseplan.compilation.home.local_vendor", lambda: "nvidia")
    monkeypatch.setattr("fuseplan.compilation.home.prices_of", fails)
    graph, before, report = planned(PAD)
    assert str(graph) == before
    assert "a bug in prices" in report.graphs[0].refusals[0].detail
