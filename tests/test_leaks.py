"""Compiling again and again leaves nothing of fuseplan behind: no graph, no object, no handle, no thread, no memory."""

import functools
import gc
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import fuseplan
from fuseplan.record import Report
from tests.interpreted import no_code

CONFIG = fuseplan.PassConfig(policy="ordered(act_padding)")
Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def model_of(width: int) -> Callable[[Tensor, Tensor], Tensor]:
    def padded(x: Tensor, weight: Tensor) -> Tensor:
        return F.pad(F.rms_norm(x, (width,), weight), (0, 8))

    return padded


class Compilations(CustomGraphPass):
    """Compiles small models one after the other, and keeps no more than weak references to graphs."""

    def __init__(self) -> None:
        self.graphs: list[weakref.ref[fx.Graph]] = []
        self.fused = 0

    def __call__(self, graph: fx.Graph) -> None:
        """Takes note of one."""
        self.graphs.append(weakref.ref(graph))

    def uuid(self) -> str:
        """What it does, whatever it has seen."""
        return "watch"

    def count(self, report: Report) -> None:
        self.fused += report.fused["act_padding"]

    def planned(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        options = {"post_grad_custom_post_pass": self}
        return fuseplan.compile(model, config=CONFIG, options=options, on_report=self.count)

    def run(self, compilations: int, compiler: Compiler) -> None:
        for number in range(compilations):
            torch._dynamo.reset()
            width = 64 + 8 * (number % 3)
            model, x, weight = model_of(width), torch.randn(4, width), torch.rand(width)
            with torch.inference_mode():
                torch.testing.assert_close(compiler(model)(x, weight), model(x, weight))
        torch._dynamo.reset()
        gc.collect()


def state() -> dict[str, object]:
    """What a process holds of fuseplan's."""
    gc.collect()
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return {
        "objects": sorted(Counter(name for name in names if name.startswith("fuseplan")).items()),
        "handles": len(os.listdir("/dev/fd")),  # noqa: PTH208 - numbers, not paths
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def test_compiling_leaves_nothing_behind() -> None:
    compilations = Compilations()
    with no_code(), fresh_cache():
        compilations.run(6, compilations.planned)
        before = state()
        compilations.run(12, compilations.planned)
        assert state() == before
    assert compilations.fused == len(compilations.graphs) == 18
    assert [graph for graph in compilations.graphs if graph() is not None] == []


def test_explaining_leaves_nothing_behind() -> None:
    seen: list[weakref.ref[Report]] = []
    states = []
    for count in (3, 10):
        for _ in range(count):
            report = fuseplan.explain(model_of(64), torch.randn(4, 64), torch.rand(64), config=CONFIG)
            assert report.fused == {"act_padding": 1}
            seen.append(weakref.ref(report))
            del report
        states.append(state())
    assert states[0] == states[1]
    assert [report for report in seen if report() is not None] == []


def held() -> int:
    """Objects. Caches of torch that drop what is oldest are emptied first: they aren't full yet after a few."""
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and each.cache_parameters()["maxsize"] is not None:
            each.cache_clear()
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.nightly
@pytest.mark.parametrize(("count", "generates"), [(500, False), (25, True)], ids=["interpreted", "generated"])
def test_many_compilations_keep_no_more_objects_than_those_of_torch(count: int, generates: bool) -> None:
    """torch.compile itself keeps about 190 objects of each compilation, as of 2.13: fuseplan adds nothing to that."""
    compilations, kept = Compilations(), list[float]()
    always_anew = (inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False))
    with nullcontext() if generates else no_code(), fresh_cache(), always_anew[0], always_anew[1]:
        for compiler in (torch.compile, compilations.planned):
            compilations.run(9, compiler)
            before = held()
            compilations.run(count, compiler)
            kept.append((held() - before) / count)
    assert compilations.fused == len(compilations.graphs) == count + 9
    assert kept[1] < kept[0] + 25
