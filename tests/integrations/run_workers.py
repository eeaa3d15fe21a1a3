"""One worker of two: `run_workers.py RANK 2 FOLDER` has journals settle what it couldn't verify alone, and writes what
came of each to FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.dialect import ops
from fuseplan.errors import FuseplanError
from fuseplan.graph.facts import process_group
from fuseplan.integrations.vllm.reports import Journal
from fuseplan.providers import provider_of
from tests.helpers import HIDDEN, all_reduce, llama, post_grad, randn
from tests.ranks import leave

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[3])
OP = ops.all_reduce_fused_add_rms_norm


def sums(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str, group_name: str
) -> tuple[Tensor, Tensor]:
    """A collective kernel, as FlashInfer's."""
    total = x.float()
    dist.all_reduce(total, group=process_group(group_name))
    y, residual_out = ops.fused_add_rms_norm.reference(total.to(x.dtype), residual, weight, eps, rounding)
    return y, residual_out


def wrong_on_rank_1(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, residual_out = sums(*arguments)
    return (2 * y if RANK else y), residual_out


SUMS = provider_of("sums", {OP: sums}, cost=0.0)
WRONG = provider_of("wrong_on_rank_1", {OP: wrong_on_rank_1}, cost=0.0)


def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    assert dist.group.WORLD is not None
    return llama(all_reduce(x, dist.group.WORLD.group_name), residual, weight)


def compiled(name: str, config: PassConfig, provider: Any) -> Journal:
    """A worker's journal after its model was compiled, and before it ran."""
    journal = Journal(FOLDER / f"{name}-{RANK}.json", FOLDER / f"{name}-{RANK}.json", RANK)
    span = CompileRange(start=1, end=8)
    manager = PostGradPassManager(config, compile_range=span, on_report=journal.add, providers=[provider], settles=True)
    graph = post_grad(model, randn(5, HIDDEN), randn(5, HIDDEN), randn(HIDDEN), dynamic=True)
    manager(graph)
    return journal


def settled(journal: Journal, config: PassConfig) -> dict[str, Any]:
    given_up: list[None] = []
    raised = None
    try:
        journal.settle(config, lambda: given_up.append(None))
    except FuseplanError as error:
        raised = str(error)
    found = [graph for report in journal.reports for graph in report.graphs]
    return {
        "pending": [len(graph.pending) for graph in found],
        "verified": [[each.passed, each.ranks, each.tokens] for graph in found for each in graph.verified],
        "raised": raised,
        "given_up": len(given_up),
    }


def scenarios() -> dict[str, Any]:
    config = PassConfig(force=("allreduce_rms",), agreement_timeout_s=60)
    journal = compiled("cold", config, SUMS)
    results: dict[str, Any] = {"cold": settled(journal, config), "again": settled(journal, config)}

    killed = compiled("killed", config, SUMS)  # while the others verified
    warm = Journal(killed.kept, killed.path, RANK)
    results["killed"] = settled(warm, config)
    results["kept"] = [
        [len(graph["pending"]), len(graph["verified"])] for graph in json.loads(killed.kept.read_text())["graphs"]
    ]
    results["wrong"] = settled(compiled("wrong", config, WRONG), config)
    short = PassConfig(force=("allreduce_rms",), agreement_timeout_s=0.5)
    alone = compiled("alone", short, SUMS)
    dist.barrier()
    results["alone"] = settled(alone, short) if RANK == 0 else None
    return results


def main() -> None:
    store = TCPStore("127.0.0.1", int(os.environ["PORT"]), world_size=2, is_master=RANK == 0)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=2)
    torch.manual_seed(0)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(scenarios()))
    leave()


if __name__ == "__main__":
    main()
