"""Compiling again and again leaves nothing of fuseplan behind: no graph, no object, no handle, no thread, no memory."""

import functools
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

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

ROOT = Path(__file__).parents[1]
CONFIG = fuseplan.PassConfig(policy="ordered(act_padding)")
WIDTHS = (64, 72, 80)
Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def model_of(width: int) -> Callable[[Tensor, Tensor], Tensor]:
    def padded(x: Tensor, weight: Tensor) -> Tensor:
        return F.pad(F.rms_norm(x, (width,), weight), (0, 8))

    return padded


class Watch(CustomGraphPass):
    """Keeps weak references to graphs."""

    def __init__(self) -> None:
        self.graphs: list[weakref.ref[fx.Graph]] = []

    def __call__(self, graph: fx.Graph) -> None:
        """Takes note of one."""
        self.graphs.append(weakref.ref(graph))

    def uuid(self) -> str:
        """What it does, whatever it has seen."""
        return "watch"


class Compilations:
    """Compiles small models one after the other, and keeps no more than weak references."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.fused = 0

    @property
    def graphs(self) -> list[weakref.ref[fx.Graph]]:
        return self.watch.graphs

    def planned(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        options = {"post_grad_custom_post_pass": self.watch}
        return fuseplan.compile(model, config=CONFIG, options=options, on_report=self.count)

    def count(self, report: Report) -> None:
        self.fused += report.fused["act_padding"]

    def run(self, compilations: int, compiler: Compiler) -> None:
        for number in range(compilations):
            torch._dynamo.reset()
            width = WIDTHS[number % len(WIDTHS)]
            model, x, weight = model_of(width), torch.randn(4, width), torch.rand(width)
            with torch.inference_mode():
                torch.testing.assert_close(compiler(model)(x, weight), model(x, weight))
        torch._dynamo.reset()
        gc.collect()


def state() -> dict[str, object]:
    """What a process holds."""
    ours: Counter[str] = Counter()
    for each in gc.get_objects():
        module = type(each).__module__
        if isinstance(module, str) and module.startswith("fuseplan"):
            ours[type(each).__qualname__] += 1
    return {
        "objects": dict(sorted(ours.items())),
        "handles": len(os.listdir("/dev/fd")),  # noqa: PTH208 - numbers, not paths
        "threads": threading.active_count(),
        "children": sorted(thread.name for thread in threading.enumerate()),
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

    def explain() -> None:
        report = fuseplan.explain(model_of(64), torch.randn(4, 64), torch.rand(64), config=CONFIG)
        assert report.fused == {"act_padding": 1}
        seen.append(weakref.ref(report))

    for _ in range(3):
        explain()
    gc.collect()
    before = state()
    for _ in range(10):
        explain()
    gc.collect()
    assert state() == before
    assert [report for report in seen if report() is not None] == []


def held() -> tuple[int, int]:
    """Objects and bytes of this process. Caches of torch that drop what is oldest are emptied first: they aren't full
    yet after a few compilations.
    """
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and each.cache_parameters()["maxsize"] is not None:
            each.cache_clear()
    gc.collect()
    return len(gc.get_objects()), int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(plain: int, planned: int, generates: bool) -> dict[str, object]:
    """What a compilation costs for good: of torch.compile alone, and of fuseplan.compile, in one process."""
    compilations = Compilations()
    result: dict[str, object] = {}
    always_anew = (inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False))
    with nullcontext() if generates else no_code(), fresh_cache(), always_anew[0], always_anew[1]:
        compilations.run(9, torch.compile)
        compilations.run(9, compilations.planned)
        for name, count, compiler in (("plain", plain, torch.compile), ("planned", planned, compilations.planned)):
            before, start = state(), held()
            compilations.run(count, compiler)
            result[name] = [(after - value) / count for value, after in zip(start, held(), strict=True)]
            result[f"{name}: before and after"] = [before, state()]
    result["alive"] = sum(graph() is not None for graph in compilations.graphs)
    result["graphs"], result["fused"] = len(compilations.graphs), compilations.fused
    return result


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("plain", "planned", "generates"), [(300, 1000, False), (25, 50, True)], ids=["interpreted", "generated"]
)
def test_many_compilations_cost_no_more_than_those_of_torch(plain: int, planned: int, generates: bool) -> None:
    """torch.compile itself keeps about 190 objects of each compilation, as of 2.13: fuseplan adds nothing to that."""
    call = f"measure({plain}, {planned}, {generates})"
    code = f"import json; from tests.test_leaks import measure; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({name: found[name] for name in ("plain", "planned")}))
    assert (found["alive"], found["graphs"], found["fused"]) == (0, planned + 9, planned + 9)
    before, after = found["planned: before and after"]
    assert after == before
    assert found["planned"][0] < found["plain"][0] + 25
    if planned >= 1000:
        assert found["planned"][1] < found["plain"][1] + 20_000
