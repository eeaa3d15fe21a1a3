"""Kernels that are wrong: the candidate goes, the plan is made again without it, the result stays right. What was
verified once is not verified again, and never believed of other hardware, versions or kernels.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.caching import fingerprint
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.dialect import ops
from fuseplan.providers import Provider
from fuseplan.record import GraphReport, Nearness, Reason, Refusal, Report, Verification
from fuseplan.rules import Rule
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES
from fuseplan.verification import outcomes
from tests import cached
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
    traced: fx.Graph, *providers: Provider, span: CompileRange = SPAN, rules: Sequence[Rule] = (AddNormRelu(),),
    **options: Any,
) -> tuple[fx.GraphModule, GraphReport]:  # fmt: skip
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    module = fx.GraphModule({}, graph)
    reports: list[Report] = []
    options.setdefault("verify_timeout_s", 0.5 if any("hangs" in each.name for each in providers) else 60.0)
    manager = PostGradPassManager(
        PassConfig(**options), compile_range=span, rules=rules, providers=providers, on_report=reports.append
    )
    manager(module.graph)
    module.recompile()
    (report,) = reports[0].graphs
    return module, report


def results(module: fx.GraphModule, rows: int) -> list[Tensor]:
    symbols = [node for node in module.graph.find_nodes(op="placeholder") if not isinstance(node.meta["val"], Tensor)]
    return list(module(*[rows] * len(symbols), *inputs(rows)))


def warning_of(report: GraphReport) -> Refusal:
    """What is said of a kernel that is wrong."""
    (found,) = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is None]
    return found


@pytest.mark.parametrize("kernel", FAULTS, ids=lambda kernel: str(kernel.__name__))
def test_a_wrong_kernel_is_not_applied_and_says_why(traced: fx.Graph, kernel: Kernel) -> None:
    module, report = fuse(traced, provider(kernel), span=LONG if kernel is wrong_above_4096 else SPAN)
    assert report.count(["add_norm_relu"]) == {"add_norm_relu": 0}
    (verified,) = report.verified
    assert not verified.passed
    warning = warning_of(report)
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


# Kernels that write to their arguments: what is cached is held against the reference, and all else stays.


def writes(*given: Any) -> Tensor:
    q_out, keys, values = ops.rope_cache.reference(*given)
    given[3].copy_(keys)
    given[4].copy_(values)
    return q_out  # type: ignore[no-any-return]


def at_the_start(*given: Any) -> Tensor:
    """It reads no positions."""
    return writes(*given[:7], torch.arange(given[2].shape[2]), given[8])


def keys_alone(*given: Any) -> Tensor:
    return writes(*given[:4], given[4].clone(), *given[5:])


def unrotated(*given: Any) -> Tensor:
    q_out = writes(*given)
    given[3][:, :, given[7]] = given[1]
    return q_out


def a_neighbour_too(*given: Any) -> Tensor:
    q_out = writes(*given)
    given[4][:, :, given[7] - 1] = given[2]
    return q_out


@pytest.mark.parametrize(
    ("kernel", "wrong"), [(writes, None), (at_the_start, 1), (keys_alone, 2), (unrotated, 1), (a_neighbour_too, 2)]
)
def test_what_is_written_is_held_against_the_reference(kernel: Kernel, wrong: int | None) -> None:
    traced = post_grad(cached.layer(), *cached.arguments())
    _, report = fuse(traced, provider(kernel, ops.rope_cache), rules=CACHED_ROTARY_RULES[:1], verify="always")
    assert [each.rule for each in report.applied] == ["rope_cache"] * (wrong is None)
    assert [each.passed for each in report.verified] == [wrong is None]
    if wrong is not None:
        assert re.search(rf"result {wrong}: element .* is .* where .* is exact", warning_of(report).detail)


# What was verified once.


class Calls:
    """How often a kernel ran. Data that a kernel names would be part of what the kernel is."""

    def __init__(self) -> None:
        self.count = 0


CALLS = Calls()


def counted(x: Tensor, *rest: Any) -> Any:
    CALLS.count += 1
    return reference(x, *rest)


@pytest.fixture(autouse=True)
def _uncounted() -> None:
    CALLS.count = 0


def test_a_second_compilation_runs_no_kernel(traced: fx.Graph) -> None:
    mine, wrong = provider(counted), provider(yields_nan)
    _, first = fuse(traced, mine)
    assert CALLS.count == 5
    _, second = fuse(traced, mine)
    assert CALLS.count == 5
    assert [each.from_cache for each in (*first.verified, *second.verified)] == [False, True]
    assert (first.verified[0].worst, first.verified[0].tokens) == (second.verified[0].worst, second.verified[0].tokens)
    fuse(traced, wrong)
    _, report = fuse(traced, wrong)
    assert (report.verified[0].from_cache, [*report.applied]) == (True, []), "what is wrong is remembered, too"


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (torch, "__version__", "99.0"), (fingerprint, "_local_devices", lambda: ["another GPU"]),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024"),
    ],
    ids=["torch", "gpu", "capability"],
)  # fmt: skip
def test_other_hardware_and_versions_are_another_question(
    traced: fx.Graph, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    mine = provider(counted)
    fuse(traced, mine)
    monkeypatch.setattr(where, name, value)
    _, report = fuse(traced, mine)
    assert not report.verified[0].from_cache


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"rule": 3}', b"[" * 40_000, b"x" * 2**17])
def test_a_broken_file_is_no_outcome(traced: fx.Graph, cold: Path, content: bytes) -> None:
    mine = provider(counted)
    fuse(traced, mine)
    (path,) = cold.glob("*.json")
    assert json.loads(path.read_text())["passed"] is True
    path.write_bytes(content)
    _, report = fuse(traced, mine)
    assert report.verified[0].passed
    assert not report.verified[0].from_cache
    assert CALLS.count == 10


def test_a_cache_that_cannot_be_written_to_fails_nothing(traced: fx.Graph, cold: Path) -> None:
    cold.parent.mkdir(parents=True)
    cold.write_text("a file where the folder should be")
    _, report = fuse(traced, provider(right))
    assert report.count(["add_norm_relu"]) == {"add_norm_relu": 1}
    outcomes.save("key", Verification(rule="r", op="o", provider="p", signature="s"))
    assert outcomes.load("key") is None
