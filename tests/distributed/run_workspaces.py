"""One rank of several: `run_workspaces.py RANK RANKS FOLDER` has ranks make workspaces together, against all odds, and
writes what it saw to FOLDER/RANK.json. Memory that can't be shared stands in for that of GPUs.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed import distributed_c10d

import fuseplan
from fuseplan.compilation import analysis, first_run
from fuseplan.distributed import agree_in_groups
from fuseplan.distributed import workspace as workspaces
from fuseplan.errors import CollectiveError
from fuseplan.providers import provider_of
from tests.distributed.run_ranks import FOLDER, OP, RANK, close, inputs, meet, model, sums
from tests.interpreted import no_code

RANKS = int(sys.argv[2])
LAST = RANKS - 1
CPU = torch.device("cpu")
INTERPRETER = threading.Lock()
"""A library that waits without letting other threads run holds it."""


def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def no_memory(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def rendezvous(local: Tensor, group: dist.ProcessGroup) -> SimpleNamespace:
    """Waits for the other ranks, as torch's does: whoever they come for."""
    store = distributed_c10d._get_process_group_store(group)
    with INTERPRETER:
        came = store.add("rendezvous", 1)
        round_ = (came - 1) // group.size()
        until = time.monotonic() + 20
        while store.add("rendezvous", 0) < (round_ + 1) * group.size():
            if time.monotonic() > until:
                raise RuntimeError("the others are waiting for something else")
            time.sleep(0.002)
    return SimpleNamespace(buffer_ptrs=[local.data_ptr()] * group.size())


def make(group: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What was wrong with making a workspace."""
    try:
        workspaces.workspace_of(group, CPU, dtype, 4096)
    except CollectiveError as error:
        return str(error)
    return None


def opposite_orders() -> list[str | None]:
    """Threads that make workspaces of two groups and two dtypes, on every other rank in another order."""
    groups = [dist.new_group().group_name for _ in range(2)]
    wanted = [(group, dtype) for group in groups for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda each=each: found.append(make(*each)), daemon=True) for each in wanted]
    for thread in reversed(threads) if RANK % 2 else threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(90)
    return found + ["waits for ever"] * sum(thread.is_alive() for thread in threads)


def no_memory_on_the_last() -> tuple[str | None, str | None]:
    """Twice: what is wrong on one rank, and, once it has memory, on none."""
    group = dist.new_group().group_name
    with mock.patch.object(symmetric_memory, "empty", no_memory if RANK == LAST else empty):
        first = make(group)
    return first, make(group)


def the_last_is_late() -> tuple[str | None, str | None]:
    """It comes after the others have given up, and gets their results; then all of them come once more."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=0.5)).group_name
    dist.barrier()
    if RANK == LAST:
        time.sleep(1.5)
    first = make(group)
    dist.barrier()
    return first, make(group)


def the_last_has_no_plan() -> str | None:
    """How long the others wait is up to their group."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=0.5)).group_name
    dist.barrier()
    if RANK == LAST:
        time.sleep(1.5)
    return agree_in_groups([group], graph="g", digest="plan", deadline_s=None).reason


SHARES = dataclasses.replace(provider_of("shares", {OP: sums}), runs_alone=True)


def planned_again(prepare: Callable[..., str], **settings: Any) -> dict[str, Any]:
    """A model whose ranks agree on a kernel that needs shared memory, which one of them can't have."""
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(FOLDER / f"cache-{RANK}")
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(agreement_timeout_s=60, verify="off", **settings)
    needed = (("0", "bfloat16", "cpu"),)

    def workspaces_of(problem: Any, decision: Any) -> Any:
        chosen = [problem.candidates[index].match.provider for index in decision.selected]
        return needed if "shares" in chosen else ()

    with (
        mock.patch.object(analysis, "_workspaces", workspaces_of), mock.patch.object(first_run, "prepare", prepare),
        torch.inference_mode(), no_code() if RANKS > 2 else contextlib.nullcontext(),
    ):  # fmt: skip
        compiled = fuseplan.compile(model, config=config, on_report=reports.append, providers=[SHARES])
        outputs, again = compiled(*inputs(3)), compiled(*inputs(3))
        expected = model(*inputs(3))
    return {
        "right": close((*outputs, *again), (*expected, *expected)),
        "providers": [[fusion.provider for graph in report.graphs for fusion in graph.applied] for report in reports],
        "warnings": [refusal.detail for report in reports for refusal in report.warnings],
    }


def fails_on_the_last(wanted: Any) -> str:
    if RANK == LAST:
        raise AssertionError("an internal error")
    return ""


def main() -> None:
    meet(RANKS)
    results: dict[str, Any] = {}
    with (
        mock.patch.object(symmetric_memory, "empty", empty),
        mock.patch.object(symmetric_memory, "rendezvous", rendezvous),
    ):
        for scenario in (opposite_orders, no_memory_on_the_last, the_last_is_late, the_last_has_no_plan):
            results[scenario.__name__] = scenario()
            dist.barrier()
    force = ("allreduce_rms:shares",)
    results["planned again"] = planned_again(
        fails_on_the_last, policy="ordered(allreduce_rms)", forbid=("allreduce_rms:torch",)
    )
    results["forced"] = planned_again(fails_on_the_last, force=force)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
