"""Python files and modules, each in processes of its own, forked from one that has imported what they take longest to
import: torch, fuseplan, transformers, pytest.

`python -m tests.forks` reads one `Request` a line, as JSON, and answers each with the `Outcome` of every process.
"""

import dataclasses
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "pytest",
    "scipy.optimize",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.codegen.cpp",
    "torch._inductor.codegen.cpp_wrapper_cpu",
    "torch._inductor.compile_fx",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._inductor.fx_passes.pre_grad",
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
    "fuseplan.frontend",
    "fuseplan.integrations.transformers",
    "fuseplan.testing",
)
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "GLOO_SOCKET_IFNAME": "lo",
    # Output is compared.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # What has been forked can't use a GPU.
    "CUDA_VISIBLE_DEVICES": "",
    # No threads in the process that forks.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
LIMIT_S = 600


Processes = Sequence[tuple[Sequence[str], Mapping[str, str]]]
"""The arguments of each, and its variables."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A file or a module to run.

    Attributes:
        path: the file; empty: it is a module.
        module: its name.
        folder: where it runs.
        environment: variables of all its processes.
        processes: they run at once; a variable of theirs goes before one of all.
        is_told: whether they print the line that a first compilation logs.
    """

    path: str = ""
    module: str = ""
    folder: str = str(ROOT)
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: Processes = (((), {}),)
    is_told: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it printed."""

    status: int
    output: str


class Forks:
    """The process that forks: runs one request after the other, beside what runs here."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **environment},
        )  # fmt: skip
        self._count, self._outcomes = 0, list[list[Outcome]]()

    def start(self, request: Request) -> int:
        """Returns the number by which its outcomes are asked for."""
        assert self._process.stdin is not None
        print(json.dumps(dataclasses.asdict(request)), file=self._process.stdin, flush=True)
        self._count += 1
        return self._count - 1

    def outcomes(self, number: int) -> list[Outcome]:
        """How its processes ended; waits for that."""
        assert self._process.stdout is not None
        while len(self._outcomes) <= number:
            answer = json.loads(self._process.stdout.readline())
            self._outcomes.append([Outcome(**each) for each in answer])
        return self._outcomes[number]

    def close(self) -> None:
        """Ends the process that forks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _run(request: Request, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """In the forked process: as `python path arguments...`, or `python -m module arguments...`, would in its folder."""
    os.chdir(request.folder)
    os.environ.update({**request.environment, **environment})
    if not request.is_told:
        logging.getLogger("fuseplan.compiled").setLevel(logging.WARNING)
    sys.path.insert(0, request.folder)
    if any(name.startswith("TORCH_") for name in request.environment):
        from torch._logging._internal import _init_logs

        _init_logs()
    sys.argv = [request.path or request.module, *arguments]
    if request.module:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(request.path, run_name="__main__")


def _fork(request: Request, arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> int:
    """The number of a process that is running, and ends by itself or is killed in time."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(LIMIT_S)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        _run(request, arguments, environment)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, it is the answer
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _answer(request: Request) -> list[dict[str, Any]]:
    """Forks, waits, and reads what was written."""
    running = []
    for arguments, environment in request.processes:
        output = tempfile.TemporaryFile()  # noqa: SIM115 - read and closed below
        running.append((_fork(request, arguments, environment, output), output))
    outcomes = []
    for child, output in running:
        _, code = os.waitpid(child, 0)
        with output:
            output.seek(0)
            outcomes.append(Outcome(os.waitstatus_to_exitcode(code), output.read().decode()))
    return [dataclasses.asdict(each) for each in outcomes]


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for passes in ("joint_graph", "post_grad"):
        sys.modules[f"torch._inductor.fx_passes.{passes}"].lazy_init()
    vars(sys.modules["torch._dynamo.guards"])["profile_guard_manager"] = lambda *_: 0.0  # as in conftest.py
    sys.path.remove(str(ROOT))  # the folder that `-m` puts there; PYTHONPATH has it, too
    gc.set_threshold(100_000, 20, 20)
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_answer(Request(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
