"""Kernels that are wrong: the candidate goes, the plan is made again without it, the result stays right."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.providers import Provider
from fuseplan.record import GraphReport, Nearness, Reason, Report
from tests.helpers import HIDDEN, post_grad, randn
from tests.verification.fused_norm import (
    FAULTS,
    WEIGHT,
    AddNormRelu,
    Kernel,
    model,
    provider,
    raises,
    reference,
    right,
    wrong_above_4096,
    yields_nan,
)

SPAN, LONG = CompileRange(start=1, end=64), CompileRange(start=1, end=8192)


@pytest.fixture(scope="module")
def traced() -> fx.Graph:
    return post_grad(model, *inputs(5), dynamic=True)


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(rows, HIDDEN), randn(rows, HIDDEN, seed=1), WEIGHT


def fuse(
    traced: fx.Graph, *providers: Provider, span: CompileRange = SPAN, **options: Any
) -> tuple[fx.GraphModule, GraphReport]:
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    module = fx.GraphModule({}, graph)
    reports: list[Report] = []
    options.setdefault("verify_timeout_s", 0.5 if any("hangs" in each.name for each in providers) else 60.0)
    manager = PostGradPassManager(
        PassConfig(**options), compile_range=span, rules=[AddNormRelu()], providers=providers, on_report=reports.append
    )
    manager(module.graph)
    module.recompile()
    (report,) = reports[0].graphs
    return module, report


def results(module: fx.GraphModule, rows: int) -> list[Tensor]:
    symbols = [node for node in module.graph.find_nodes(op="placeholder") if not isinstance(node.meta["val"], Tensor)]
    return list(module(*[rows] * len(symbols), *inputs(rows)))


@pytest.mark.parametrize("kernel", FAULTS, ids=lambda kernel: str(kernel.__name__))
def test_a_wrong_kernel_is_not_applied_and_says_why(traced: fx.Graph, kernel: Kernel) -> None:
    module, report = fuse(traced, provider(kernel), span=LONG if kernel is wrong_above_4096 else SPAN)
    assert report.count(["add_norm_relu"]) == {"add_norm_relu": 0}
    (verified,) = report.verified
    assert not verified.passed
    (warning,) = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is None]
    place = [each for each in report.refusals if each.nearness is Nearness.REFUSED and each.op == "fused_add_rms_norm"]
    assert [each.reason for each in place] == [Reason.VERIFICATION]
    assert "\n" not in warning.detail
    assert re.search(FAULTS[kernel], warning.detail), warning.detail
    for actual, expected in zip(results(module, 5), model(*inputs(5)), strict=True):
        assert torch.equal(actual, expected)


def test_a_right_kernel_is_applied_and_runs(traced: fx.Graph) -> None:
    module, report = fuse(traced, provider(right))
    assert report.count(["add_norm_relu"]) == {"add_norm_relu": 1}
    (verified,) = report.verified
    assert verified.passed
    assert verified.tokens == (1, 5, 7, 33, 64)
    assert verified.worst is not None
    assert 0 < verified.worst <= 1
    for actual, expected in zip(results(module, 5), model(*inputs(5)), strict=True):
        assert torch.equal(actual, expected)


def test_another_provider_takes_the_place(traced: fx.Graph) -> None:
    wrong, sound = provider(yields_nan), provider(right)
    _, report = fuse(traced, wrong, sound, force=[f"add_norm_relu:{wrong.name}"])
    assert [fusion.provider for fusion in report.applied] == [sound.name]
    assert [(each.provider, each.passed) for each in report.verified] == [(wrong.name, False), (sound.name, True)]
    (place,) = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is not None]
    assert place.nearness is Nearness.DECLINED
    assert not report.lost


def test_case_8_vllm_57681_wrong_above_a_size_is_refused_in_the_ranges_that_reach_it(traced: fx.Graph) -> None:
    for span, fused in ((CompileRange(start=1, end=4096), 1), (CompileRange(start=4097, end=8192), 0)):
        _, report = fuse(traced, provider(wrong_above_4096), span=span)
        assert report.count(["add_norm_relu"]) == {"add_norm_relu": fused}


@pytest.mark.parametrize(
    "options", [{"policy": "planned"}, {"policy": "ordered(add_norm_relu)"}, {"force": ["add_norm_relu"]}], ids=str
)
def test_every_policy_is_verified(traced: fx.Graph, options: dict[str, Any]) -> None:
    _, report = fuse(traced, provider(raises), **options)
    assert ([*report.applied], [*report.lost]) == ([], [])


def test_off_verifies_nothing(traced: fx.Graph) -> None:
    _, report = fuse(traced, provider(raises), verify="off")
    assert report.count(["add_norm_relu"]) == {"add_norm_relu": 1}
    assert report.verified == ()


@pytest.mark.usefixtures("by_code_at_night")
def test_one_line_says_it_to_the_user_of_compile() -> None:
    torch._dynamo.reset()
    wrong = provider(yields_nan)
    compiled = fuseplan.compile(model, rules=[AddNormRelu()], providers=[wrong])
    with torch.inference_mode(), pytest.warns(UserWarning, match="failed verification") as caught:
        actual = compiled(*inputs(3))
    (warning,) = [str(each.message) for each in caught]
    assert warning.startswith(
        f"add_norm_relu is not applied: {wrong.name}'s add_norm_relu failed verification at 3 tokens"
    )
    assert warning.endswith(f"forbid add_norm_relu:{wrong.name}")
    assert not actual[0].isnan().any()


def gemma(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = (total := x + residual).float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (normed * (1.0 + weight.float())).type_as(x).relu(), total


def test_a_weight_with_one_added_is_no_other_rounding() -> None:
    """A kernel that multiplies by the weight may round elsewhere, with leave, but not stand for 1 + weight."""
    mine = provider(right)
    offers = {"add_norm_relu": replace(mine.implements["add_norm_relu"], roundings=frozenset({"llama", "fp32"}))}
    _, report = fuse(post_grad(gemma, *inputs(3)), replace(mine, implements=offers), allow_rounding_changes=True)
    assert not report.applied
    assert not report.verified
    assert any(refusal.reason is Reason.ROUNDING for refusal in report.refusals)


def test_a_kernel_that_rounds_elsewhere_with_leave_is_held_against_the_graph(traced: fx.Graph) -> None:
    def precise(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str) -> Any:
        assert rounding == "fp32"
        return reference(x, residual, weight, eps, rounding)

    mine = provider(precise)
    offers = {"add_norm_relu": replace(mine.implements["add_norm_relu"], roundings=frozenset({"fp32"}))}
    _, report = fuse(traced, replace(mine, implements=offers), allow_rounding_changes=True)
    assert [fusion.rounding_change for fusion in report.applied] == [("llama", "fp32")]
    assert [outcome.passed for outcome in report.verified] == [True]
