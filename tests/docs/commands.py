"""What pages tell their readers to run, run: Python blocks in processes of their own, commands as a shell would."""

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from typer.testing import CliRunner

from docs.blocks import ROOT
from fuseplan.cli import app
from fuseplan.cpython import uncollected
from fuseplan.explanation import capture as capturing
from fuseplan.explanation import comparison
from fuseplan.workloads import catalog

FORKS = Path(__file__).with_name("forks.py")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "COLUMNS": "110",
    # Pages show a machine without GPU; and what has been forked can't use one.
    "CUDA_VISIBLE_DEVICES": "",
    # No threads in the process that forks.
    "OPENBLAS_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


@dataclass(frozen=True)
class Outcome:
    """How something ended, and what it printed."""

    status: int
    output: str


class Forks:
    """Python files and modules, each in a process of its own, one after the other, beside what runs here."""

    def __init__(self, cache: Path) -> None:
        environment = {**os.environ, **ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        self._process = subprocess.Popen(
            [sys.executable, FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._count, self._outcomes = 0, list[Outcome]()

    def start(self, folder: Path, environment: Mapping[str, str], arguments: list[str], **what: str) -> int:
        """Runs `path=` a file, or `module=` a module. Returns the number by which its outcome is asked for."""
        assert self._process.stdin is not None
        request = {**what, "folder": str(folder), "environment": dict(environment), "arguments": arguments}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        self._count += 1
        return self._count - 1

    def outcome(self, number: int) -> Outcome:
        """How it ended; waits for that."""
        assert self._process.stdout is not None
        while len(self._outcomes) <= number:
            self._outcomes.append(Outcome(**json.loads(self._process.stdout.readline())))
        return self._outcomes[number]

    def close(self) -> None:
        """Ends the process that forks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@dataclass(frozen=True)
class Command:
    """One line of a shell.

    Attributes:
        environment: the variables set before it.
        program: `fuseplan`, `python`, `torchrun`, `pytest`, `cat`, `make` or `pip`.
        arguments: the words after it.
        status: what its comment says of its exit status.
    """

    environment: Mapping[str, str]
    program: str
    arguments: list[str]
    status: int


def commands_of(script: str) -> Iterator[Command]:
    """The commands of a block."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            count = next(index for index, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
            pairs = [word.split("=", 1) for word in words[:count]]
            status = re.search(r"# exit status (\d)", line)
            program = words[count].removeprefix(".venv/bin/")
            yield Command(dict(pairs), program, words[count + 1 :], int(status[1]) if status else 0)


class Shell:
    """Runs commands in a folder, each in the way of its program.

    What would install packages or run for minutes is only looked up: targets in the Makefile, extras in pyproject.toml.
    """

    def __init__(self, forks: Forks, folder: Path) -> None:
        self.forks, self.folder = forks, folder

    def run(self, command: Command) -> Outcome:
        """How the command ends."""
        programs: dict[str, Callable[[Command], Outcome]] = {
            "fuseplan": self._fuseplan,
            "python": self._python,
            "pytest": self._pytest,
            "cat": self._cat,
            "make": self._make,
            "pip": self._pip,
            "torchrun": self._torchrun,
        }
        assert command.program in programs, f"there is no way to run {command.program!r}"
        return programs[command.program](command)

    def _fuseplan(self, command: Command) -> Outcome:
        # Pages show a machine that has nothing else to do.
        idle = mock.patch("os.getloadavg", return_value=(0.0, 0.0, 0.0))
        with contextlib.chdir(self.folder), _own_modules(), idle, uncollected():
            result = CliRunner().invoke(app, command.arguments, env={**ENVIRONMENT, **command.environment})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.output)

    def _python(self, command: Command) -> Outcome:
        path, *arguments = command.arguments
        started = self.forks.start(self.folder, command.environment, arguments, path=str(self.folder / path))
        return self.forks.outcome(started)

    def _torchrun(self, command: Command) -> Outcome:
        environment = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", *command.arguments]
        done = subprocess.run(
            arguments, cwd=self.folder, env={**environment, **command.environment}, capture_output=True, text=True,
            check=False, timeout=400,
        )  # fmt: skip
        # gloo's threads now and then outlive their process group, and the interpreter then aborts after its last line.
        aborted = "terminate called without an active exception" in done.stderr
        return Outcome(0 if aborted else done.returncode, done.stdout)

    def _pytest(self, command: Command) -> Outcome:
        started = self.forks.start(self.folder, command.environment, command.arguments, module="pytest")
        return self.forks.outcome(started)

    def _cat(self, command: Command) -> Outcome:
        paths = [path for pattern in command.arguments for path in sorted(self.folder.glob(pattern))]
        return Outcome(int(not paths), "".join(path.read_text(encoding="utf-8") for path in paths))

    def _make(self, command: Command) -> Outcome:
        listed = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        targets = [word for word in command.arguments if "=" not in word]
        return Outcome(int(not set(targets) <= set(listed)), f"make help lists {listed}")

    def _pip(self, command: Command) -> Outcome:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = re.findall(r"\[(\w+)\]", " ".join(command.arguments))
        return Outcome(int(not set(extras) <= set(project["optional-dependencies"])), f"extras asked for: {extras}")


@contextmanager
def _own_modules() -> Iterator[None]:
    """Forgets what a factory's import brings: another page has another file of that name."""
    modules, path = set(sys.modules), [*sys.path]
    importlib.invalidate_caches()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(Path.cwd())):
            del sys.modules[name]


def traced_once() -> AbstractContextManager[Any]:
    """Traces each workload once, whatever number of commands explain it: that is where their time goes.

    A workload is known by its name and by the files of the folder, which its factory may be in.
    """
    build, capture = catalog.build, capturing.capture
    traces: dict[tuple[Any, ...], Any] = {}
    current: list[tuple[Any, ...]] = []

    @contextmanager
    def remember(name: str, **options: Any) -> Iterator[Any]:
        files = sorted((path.name, path.read_text(encoding="utf-8")) for path in Path.cwd().glob("[!.]*.py"))
        current[:] = [(name, *sorted(options.items()), *(files if ":" in name else ()))]
        with build(name, **options) as built:
            yield built

    def look_up(model: Any, inputs: Any, kwargs: Any, **options: Any) -> Any:
        (key,) = current
        if key not in traces:
            traces[key] = capture(model, inputs, kwargs, **options)
        return traces[key]

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(catalog, "build", remember))
    stack.enter_context(mock.patch.object(comparison, "capture", look_up))
    return stack
