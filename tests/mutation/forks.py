"""Tests run in forks of a process that has imported everything but fuseplan and the tests: torch takes seconds."""

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "fuseplan"
FAMILIES = (
    "torch", "sympy", "scipy", "numpy", "networkx", "hypothesis", "pytest", "_pytest", "typer", "rich", "jinja2",
)  # fmt: skip
BY_ALARM = -signal.SIGALRM
# One thread a process, since there are as many processes as cores; and none of these tests needs a GPU.
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
ALONE["CUDA_VISIBLE_DEVICES"] = ""
BROKEN = 70
"""The exit status of a fork that couldn't run tests."""


@dataclass
class Slot:
    """A folder with a copy of the package, in which one process at a time runs tests."""

    folder: Path

    @classmethod
    def fresh(cls, folder: Path) -> "Slot":
        """One with the package as it is."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(SOURCE, folder / "src" / "fuseplan", ignore=shutil.ignore_patterns("__pycache__"))
        return cls(folder)

    def write(self, path: str, source: str) -> None:
        """Puts `source` in the place of a file of the package."""
        (self.folder / "src" / "fuseplan" / path).write_text(source)

    def restore(self, path: str) -> None:
        """Puts the file back."""
        shutil.copyfile(SOURCE / path, self.folder / "src" / "fuseplan" / path)


@dataclass
class Limits:
    """A plugin: ends the process by an alarm where a test takes far longer than it should, notes the first that fails.

    Attributes:
        seconds: what each test took before.
        note: the file that the failing test's name goes to.
    """

    seconds: Mapping[str, float]
    note: Path

    @staticmethod
    def pytest_configure() -> None:
        from hypothesis import Phase, settings

        # Failures needn't be shrunk, and none is to be remembered for the next mutant.
        settings.register_profile(
            "mutants", settings.default, phases=(Phase.explicit, Phase.generate), database=None, derandomize=True
        )
        settings.load_profile("mutants")
        signal.setitimer(signal.ITIMER_REAL, 120)  # for imports and collection

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 10 + 10 * self.seconds.get(item.nodeid, 1.0))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 120)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.note.exists():
            self.note.write_text(report.nodeid)


@dataclass
class Observer:
    """A plugin: what each test takes, and which lines it runs.

    Attributes:
        coverage: started.
        seconds: by test.
        failed: tests.
    """

    coverage: Any
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, None] = field(default_factory=dict)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed[report.nodeid] = None


def preload(modules: Iterable[str]) -> None:
    """Imports what forks needn't import again."""
    os.environ.update(ALONE)
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_pytest(slot: Slot, arguments: Sequence[str], plugin: object) -> int:
    """Runs tests in this process, which must be a fork, on the slot's copy of the package."""
    os.environ.update(
        {
            **ALONE,
            "HYPOTHESIS_STORAGE_DIRECTORY": str(slot.folder / "hypothesis"),
            "PYTHONPATH": str(slot.folder / "src"),
            "XDG_CACHE_HOME": str(slot.folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(slot.folder / "inductor"),
        }
    )
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(slot.folder / "src"))
    # pytest would rather import plugins itself, to rewrite the assertions in them.
    common = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = int(pytest.main([*common, *arguments], plugins=[plugin]))
    assert sys.modules["fuseplan"].__file__ == str(slot.folder / "src" / "fuseplan" / "__init__.py")
    return code


@dataclass
class Fork:
    """A process that runs tests."""

    process: int
    slot: Slot
    what: Any
    began: float
    deadline: float


def fork(slot: Slot, what: Any, deadline: float, work: Callable[[], int]) -> Fork:
    """Starts `work` in a process group of its own; it ends with what `work` returns."""
    process = os.fork()
    if process == 0:
        code = BROKEN
        try:
            os.setpgid(0, 0)
            log = os.open(slot.folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = work()
        except BaseException:  # noqa: BLE001 - whatever it is, this process ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Fork(process, slot, what, time.monotonic(), time.monotonic() + deadline)


def end(forks: Iterable[Fork]) -> None:
    """Ends forks that are still running."""
    for each in forks:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(each.process, signal.SIGKILL)


def wait(forks: list[Fork]) -> tuple[Fork, int]:
    """The next fork that ends, and its exit status, `BY_ALARM` where it took too long; takes it off the list."""
    while True:
        for each in forks:
            process, status = os.waitpid(each.process, os.WNOHANG)
            late = time.monotonic() > each.deadline
            if process or late:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(each.process, signal.SIGKILL)
                if not process:
                    os.waitpid(each.process, 0)
                forks.remove(each)
                return each, os.waitstatus_to_exitcode(status) if process else BY_ALARM
        time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the tests do on the package as it is.

    Attributes:
        seconds: by test.
        failed: tests that fail as it is.
        tests: by file and line, those that pass.
        modules: that they import, of other people.
    """

    seconds: Mapping[str, float]
    failed: Sequence[str]
    tests: Mapping[str, Mapping[int, Sequence[str]]]
    modules: Sequence[str]


def observe(slot: Slot, file: str, deselected: Sequence[str], mutated: Sequence[str]) -> int:
    """Runs the tests of a file, in a fork, and leaves what they do in the slot.

    Args:
        slot: with the package as it is.
        file: of tests.
        deselected: tests of it that are too slow.
        mutated: files of the package whose lines are asked for.
    """
    import coverage

    sources = [str(slot.folder / "src" / "fuseplan" / path) for path in mutated]
    measured = coverage.Coverage(data_file=None, config_file=False, include=sources)
    measured.start()
    observer = Observer(measured)
    code = run_pytest(slot, [file, *(f"--deselect={each}" for each in deselected)], observer)
    measured.stop()
    data = measured.get_data()
    tests = {
        path: {
            str(line): sorted(set(contexts) - set(observer.failed))
            for line, contexts in data.contexts_by_lineno(source).items()
        }
        for path, source in zip(mutated, sources, strict=True)
    }
    modules = [name for name in sys.modules if name.split(".")[0] in FAMILIES]
    content = {"seconds": observer.seconds, "failed": list(observer.failed), "tests": tests, "modules": modules}
    (slot.folder / "observed.json").write_text(json.dumps(content))
    return 0 if observer.seconds else code


def observed(slots: Iterable[Slot]) -> Observed:
    """What several slots hold, together."""
    seconds: dict[str, float] = {}
    failed: list[str] = []
    tests: dict[str, dict[int, list[str]]] = {}
    modules: dict[str, None] = {}
    for slot in slots:
        content = json.loads((slot.folder / "observed.json").read_text())
        seconds.update(content["seconds"])
        failed += content["failed"]
        modules.update(dict.fromkeys(content["modules"]))
        for path, lines in content["tests"].items():
            for line, names in lines.items():
                tests.setdefault(path, {}).setdefault(int(line), []).extend(names)
    return Observed(seconds=seconds, failed=failed, tests=tests, modules=tuple(modules))
