"""One decode step of an unmodified Hugging Face Llama of Llama-3.1-8B's shape, split by its own tp_plan, on a static
cache, in CUDA graphs: fuseplan beside plain torch.compile, and beside fuseplan that leaves attention alone, in one
process a rank.

torchrun --nproc-per-node 2 benchmarks/decode.py [--layers 8] [--batch 1 8 32] [--device cpu] [--captured] [--write]
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
    "Llama-3.1-8B's layer shape (on a CPU 256 wide), bfloat16, vocabulary 32000, static cache of 1280, position 1000, "
    "mode='reduce-overhead'; without FLAG: fuseplan with that flag of PassConfig off; grouped_attention: what fuseplan "
    "takes less than so, and what so takes less than plain; host: until the step's call has returned; without_guards: "
    "under torch.compiler.set_stance(skip_guard_eval_unsafe=True); captured: each step in one CUDA graph that was "
    "captured by hand, as engines do, without mode='reduce-overhead', so that no rank waits for Python"
)
PLAIN, FUSED, APART = "torch.compile", "fuseplan", "without fuse_grouped_attention"


def model_of(layers: int, rank: int, device: torch.device) -> LlamaForCausalLM:
    """Random weights, saved once and loaded by every rank with the model's own plan."""
    width, heads = (4096, 32) if device.type == "cuda" else (256, 8)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    if rank == 0:
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": width, "intermediate_size": width * 7 // 2, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads // 4, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        with device:
            whole: Any = LlamaForCausalLM(LlamaConfig(**shape))
            whole.to(torch.bfloat16).save_pretrained(folder[0])
        torch.cuda.empty_cache()
    dist.broadcast_object_list(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.bfloat16)
    return model.eval()  # type: ignore[no-any-return]


class Step:
    """A compiled step at one batch size, with a cache of its own."""

    def __init__(self, model: LlamaForCausalLM, batch: int, compiled: Callable[..., Any]) -> None:
        device, self.compiled = model.device, compiled
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=CACHE)
        ids = torch.randint(0, 32000, (batch, 1), device=device, generator=torch.Generator(device).manual_seed(batch))
        self.arguments = {
            "input_ids": ids, "position_ids": torch.full((batch, 1), POSITION, device=device),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip
        model(**self.arguments)
        for layer in self.cache.layers:
            for value in vars(layer).values():
                if isinstance(value, torch.Tensor):
                    torch._dynamo.mark_static_address(value)

    def __call__(self) -> torch.Tensor:
        """Logits."""
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        if dist.get_backend() == "nccl":
            torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(**self.arguments).logits  # type: ignore[no-any-return]

    def capture(self) -> None:
        """From now on, a step is one replay. It was called before, so that nothing compiles while it is captured."""
        meet()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events meanwhile, in a thread of its own.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self.compiled(**self.arguments).logits
        self.graph = graph
        meet()

    def repeat(self) -> tuple[float, float]:
        """Microseconds a step, and those of them until its call has returned. Tokens are written behind POSITION."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(POSITION)
        meet()
        start = time.perf_counter()
        for _ in range(STEPS):
            self()
        returned = time.perf_counter()
        synchronize()
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


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()


def meet() -> None:
    """Waits for this rank's GPU, and for all ranks."""
    synchronize()
    dist.barrier()
    synchronize()


def profiled(step: Step) -> list[list[Any]]:
    """The kernels of a step that take the most: microseconds, calls, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        meet()  # else kernels that wait for another rank also wait for its profiler
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = [(e.self_device_time_total / 3, e.count / 3, e.key[:80]) for e in profile.key_averages()]
    return [[round(us, 1), round(count, 1), name] for us, count, name in sorted(events, reverse=True)[:12]]


def compared(times: Mapping[str, tuple[Figure, Figure]]) -> dict[str, Any]:
    """Each side's step, what fuseplan's takes less than plain torch.compile's, and what attention has of that."""
    us = {name: whole.us for name, (whole, _) in times.items()}
    return {
        **{name: whole.json() for name, (whole, _) in times.items()},
        "less_time_percent": round(100 * (1 - us[FUSED] / us[PLAIN]), 2),
        "grouped_attention": {
            "gave_us": round(us[APART] - us[FUSED], 2),
            "less_time_percent": round(100 * (1 - us[FUSED] / us[APART]), 2),
            "rest_less_time_percent": round(100 * (1 - us[APART] / us[PLAIN]), 2),
        },
    }


def measure(model: LlamaForCausalLM, batch: int, *, captured: bool) -> dict[str, Any]:
    """All sides at one batch size."""
    torch._dynamo.reset()
    forward, on_gpu = model.forward, dist.get_backend() == "nccl"
    reports: dict[str, list[fuseplan.Report]] = {FUSED: [], APART: []}
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if on_gpu and not captured:
        how["mode"] = "reduce-overhead"
    apart = fuseplan.PassConfig(fuse_grouped_attention=False)
    sides = {
        PLAIN: Step(model, batch, torch.compile(forward, **how)),
        FUSED: Step(model, batch, fuseplan.compile(forward, on_report=reports[FUSED].append, **how)),
        APART: Step(model, batch, fuseplan.compile(forward, config=apart, on_report=reports[APART].append, **how)),
    }
    logits = {}
    for name, step in sides.items():
        for _ in range(4):
            logits[name] = step().float().clone()
        if captured:
            step.capture()
            logits[name] = step().float().clone()
    times = timed(sides)
    unguarded: dict[str, Any] = {}
    if not captured:
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            for step in sides.values():
                step()
            unguarded = {"without_guards": compared(timed(sides))}
    graphs = reports[FUSED][-1].graphs
    return {
        "batch": batch,
        "captured": captured,
        **compared(times),
        "tokens_per_s": {name: round(batch / whole.us * 1e6) for name, (whole, _) in times.items()},
        "host": {name: host.json() for name, (_, host) in times.items()},
        **unguarded,
        "fused": reports[FUSED][-1].fused,
        "fused_apart": reports[APART][-1].fused,
        "applied": sorted({f"{f.rule}:{f.provider}" for graph in graphs for f in graph.applied}),
        "refused": sorted({r.detail for graph in graphs for r in graph.refusals if r.detail})[:6],
        "logits_relative_difference": float((logits[FUSED] - logits[PLAIN]).norm() / logits[PLAIN].norm()),
        "profile": {name: profiled(step) for name, step in sides.items()} if on_gpu else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--captured", action="store_true", help="each step in one CUDA graph, captured by hand")
    parser.add_argument("--write", action="store_true", help="write results/decode_DEVICExRANKS[_captured].json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rank, on_gpu = int(os.environ["RANK"]), arguments.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    ranks, rows = dist.get_world_size(), list[dict[str, Any]]()
    flag, suffix = (" --captured", "_captured") if arguments.captured else ("", "")
    result = {
        "what": WHAT,
        "command": f"torchrun --nproc-per-node {ranks} benchmarks/decode.py --layers {arguments.layers}{flag} --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions() if on_gpu else {"torch": torch.__version__},
        "ranks": ranks,
        "layers": arguments.layers,
        "rows": rows,
    }
    name = torch.cuda.get_device_name().split()[1].lower() if on_gpu else "cpu"
    with torch.no_grad():
        model = model_of(arguments.layers, rank, device)
        for batch in arguments.batch:
            rows.append(measure(model, batch, captured=arguments.captured))
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                if arguments.write:
                    path = arguments.out / f"decode_{name}x{ranks}{suffix}.json"
                    path.write_text(json.dumps(result, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
