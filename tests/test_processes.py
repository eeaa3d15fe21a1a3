"""Compiling in several threads and processes, interrupted, and beside caches that can't be written or are broken."""

import errno
import gc
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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

ROOT = Path(__file__).parents[1]
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
def without_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """A cache of its own for each test, and no code but where a test is of generated code."""
    if request.node.get_closest_marker("nightly"):
        yield
        return
    with no_code(), fresh_cache():
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def run(compiled: Callable[..., Tensor], model: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_two_models_of_other_shapes_and_configs_in_one_process() -> None:
    spans = (CompileRange(start=1, end=8), CompileRange(start=9, end=64))
    made = {
        "padding": (64, model_of(64), PAD),
        "off": (72, model_of(72), fuseplan.PassConfig(policy="off")),
        "ranges": (80, model_of(80, 2), replace(PAD, compile_ranges=spans)),
    }
    reports = {name: list[Report]() for name in made}
    compiled = {
        name: fuseplan.compile(model, config=config, on_report=reports[name].append)
        for name, (_, model, config) in made.items()
    }
    for rows in (4, 16, 4):
        for name in ("padding", "off", "ranges", "off", "padding"):
            width, model, _ = made[name]
            run(compiled[name], model, inputs_of(width, rows))
    assert {report.fused["act_padding"] for report in reports["padding"]} == {2}
    assert {sum(report.fused.values()) for report in reports["off"]} == {0}
    assert [graph.range for report in reports["ranges"] for graph in report.graphs] == [(1, 8), (9, 64)]
    assert {report.fused["act_padding"] for report in reports["ranges"]} == {3}


@pytest.mark.parametrize("explains", [False, True], ids=["compile", "explain"])
def test_threads_at_once(explains: bool) -> None:
    count, failures = 6, list[BaseException]()
    reports: list[list[Report]] = [[] for _ in range(count)]
    start = threading.Barrier(count)

    def work(number: int) -> None:
        try:
            width, layers = 64 + 8 * number, 1 + number % 3
            model = model_of(width, layers)
            start.wait()
            if explains:
                reports[number].append(fuseplan.explain(model, *inputs_of(width), config=PAD))
            else:
                run(fuseplan.compile(model, config=PAD, on_report=reports[number].append), model, inputs_of(width))
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [[report.fused["act_padding"] for report in each] for each in reports] == [[2 + n % 3] for n in range(count)]


def in_a_fork(work: Callable[[], None]) -> None:
    """Runs `work` in a child of this process, which must end by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(120)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


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
    (line,) = [each for each in caplog.messages if "stored" in each]
    assert line == (
        f"reports can't be stored, so that warm compile caches will come without them: {os.strerror(number)}"
    )
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
    store.save("key", REPORT)
    assert store.load("key") == REPORT
    (store._folder() / "key.json").write_bytes(GARBAGE[name])
    assert store.load("key") is None
    store.save("key", REPORT)
    assert store.load("key") == REPORT


def test_what_killed_processes_left_in_the_cache_goes() -> None:
    store.save("key", REPORT)
    left = store._folder() / ".other.json.0123abcd.tmp"
    left.write_text("half")
    os.utime(left, (1, 1))
    store.save("another", REPORT)
    assert cached_files() == ["another.json", "key.json"]


def graph_of(text: str, **attributes: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = graph.get_attr("held") if attributes else x
    graph.output(graph.call_function(getattr(torch, text), (x, value) if attributes else (x,)))
    root = torch.nn.Module()
    for name, each in attributes.items():
        root.register_buffer(name, each)
    return fx.GraphModule(root, graph)


def report_key(gm: fx.GraphModule, x: Tensor, *, manager: Any = "manager", **options: Any) -> str | None:
    return store.graph_key(gm, [x], manager, options)


def test_reports_are_stored_under_all_that_shapes_a_graph() -> None:
    x = torch.randn(4, 8)
    held = graph_of("add", held=torch.zeros(8))
    sin, shapes = graph_of("sin"), [torch.randn(8, 4).t(), torch.randn(5, 8)]
    others = [torch.zeros(4, 8), torch.zeros(8, dtype=torch.int64)]
    keys = [
        report_key(sin, x), report_key(graph_of("cos"), x), report_key(sin, x, manager="other"),
        *(report_key(sin, each) for each in (x.double(), *shapes)), report_key(held, x),
        *(report_key(graph_of("add", held=each), x) for each in others),
    ]  # fmt: skip
    contexts = [
        torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16),
        torch._inductor.config.patch(pattern_matcher=False),
        *(torch._inductor.config.patch(joint_custom_pre_pass=Named(name)) for name in "12"),
    ]  # fmt: skip
    for context in contexts:
        with context:
            keys.append(report_key(graph_of("sin"), x))
    assert len(set(keys)) == len(keys)
    assert report_key(graph_of("sin"), torch.randn(4, 8)) == keys[0]
    assert report_key(graph_of("add", held=torch.ones(8)), x) == keys[6]
    assert report_key(graph_of("sin"), x, max_autotune=True) not in keys


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
    assert report_key(graph_of("sin"), x, manager=None) is None
    assert report_key(graph_of("sin"), x, **{hook: lambda graph: None}) is None
    assert report_key(graph_of("sin"), x, **{hook: Named("1")}) not in (None, report_key(graph_of("sin"), x))
    with torch._inductor.config.patch({hook: lambda graph: None}):
        assert report_key(graph_of("sin"), x) is None
