"""What explaining published Hugging Face models takes and finds, and what fuseplan adds to compiling such models.

    PYTHONPATH=src python benchmarks/huggingface.py [--write]

Each model of `examples/configs` is explained at full size in a process of its own, which tells its own time and peak
memory. Compilations are of the same architectures, cut to a few narrow layers, where the share of whatever fuseplan
does once is largest; each starts with empty caches, plain ones and fuseplan's in turns.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from committed import main
from torch.testing._internal.distributed.fake_pg import FakeStore

import fuseplan
from fuseplan import workloads
from fuseplan.integrations import transformers as huggingface

CONFIGS = Path(__file__).parents[1] / "examples/configs"
TP, LAYERS, REPEATS = 2, 4, 3
TOKENS = fuseplan.CompileRange(start=1, end=64)
NARROW = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
POLICIES = {"planned": "planned", "fused": "ordered(allreduce_rms)"}
"""What a CPU does by default, which is to leave all to Inductor, and every fusion applied and verified."""


def explained(name: str) -> dict[str, Any]:
    """One model at full size, in this process; the imports count."""
    start = time.perf_counter()
    config = fuseplan.PassConfig(compile_ranges=[TOKENS])
    with workloads.build(str(CONFIGS / f"{name}.json"), tp=TP) as built:
        report = fuseplan.explain(built.model, *built.inputs, config=config, device="h200")
    found = report.recognized
    return {
        "s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time(), 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "layers": huggingface.load_config(CONFIGS / f"{name}.json").num_hidden_layers,
        "graphs": len(report.graphs),
        "graph_breaks": len(report.breaks),
        "norms": {op: count for op, count in found.items() if "rms_norm" in op},
        "all_reduces": sum(count for op, count in found.items() if op.startswith("all_reduce")),
        "sites": report.matched,
        "fused": report.fused,
        "notes": list(built.notes),
    }


def explained_alone(name: str) -> dict[str, Any]:
    """The same in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--explain", name], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def two_ranks() -> Iterator[dist.ProcessGroup]:
    """A group whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=TP, store=FakeStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def narrow(name: str) -> Any:
    """A configuration of the same architecture, cut to `LAYERS` narrow layers."""
    config = huggingface.with_layers(huggingface.load_config(CONFIGS / f"{name}.json"), LAYERS, name)
    for field, value in NARROW.items():
        if getattr(config, field, None) is not None:
            setattr(config, field, value)
    config.use_cache = False
    return config


def compile_once(model: Any, ids: torch.Tensor, policy: str | None) -> dict[str, float]:
    """One cold compilation, in seconds: of all, and of fuseplan's stages."""
    reports: list[fuseplan.Report] = []
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        if policy is None:
            compiled = torch.compile(model)
        else:
            config = fuseplan.PassConfig(policy=policy)
            compiled = fuseplan.compile(model, config=config, on_report=reports.append)
        start = time.perf_counter()
        compiled(ids)
        total = time.perf_counter() - start
    graphs = [graph for report in reports for graph in report.graphs]
    stages = sum(spent for graph in graphs for spent in graph.stages_ns.values()) / 1e9
    return {"total": total, "stages": stages, "fused": sum(len(graph.applied) for graph in graphs)}


def overhead(name: str) -> dict[str, Any]:
    """Compilations by plain torch.compile and under each policy, in turns."""
    with two_ranks() as group:
        torch.manual_seed(0)
        model = huggingface.build(narrow(name), group, name)
        ids = torch.arange(16)[None]
        for policy in (None, POLICIES["fused"]):  # imports, and what torch computes once a process
            compile_once(model, ids, policy)
        plain: list[float] = []
        runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
        for _ in range(REPEATS):
            plain.append(compile_once(model, ids, None)["total"])
            for policy, rows in runs.items():
                rows.append(compile_once(model, ids, POLICIES[policy]))
    return {
        "plain_s": spread(plain),
        **{
            policy: {
                "total_s": spread([run["total"] for run in rows]),
                "share_of_stages": spread([run["stages"] / run["total"] for run in rows]),
                "wall_clock_ratio": round(
                    statistics.median(run["total"] for run in rows) / statistics.median(plain), 3
                ),
                "fused": int(rows[0]["fused"]),
            }
            for policy, rows in runs.items()
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def figures() -> dict[str, Any]:
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    load = os.getloadavg()[1]
    architectures = {huggingface.load_config(CONFIGS / f"{name}.json").model_type: name for name in names}
    return {
        "explain": {name: explained_alone(name) for name in names},
        "compile": {kind: overhead(name) for kind, name in architectures.items()},
        "compile_layers": LAYERS,
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[1], 2), "cores": os.cpu_count()},
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--explain"]:
        sys.stdout.write(json.dumps(explained(sys.argv[2])))
    else:
        main(
            "huggingface",
            "What explaining Hugging Face models takes and finds, and what fuseplan adds to their compilation.",
            f"explain at TP={TP}, {TOKENS.start} to {TOKENS.end} tokens, modelled costs of h200, in seconds and MiB, "
            f"imports included; cold compilations of {LAYERS} narrow layers on the CPU, in seconds and shares of one",
            figures,
        )
