"""Up to the first run nothing that goes wrong costs more than the fusions: the graph is as Inductor made it, and one
line says why.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.errors import FuseplanError, PlanError
from fuseplan.graph.surgery import copy_graph
from fuseplan.providers import provider_of
from fuseplan.record import GraphReport, Reason, Refusal, Report
from fuseplan.rules import Bindings
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.verification.fused_norm import AddNormRelu, add_norm_relu, provider, reference, right

WEIGHT = torch.ones(HIDDEN).bfloat16()


def model(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y, total = llama(x, residual, weight)
    other, last = llama(total, residual, weight)
    return torch.nn.functional.pad(y, (0, 64)).sum() + other.relu().sum() + last.sum()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return randn(5, HIDDEN), randn(5, HIDDEN, seed=1), WEIGHT


@pytest.fixture(scope="module")
def traced() -> fx.Graph:
    return post_grad(model, *inputs())


def fuse(traced: fx.Graph, **options: Any) -> tuple[fx.Graph, GraphReport]:
    graph = copy_graph(traced)[0]
    reports: list[Report] = []
    config = options.pop("config", PassConfig())
    manager = PostGradPassManager(config, on_report=reports.append, **options)
    manager(graph)
    return graph, reports[0].graphs[0]


def assert_left_alone(graph: fx.Graph, traced: fx.Graph, report: GraphReport, error: str) -> None:
    assert str(graph).replace(" ", "") == str(traced).replace(" ", "")
    graph.lint()
    for node, original in zip(graph.nodes, traced.nodes, strict=True):
        assert node.meta == original.meta
    assert not report.rewritten
    (refusal,) = report.refusals
    assert refusal.reason is Reason.FAULT
    assert error in refusal.detail
    assert "\n" not in refusal.detail


class Checked(AddNormRelu):
    """A rule whose check has a bug."""

    def check(self, m: Bindings) -> Refusal | None:
        raise KeyError("head_dim")


def accepts(m: Bindings) -> Refusal | None:
    raise AttributeError("no such\nattribute")


def careless(graph: fx.Graph) -> None:
    graph.erase_node(graph.output_node())
    raise LookupError("not mine")


def careless_in_torch(graph: fx.Graph) -> None:
    torch.broadcast_shapes((2,), (3,))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: {"rules": [*BUILT_IN_RULES, Checked()], "providers": [provider(right)]},
         "since check (test_unfused_on_faults.py:|raises KeyError: 'head_dim'"),
        (lambda: {"rules": [AddNormRelu()], "providers": [provider(right, accepts=accepts)]},
         "AttributeError: no such attribute"),
        (lambda: {"passes": [careless]}, "since careless (test_unfused_on_faults.py:"),
        (lambda: {"passes": [careless_in_torch]}, "since careless_in_torch (test_unfused_on_faults.py:"),
    ],
    ids=["a rule's check", "a provider's gate", "somebody's pass", "torch in somebody's pass"],
)  # fmt: skip
def test_what_others_brought_raises(traced: fx.Graph, make: Callable[[], dict[str, Any]], says: str) -> None:
    graph, report = fuse(traced, **make())
    for part in says.split("|"):
        assert_left_alone(graph, traced, report, part)


@pytest.mark.parametrize(
    "stage", ["canonicalize", "find_matches", "find_near_misses", "pose", "decide_planned", "apply"]
)
def test_a_stage_that_raises(traced: fx.Graph, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(f"a bug in {stage}")

    module = "chosen" if stage == "apply" else "manager"
    monkeypatch.setattr(f"fuseplan.compilation.{module}.{stage}", raises)
    graph, report = fuse(traced, rules=[AddNormRelu()], providers=[provider(right)])
    assert_left_alone(graph, traced, report, f"a bug in {stage}")


@pytest.mark.parametrize("settled", [0, 1])
def test_a_rewriting_that_breaks_off_half_way(traced: fx.Graph, settled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseplan.rewriting import apply

    original: Callable[..., None] = apply.__globals__["_Rewriter"]._settle
    calls: list[None] = []

    def breaks(self: Any, *arguments: Any) -> None:
        calls.append(None)
        if len(calls) > settled:
            raise RuntimeError("half way")
        original(self, *arguments)

    monkeypatch.setattr(apply.__globals__["_Rewriter"], "_settle", breaks)
    graph, report = fuse(traced, rules=[AddNormRelu()], providers=[provider(right)])
    assert_left_alone(graph, traced, report, "half way")


def test_what_the_user_asked_for_and_cannot_have_is_an_error(traced: fx.Graph) -> None:
    with pytest.raises(PlanError):
        fuse(traced, config=PassConfig(force=("act_padding",), forbid=("act_padding:torch",)))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_is_no_fault(
    traced: fx.Graph, interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*arguments: Any, **named: Any) -> Any:
        raise interrupt

    monkeypatch.setattr("fuseplan.compilation.manager.find_matches", raises)
    with pytest.raises(interrupt):
        fuse(traced)


def test_the_model_runs_and_one_line_says_why() -> None:
    torch._dynamo.reset()
    compiled = fuseplan.compile(model, rules=[Checked()], providers=[provider(right)])
    with torch.inference_mode(), pytest.warns(UserWarning, match="the graph is left unfused") as caught:
        actual = compiled(*inputs())
    assert len(caught) == 1
    torch.testing.assert_close(actual, model(*inputs()), rtol=2**-6, atol=1.0)
    assert not issubclass(KeyError, FuseplanError)


def test_after_the_first_run_an_error_is_an_error() -> None:
    """A kernel that fails when the model runs raises: nothing is computed another way behind the user's back."""
    broken: list[bool] = []

    def normed(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return llama(x, residual, weight)[0].relu()

    def breaks_later(*arguments: Any) -> Any:
        if broken:
            raise RuntimeError("the link is down")
        return reference(*arguments)

    torch._dynamo.reset()
    mine = provider_of("breaks_later", {add_norm_relu: breaks_later}, cost=0.0)
    reports: list[Report] = []
    compiled = fuseplan.compile(
        normed,
        rules=[AddNormRelu()], providers=[mine], on_report=reports.append,
    )  # fmt: skip
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*inputs())
        assert reports[0].fused["add_norm_relu"] == 1
        broken.append(True)
        with pytest.raises(RuntimeError, match="the link is down"):
            compiled(*inputs())
