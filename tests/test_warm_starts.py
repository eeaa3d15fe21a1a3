"""What a warm compile cache serves: never what a user's code did before, nor what failed for one run alone."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import fuseplan
from fuseplan.record import GraphReport, Reason, Report
from fuseplan.rules import Bindings
from tests.helpers import HIDDEN, randn
from tests.providers.stand_ins import ranks
from tests.verification.fused_norm import WEIGHT, AddNormRelu, model, provider, reference

pytestmark = pytest.mark.filterwarnings("ignore::fuseplan.errors.FuseplanWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: under other keys they share what a C++ compiler made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rescale(graph: fx.Graph, scale: float) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
        node.kwargs = {"beta": scale}


def by_environment(graph: fx.Graph) -> None:
    rescale(graph, float(os.environ["SCALE"]))


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, graph: fx.Graph) -> None:
        rescale(graph, self.scale)


class Versioned(CustomGraphPass):
    """As by_environment, and says so."""

    def __call__(self, graph: fx.Graph) -> None:
        by_environment(graph)

    def uuid(self) -> str:
        return os.environ["SCALE"]


def scaled(x: Tensor, zeros: Tensor) -> Tensor:
    """`x * beta`, without a kernel for which a C++ compiler is called."""
    return torch.addmm(x, zeros, zeros, beta=2.0)


HOOK = "post_grad_custom_post_pass"
PASSES: dict[str, Callable[[float], dict[str, Any]]] = {
    "environment": lambda scale: {"passes": [by_environment]},
    "slots": lambda scale: {"passes": [Slotted(scale)]},
    "method": lambda scale: {"passes": [Slotted(scale).__call__]},
    "hooks": lambda scale: {"options": {HOOK: [Slotted(scale), by_environment]}},
    "earlier hook": lambda scale: {"options": {"joint_custom_post_pass": by_environment}},
    "uuid": lambda scale: {"passes": [Versioned()]},
    "uuid in the hook": lambda scale: {"options": {HOOK: Versioned()}},
}


@pytest.mark.parametrize("name", PASSES)
def test_what_a_pass_reads_may_change_between_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, reports = [], list[Report]()
    for scale in (3.0, 5.0, 5.0, 3.0):
        monkeypatch.setenv("SCALE", str(scale))
        torch._dynamo.reset()
        with torch.inference_mode():
            compiled = fuseplan.compile(scaled, on_report=reports.append, **PASSES[name](scale))
            seen.append(float(compiled(torch.ones(8, 8), torch.zeros(8, 8))[0, 0]))
    assert seen == [3.0, 5.0, 5.0, 3.0]
    warm = [report.graphs[0].from_cache for report in reports]
    assert warm == [False, False, "uuid" in name, "uuid" in name]


def test_layers_share_what_a_pass_without_a_uuid_was_compiled_into() -> None:
    reports, passes = list[Report](), [Slotted(2.0)]
    with torch.inference_mode():
        for layer in [torch.nn.Linear(4, 4) for _ in range(12)]:
            fuseplan.compile(layer, on_report=reports.append, passes=passes)(torch.ones(2, 4))
    assert len(reports) == 1


WITHOUT_OPS: dict[str, Callable[[Tensor], Any]] = {
    "same dtype": lambda x: x.to(torch.float32),
    "twice": lambda x: (x.contiguous(), x),
    "alias": torch.ops.aten.alias,
}


@pytest.mark.parametrize("name", WITHOUT_OPS)
def test_ranks_compile_a_graph_without_ops_at_most_twice(name: str) -> None:
    inductor, x, function = torch._TorchCompileInductorWrapper, torch.randn(2, 2), WITHOUT_OPS[name]
    for _ in range(2):
        torch._dynamo.reset()
        counted = mock.patch.object(inductor, "__call__", autospec=True, side_effect=inductor.__call__)
        with ranks(2), torch.inference_mode(), counted as called:
            torch.testing.assert_close(fuseplan.compile(function)(x), function(x))
        assert called.call_count == 2


INPUTS = randn(5, HIDDEN), randn(5, HIDDEN, seed=1), WEIGHT
FAILURES = list[Exception]()
"""What goes wrong in the next calls."""


def fails_sometimes(*arguments: Any) -> Any:
    if FAILURES:
        raise FAILURES.pop()
    return reference(*arguments)


def wrong_sometimes(*arguments: Any) -> Any:
    y, total = reference(*arguments)
    return (y + FAILURES.pop().args[0] if FAILURES else y), total


class Faulty(AddNormRelu):
    """Its check fails as the kernel does."""

    def check(self, m: Bindings) -> None:
        if FAILURES:
            raise FAILURES.pop()


def starts(make: Callable[..., Callable[..., Any]], count: int, **arguments: Any) -> list[GraphReport | None]:
    """What so many processes report, one after the other; None: the pass did not run."""
    found = list[GraphReport | None]()
    for _ in range(count):
        torch._dynamo.reset()
        reports = list[Report]()
        with torch.inference_mode():
            compiled = make(model, on_report=reports.append, **arguments)
            torch.testing.assert_close(compiled(*INPUTS), model(*INPUTS), rtol=2**-6, atol=2**-6)
        found.append(reports[-1].graphs[0] if reports else None)
    return found


CONFIG = fuseplan.PassConfig(policy="ordered(add_norm_relu)")
TRANSIENT = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a driver that hung")]


@pytest.mark.parametrize(
    ("kernel", "rule", "failures", "found"),
    [
        (fails_sometimes, AddNormRelu, [TRANSIENT[0]], [(False, 0), (False, 1), (True, 1)]),
        (fails_sometimes, AddNormRelu, [TRANSIENT[1]], [(False, 0), (False, 1), (True, 1)]),
        (fails_sometimes, AddNormRelu, [TRANSIENT[0]] * 3, [*[(False, 0)] * 3, (False, 1)]),
        (wrong_sometimes, AddNormRelu, [ArithmeticError(7.0)], [(False, 0), (True, 0)]),
        (fails_sometimes, Faulty, [MemoryError("short of memory")], [(False, 0), (False, 1), (True, 1)]),
    ],
    ids=[
        "short of memory once is tried again", "a driver that hung once is tried again",
        "what fails every time is compiled anew", "wrong results are found in the cache", "a fault is of one start",
    ],
)  # fmt: skip
def test_what_went_wrong_in_a_start(
    kernel: Callable[..., Any], rule: type[AddNormRelu], failures: list[Exception], found: list[tuple[bool, int]]
) -> None:
    FAILURES[:] = failures
    mine = provider(kernel, uuid="1")
    graphs = starts(fuseplan.compile, len(found), config=CONFIG, rules=[rule()], providers=[mine])
    assert [(each.from_cache, len(each.applied)) for each in graphs if each] == found
    assert graphs[0] is not None
    if rule is Faulty:
        assert [each.reason for each in graphs[0].refusals] == [Reason.FAULT]
    elif kernel is fails_sometimes:
        assert [each.transient for each in graphs[0].verified] == [True]


def test_what_failed_once_under_torch_compile_is_tried_again() -> None:
    FAILURES[:] = [TRANSIENT[0]]

    def compiled(model: Any, **arguments: Any) -> Any:
        return torch.compile(model, options=fuseplan.inductor_options(**arguments))

    mine = provider(fails_sometimes, uuid="1")
    found = starts(compiled, 3, config=CONFIG, rules=[AddNormRelu()], providers=[mine])
    assert [each and len(each.applied) for each in found] == [0, 1, None]  # the last is Inductor's own, from its cache


def test_kernels_without_a_uuid_are_verified_at_every_start() -> None:
    mine = provider(fails_sometimes, uuid=None)
    found = starts(fuseplan.compile, 2, config=CONFIG, rules=[AddNormRelu()], providers=[mine])
    assert [[each.from_cache for each in graph.verified] for graph in found if graph] == [[False], [False]]


def test_a_function_that_becomes_a_graph_which_the_cache_has_is_reported_too() -> None:
    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x + 1, (HIDDEN,), WEIGHT, 1e-6)

    reports: list[Report] = []
    with torch.no_grad():
        for each in (norm, lambda x: norm(x.reshape(x.shape))):
            fuseplan.compile(each, on_report=reports.append)(randn(4, HIDDEN))
            torch._dynamo.reset()
    assert [bool(each.recognized) for each in reports] == [True, True]
    assert reports[0].recognized == reports[1].recognized
