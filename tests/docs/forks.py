"""Runs Python files, each in a process of its own, forked from one that has imported torch, scipy and pytest: importing
them takes longer than most files. Nothing of fuseplan is there before a file imports it.

It reads one request a line, JSON with `path` or `module`, `folder`, `environment` and `arguments`, and answers each
with `status` and `output`.
"""

import gc
import importlib
import json
import logging
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from torch._logging._internal import _init_logs

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
)


def run(request: dict[str, Any]) -> None:
    """In the forked process: as `python path arguments...`, or `python -m module arguments...`, would in its folder."""
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    # Output is compared, and the line that a first compilation logs isn't part of what most pages are about.
    logging.getLogger("fuseplan.compiled").setLevel(logging.WARNING)
    sys.path.insert(0, request["folder"])
    if any(name.startswith("TORCH_") for name in request["environment"]):
        _init_logs()
    sys.argv = [request.get("path", ""), *request["arguments"]]
    if "module" in request:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(request["path"], run_name="__main__")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Forks, waits, and reads what was written."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                run(request)
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:  # noqa: BLE001 - whatever it is, it is the answer
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(child, 0)
        output.seek(0)
        return {"status": os.waitstatus_to_exitcode(code), "output": output.read().decode()}


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for passes in ("joint_graph", "post_grad"):
        sys.modules[f"torch._inductor.fx_passes.{passes}"].lazy_init()
    sys.path.remove(str(Path(__file__).resolve().parent))
    gc.set_threshold(100_000, 20, 20)
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
