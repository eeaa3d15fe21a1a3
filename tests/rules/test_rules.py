"""Every rule fires as often as it should, computes what it replaces, refuses by name, and is off when disabled."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.graph.surgery import copy_graph
from fuseplan.record import Report
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import (
    HIDDEN,
    SPELLINGS,
    all_reduce,
    llama,
    post_grad,
    quantize,
    quantize_rows,
    randn,
    vllm,
)
from tests.interpreted import no_code
from tests.rules.planning import compiled_and_eager

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
ALONE = {
    rule: fuseplan.PassConfig(policy=f"ordered({rule})") for rule in sorted({rule.name for rule in BUILT_IN_RULES})
}


def compare(function: Callable[..., Any], *inputs: Tensor, rule: str, ulps: int = 2, coded: bool = True) -> Report:
    """Compiles with one rule and without fuseplan, compares every output, and returns the report. What isn't to be
    coded is interpreted.

    `ulps` counts units in the last place of bf16, of values of about 1. Inside its own kernels Inductor keeps
    intermediates in float32 that the references round, as eager PyTorch does.
    """
    reports: list[Report] = []
    with torch.inference_mode(), contextlib.nullcontext() if coded else no_code():
        torch._dynamo.reset()
        expected = torch.compile(function)(*inputs)
        torch._dynamo.reset()
        actual = fuseplan.compile(function, config=ALONE[rule], on_report=reports.append)(*inputs)
    for left, right in zip(
        torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert left.dtype is right.dtype
        assert left.shape == right.shape
        if left.dtype is torch.float8_e4m3fn:
            codes = left.view(torch.uint8).int() - right.view(torch.uint8).int()
            assert codes.abs().max() <= 1
        else:
            torch.testing.assert_close(left, right, rtol=ulps * 2**-8, atol=ulps * 2**-8)
    return reports[-1]


def arguments_of(rule: Rule, device: torch.device) -> list[dict[str, Any]]:
    """Values for a rule's variables from the samples of its fused op, by the names in the op's schema."""
    generator = torch.Generator().manual_seed(0)
    names = [argument.name for argument in rule.op.overload._schema.arguments]
    found = [dict(zip(names, sample.make(device, generator), strict=True)) for sample in rule.op.samples]
    if "groups" in rule.variables:
        found = [{**each, "groups": each["q"].shape[1] // each["k"].shape[1]} for each in found]
    if getattr(rule, "transposes", False):
        moved = ("q", "k") if "k_cache" in rule.variables else ("cos", "sin")
        found = [{name: _batched(value) for name, value in each.items()} for each in found]
        found = [{**each, **{name: each[name].transpose(1, 2) for name in moved}} for each in found]
    return found


def _batched(value: Any) -> Any:
    return value[None] if isinstance(value, Tensor) and value.dim() == 3 else value


def rule_id(rule: Rule) -> str:
    return f"{rule.name}-{rule.op.name}{'-moves' * _moves(rule)}"


def _moves(rule: Rule) -> bool:
    return getattr(rule, "transposes", False)


def stack(spelling: str, layers: int, width: int, group: str | None) -> Callable[..., Any]:
    """A GPT-OSS-like stack: (all-reduce,) residual add, norm, router on the norm, pad of the norm for the experts."""
    norm = SPELLINGS[spelling]

    def model(x: Tensor, weight: Tensor, router: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        residual = x
        scores = x.new_zeros(())
        for _ in range(layers):
            block = x.sigmoid()
            block = all_reduce(block, group) if group else block
            y, residual = norm(block, residual, weight)
            scores = scores + F.linear(y, router, bias) / HIDDEN
            x = F.pad(y, (0, width)).relu()[..., width:]
        return norm(x, residual, weight)[0], scores

    return model


@pytest.mark.parametrize(
    ("spelling", "layers", "width"),
    [
        *((spelling, 3, 1) for spelling in sorted(SPELLINGS)),
        *(
            pytest.param(spelling, 2, 192, marks=[pytest.mark.nightly] * (spelling != "gpt_oss"))
            for spelling in sorted(SPELLINGS)
        ),
    ],
)
def test_act_padding_fires_once_a_layer(spelling: str, layers: int, width: int) -> None:
    coded = width > 1 and spelling == "gpt_oss"
    inputs = (randn(7, HIDDEN), W, randn(8, HIDDEN, seed=2), randn(8, seed=3))
    report = compare(stack(spelling, layers, width, None), *inputs, rule="act_padding", ulps=8, coded=coded)
    assert report.fused == {"act_padding": layers}


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_allreduce_rms_fires_at_every_norm_behind_an_all_reduce(spelling: str, coded: bool, one_rank: str) -> None:
    inputs = (randn(7, HIDDEN), W, randn(8, HIDDEN, seed=2), randn(8, seed=3))
    report = compare(stack(spelling, 2, 8, one_rank), *inputs, rule="allreduce_rms", ulps=8, coded=coded)
    assert report.fused == {"allreduce_rms": 2}


def test_allreduce_rms_without_residual_still_yields_the_sum(one_rank: str) -> None:
    def model(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        reduced = all_reduce(x, one_rank)
        return llama(reduced, None, weight)[0], reduced * 2

    report = compare(model, randn(7, HIDDEN), W, rule="allreduce_rms")
    assert [fusion.op for fusion in report.graphs[0].applied] == ["all_reduce_rms_norm"]


def test_composed_rules(one_rank: str) -> None:
    def padded(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = vllm(all_reduce(x, one_rank), residual, weight)
        return F.pad(y, (0, 32)), total, y.relu()

    inputs = (randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W)
    assert compare(padded, *inputs, rule="allreduce_rms_padding").fused == {"allreduce_rms_padding": 1}

    def quantized(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(all_reduce(x, one_rank), residual, weight)
        return quantize(y, scale), total

    scale = torch.tensor([0.02])
    assert compare(quantized, *inputs, scale, rule="allreduce_rms_quant").fused == {"allreduce_rms_quant": 1}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dynamic_scale", [False, True])
def test_norm_quant(residual: bool, dynamic_scale: bool) -> None:
    """Code is made of one of them."""

    def model(x: Tensor, r: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(x, r if residual else None, weight)
        return *(quantize_rows(y) if dynamic_scale else (quantize(y, scale),)), total * 2

    inputs = (randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W, torch.tensor([0.02]))
    assert compare(model, *inputs, rule="norm_quant", coded=residual and dynamic_scale).fused == {"norm_quant": 1}


@pytest.mark.parametrize("dynamic_scale", [False, True])
def test_act_quant(dynamic_scale: bool) -> None:
    def model(gate: Tensor, up: Tensor, scale: Tensor) -> Any:
        y = F.silu(gate) * up
        return quantize_rows(y) if dynamic_scale else quantize(y, scale)

    inputs = (randn(7, HIDDEN), randn(7, HIDDEN, seed=1), torch.tensor([0.02]))
    assert compare(model, *inputs, rule="act_quant", coded=dynamic_scale).fused == {"act_quant": 1}


def test_case_3_a_slice_behind_the_all_reduce_fuses(one_rank: str) -> None:
    """vLLM #28841."""

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return llama(all_reduce(x, one_rank)[..., :HIDDEN], residual, weight)

    report = compare(model, randn(7, 96), randn(7, HIDDEN, seed=1), W, rule="allreduce_rms", coded=False)
    assert report.fused == {"allreduce_rms": 1}


