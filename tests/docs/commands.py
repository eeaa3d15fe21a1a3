"""What pages tell their readers to run, run: Python blocks in processes of their own, commands as a shell would."""

import contextlib
import importlib
import re
import shlex
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
from fuseplan.measurement import costs
from fuseplan.workloads import catalog
from tests.forks import Forks, Outcome, Processes, Request
from tests.ranks import variables_of_ranks

ENVIRONMENT = {
    "COLUMNS": "110",
    # Pages show a machine without GPU.
    "CUDA_VISIBLE_DEVICES": "",
}


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

    Attributes:
        has_code: whether Inductor makes code of what Python programs compile; otherwise graphs are interpreted.
    """

    def __init__(self, forks: Forks, folder: Path, cache: Path) -> None:
        self.forks, self.folder, self.has_code = forks, folder, False
        self.environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache)}

    def run(self, command: Command) -> Outcome:
        """How the command ends."""
        run: Callable[[Command], Outcome] | None = getattr(self, f"_{command.program}", None)
        assert run is not None, f"there is no way to run {command.program!r}"
        return run(command)

    def _fuseplan(self, command: Command) -> Outcome:
        # Pages show a machine that has nothing else to do.
        idle = mock.patch("os.getloadavg", return_value=(0.0, 0.0, 0.0))
        with contextlib.chdir(self.folder), _own_modules(), idle, uncollected():
            result = CliRunner().invoke(app, command.arguments, env={**ENVIRONMENT, **command.environment})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.output)

    def start(self, path: Path, *, has_code: bool) -> int:
        """Has a Python file run beside what runs here, by generated code or not. Returns the number by which its
        outcome is asked for.
        """
        what: dict[str, Any] = {"path": str(path)}
        if not has_code:
            what = {"module": "tests.interpreted", "processes": [([str(path)], {})]}
        request = Request(**what, folder=str(self.folder), environment=self.environment, is_told=False)
        return self.forks.start(request)

    def _python(self, command: Command) -> Outcome:
        (outcome,) = self._programs(command, command.arguments, [{}])
        return outcome

    def _torchrun(self, command: Command) -> Outcome:
        """Its ranks, with the variables that it tells them of each other."""
        option, count, *program = command.arguments
        assert option == "--nproc-per-node"
        outcomes = self._programs(command, program, variables_of_ranks(int(count)))
        return Outcome(max(each.status for each in outcomes), "".join(each.output for each in outcomes))

    def _programs(self, command: Command, program: list[str], ranks: list[dict[str, str]]) -> list[Outcome]:
        """A file with its arguments, once for each of several environments."""
        if self.has_code:
            path, *arguments = program
            return self._forked(command, [(arguments, rank) for rank in ranks], path=str(self.folder / path))
        return self._forked(command, [(program, rank) for rank in ranks], module="tests.interpreted")

    def _pytest(self, command: Command) -> Outcome:
        # fuseplan's own plugin has been imported where pytest would first rewrite its assertions, and it has none.
        arguments = ["-Wignore::pytest.PytestAssertRewriteWarning", *command.arguments]
        (outcome,) = self._forked(command, [(arguments, {})], module="pytest")
        return outcome

    def _forked(self, command: Command, processes: Processes, **what: str) -> list[Outcome]:
        environment = {**self.environment, **command.environment}
        # Output is compared, and what a first compilation logs isn't part of what most pages are about.
        told: dict[str, Any] = {**what, "environment": environment, "processes": processes, "is_told": False}
        return self.forks.outcomes(self.forks.start(Request(folder=str(self.folder), **told)))

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
    """Traces each workload once, whatever number of commands explain or tune it: that is where their time goes.

    A workload is known by its name and by the files of the folder, which its factory may be in, or by the path of its
    configuration, which doesn't change.
    """
    build, capture = catalog.build, capturing.capture
    traces: dict[tuple[Any, ...], Any] = {}
    current: list[tuple[Any, ...]] = []

    @contextmanager
    def remember(name: str, **options: Any) -> Iterator[Any]:
        files = sorted((path.name, path.read_text(encoding="utf-8")) for path in Path.cwd().glob("[!.]*.py"))
        config = Path(name, "config.json") if Path(name).is_dir() else Path(name)
        known = config.resolve() if config.is_file() else name
        told = sorted((option, value) for option, value in options.items() if value)  # the others are defaults
        current[:] = [(known, *told, *(files if ":" in name else ()))]
        with build(name, **options) as built:
            yield built

    def look_up(model: Any, inputs: Any, kwargs: Any, **options: Any) -> Any:
        (key,) = current
        if key not in traces:
            traces[key] = capture(model, inputs, kwargs, **options)
        return traces[key]

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(catalog, "build", remember))
    for module in (comparison, costs):
        stack.enter_context(mock.patch.object(module, "capture", look_up))
    return stack
