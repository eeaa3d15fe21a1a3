"""One decode step of an unmodified Hugging Face Llama of Llama-3.1-8B's shape, split by its own tp_plan, on a static
cache, in CUDA graphs: fuseplan beside plain torch.compile, in one process a rank.

torchrun --nproc-per-node 2 benchmarks/decode.py [--layers 8] [--batch 1 8 32] [--write]
"""

import argparse
import datetime
import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fuseplan
from benchmarks.graphs import Figure, figure, leave, slowest, versions

POSITION, CACHE = 1000, 1280
REPEATS, STEPS = 25, 40
WHAT = (
    "microseconds a decode step, [median, interquartile range] of interleaved repeats of 40 steps, slowest rank; "
    "Llama-3.1-8B's layer shape, bfloat16, vocabulary 32000, static cache of 1280, position 1000, "
    "mode='reduce-overhead'; host: until the step's call has returned; without_guards: under "
    "torch.compiler.set_stance(skip_guard_eval_unsafe=True)"
)


def model_of(layers: int, rank: int) -> LlamaForCausalLM:
    """Random weights, saved once and loaded by every rank with the model's own plan."""
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    if rank == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096, rope_theta=5e5, rms_norm_eps=1e-5,
        )  # fmt: skip
        with torch.device("cuda"):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder[0])
        torch.cuda.empty_cache()
    dist.broadcast_object_list(folder)
    return LlamaForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.bfloat16).eval()  # type: ignore[no-any-return]


class Step:
    """A compiled step at one batch size, with a cache of its own."""

    def __init__(self, model: LlamaForCausalLM, batch: int, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        ids = torch.randint(0, 32000, (batch, 1), device="cuda", generator=torch.Generator("cuda").manual_seed(batch))
        self.arguments = {
            "input_ids": ids, "position_ids": torch.full((batch, 1), POSITION, device="cuda"),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip
        model(**self.arguments)
        for layer in self.cache.layers:
            for value in vars(layer).values():
                if isinstance(value, torch.Tensor):
                    torch._dynamo.mark_static_address(value)

    def __call__(self) -> torch.Tensor:
        """Logits."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(**self.arguments).logits  # type: ignore[no-any-return]

    def repeat(self) -> tuple[float, float]:
        """Microseconds a step, and those of them until its call has returned. Tokens are written behind POSITION."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(POSITION)
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            self()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS * 1e6, (returned - start) / STEPS * 1e6


def timed(sides: Mapping[str, Step]) -> dict[str, tuple[Figure, Figure]]:
    """A step of each side, and its host's part, in turns."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    for _ in range(REPEATS):
        for name, step in sides.items():
            samples[name].append(step.repeat())
    gc.enable()
    return {
        name: (figure(slowest([whole for whole, _ in each])), figure(slowest([host for _, host in each])))
        for name, each in samples.items()
    }


def profiled(step: Step) -> list[list[Any]]:
    """The kernels of a step that take the most: microseconds, calls, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = [(e.self_device_time_total / 3, e.count / 3, e.key[:80]) for e in profile.key_averages()]
    return [[round(us, 1), round(count, 1), name] for us, count, name in sorted(events, reverse=True)[:12]]


def less_time(times: Mapping[str, tuple[Figure, Figure]]) -> float:
    """Of fuseplan's step than of the other one, per cent."""
    return round(100 * (1 - times["fuseplan"][0].us / times["torch.compile"][0].us), 2)


def measure(model: LlamaForCausalLM, batch: int) -> dict[str, Any]:
    """Both sides at one batch size."""
    torch._dynamo.reset()
    forward, reports = model.forward, list[fuseplan.Report]()
    how = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
    sides = {
        "torch.compile": Step(model, batch, torch.compile(forward, **how)),
        "fuseplan": Step(model, batch, fuseplan.compile(forward, on_report=reports.append, **how)),
    }
    logits = {}
    for name, step in sides.items():
        for _ in range(4):
            logits[name] = step().float().clone()
    times = timed(sides)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for step in sides.values():
            step()
        unguarded = timed(sides)
    apart = (logits["fuseplan"] - logits["torch.compile"]).norm() / logits["torch.compile"].norm()
    return {
        "batch": batch,
        **{name: whole.json() for name, (whole, _) in times.items()},
        "less_time_percent": less_time(times),
        "tokens_per_s": {name: round(batch / whole.us * 1e6) for name, (whole, _) in times.items()},
        "host": {name: host.json() for name, (_, host) in times.items()},
        "without_guards": {
            **{name: whole.json() for name, (whole, _) in unguarded.items()},
            "less_time_percent": less_time(unguarded),
        },
        "fused": reports[-1].fused,
        "applied": sorted({f"{f.rule}:{f.provider}" for graph in reports[-1].graphs for f in graph.applied}),
        "refused": sorted({r.detail for graph in reports[-1].graphs for r in graph.refusals if r.detail})[:6],
        "logits_relative_difference": float(apart),
        "profile": {name: profiled(step) for name, step in sides.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/decode_DEVICExRANKS.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    ranks, rows = dist.get_world_size(), list[dict[str, Any]]()
    result = {
        "what": WHAT,
        "command": f"torchrun --nproc-per-node {ranks} benchmarks/decode.py --layers {arguments.layers} --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "ranks": ranks,
        "layers": arguments.layers,
        "rows": rows,
    }
    name = torch.cuda.get_device_name().split()[1].lower()
    with torch.no_grad():
        model = model_of(arguments.layers, rank)
        for batch in arguments.batch:
            rows.append(measure(model, batch))
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                if arguments.write:
                    path = arguments.out / f"decode_{name}x{ranks}.json"
                    path.write_text(json.dumps(result, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