def test_case_4_reshapes_on_both_sides_fuse_with_any_batch(one_rank: str) -> None:
    """vLLM #48757, TensorRT-LLM #14781 and #14796: runs at two other batch sizes."""

    def reduced(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return llama(all_reduce(x.reshape(-1, HIDDEN), one_rank).reshape(x.shape), residual, weight)

    def padded(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(x, residual, weight)
        return F.pad(y.reshape(-1, HIDDEN), (0, 8)), total

    for function, rule in ((reduced, "allreduce_rms"), (padded, "act_padding")):
        reports: list[Report] = []
        torch._dynamo.reset()
        fused = fuseplan.compile(function, config=ALONE[rule], on_report=reports.append)
        for batch in (3, 4, 9):
            inputs = (randn(batch, 5, HIDDEN, seed=batch), randn(batch, 5, HIDDEN, seed=1), W)
            with torch.inference_mode():
                for left, right in zip(fused(*inputs), function(*inputs), strict=True):
                    torch.testing.assert_close(left, right, rtol=2**-7, atol=2**-7)
        assert [report.fused[rule] for report in reports] == [1] * len(reports)
        assert len(reports) <= 2, "static first, then one graph for every batch"


@functools.cache
def reduced_normed_and_padded(group: str) -> fx.Graph:
    """A graph that several rules have something to do with."""

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(all_reduce(x, group), residual, weight)
        return F.pad(y, (0, 8)), total

    return post_grad(model, randn(7, HIDDEN), randn(7, HIDDEN, seed=1), W)


@pytest.mark.parametrize("rule", sorted(ALONE))
def test_disabled_is_identity(rule: str, one_rank: str) -> None:
    graph, _ = copy_graph(reduced_normed_and_padded(one_rank))
    before = str(graph)
    (flags,) = {each.flags for each in BUILT_IN_RULES if each.name == rule}
    switched_off: dict[str, Any] = dict.fromkeys(flags, False)
    config = fuseplan.PassConfig(**switched_off, policy="off")
    manager = PostGradPassManager(config)
    assert rule not in manager.rules
    manager(graph)
    assert str(graph) == before


# Norms without a weight fuse as others do, bit for bit, with ones that are made once for all of them.


def unweighted(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)).type_as(x)


def test_with_an_all_reduce_a_pad_and_codes(one_rank: str) -> None:
    def model(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return unweighted(all_reduce(x, one_rank)), F.pad(unweighted(x.exp()), (0, 8)), quantize(unweighted(-x), scale)

    report, pairs = compiled_and_eager(
        model, randn(5, HIDDEN), torch.tensor([0.02]), policy="ordered(allreduce_rms, act_padding, norm_quant)"
    )
    for left, right in pairs:
        assert left.dtype is right.dtype
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    assert report.fused == {**dict.fromkeys(report.fused, 0), "allreduce_rms": 1, "act_padding": 1, "norm_quant": 1}
    # What the graph computes there was held against the op with this weight, not with a random one.
    assert [outcome.passed for graph in report.graphs for outcome in graph.verified] == [True] * 3


def test_the_ones_are_made_once_and_only_where_something_is_fused() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        return F.pad(unweighted(x), (0, 8)), F.pad(unweighted(x.relu()), (0, 8)), unweighted(x.sigmoid())

    for policy, made in (("ordered(act_padding)", 1), ("off", 0)):
        graph = post_grad(model, randn(5, HIDDEN))
        PostGradPassManager(fuseplan.PassConfig(policy=policy))(graph)
        assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)) == made
        graph.lint()
