"""Reports from the field that the planner answers: each test names its report."""

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from typer.testing import CliRunner

from fuseplan.cli import app
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.explanation.capture import capture
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.record import GraphReport, NearMiss, Nearness, Reason, Report
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.workloads import catalog
from tests.docs.commands import traced_once
from tests.helpers import all_reduce, needs_rounded_residual, post_grad, quantize, randn, vllm

LAYERS, HIDDEN = 3, 2880
SPAN = CompileRange(start=1, end=64)


@pytest.fixture(scope="module")
def gpt_oss() -> Iterator[fx.Graph]:
    with catalog.build("gpt-oss-120b", tp=2, layers=LAYERS) as built:
        (gm,) = capture(built.model, built.inputs, {}, dynamic=True).graphs
        yield gm.graph


@pytest.fixture
def two_ranks(gpt_oss: fx.Graph) -> str:
    """The name of the group that the workload stands in."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def explained(graph: fx.Graph, policy: str = "planned", span: CompileRange = SPAN, **options: Any) -> GraphReport:
    config = options.pop("config", PassConfig())
    options.setdefault("device", PROFILES["h200"])
    manager = PostGradPassManager(config, compile_range=span, **options)
    analysis = manager.analyze(graph)
    return manager.report("graph_0", analysis, manager.decide(analysis, Policy.parse(policy), "graph_0"))


def counts(report: GraphReport) -> dict[str, int]:
    return {rule: n for rule, n in report.count(report.matched).items() if n}


def without(*rules: str) -> list[Any]:
    return [rule for rule in BUILT_IN_RULES if rule.name not in rules]


def test_case_1_vllm_42411_order_of_registration_means_nothing(gpt_oss: fx.Graph) -> None:
    """AR+RMS claimed every fused_add_rms_norm and starved the RMSNorm+pad fusion."""
    first = explained(gpt_oss)
    for order in permutations(("allreduce_rms", "act_padding", "allreduce_rms_padding")):
        rules = sorted(without(), key=lambda rule: order.index(rule.name) if rule.name in order else 9)
        report = explained(gpt_oss, rules=rules)
        assert (report.plan, report.applied) == (first.plan, first.applied)
        assert explained(gpt_oss, f"ordered({', '.join(order)})").saved_ns <= first.saved_ns


def test_case_1_vllm_42411_losers_are_listed_with_what_they_lost(gpt_oss: fx.Graph) -> None:
    report = explained(gpt_oss, rules=without("allreduce_rms_padding"))
    assert counts(report) == {"allreduce_rms": LAYERS + 1}
    losers = [loss for loss in report.lost if loss.fusion.rule == "act_padding" and loss.fusion.provider == "triton"]
    assert len(losers) == LAYERS
    for loss in losers:
        (winner,) = loss.blocked_by
        assert winner.rule == "allreduce_rms"
        assert loss.lost_ns == (winner.saving_ns or 0) - (loss.fusion.saving_ns or 0) > 0


@needs_rounded_residual
def test_case_1_vllm_42411_the_plan_follows_the_costs(gpt_oss: fx.Graph, tmp_path: Path) -> None:
    """The same graph, the other price, the other plan; the report's own: pad first wins on MI355X with AITER."""
    rules = without("allreduce_rms_padding", "skinny_linear", "add_rms_norm")
    aiter = [provider for provider in BUILT_IN_PROVIDERS if provider.name == "aiter"]
    span, config = CompileRange(start=32, end=32), PassConfig(allow_rounding_changes=True)
    on_amd = explained(gpt_oss, span=span, config=config, rules=rules, providers=aiter, device=PROFILES["mi355x"])
    # AITER's all-reduce kernels add a residual, and the first norm has none.
    assert counts(on_amd) == {"act_padding": LAYERS}
    on_nvidia = explained(gpt_oss, span=span, rules=rules)
    assert counts(on_nvidia) == {"allreduce_rms": LAYERS + 1}


X, R, W = randn(16, HIDDEN), randn(16, HIDDEN, seed=1), randn(HIDDEN)


