"""Collective kernels: what is left to all ranks, what is kept of it, and how they part. Two processes verify
some together in `tests/distributed`.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

from fuseplan.compilation.first_run import digest_of
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.dialect import ops
from fuseplan.distributed import Agreement
from fuseplan.errors import CollectiveError
from fuseplan.providers import Provider, provider_of
from fuseplan.record import GraphReport, Nearness, Pending, PendingCase, Report, Verification, from_json, to_json
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification import together, verifier, verify_together
from fuseplan.verification.check import CheckResult
from tests.helpers import HIDDEN, all_reduce, llama, post_grad, randn
from tests.providers.stand_ins import ranks
from tests.verification.made import spec

OP = ops.all_reduce_fused_add_rms_norm


def kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    raise AssertionError("nobody runs it alone")


APART = provider_of("apart", {OP: kernel}, cost=0.0)


@pytest.fixture
def graph() -> Iterator[fx.Graph]:
    """A group of two ranks, the other of which doesn't exist."""
    with ranks(2) as group:

        def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return llama(all_reduce(x, group), residual, weight)

        yield post_grad(model, randn(5, HIDDEN), randn(5, HIDDEN), randn(HIDDEN), dynamic=True)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does."""
    monkeypatch.setattr(verifier, "STAND_IN", "another")


def decided(graph: fx.Graph, provider: Provider = APART, **arguments: Any) -> GraphReport:
    config = PassConfig(force=("allreduce_rms",), verify=arguments.pop("verify", "first-use"))
    span = CompileRange(start=1, end=64)
    manager = PostGradPassManager(config, compile_range=span, providers=[provider], **arguments)
    analysis = manager.analyze(graph)
    analysis, decision, verified = manager.decide_verified(analysis, "graph_0")
    return manager.report("graph_0", analysis, decision, rewritten=True, verified=verified)


@pytest.mark.usefixtures("others")
def test_what_one_rank_can_not_verify_is_left_to_all_without_the_size_that_was_traced(graph: fx.Graph) -> None:
    report = decided(graph, settles=True)
    (pending,) = report.pending
    assert not report.verified
    assert [case.tokens for case in pending.cases] == [1, 7, 33, 64]
    assert len(report.applied) == 1
    assert not decided(graph, settles=True, verify="off").pending
    assert not decided(graph, dataclasses.replace(APART, name="torch"), settles=True).pending


@pytest.mark.usefixtures("graph", "others")
def test_each_group_verifies_for_itself() -> None:
    world, other = dist.group.WORLD, dist.new_group([0, 1])
    assert world is not None

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(all_reduce(x, world.group_name), residual, weight)
        y, total = llama(all_reduce(y.relu(), other.group_name), total, weight)
        y, total = llama(all_reduce(y.relu(), other.group_name), total, weight)
        return y, total

    inputs = randn(5, HIDDEN), randn(5, HIDDEN), randn(HIDDEN)
    report = decided(post_grad(model, *inputs, dynamic=True), settles=True)
    assert len(report.applied) == 3
    assert [pending.group for pending in report.pending] == [world.group_name, other.group_name]


@pytest.mark.parametrize("settles", [False, True])
def test_where_no_other_rank_settles_it_is_refused(graph: fx.Graph, settles: bool) -> None:
    """Without a first run to wait before, or in a group of torch's `fake` backend."""
    report = decided(graph, settles=settles)
    assert not report.pending
    assert not report.applied
    (refusal,) = [each for each in report.refusals if each.nearness is Nearness.REFUSED]
    assert refusal.detail.endswith(
        "its kernel is collective, and ranks verify it together only under fuseplan.compile and in vLLM"
    )
    assert refusal.fix == "forbid allreduce_rms:apart"


def test_what_is_kept_comes_back() -> None:
    weight = spec(8, dtype=torch.bfloat16, stride=(2,), off=6, device="meta")
    arguments = {
        "weight": weight, "same": dataclasses.replace(weight, same_as="weight"), "dtype": torch.float8_e4m3fn,
        "right": 8, "eps": 1e-6, "nothing": None,
    }  # fmt: skip
    fills = {1: 1.0, 0.25: 0.25, float("inf"): None}
    case = PendingCase(tokens=1, arguments=together._kept({
        **arguments, **{str(fill): dataclasses.replace(weight, fill=fill) for fill in fills},
    }))  # fmt: skip
    again = from_json(PendingCase, json.loads(json.dumps(to_json(case))))
    constants = {str(fill): dataclasses.replace(weight, fill=kept) for fill, kept in fills.items()}
    assert together._arguments(again.arguments) == {**arguments, **constants}


@pytest.mark.usefixtures("others")
def test_ranks_agree_on_what_they_verify_whatever_they_call_it(graph: fx.Graph) -> None:
    def digest(pending: Pending) -> str:
        found = GraphReport(graph="graph_0", digest="d", pending=(pending,))
        return digest_of(Report(policy="planned", order=(), rules=(), graphs=(found,)))

    (pending,) = decided(graph, settles=True).pending
    renamed = json.loads(json.dumps(to_json(pending)).replace('"cpu"', '"cuda:1"').replace('\\"0\\"', '\\"7\\"'))
    elsewhere = dataclasses.replace(from_json(Pending, renamed), group="7")
    assert elsewhere.cases != pending.cases
    assert digest(elsewhere) == digest(pending)
    assert digest(dataclasses.replace(pending, cases=pending.cases[1:])) != digest(pending)


