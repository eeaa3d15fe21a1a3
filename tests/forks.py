"""Python files and modules, each in processes of its own, forked from one that has imported what they take longest to
import: torch, fuseplan, transformers, pytest.

Whoever connects to a `Server` writes one `Request` a line, as JSON, and reads the `Outcome` of every process of each.
"""

import dataclasses
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
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
IMPORTED_WHERE_TRITON_INTERPRETS = ("tests.providers.run_interpreted",)
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "GLOO_SOCKET_IFNAME": "lo",
    # Output is compared.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Hashes of texts are others than here.
    "PYTHONHASHSEED": "random",
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


class Server:
    """The process that forks, for all who connect: it imports nothing before the first does.

    Attributes:
        address: where they connect.
    """

    def __init__(self, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self._folder.name, "forks"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.address)
            listening.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(listening.fileno())], pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **environment},
            )  # fmt: skip

    def close(self) -> None:
        """Ends it, once all who have connected are done."""
        self._process.communicate()
        self._folder.cleanup()


class Forks:
    """A connection to a server, which runs its requests one after the other, beside what runs here."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        # Two: one that is written to forgets what it has read ahead.
        self._requests = self._socket.makefile("w", encoding="utf-8")
        self._answers = self._socket.makefile("r", encoding="utf-8")
        self._count, self._outcomes = 0, list[list[Outcome]]()

    def start(self, request: Request) -> int:
        """Returns the number by which its outcomes are asked for."""
        print(json.dumps(dataclasses.asdict(request)), file=self._requests, flush=True)
        self._count += 1
        return self._count - 1

    def outcomes(self, number: int) -> list[Outcome]:
        """How its processes ended; waits for that."""
        while len(self._outcomes) <= number:
            answer = json.loads(self._answers.readline())
            self._outcomes.append([Outcome(**each) for each in answer])
        return self._outcomes[number]

    def close(self) -> None:
        """Has the server know that nothing more is asked."""
        for each in (self._requests, self._answers, self._socket):
            each.close()


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


def _import() -> None:
    """Imports what forks needn't import again."""
    gc.disable()  # it all stays
    for name in IMPORTED + IMPORTED_WHERE_TRITON_INTERPRETS * ("TRITON_INTERPRET" in os.environ):
        importlib.import_module(name)
    for passes in ("joint_graph", "post_grad"):
        sys.modules[f"torch._inductor.fx_passes.{passes}"].lazy_init()
    # As in running.py.
    vars(sys.modules["torch._dynamo.guards"])["profile_guard_manager"] = lambda *_: 0.0
    sys.modules["torch._dynamo.config"].run_gc_after_compile = False  # type: ignore[attr-defined]
    sys.path.remove(str(ROOT))  # the folder that `-m` puts there; PYTHONPATH has it, too
    gc.set_threshold(100_000, 20, 20)
    gc.enable()
    gc.freeze()


def main() -> None:
    """Serves each connection in a process of its own, until standard input ends."""
    has_imported = False
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            with connection, connection.makefile("r") as requests, connection.makefile("w") as answers:
                if not has_imported:
                    _import()
                    has_imported = True
                if os.fork():
                    continue
                listening.close()
                for line in requests:
                    print(json.dumps(_answer(Request(**json.loads(line)))), file=answers, flush=True)
                os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
