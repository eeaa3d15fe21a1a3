"""Replacements of other people's passes: what isn't what it stands for isn't applied, and its owner can see why."""

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.matching import ExternalPass
from fuseplan.record import GraphReport, Reason, Report
from tests.helpers import HIDDEN, all_reduce, post_grad, randn
from tests.verification import others

SPAN = CompileRange(start=1, end=64)


def run(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], *passes: ExternalPass, dynamic: bool = True,
    span: CompileRange = SPAN, **options: Any,
) -> tuple[GraphReport, list[str]]:  # fmt: skip
    """The report of a graph, and what is called in it then; it computes what it did."""
    graph = post_grad(function, *inputs, dynamic=dynamic)
    reports: list[Report] = []
    PostGradPassManager(PassConfig(**options), compile_range=span, passes=passes, on_report=reports.append)(graph)
    (report,) = reports[0].graphs
    return report, [str(node.target) for node in graph.nodes if node.op == "call_function"]


def refusal(report: GraphReport) -> str:
    """What is told of the pass, once."""
    (verified,) = report.verified
    assert not verified.passed
    assert not report.applied
    (whole,) = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is None]
    assert verified.detail is not None
    assert verified.detail in whole.detail
    assert whole.fix == f"correct the pass, or forbid {verified.rule}"
    return whole.detail


def silu_quant(x: Tensor) -> Any:
    return others.group_quant(others.silu_mul(x), others.GROUP, True)


def norm_quant(x: Tensor, weight: Tensor, scale: Tensor) -> Any:
    return others.quant(others.rms_norm(x, weight, 1e-6), scale)


def add_relu(x: Tensor, y: Tensor) -> Any:
    return torch.relu(x + y) * 2.0


def reads_later(x: Tensor, y: Tensor) -> Any:
    shifted = y + 1.0
    return torch.relu(x + shifted) * shifted


ADDED = randn(5, HIDDEN, dtype=torch.float32), randn(5, HIDDEN, dtype=torch.float32, seed=1)


def test_case_51477_a_scale_format_that_is_dropped_is_named() -> None:
    report, called = run(silu_quant, (randn(5, 2 * HIDDEN),), others.silu_quant(others.drops_ue8m0))
    detail = refusal(report)
    assert "made_up.group_quant.default" in called
    assert detail.startswith(
        "silu_quant is not applied: the replacement of pass silu_quant failed verification at 1 tokens: "
    )
    assert re.search(r" tokens: result \d \(\w+\): element .* are wrong", detail)
    assert "it drops scale_ue8m0=True of made_up.group_quant (there it is False)" in detail
    assert f"made_up.group_quant(x: bfloat16[1, {HIDDEN}], group_size=32, scale_ue8m0=True)" in detail
    assert re.search(r"replacement drops_ue8m0 \(others\.py:\d+\)", detail)
    assert re.search(r"the largest differences from the graph's own are \S+ and \S+ of the value", detail)


def test_the_same_with_the_format_is_applied() -> None:
    report, called = run(silu_quant, (randn(5, 2 * HIDDEN),), others.silu_quant(others.keeps_ue8m0))
    (verified,) = report.verified
    assert (verified.passed, verified.tokens, verified.detail) == (True, (1, 5, 7, 33, 64), None)
    assert verified.worst is not None
    assert verified.worst <= 1
    assert "made_up.silu_mul_group_quant.default" in called
    assert (verified.rule, verified.provider) == ("silu_quant", "external")
    assert "silu_mul_group_quant" in verified.op
    assert (verified.transient, verified.from_cache, verified.ranks) == (False, False, 1)
    assert verified.time_ns > 0
    assert verified.signature == f"silu_quant(x:bfloat16[?x{2 * HIDDEN}])"


