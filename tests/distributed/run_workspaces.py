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
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed import distributed_c10d

import fuseplan
from fuseplan.compilation import analysis, first_run
from fuseplan.dialect import ops
from fuseplan.distributed import agree_in_groups
from fuseplan.distributed import workspace as workspaces
from fuseplan.errors import CollectiveError
from fuseplan.graph.facts import process_group
from fuseplan.providers import provider_of
from tests.helpers import HIDDEN, all_reduce, llama
from tests.interpreted import no_code

RANK, RANKS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
LAST = RANKS - 1
CPU = torch.device("cpu")
WEIGHT = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
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


def model(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    assert dist.group.WORLD is not None
    y, total = llama(all_reduce(x, dist.group.WORLD.group_name), residual, WEIGHT)
    return y.relu(), total


def sums(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reduced = x.clone()
    dist.all_reduce(reduced, group=process_group(rest[-1]))
    return ops.fused_add_rms_norm.reference(*(reduced, *rest[:-1]))  # type: ignore[no-any-return]


SHARES = dataclasses.replace(
    provider_of("shares", {ops["all_reduce_fused_add_rms_norm"]: sums}), runs_alone=True
)  # fmt: skip


def planned_again(prepare: Callable[..., str], **settings: Any) -> dict[str, Any]:
    """A model whose ranks agree on a kernel that needs shared memory, which one of them can't have."""
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(FOLDER / f"cache-{RANK}")
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(agreement_timeout_s=60, verify="off", **settings)
    generator = torch.Generator().manual_seed(RANK)
    x, residual = torch.randn(3, HIDDEN, generator=generator).bfloat16(), torch.ones(3, HIDDEN).bfloat16()
    needed = (("0", "bfloat16", "cpu"),)

    def workspaces_of(problem: Any, decision: Any) -> Any:
        chosen = [problem.candidates[index].match.provider for index in decision.selected]
        return needed if "shares" in chosen else ()

    with (
        mock.patch.object(analysis, "_workspaces", workspaces_of), mock.patch.object(first_run, "prepare", prepare),
        torch.inference_mode(), no_code() if RANKS > 2 else contextlib.nullcontext(),
    ):  # fmt: skip
        compiled = fuseplan.compile(model, config=config, on_report=reports.append, providers=[SHARES])
        outputs, again = compiled(x, residual), compiled(x, residual)
        expected = model(x, residual)
    return {
        "right": all(
            torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2**-6)
            for got in (outputs, again)
            for a, b in zip(got, expected, strict=True)
        ),
        "providers": [[fusion.provider for graph in report.graphs for fusion in graph.applied] for report in reports],
        "warnings": [refusal.detail for report in reports for refusal in report.warnings],
        "refused": [
            refusal.detail for report in reports for graph in report.graphs for refusal in graph.refusals
            if refusal.provider == "shares"
        ],
    }  # fmt: skip


def fails_on_the_last(wanted: Any) -> str:
    if RANK == LAST:
        raise AssertionError("an internal error")
    return ""


def main() -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", int(os.environ["PORT"]), RANKS, is_master=RANK == 0)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
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