@pytest.mark.usefixtures("others")
def test_nothing_is_verified_while_a_graph_is_captured_and_who_is_left_behind_is_an_error(
    graph: fx.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = decided(graph, settles=True).pending
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    heard: list[str] = []

    def meet(said: str, awaited: str) -> Agreement:
        heard.append(said)
        return Agreement(fused=False, reason="rank 0 captures a graph")

    (outcome,) = verify_together(pending, BUILT_IN_RULES, meet, 60)
    assert (outcome.passed, outcome.detail, outcome.tokens) == (False, "rank 0 captures a graph", ())
    assert heard == [
        "failed: captures a graph, before which allreduce_rms by apart has to be verified: run the model once before"
    ]

    def lost(said: str, awaited: str) -> Agreement:
        return Agreement(fused=False, reason="rank 1 is left in it", lost=True)

    with pytest.raises(CollectiveError, match=r"rank 1 is left in it; .* or forbid allreduce_rms:apart"):
        verify_together(pending, BUILT_IN_RULES, lost, 60)


class Ranks:
    """One of two ranks, whose other one goes on until it says otherwise, with a kernel of its own.

    Attributes:
        steps: what was done, in order.
    """

    def __init__(self, **kernel: Any) -> None:
        self.kernel, self.steps = kernel, list[str]()

    def trial(self, pending: Pending, kept: PendingCase, rules: object, rank: int) -> Any:
        assert rank == 0

        def step(name: str) -> Any:
            self.steps.append(f"{name} {kept.tokens}")
            does = self.kernel.get(f"{name}_{kept.tokens}")
            return does() if callable(does) else does

        return SimpleNamespace(**{name: partial(step, name) for name in ("draw", "expect", "run")})

    def meet(self, said: str, awaited: str) -> Agreement:
        assert awaited == "did not come to verify r by p"
        self.steps.append(said)
        return Agreement(fused=said == "ready", reason=None if said == "ready" else f"rank 0 {said}")

    def verify(self, count: int, group: str, seconds: float = 60) -> list[Verification]:
        cases = tuple(PendingCase(tokens=tokens, arguments=()) for tokens in (1, 7))
        pending = [
            Pending(rule="r", op="o", ops="", provider="p", signature=str(number), group=group, cases=cases)
            for number in range(count)
        ]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(together, "_trial", self.trial)
            return verify_together(pending, (), self.meet, seconds)


ALONE, AGAIN = (
    [f"draw {tokens}", "ready", f"expect {tokens}", "ready", f"run {tokens}"] for tokens in (1, 7)
)  # fmt: skip
RIGHT = CheckResult(wrong=None, worst=0.5)


def test_ranks_meet_before_each_step_in_which_they_wait_for_each_other(one_rank: str) -> None:
    ranks = Ranks(run_1=RIGHT, run_7=CheckResult(wrong=None, worst=0.25))
    first, second = ranks.verify(2, one_rank)
    assert (first.passed, first.detail, first.worst, first.tokens, first.ranks) == (True, None, 0.5, (1, 7), 1)
    assert (first.signature, second.signature, second.passed) == ("0", "1", True)
    assert ranks.steps == 2 * [*ALONE, *AGAIN, "ready"]
    assert 0 < first.time_ns < 60e9


@pytest.mark.parametrize(
    ("kernel", "steps", "why", "tokens"),
    [
        ({"run_1": CheckResult(wrong="it is 3", worst=4.0)}, ALONE, "it is 3", (1,)),
        ({"run_1": lambda: 1 / 0}, ALONE, "the kernel raises ZeroDivisionError: division by zero", (1,)),
        ({"expect_1": lambda: 1 / 0}, ALONE[:3], "the kernel raises ZeroDivisionError: division by zero", ()),
        ({"draw_1": lambda: 1 / 0}, ALONE[:1], "the kernel raises ZeroDivisionError: division by zero", ()),
        ({"run_1": RIGHT, "run_7": CheckResult(wrong="it is 3")}, [*ALONE, *AGAIN], "it is 3", (1, 7)),
    ],
)
def test_what_one_rank_finds_wrong_ends_the_verification_of_all(
    one_rank: str, kernel: dict[str, Any], steps: list[str], why: str, tokens: tuple[int, ...]
) -> None:
    """At their next meeting, and nothing else is verified."""
    ranks = Ranks(**kernel)
    (outcome,) = ranks.verify(2, one_rank)
    said = f"failed: found r by p wrong at {tokens[-1] if tokens else 1} tokens: {why}"
    assert ranks.steps == [*steps, said]
    assert (outcome.passed, outcome.detail, outcome.worst, outcome.tokens) == (False, f"rank 0 {said}", None, tokens)


def test_a_rank_that_is_late_says_that_it_is_lost(one_rank: str) -> None:
    ranks = Ranks(run_1=lambda: time.sleep(1))
    ranks.verify(1, one_rank, seconds=0.05)
    said = "lost: is left in the verification of r by p at 1 tokens: the kernel did not end within 0.05 s"
    assert ranks.steps == [*ALONE, said]
