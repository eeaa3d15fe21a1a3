"""What ranks settle on is what runs, and what the report says. Two processes settle in `tests/distributed`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fuseplan.compilation import first_run
from fuseplan.compilation.first_run import AgreedGraph, digest_of, groups_of, pending_in, settled, verify_pending
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.devices.known import device_profile
from fuseplan.distributed import Agreement
from fuseplan.errors import CollectiveError
from fuseplan.record import Fusion, GraphReport, Pending, Reason, Report, Verification
from tests.helpers import all_reduce, quickly_traced, randn

PENDING = Pending(rule="r", op="o", ops="o", provider="p", signature="s", group="0", cases=())
OTHER = dataclasses.replace(PENDING, signature="another")
FUSION = Fusion(rule="r", op="o", provider="p", anchor="n", consumed=("n",), contested_op="rms_norm", site="n")
RIGHT = Verification(rule="r", op="o", provider="p", signature="s", ranks=2)
WRONG = dataclasses.replace(RIGHT, rule="w", passed=False, detail="rank 1 found r by p wrong at 7 tokens")


def graph(*pending: Pending, **more: Any) -> GraphReport:
    return GraphReport(graph="g", applied=(FUSION,), rewritten=True, pending=pending, **more)


def report(*graphs: GraphReport) -> Report:
    return Report(policy="planned", order=(), rules=(), graphs=graphs)


def agreed(outcomes: list[Agreement | CollectiveError], told: list[Agreement]) -> AgreedGraph:
    """A graph whose ranks come to a verdict, or to none; they are asked once an outcome."""

    def settle() -> Agreement:
        outcome = outcomes.pop()
        if isinstance(outcome, CollectiveError):
            raise outcome
        return outcome

    return AgreedGraph(
        lambda x: ("fused", x), lambda: lambda x: ("unfused", x), lambda why: lambda x: (why, x), settle, told.append
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "runs", "is_told"),
    [
        (Agreement(fused=True), "fused", False),
        (Agreement(fused=True, verified=(RIGHT,)), "fused", True),
        (Agreement(fused=False, reason="they differ"), "unfused", True),
        (Agreement(fused=False, reason="far", apart=True), "far", True),
        (Agreement(fused=False, apart=True), "", True),
    ],
)
def test_all_calls_run_what_the_first_one_settled(verdict: Agreement, runs: str, is_told: bool) -> None:
    told: list[Agreement] = []
    run = agreed([verdict], told)
    assert [run(1), run(2)] == [(runs, 1), (runs, 2)]
    assert told == [verdict] * is_told


def test_a_graph_whose_ranks_parted_raises_at_every_call() -> None:
    """The other ranks wait for this one at its first run: it never comes."""
    told: list[Agreement] = []
    run = agreed([CollectiveError("a rank is left in a kernel")], told)
    for _ in range(2):
        with pytest.raises(CollectiveError, match="left in a kernel"):
            run(1)
    assert not told


def test_groups_and_what_is_pending_are_named_once_each() -> None:
    found = report(graph(PENDING, OTHER, groups=("0", "1")), graph(OTHER, groups=("1", "2")))
    assert groups_of(found) == ("0", "1", "2")
    assert pending_in([found, found]) == (PENDING, OTHER)


def test_what_ranks_have_to_agree_on_tells_plans_apart() -> None:
    found = [
        report(graph(digest="a"), graph(digest="b")), report(graph(digest="b"), graph(digest="a")),
        report(graph(PENDING, digest="a"), graph(digest="b")), report(graph(digest="a")), report(), None,
    ]  # fmt: skip
    assert len({digest_of(each) for each in found}) == len(found)
    assert digest_of(found[0]) == digest_of(report(graph(digest="a", range=(1, 2)), graph(digest="b")))


class Asked:
    """The other ranks, who agree to all, and what they are told."""

    def __init__(self, *verdicts: Agreement) -> None:
        self.verdicts, self.heard = [*verdicts], list[dict[str, Any]]()

    def __call__(self, *names: Any, **said: Any) -> Agreement:
        self.heard.append(said)
        return self.verdicts.pop(0) if self.verdicts else Agreement(fused=True)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pending, ...]]:
    """What was verified, with two meetings for each, all of it right but what is called another."""
    found: list[tuple[Pending, ...]] = []

    def verify(
        pending: tuple[Pending, ...], rules: object, meet: Callable[[str, str], Agreement], seconds: float
    ) -> Any:
        found.append(pending)
        assert seconds == 7
        for said in ("ready", "done"):
            meet(said, "did not come")
        return [WRONG if each is OTHER else RIGHT for each in pending]

    monkeypatch.setattr(first_run, "verify_together", verify)
    return found


CONFIG = PassConfig(verify_timeout_s=7, agreement_timeout_s=3)


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("pending", [(PENDING,), (PENDING, OTHER)])
def test_what_is_pending_decides(pending: tuple[Pending, ...]) -> None:
    asked = Asked()
    verdict = verify_pending(pending, (), asked, "name", CONFIG)
    outcomes = (RIGHT, WRONG)[: len(pending)]
    assert verdict == Agreement(fused=OTHER not in pending, reason=outcomes[-1].detail, verified=outcomes)
    common = {"work_s": 7, "awaited": "did not come"}
    assert asked.heard == [
        {"graph": "name-0", "digest": "ready", **common}, {"graph": "name-1", "digest": "done", **common},
    ]  # fmt: skip


def settle(found: Report, *verdicts: Agreement, module: fx.GraphModule | None = None) -> tuple[Agreement, Asked]:
    asked = Asked(*verdicts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(first_run, "agree_in_groups", asked)
        patched.setattr(first_run, "prepare", lambda wanted: "132 processors")
        return first_run.settle(module or fx.GraphModule({}, fx.Graph()), found, "digest", CONFIG, ()), asked


def test_ranks_that_agree_verify_what_is_pending(verified: list[tuple[Pending, ...]]) -> None:
    verdict, asked = settle(report(graph(PENDING, PENDING, groups=("0",))))
    assert (verdict.fused, verdict.verified, verified) == (True, (RIGHT,), [(PENDING,)])
    assert [said["digest"] for said in asked.heard] == ["digest", "ready", "done"]
    assert ({said["deadline_s"] for said in asked.heard}, len({said["graph"] for said in asked.heard})) == ({3}, 3)


WORKSPACES = (("0", "bfloat16", "cpu"),)


@pytest.mark.parametrize("agreements", [0, 1])
def test_ranks_that_differ_verify_nothing(verified: list[tuple[Pending, ...]], agreements: int) -> None:
    """In their plans, or in what they share."""
    differ = Agreement(fused=False, reason="they differ")
    found = report(graph(PENDING, groups=("0",), workspaces=WORKSPACES))
    verdict, asked = settle(found, *[Agreement(fused=True)] * agreements, differ)
    assert verdict == differ
    assert [said["digest"] for said in asked.heard] == ["digest", "digest 132 processors"][: agreements + 1]
    assert not verified


def test_graphs_are_told_apart_by_their_ops() -> None:
    """Not by what ranks name otherwise."""

    def name_of(*ops: Callable[..., Any], prefix: str) -> str:
        made = fx.Graph()
        value = made.placeholder(prefix)
        for op in ops:
            value = made.call_function(op, (value,))
        made.output(value)
        return str(settle(report(), module=fx.GraphModule({}, made))[1].heard[0]["graph"])

    assert name_of(torch.relu, torch.tanh, prefix="x") == name_of(torch.relu, torch.tanh, prefix="y")
    assert name_of(torch.relu, torch.tanh, prefix="x") != name_of(torch.tanh, torch.relu, prefix="x")


def test_what_was_verified_is_reported_with_the_graphs_that_have_it() -> None:
    before = report(graph(PENDING, verified=(WRONG,)), graph(OTHER), graph())
    after = settled(before, Agreement(fused=True, verified=(RIGHT,)))
    assert [each.verified for each in after.graphs] == [(WRONG, RIGHT), (), ()]
    assert [(each.pending, each.applied, each.rewritten) for each in after.graphs] == [((), (FUSION,), True)] * 3
    assert not after.warnings


@pytest.mark.parametrize(
    ("verdict", "reason", "detail", "fix"),
    [
        (Agreement(fused=False, reason="they differ"), Reason.RANKS, "run unfused on all ranks", "give all ranks one"),
        (Agreement(fused=False, reason="far", apart=True), Reason.RANKS, "is planned again without", "forbid those"),
        (
            Agreement(fused=False, reason="rank 1 found it wrong", verified=(RIGHT, RIGHT, WRONG)), Reason.VERIFICATION,
            "run unfused on all ranks of its group: rank 1 found it wrong", "or forbid w:p",
        ),
    ],
)  # fmt: skip
def test_a_graph_that_is_run_unfused_says_why(verdict: Agreement, reason: Reason, detail: str, fix: str) -> None:
    after = settled(report(graph(PENDING), graph()), verdict)
    (warning,) = after.warnings
    assert [(each.applied, each.lost, each.rewritten, each.refusals) for each in after.graphs] == [
        ((), (), False, (warning,))
    ] * 2
    assert warning.reason is reason
    assert detail in warning.detail
    assert fix in (warning.fix or "")
    assert (warning.rule, warning.provider) == (("w", "p") if verdict.verified else (None, None))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [({}, True), ({"is_biased": True}, True), ({"eps": 1e-6}, False), ({"is_fused": False}, False)],
)
def test_ranks_agree_on_collectives_and_on_which_others_there_are(
    change: dict[str, Any], is_same: bool, four_ranks: str
) -> None:
    """A layer whose parts are summed over the ranks has its bias on one of them alone."""

    def planned(*, is_biased: bool = False, eps: float = 1e-5, is_fused: bool = True) -> GraphReport:
        def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            part = F.linear(x, weight, bias if is_biased else None)
            total = all_reduce(part, four_ranks) + residual
            return F.rms_norm(total, (total.shape[-1],), norm, eps), total

        inputs = randn(3, 128), randn(64, 128), randn(64), randn(3, 64), randn(64)
        config = PassConfig(verify="off", **{"force" if is_fused else "forbid": ("skinny_linear",)})  # type: ignore[arg-type]
        reports: list[Report] = []
        manager = PostGradPassManager(config, device=device_profile("h200"), on_report=reports.append)
        manager(quickly_traced(layer, *inputs))
        assert {"allreduce_rms", *["skinny_linear"] * is_fused} == {each.rule for each in reports[-1].graphs[0].applied}
        return reports[-1].graphs[0]

    assert (planned().digest == planned(**change).digest) is is_same
