"""Up to the first run nothing that goes wrong costs more than the fusions: the graph is as Inductor made it, and one
line says why.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.errors import PlanError
from fuseplan.graph.surgery import copy_graph
from fuseplan.record import Reason, Refusal, Report
from fuseplan.rewriting import apply
from fuseplan.rules import Bindings
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.verification.fused_norm import WEIGHT, AddNormRelu, provider, reference, right
from tests.verification.fused_norm import model as normed


def model(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y, total = llama(x, residual, weight)
    other, last = llama(total, residual, weight)
    return torch.nn.functional.pad(y, (0, 64)).sum() + other.relu().sum() + last.sum()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return randn(5, HIDDEN), randn(5, HIDDEN, seed=1), WEIGHT


@pytest.fixture(scope="module")
def traced() -> fx.Graph:
    return post_grad(model, *inputs())


def assert_left_alone(traced: fx.Graph, error: str, **options: Any) -> None:
    """That a graph is as it was after a pass with an error, which its report names."""
    graph, reports = copy_graph(traced)[0], list[Report]()
    PostGradPassManager(PassConfig(), on_report=reports.append, **options)(graph)
    assert str(graph).replace(" ", "") == str(traced).replace(" ", "")
    graph.lint()
    for node, original in zip(graph.nodes, traced.nodes, strict=True):
        assert node.meta == original.meta
    (report,) = reports[0].graphs
    assert not report.rewritten
    (refusal,) = report.refusals
    assert refusal.reason is Reason.FAULT
    assert re.search(error, refusal.detail)
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
         r"since check \(test_unfused_on_faults.py:.*raises KeyError: 'head_dim'"),
        (lambda: {"rules": [AddNormRelu()], "providers": [provider(right, accepts=accepts)]},
         "AttributeError: no such attribute"),
        (lambda: {"passes": [careless]}, r"since careless \(test_unfused_on_faults.py:"),
        (lambda: {"passes": [careless_in_torch]}, r"since careless_in_torch \(test_unfused_on_faults.py:"),
    ],
    ids=["a rule's check", "a provider's gate", "somebody's pass", "torch in somebody's pass"],
)  # fmt: skip
def test_what_others_brought_raises(traced: fx.Graph, make: Callable[[], dict[str, Any]], says: str) -> None:
    assert_left_alone(traced, says, **make())


@pytest.mark.parametrize(
    "stage",
    ["manager.canonicalize", "manager.find_matches", "manager.find_near_misses", "manager.pose",
     "manager.decide_planned", "chosen.apply"],
)  # fmt: skip
def test_a_stage_that_raises(traced: fx.Graph, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(f"a bug in {stage}")

    monkeypatch.setattr(f"fuseplan.compilation.{stage}", raises)
    assert_left_alone(traced, f"a bug in {stage}", rules=[AddNormRelu()], providers=[provider(right)])


def test_a_rewriting_that_breaks_off_half_way(traced: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    rewriter = apply.__globals__["_Rewriter"]
    settle, calls = rewriter._settle, list[None]()

    def breaks(self: Any, *arguments: Any) -> None:
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("half way")
        settle(self, *arguments)

    monkeypatch.setattr(rewriter, "_settle", breaks)
    assert_left_alone(traced, "half way", rules=[AddNormRelu()], providers=[provider(right)])


def test_what_the_user_asked_for_and_cannot_have_is_an_error(traced: fx.Graph) -> None:
    config = PassConfig(force=("act_padding",), forbid=("act_padding:torch",))
    with pytest.raises(PlanError):
        PostGradPassManager(config)(copy_graph(traced)[0])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_is_no_fault(
    traced: fx.Graph, interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuseplan.compilation.manager.find_matches", mock.Mock(side_effect=interrupt))
    with pytest.raises(interrupt):
        PostGradPassManager(PassConfig())(copy_graph(traced)[0])


def test_the_model_runs_and_one_line_says_why() -> None:
    torch._dynamo.reset()
    compiled = fuseplan.compile(model, rules=[Checked()], providers=[provider(right)])
    with torch.inference_mode(), pytest.warns(UserWarning, match="the graph is left unfused") as caught:
        actual = compiled(*inputs())
    assert len(caught) == 1
    torch.testing.assert_close(actual, model(*inputs()), rtol=2**-6, atol=1.0)


def test_after_the_first_run_an_error_is_an_error() -> None:
    """A kernel that fails when the model runs raises: nothing is computed another way behind the user's back."""
    broken, reports = list[bool](), list[Report]()

    def breaks_later(*arguments: Any) -> Any:
        if broken:
            raise RuntimeError("the link is down")
        return reference(*arguments)

    torch._dynamo.reset()
    mine = provider(breaks_later)
    compiled = fuseplan.compile(normed, rules=[AddNormRelu()], providers=[mine], on_report=reports.append)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*inputs())
        assert reports[0].fused["add_norm_relu"] == 1
        broken.append(True)
        with pytest.raises(RuntimeError, match="the link is down"):
            compiled(*inputs())
