"""What tests that start several ranks share, and their processes.

`python -m tests.ranks MODULE RANKS FOLDER` runs a module of tests once for each rank, as `MODULE RANK RANKS FOLDER`,
each in a process forked from one that has imported what the module does, and prints their exit statuses.
"""

import ast
import gc
import importlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from fuseplan.distributed.workspace import SLOTS, Workspace
from fuseplan.providers.triton.tuned import SECOND_WAIT_BYTES, Found

COMPILER = ("torch._inductor.codegen.cpp", "torch._inductor.codegen.cpp_wrapper_cpu", "torch._inductor.compile_fx")
"""What compiling imports."""


def seen_by_ranks(module: str, ranks: int, folder: Path, *, statuses: list[int], **environment: str) -> list[Any]:
    """What each rank wrote to FOLDER/RANK.json; asserts that they ended as expected."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.ranks", module, str(ranks), str(folder)]
    alone = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
        env={**os.environ, **alone, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == statuses, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _imported_by(module: str) -> Iterator[str]:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    for node in ast.parse(Path(found.origin).read_text()).body:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _run(module: str, *arguments: str) -> NoReturn:
    try:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException:  # noqa: BLE001 - a rank that failed says why
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    module, ranks, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    for name in (*_imported_by(module), *COMPILER):
        importlib.import_module(name)
    gc.freeze()
    running = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _run(module, str(rank), str(ranks), folder)
        running.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in running]))


def leave() -> NoReturn:
    """Waits for the other ranks and ends this process, successfully and at once.

    gloo's threads now and then outlive their process group, and the interpreter, taking down what is left, then aborts:
    "terminate called without an active exception". A rank that failed has raised before.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def always(size: int) -> Found:
    """Two shots from that many bytes on, in place of what was found."""
    return replace(SECOND_WAIT_BYTES, steps=((inf, size),))


def left_in(workspace: Workspace) -> int:
    """Words that aren't empty in the two slots that the last call didn't fill, once all ranks have made it."""
    dist.barrier()
    slot = (int(workspace.state[0]) - 1) % SLOTS
    shots = workspace.words[: workspace.sums_at].view(SLOTS, -1)
    sums = workspace.words[workspace.sums_at :].view(SLOTS, -1)
    found = sum(int((each != -1).sum()) for parts in (shots, sums) for at, each in enumerate(parts) if at != slot)
    dist.barrier()
    return found


if __name__ == "__main__":
    main()
