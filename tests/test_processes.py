"""Compiling in several threads and processes, interrupted, and beside caches that can't be written or are broken."""

import errno
import gc
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch._logging._internal import warning_once
from torch.nn import functional as F

import fuseplan
from fuseplan.caching import store
from fuseplan.config import CompileRange
from fuseplan.record import Report
from tests.interpreted import no_code

PAD = fuseplan.PassConfig(policy="ordered(act_padding)")


def model_of(width: int, layers: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(layers):
            x = F.pad(F.rms_norm(x, (width,), weight), (0, 8))[..., 8:]
        return F.pad(F.rms_norm(x, (width,), weight), (0, 8))

    return model


def inputs_of(width: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width), torch.rand(width)


@pytest.fixture(autouse=True)
def without_code() -> Iterator[None]:
    """A cache of its own for each test, and no code."""
    with no_code(), fresh_cache():
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def run(compiled: Callable[..., Tensor], model: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_two_models_of_other_shapes_and_configs_in_one_process() -> None:
    spans = (CompileRange(start=1, end=8), CompileRange(start=9, end=64))
    padding, off, ranges = list[Report](), list[Report](), list[Report]()
    made = [
        (fuseplan.compile(model, config=config, on_report=reports.append), model, width)
        for reports, config, model, width in (
            (padding, PAD, model_of(64), 64),
            (off, fuseplan.PassConfig(policy="off"), model_of(72), 72),
            (ranges, replace(PAD, compile_ranges=spans), model_of(80, 2), 80),
        )
    ]
    for rows in (4, 16, 4):
        for compiled, model, width in (*made, *made[::-1]):
            run(compiled, model, inputs_of(width, rows))
    assert {report.fused["act_padding"] for report in padding} == {2}
    assert {sum(report.fused.values()) for report in off} == {0}
    assert [graph.range for report in ranges for graph in report.graphs] == [(1, 8), (9, 64)]
    assert {report.fused["act_padding"] for report in ranges} == {3}


@pytest.mark.parametrize("explains", [False, True], ids=["compile", "explain"])
def test_threads_at_once(explains: bool) -> None:
    count = 6
    start = threading.Barrier(count)

    def work(number: int) -> list[int]:
        reports, width = list[Report](), 64 + 8 * number
        model = model_of(width, 1 + number % 3)
        start.wait()
        if explains:
            reports.append(fuseplan.explain(model, *inputs_of(width), config=PAD))
        else:
            run(fuseplan.compile(model, config=PAD, on_report=reports.append), model, inputs_of(width))
        return [report.fused["act_padding"] for report in reports]

    with ThreadPoolExecutor(count) as threads:
        assert [*threads.map(work, range(count))] == [[2 + number % 3] for number in range(count)]


def in_a_fork(work: Callable[[], None]) -> None:
    """Runs `work` in a child of this process, which must end by itself."""
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child.start()
    child.join(120)
    assert child.exitcode == 0


def test_a_fork_runs_what_was_compiled_and_compiles_anew() -> None:
    model, reports = model_of(64), list[Report]()
    compiled = fuseplan.compile(model, config=PAD, on_report=reports.append)
    run(compiled, model, inputs_of(64))

    def work() -> None:
        run(compiled, model, inputs_of(64))
        assert len(reports) == 1
        other = model_of(72, 2)
        run(fuseplan.compile(other, config=PAD, on_report=reports.append), other, inputs_of(72))
        assert [report.fused["act_padding"] for report in reports] == [2, 3]

    in_a_fork(work)
    run(fuseplan.compile(model_of(80), config=PAD), model_of(80), inputs_of(80))


def test_a_fork_compiles_first() -> None:
    model = model_of(64)
    in_a_fork(lambda: run(fuseplan.compile(model, config=PAD), model, inputs_of(64)))
    run(fuseplan.compile(model, config=PAD), model, inputs_of(64))


def cached_files() -> list[str]:
    folder = store._folder()
    return sorted(each.name for each in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("stage", ["before the plan", "while a report is stored", "while a report is delivered"])
def test_an_interrupt_leaves_no_half_of_anything(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, armed = model_of(64), [True]

    def interrupt(*arguments: Any) -> None:
        if armed.pop() if armed else False:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # until Python handles it

    interrupt.uuid = "1"  # type: ignore[attr-defined]
    options = {"post_grad_custom_post_pass": interrupt} if stage == "before the plan" else None
    deliver = interrupt if stage == "while a report is delivered" else None
    if stage == "while a report is stored":
        monkeypatch.setattr(os, "fsync", interrupt)
    compiled = fuseplan.compile(model, config=PAD, options=options, on_report=deliver)
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        compiled(*inputs_of(64))
    assert not armed
    assert gc.isenabled()
    assert [name for name in cached_files() if not name.endswith(".json")] == []
    run(compiled, model, inputs_of(64))
    assert len(cached_files()) == 1


@pytest.mark.sampled
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_reports_that_cannot_be_stored_fail_no_compilation(
    number: int, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, and a home that may only be read."""

    def fail(*arguments: Any, **further: Any) -> None:
        raise OSError(number, os.strerror(number))

    warning_once.cache_clear()
    owner = {"mkdir": Path, "fsync": os, "replace": Path}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        for width in (64, 72):
            model, reports = model_of(width), list[Report]()
            run(fuseplan.compile(model, config=PAD, on_report=reports.append), model, inputs_of(width))
            assert [report.fused["act_padding"] for report in reports] == [2]
    says = f"reports can't be stored, so that warm compile caches will come without them: {os.strerror(number)}"
    assert [each for each in caplog.messages if "stored" in each] == [says]
    assert cached_files() == []


def test_dumps_that_cannot_be_written_fail_no_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEPLAN_DEBUG_DIR", str(tmp_path / "file" / "dumps"))
    run(fuseplan.compile(model_of(64), config=PAD), model_of(64), inputs_of(64))
    warnings = [each for each in caplog.messages if "FUSEPLAN_DEBUG_DIR" in each]
    assert warnings
    assert all("Not a directory" in each and each.isprintable() for each in warnings)


REPORT = Report(policy="planned", order=(), rules=(), graphs=())
GARBAGE = {
    "empty": b"",
    "half": b'{"policy": "ordered", "order": ["act_pad',
    "of another program": b'{"name": "something"}',
    "deep": b"[" * 100_000,
    "binary": bytes(range(256)),
    "of another version": json.dumps({"policy": "planned", "order": [], "rules": [], "graphs": [], "new": 1}).encode(),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_stored_report_that_is_broken_is_none(name: str) -> None:
    for _ in range(2):
        store.save("key", REPORT)
        assert store.load("key") == REPORT
        (store._folder() / "key.json").write_bytes(GARBAGE[name])
        assert store.load("key") is None


def test_what_killed_processes_left_in_the_cache_goes() -> None:
    store.save("key", REPORT)
    left = store._folder() / ".other.json.0123abcd.tmp"
    left.write_text("half")
    os.utime(left, (1, 1))
    store.save("another", REPORT)
    assert cached_files() == ["another.json", "key.json"]


def holding(held: Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.add, (graph.placeholder("x"), graph.get_attr("held"))))
    return fx.GraphModule({"held": held}, graph)


SIN, COS = fx.symbolic_trace(lambda x: x.sin()), fx.symbolic_trace(lambda x: x.cos())


def report_key(x: Tensor, gm: fx.GraphModule = SIN, *, manager: Any = "manager", **options: Any) -> str | None:
    return store.graph_key(gm, [x], manager, options)


def test_reports_are_stored_under_all_that_shapes_a_graph() -> None:
    x = torch.randn(4, 8)
    keys = [report_key(each) for each in (x, x.double(), torch.randn(8, 4).t(), torch.randn(5, 8))]
    held = torch.zeros(8), torch.zeros(4, 8), torch.zeros(8, dtype=torch.int64)
    keys += [report_key(x, gm) for gm in (COS, *map(holding, held))]
    keys += [report_key(x, manager="other"), report_key(x, max_autotune=True)]
    for context in (
        torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16),
        torch._inductor.config.patch(pattern_matcher=False),
        *(torch._inductor.config.patch(joint_custom_pre_pass=Named(name)) for name in "12"),
    ):  # fmt: skip
        with context:
            keys.append(report_key(x))
    assert len(set(keys)) == len(keys)
    assert report_key(torch.randn(4, 8)) == keys[0]
    assert report_key(x, holding(torch.ones(8))) == report_key(x, holding(held[0]))


class Named(CustomGraphPass):
    """A pass that runs before fuseplan's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, graph: fx.Graph) -> None:
        """Nothing."""

    def uuid(self) -> str:
        return self.name


@pytest.mark.parametrize("hook", store.EARLIER_PASSES)
def test_no_report_is_stored_where_a_pass_without_a_uuid_shapes_the_graph(hook: str) -> None:
    x = torch.randn(4, 8)
    assert report_key(x, manager=None) is None
    assert report_key(x, SIN, **{hook: lambda graph: None}) is None
    assert report_key(x, SIN, **{hook: Named("1")}) not in (None, report_key(x))
    with torch._inductor.config.patch({hook: lambda graph: None}):
        assert report_key(x) is None