def test_case_2_vllm_42864_all_reduce_norm_and_quant_become_one(two_ranks: str) -> None:
    """AR+RMS absorbed the norm, so that norm+quant could not fire and the quants stood alone. Without a fusion of all
    three it is the cheaper of these two.
    """

    def block(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y, total = vllm(all_reduce(x, two_ranks), residual, weight)
        return quantize(y, scale), total

    graph, rules = post_grad(block, X, R, W, torch.tensor(0.5)), without("allreduce_rms_quant")
    starved = explained(graph, "ordered(allreduce_rms, norm_quant)")
    assert counts(starved) == {"allreduce_rms": 1}
    assert [loss.fusion.rule for loss in starved.lost] == ["norm_quant"]
    planned = explained(graph)
    assert counts(planned) == {"allreduce_rms_quant": 1}
    assert planned.saved_ns > starved.saved_ns
    pairs = ("allreduce_rms", "norm_quant")
    each = {order: explained(graph, f"ordered({order})", rules=rules).saved_ns for order in pairs}
    best = max(each, key=each.__getitem__)
    without_it = explained(graph, rules=rules)
    assert (counts(without_it), without_it.saved_ns) == ({best: 1}, each[best])


def test_case_8_vllm_57681_fuses_only_in_ranges_where_it_is_faster(gpt_oss: fx.Graph, tmp_path: Path) -> None:
    """Fusions that are faster when small and slower when large (#57681, #34391, #44079, TensorRT-LLM #14629)."""
    from tests.planner.test_planning import cost_rows

    analysis = PostGradPassManager(PassConfig(), compile_range=SPAN, device=PROFILES["h200"]).analyze(gpt_oss)
    rows = []
    for row in cost_rows(analysis, {"allreduce_rms_padding": 5_000}):
        fused = "allreduce_rms_padding" in row["key"] and "triton" in row["key"]
        rows += [{**row, "tokens": 1 if row["tokens"] == 1 else 64}]
        for tokens in (65, 8192):
            rows.append({**row, "tokens": tokens, "time_ns": 60_000 if fused else row["time_ns"]})
    unique = {(row["key"], row["tokens"]): row for row in rows}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"schema": 1, "device": "h200", "rows": list(unique.values())}))
    config = PassConfig(cost_table=path)
    assert counts(explained(gpt_oss, config=config)) == {"allreduce_rms_padding": LAYERS}
    assert counts(explained(gpt_oss, config=config, span=CompileRange(start=65, end=8192))) == {}


