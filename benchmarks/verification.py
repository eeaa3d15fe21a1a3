"""What it costs to verify fusions before their first use, as a share of the compilation that they are part of.

    PYTHONPATH=src python benchmarks/verification.py [--write]

Every fusion that matches is applied, by the `torch` provider, since a plan for a CPU would leave nearly all of them
alone. Each compilation starts with empty caches. `gpt-oss-20b` is cut to two layers, which is the worst case: further
layers take time to compile and bring nothing new to verify.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from committed import main
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fuseplan
from fuseplan.workloads.models import workload

REPEATS = 3
WORKLOADS = {"gpt-oss-20b-tiny": None, "gpt-oss-120b-tiny": None, "gpt-oss-20b": 2}
POLICY = "ordered(allreduce_rms_padding, allreduce_rms, act_padding, norm_quant, act_quant)"


@contextmanager
def two_ranks() -> Iterator[dist.ProcessGroup]:
    """A group whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def compile_once(model: torch.nn.Module, inputs: tuple[Tensor, ...], verify: str) -> dict[str, Any]:
    """One cold compilation, in seconds."""
    reports: list[fuseplan.Report] = []
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch._dynamo.maybe_mark_dynamic(inputs[0], 1)
        compiled = fuseplan.compile(
            model, config=fuseplan.PassConfig(policy=POLICY, verify=verify), on_report=reports.append
        )
        start = time.perf_counter()
        compiled(*inputs)
        total = time.perf_counter() - start
    graphs = [graph for report in reports for graph in report.graphs]
    verified = [outcome for graph in graphs for outcome in graph.verified]
    assert all(outcome.passed and not outcome.from_cache for outcome in verified)
    return {
        "total": total,
        "verification": sum(graph.stages_ns.get("verification", 0) for graph in graphs) / 1e9,
        "fused": sum(len(graph.applied) for graph in graphs),
        "verified": len(verified),
    }


def measured(name: str, layers: int | None) -> dict[str, Any]:
    """Compilations with and without, in turns."""
    with two_ranks() as group:
        chosen = workload(name) if layers is None else workload(name).with_layers(layers)
        model = chosen.build(group)
        runs: dict[str, list[dict[str, Any]]] = {"off": [], "first-use": []}
        compile_once(model, chosen.example_inputs(), "off")  # imports, the C++ compiler's first start
        for _ in range(REPEATS):
            for verify, rows in runs.items():
                rows.append(compile_once(model, chosen.example_inputs(), verify))
    shares = [run["verification"] / run["total"] for run in runs["first-use"]]
    first = runs["first-use"][0]
    return {
        "layers": layers or "all",
        "fused": first["fused"],
        "verified": first["verified"],
        "compile_off_s": spread([run["total"] for run in runs["off"]]),
        "compile_first_use_s": spread([run["total"] for run in runs["first-use"]]),
        "verification_s": spread([run["verification"] for run in runs["first-use"]]),
        "share": spread(shares),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


if __name__ == "__main__":
    main(
        "verification",
        "What verification costs, as a share of compilation.",
        "verification of every fusion, TP=2 in a stand-in group, as a share of a cold compilation",
        lambda: {"workloads": {name: measured(name, layers) for name, layers in WORKLOADS.items()}},
    )
