"""A torch that scopes custom passes, as pytorch #184019 proposes it: passes given as options become those of a context,
which may not be entered while something else stands in the hook. A stand-in behaves so; no release of torch does.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import compile_fx, custom_graph_pass
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import fuseplan
from fuseplan.record import Report
from tests.helpers import randn

HOOK = "post_grad_custom_post_pass"
ACTIVE: ContextVar[tuple[Sequence[Any], ...]] = ContextVar("ACTIVE", default=())


class OfContexts(CustomGraphPass):
    """What stands in the hook for the passes of all contexts, the innermost ones first."""

    __module__ = custom_graph_pass.__name__

    def __call__(self, graph: fx.Graph) -> None:
        for passes in reversed(ACTIVE.get()):
            for each in passes:
                each(graph)

    def uuid(self) -> None:
        return None


@contextmanager
def custom_pass_context(*, post_grad_post_passes: Sequence[Any] = ()) -> Iterator[None]:
    standing = getattr(inductor_config, HOOK)
    if standing is not None and not isinstance(standing, OfContexts):
        raise RuntimeError(f"custom_pass_context cannot be used while torch._inductor.config.{HOOK} is set")
    token = ACTIVE.set((*ACTIVE.get(), post_grad_post_passes))
    try:
        with inductor_config.patch({HOOK: OfContexts()} if post_grad_post_passes or standing else {}):
            yield
    finally:
        ACTIVE.reset(token)


@pytest.fixture(autouse=True)
def scoping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor takes custom passes out of its options."""
    compiled: Callable[..., Any] = compile_fx.compile_fx

    @functools.wraps(compiled)
    def compile_in_context(*args: Any, config_patches: Any = None, **kwargs: Any) -> Any:
        patches = dict(config_patches or {})
        given = patches.pop(HOOK, None)
        with custom_pass_context(post_grad_post_passes=[] if given is None else [given]):
            return compiled(*args, config_patches=patches or None, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_in_context)
    torch._dynamo.reset()


def model(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
    return torch.nn.functional.pad(y, (0, 64))


INPUTS = randn(4, 64), torch.ones(64).bfloat16()


def fused() -> int:
    """How often fuseplan fuses in a compilation, which computes what eager mode does."""
    reports: list[Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)")
    compiled = fuseplan.compile(model, config=config, on_report=reports.append)
    torch.testing.assert_close(compiled(*INPUTS), model(*INPUTS))
    (report,) = reports
    return report.fused["act_padding"]


def test_torch_refuses_what_stands_in_the_hook() -> None:
    with inductor_config.patch({HOOK: lambda graph: None}), pytest.raises(Exception, match="cannot be used while"):
        torch.compile(model, options={HOOK: lambda graph: None})(*INPUTS)


@pytest.mark.parametrize(
    ("surround", "runs"),
    [
        (lambda given: inductor_config.patch({HOOK: given}), 1),
        (lambda given: custom_pass_context(post_grad_post_passes=[given]), 1), (lambda given: nullcontext(), 0),
    ],
    ids=["in the hook", "of a surrounding context", "none"],
)  # fmt: skip
def test_passes_run_once_beside_fuseplan(surround: Callable[..., Any], runs: int) -> None:
    ran: list[int] = []
    with surround(lambda graph: ran.append(len(graph.nodes))):
        assert fused() == 1
    assert len(ran) == runs