@needs_rounded_residual
def test_case_8_vllm_44079_by_the_model_too(gpt_oss: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's fusion is expected to beat vLLM's own kernel, which eight ranks run below 256 KiB, but not surely.
    It loses to multimem above, and beats NCCL there, which torch.distributed runs.
    """
    monkeypatch.setattr("fuseplan.rules.families.sites.group_size", lambda name: 8)
    config = PassConfig(allow_rounding_changes=True, forbid=("allreduce_rms:triton",))
    rules = without("allreduce_rms_padding", "act_padding", "add_rms_norm")

    def applied(first: int, last: int) -> tuple[set[str], set[str]]:
        report = explained(gpt_oss, span=CompileRange(start=first, end=last), config=config, rules=rules)
        providers = {fusion.provider for fusion in report.applied if fusion.op.startswith("all_reduce_fused")}
        unsure = {each.provider for each in report.refusals if each.reason is Reason.UNSURE}
        providers |= {f"{provider}, not sure" for provider in unsure if provider is not None}
        return providers, {name for size in report.sizes for name in size.all_reduces}

    assert applied(1, 16) == ({"flashinfer"}, {"NCCL ring LL128"})
    assert applied(72, 88) == ({"flashinfer"}, {"NCCL ring LL128"})
    monkeypatch.setattr("fuseplan.rules.families.sites.reducer_of", lambda reduce: "vllm")
    assert applied(1, 16) == ({"flashinfer, not sure"}, {"vLLM custom one-shot"})
    assert applied(72, 88) == (set(), {"symm_mem multimem"})


def test_case_11_vllm_39356_command_line_and_configuration_choose_rules(tmp_path: Path) -> None:
    """Passes chosen from the command line, statistics of what ran; other people's passes: `matching/test_external`."""

    def run(*arguments: str) -> dict[str, int]:
        command = ["explain", "gpt-oss-120b-tiny", "--tp", "2", "--layers", "2", "--range", "1:64", "--json"]
        result = CliRunner().invoke(app, [*command, "--policy", "planned", *arguments])
        assert result.exit_code == 0, result.output
        (policy,) = json.loads(result.stdout)["policies"]
        return {rule: n for rule, n in policy["fused"].items() if n}

    with traced_once():
        assert run() == {"allreduce_rms": 1, "allreduce_rms_padding": 2}
        assert run("--force", "act_padding") == {"act_padding": 2, "allreduce_rms": 1}
        one_layer = {"act_padding": 1, "allreduce_rms": 1, "allreduce_rms_padding": 1}
        assert run("--force", "act_padding@layers.1.*") == one_layer
        assert run("--forbid", "allreduce_rms", "--forbid", "allreduce_rms_padding") == {"act_padding": 2}
        assert run("--provider", "torch") == {}


def near_misses(function: Any, *inputs: Tensor) -> list[NearMiss]:
    """What near misses of all-reduces with norms are in the graph of a function, the declined aside."""
    rows = Report(policy="planned", order=(), rules=(), graphs=(explained(post_grad(function, *inputs)),)).near_misses
    return [row for row in rows if row.rule == "allreduce_rms" and row.nearness is not Nearness.DECLINED]


def test_case_3_vllm_28841_a_slice_that_cannot_be_hoisted_is_named(two_ranks: str) -> None:
    """gpt-oss: a slice 3072 -> 2880 hid the match. Hoisted it fuses; where the rest is read too, it is named."""

    def sliced(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        reduced = all_reduce(x, two_ranks)
        return *vllm(reduced[..., :HIDDEN], r, w), reduced[..., HIDDEN:].relu()

    def alone(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return vllm(all_reduce(x, two_ranks)[..., :HIDDEN], r, w)

    wide = randn(16, HIDDEN + 192)
    (row,) = near_misses(sliced, wide, R, W)
    assert row.detail.startswith("aten.slice.Tensor stands between all_reduce and fused_add_rms_norm")
    assert str(row.line).startswith("test_cases.py:")
    assert "vllm(reduced[..., :HIDDEN], r, w)" in str(row.code)
    assert near_misses(alone, wide, R, W) == []
    assert counts(explained(post_grad(alone, wide, R, W))) == {"allreduce_rms": 1}


def test_case_4_vllm_48757_a_reshape_that_cannot_be_hoisted_is_named(two_ranks: str) -> None:
    """A reshape hid AR+RMS in Hugging Face models (TensorRT-LLM #14781, #14796); nobody could see it."""

    def reshaped(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        flat = all_reduce(x.reshape(4, 4 * HIDDEN), two_ranks)
        return *vllm(flat.reshape(16, HIDDEN), r, w), flat[:2].relu()

    (row,) = near_misses(reshaped, X, R, W)
    assert row.detail.startswith("aten.reshape.default stands between all_reduce and fused_add_rms_norm")
    assert row.fix is None, "what else reads the sum needs all of it"


def test_case_6_vllm_48324_an_fp32_weight_is_a_near_miss(two_ranks: str) -> None:
    """bf16 input with fp32 weight matched and gave garbage; the guard against it matched nothing at all (#48447)."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, total = vllm(all_reduce(x, two_ranks), r, w)
        return y.bfloat16(), total

    (row,) = near_misses(model, X, R, W.float())
    assert (row.reason, row.nearness) == (Reason.DTYPE, Nearness.REFUSED)
    assert row.detail == "weight is float32 and x is bfloat16; the fused op takes one dtype"
    assert row.fix is None, "cast to bfloat16, the weight would be rounded"
    assert counts(explained(post_grad(model, X, R, W))) == {"allreduce_rms": 1}


def test_case_12_pytorch_169440_a_match_that_failed_says_at_which_node_and_line(two_ranks: str) -> None:
    """ "Nobody can see why a specific match failed": the predicate, the node, and its source line in the model."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        scaled = all_reduce(x, two_ranks) * 0.5
        return vllm(scaled, r, w)

    graph = post_grad(model, X, R, W)
    (row,) = near_misses(model, X, R, W)
    assert (row.expected, row.found) == ("all_reduce", "aten.mul.Tensor")
    named = {node.name: node for node in graph.nodes}
    assert str(named[row.nodes[0]].target) == "aten.mul.Tensor"
    assert row.code == "scaled = all_reduce(x, two_ranks) * 0.5"
    assert str(row.line).startswith("test_cases.py:")