@pytest.mark.parametrize(
    ("fused", "says"),
    [
        (others.norm_quant_rounds, "it takes its argument weight, float32, for bfloat16: rounding it"),
        (others.norm_quant_reinterprets, "result 0 (quant): element"),
    ],
)
def test_case_48324_a_float32_weight_that_is_taken_for_bfloat16_is_caught(fused: Any, says: str) -> None:
    inputs = randn(5, HIDDEN), others.WEIGHT, others.SCALE
    report, called = run(norm_quant, inputs, others.norm_quant_pass(fused))
    assert says in refusal(report)
    assert "made_up.rms_norm.default" in called


def hangs(x: Tensor, y: Tensor) -> Tensor:
    time.sleep(3)
    return others.add_relu_eager(x, y)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (others.forgets_rows, r"at 1 tokens: result 0 \(relu\): element \[0, 0\] is nan where"),
        (others.raises, "at 1 tokens: it raises RuntimeError: no such tile"),
        (hangs, "it did not end within 0.2 s"),
        (None, "it raises NotImplementedError"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_wrong_replacement_is_not_applied(kernel: Any, says: str) -> None:
    timeout = 0.2 if kernel is hangs else 60.0
    report, called = run(reads_later, ADDED, others.add_relu(kernel), verify_timeout_s=timeout)
    assert re.search(says, detail := refusal(report)), detail
    assert "aten.relu.default" in called
    (verified,) = report.verified
    assert (verified.tokens, verified.transient) == ((1,), kernel is not others.forgets_rows)
    assert verified.time_ns > 0


def test_strides_that_the_fake_promises_and_somebody_sees_have_to_be_the_graphs() -> None:
    name = "turned_as_promised"
    others.op(f"{name}(Tensor x, Tensor y) -> Tensor", others.turned, others.turned)

    def returned(x: Tensor, y: Tensor) -> Any:
        return torch.relu(x + y)

    report, _ = run(returned, ADDED, others.add_relu(None, name))
    assert "and the graph's own value is float32" in refusal(report)
    report, _ = run(add_relu, ADDED, others.add_relu(None, name))
    assert report.count([name]) == {name: 0}, "a product lies as what it is computed of"


def test_what_can_not_be_run_here_is_applied_and_says_so() -> None:
    def in_the_engine_alone(x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise LookupError("no engine runs")
        return x + 1.0

    silu = others.op("silu_of_an_engine(Tensor x) -> Tensor", in_the_engine_alone, torch.empty_like)
    x = torch.empty(4, HIDDEN)
    external = others.replacing("doubled", lambda x: silu(x) * 2.0, lambda x: silu(x + x), x)
    report, called = run(lambda x: silu(x) * 2.0, ADDED[:1], external)
    (verified,) = report.verified
    assert verified.passed
    assert verified.detail is not None
    assert verified.detail.startswith("not verified: the region it replaces raises LookupError: no engine runs here")
    assert verified.tokens == ()
    assert "aten.mul.Tensor" not in called


def test_one_in_which_ranks_meet_is_applied_and_says_so() -> None:
    met = others.op("met(Tensor x, str group_name) -> Tensor", lambda x, _: x + x, lambda x, _: torch.empty_like(x))
    external = others.replacing("met", lambda x: torch.relu(x + 1.0), lambda x: met(x, "0"), ADDED[0])
    report, _ = run(lambda x: torch.relu(x + 1.0) * 2.0, ADDED[:1], external)
    assert report.count(["met"]) == {"met": 1}
    note = "not verified: made_up.met.default is a collective"
    assert [(each.detail, each.unverified) for each in report.verified] == [(note, True)]
    whole = Report(policy="planned", order=(), rules=("met",), graphs=(report,))
    assert note in " ".join(str(whole).split())


@pytest.mark.parametrize("is_right", [True, False])
def test_torchs_own_all_reduce_is_run_as_if_all_ranks_held_the_same(is_right: bool, one_rank: str) -> None:
    def kernel(x: Tensor, weight: Tensor, eps: float) -> Any:
        return others.rms_norm(x if is_right else x * 0.5, weight, 1e-6 if is_right else 1.0)

    def summed(x: Tensor, weight: Tensor) -> Any:
        return others.rms_norm(all_reduce(x, one_rank), weight, 1e-6)

    def replacement(x: Tensor, weight: Tensor) -> Any:
        return fused(all_reduce(x, one_rank), weight, 1e-6)

    schema = f"summed_{is_right}(Tensor x, Tensor weight, float eps) -> Tensor"
    fused = others.op(schema, kernel, lambda x, weight, eps: torch.empty_like(x))
    x, weight = randn(5, HIDDEN), others.WEIGHT.bfloat16()
    external = others.replacing("summed", summed, replacement, x, weight)
    report, called = run(lambda x, weight: summed(x, weight) * 2.0, (x, weight), external)
    (verified,) = report.verified
    assert not verified.unverified
    assert verified.passed is is_right
    assert report.count(["summed"]) == {"summed": int(is_right)}
    assert "_c10d_functional.all_reduce.default" in called
    if not is_right:
        assert "made_up.rms_norm.default" in called
        assert "failed verification at 1 tokens" in refusal(report)


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("policy", ["planned", "off", "ordered(norm_quant)"])
def test_what_is_chained_to_another_pass_is_verified_where_it_runs(policy: str, is_right: bool) -> None:
    """It matches what the first one puts in; without a plan nothing does, and the graph has the op itself."""

    def doubled(x: Tensor) -> Tensor:
        return others.add_relu_eager(x, x) if is_right else x

    schema = f"doubled_{policy[:3]}_{is_right}(Tensor x) -> Tensor"
    op = others.op(schema, doubled, torch.empty_like)
    inner = others.op(f"inner_{policy[:3]}_{is_right}(Tensor x) -> Tensor", torch.relu, torch.empty_like)
    first = others.replacing("first", lambda x: torch.relu(x + 1.0), lambda x: inner(x + 1.0), ADDED[0])
    second = others.replacing("second", lambda x: inner(x * 2.0), lambda x: op(x), ADDED[0])  # noqa: PLW0108
    report, called = run(
        lambda x, y: (torch.relu(x + 1.0), inner(y * 2.0)), ADDED, first, second, dynamic=False, policy=policy
    )
    checked = {each.rule: each.passed for each in report.verified}
    assert checked["second"] is is_right
    assert any("doubled" in each for each in called) is is_right
    told = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is None]
    assert [each.rule for each in told] == ([] if is_right else ["second"])
    failure = "second is not applied: the replacement of pass second failed verification"
    assert all(failure in each.detail for each in told)


@pytest.mark.parametrize("version", ["auto_functionalized", "auto_functionalized_v2"])
@pytest.mark.parametrize("rows", [0, 1])
def test_kernels_that_write_their_results_are_run_on_copies(version: str, rows: int) -> None:
    """As vLLM's: what is returned is written to an argument, under a higher-order op; one forgets the last row."""

    def into(result: Tensor, x: Tensor, y: Tensor) -> None:
        end = x.shape[0] - rows
        result[:end] = torch.relu(x[:end] + y[:end])

    name = f"into_{rows}"
    fused = others.op(f"{name}(Tensor! result, Tensor x, Tensor y) -> ()", into, lambda result, x, y: None)
    wrapper = getattr(torch.ops.higher_order, version)

    def replacement(x: Tensor, y: Tensor) -> Any:
        if version.endswith("v2"):
            return wrapper(fused, x=x, y=y, _result_base_index=0, _all_bases=[torch.empty_like(x)])[1]
        return wrapper(fused, result=torch.empty_like(x), x=x, y=y)[1]

    external = others.replacing(name, lambda x, y: torch.relu(x + y), replacement, *ADDED)
    report, _ = run(add_relu, ADDED, external)
    (verified,) = report.verified
    assert verified.passed is (rows == 0), verified.detail
    assert rows == 0 or "element [0, 0] is nan where" in refusal(report)
