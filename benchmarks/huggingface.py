"""What explaining published Hugging Face models takes and finds, and what fuseplan adds to compiling such models.

    PYTHONPATH=src python benchmarks/huggingface.py [--write]

Each model of `examples/configs` is explained at full size by the command, whose time and peak memory are taken.
Compilations are of the same architectures, cut to a few narrow layers, where the share of whatever fuseplan does once
is largest. Each starts with empty caches and generates its code anew in this process; plain ones and fuseplan's take
turns, and who begins changes with each turn. What is compared is CPU time, which others who share the machine disturb
less than time on the clock: of all of a compilation, and of fuseplan's code in it, which is measured directly. The C++
compiler runs in the first compilations alone, which aren't counted: it takes most of the time of a cold one, and would
make the overhead look smaller.
"""

import gc
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from committed import main
from torch._inductor import config as inductor_config
from torch.testing._internal.distributed.fake_pg import FakeStore

import fuseplan
from fuseplan import frontend
from fuseplan.caching import store
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.integrations import transformers as huggingface

CONFIGS = Path(__file__).parents[1] / "examples/configs"
TP, LAYERS, REPEATS = 2, 4, 5
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
    """What the command says of one model at full size, a range's share of it, and what it takes."""
    command = [sys.executable, "-c", "from fuseplan.cli import main; main()"]
    command += ["explain", str(CONFIGS / f"{name}.json"), "--tp", str(TP), "--policy", "planned", "--json"]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        started = subprocess.Popen(command, stdout=output)
        _, status, used = os.wait4(started.pid, 0)
        spent = time.perf_counter() - start
        started.returncode = os.waitstatus_to_exitcode(status)
        assert started.returncode == 0, name
        output.seek(0)
        explained = json.load(output)
    ranges = len(explained["ranges"])
    found, (planned,) = of_a_range(explained["recognized"], ranges), explained["policies"]
    return {
        "s": round(spent, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": used.ru_maxrss // 1024,
        "layers": huggingface.load_config(CONFIGS / f"{name}.json").num_hidden_layers,
        "graph_breaks": len(explained["breaks"]),
        "norms": {op: count for op, count in found.items() if "rms_norm" in op},
        "all_reduces": sum(count for op, count in found.items() if op.startswith("all_reduce")),
        "sites": of_a_range(planned["matched"], ranges),
        "fused": of_a_range(planned["fused"], ranges),
        "near_misses": [
            {"rule": row["rule"], "reason": row["reason"], "detail": row["detail"], "count": row["count"] // ranges}
            for row in explained["near_misses"]
        ],
        "notes": explained["notes"],
    }


def of_a_range(counts: dict[str, int], ranges: int) -> dict[str, int]:
    """Counts over all ranges, whose graphs are the same."""
    assert not any(count % ranges for count in counts.values())
    return {name: count // ranges for name, count in counts.items()}


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


def cpu_seconds() -> float:
    """Of this process and of those it started, if any."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


ADDED = (
    (fuseplan, "compile"),
    (PostGradPassManager, "__call__"),
    (PostGradPassManager, "uuid"),
    (store, "graph_key"),
    (store, "save"),
    (frontend, "settle"),
)
"""All that compiling by fuseplan does beside torch.compile: its pass, keys of caches, stored reports, agreement."""


@contextmanager
def added() -> Iterator[list[float]]:
    """CPU seconds of each call of fuseplan's code, those that one makes of another not counted twice."""
    spent: list[float] = []
    running: list[str] = []

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            running.append(name)
            start = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                running.pop()
                if not running:
                    spent.append(time.thread_time() - start)

        return call

    with ExitStack() as stack:
        for owner, name in ADDED:
            stack.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        yield spent


def compile_once(model: Any, ids: torch.Tensor, policy: str | None) -> dict[str, float]:
    """One cold compilation and the first call, in CPU seconds: of all, and of fuseplan's code."""
    reports: list[fuseplan.Report] = []
    torch._dynamo.reset()
    gc.collect()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), added() as spent:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        start = cpu_seconds()
        if policy is None:
            compiled = torch.compile(model)
        else:
            config = fuseplan.PassConfig(policy=policy)
            compiled = fuseplan.compile(model, config=config, on_report=reports.append)
        compiled(ids)
        total = cpu_seconds() - start
    assert bool(spent) == (policy is not None)
    fused = sum(len(graph.applied) for report in reports for graph in report.graphs)
    return {"cpu": total, "added": sum(spent), "fused": fused}


def overhead(name: str) -> dict[str, Any]:
    """Compilations by plain torch.compile and under each policy, in turns."""
    with two_ranks() as group, inductor_config.patch(compile_threads=1):
        torch.manual_seed(0)
        model = huggingface.build(narrow(name), group, name)
        ids = torch.arange(16)[None]
        asked: dict[str, str | None] = {"plain": None, **POLICIES}
        runs: dict[str, list[dict[str, float]]] = {who: [] for who in asked}
        for policy in asked.values():  # imports, the C++ compiler, and what torch computes once a process
            compile_once(model, ids, policy)
        for turn in range(REPEATS):
            order = [*asked][turn % len(asked) :] + [*asked][: turn % len(asked)]
            for who in order[:: 1 if turn % 2 else -1]:
                runs[who].append(compile_once(model, ids, asked[who]))
    plain = runs["plain"]
    usual = statistics.median(run["cpu"] for run in plain)
    return {
        "plain_cpu_s": spread([run["cpu"] for run in plain]),
        **{
            policy: {
                "added_share": spread([run["added"] / usual for run in rows]),
                "cpu_ratio": spread([run["cpu"] / base["cpu"] for run, base in zip(rows, plain, strict=True)]),
                "fused": int(rows[0]["fused"]),
            }
            for policy, rows in runs.items()
            if policy in POLICIES
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median, and the quartiles around it."""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "q1": round(first, 4), "q3": round(third, 4)}


def processor() -> str:
    """What the machine says that it computes with."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return model[1] if model else platform.processor()


def figures() -> dict[str, Any]:
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    load = os.getloadavg()[1]
    architectures = {huggingface.load_config(CONFIGS / f"{name}.json").model_type: name for name in names}
    return {
        "transformers": transformers.__version__,
        "explain": {name: explained(name) for name in names},
        "compile": {kind: overhead(name) for kind, name in architectures.items()},
        "compile_layers": LAYERS,
        "compile_turns": REPEATS,
        "processor": f"{os.cpu_count()} x {processor()}",
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[1], 2)},
    }


if __name__ == "__main__":
    main(
        "huggingface",
        "What explaining Hugging Face models takes and finds, and what fuseplan adds to their compilation.",
        f"fuseplan explain --tp {TP}, modelled costs of h200: counts of one compile range, seconds and MiB of the "
        f"whole command; cold compilations of {LAYERS} narrow layers on the CPU, without the C++ compiler: median and "
        "quartiles of CPU seconds, of what fuseplan's code adds to the plain ones, and of ratios to the plain one of "
        "the same turn",
        figures,
    )
