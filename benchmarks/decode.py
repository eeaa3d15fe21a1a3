"""One decode step of an unmodified Hugging Face model, split by its own tp_plan, on a static cache, in CUDA graphs:
fuseplan beside plain torch.compile, and beside fuseplan that leaves attention alone, in one process a rank; of a model
in fp8 beside fuseplan that fuses attention alone, and beside one that leaves quantisations.

torchrun --nproc-per-node 2 benchmarks/decode.py [--model llama-3.1-8b] [--layers 8] [--batch 1 8 32] [--device cpu]
    [--quantised fp8_rows] [--captured] [--write]
"""

import argparse
import datetime
import gc
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import StaticCache

import fuseplan
from benchmarks import published_shapes
from benchmarks.graphs import Figure, figure, leave, slowest, versions
from benchmarks.published_shapes import SHAPES
from benchmarks.quantised import FLAGS, FORMATS, quantised

POSITION, CACHE = 1000, 1280
REPEATS, STEPS = 25, 40
WHAT = (
    "microseconds a decode step, [median, interquartile range] of interleaved repeats of 40 steps, slowest rank; "
    "the model's layer shape (on a CPU 512 wide), bfloat16, vocabulary 32000, static cache of 1280, position 1000, "
    "mode='reduce-overhead'; without FLAG: fuseplan with that flag of PassConfig off; grouped_attention: what fuseplan "
    "takes less than so, and what so takes less than plain; host: until the step's call has returned; without_guards: "
    "under torch.compiler.set_stance(skip_guard_eval_unsafe=True); captured: each step in one CUDA graph that was "
    "captured by hand, as engines do, without mode='reduce-overhead', so that no rank waits for Python; quantised: how "
    "all linear layers but lm_head are, each rank's part by itself, by: what quantised them; less_time: by which part "
    "of it a step of fuseplan is shorter than that side's"
)
PLAIN, FUSED, APART = "torch.compile", "fuseplan", "without fuse_grouped_attention"
SIDES = {FUSED: fuseplan.PassConfig(), APART: fuseplan.PassConfig(fuse_grouped_attention=False)}
QUANTISED_SIDES = {
    FUSED: fuseplan.PassConfig(),
    **{name: fuseplan.PassConfig(**flags) for name, flags in FLAGS.items()},
}


def model_of(name: str, layers: int, rank: int, device: torch.device) -> Any:
    """Random weights, saved once and loaded by every rank with the model's own plan."""
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    if rank == 0:
        whole: Any = published_shapes.model_of(name, layers, device, torch.bfloat16)
        whole.save_pretrained(folder[0])
        del whole
        torch.cuda.empty_cache()
    dist.broadcast_object_list(folder)
    model: Any = SHAPES[name][1].from_pretrained(folder[0], tp_plan="auto", dtype=torch.bfloat16)
    for module in model.modules():  # transformers 5.17 has gradients summed by hooks, through which Dynamo can't trace
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model.eval()


class Step:
    """A compiled step at one batch size, with a cache of its own."""

    def __init__(self, model: Any, batch: int, compiled: Callable[..., Any]) -> None:
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
    found = {
        **{name: whole.json() for name, (whole, _) in times.items()},
        "less_time_percent": round(100 * (1 - us[FUSED] / us[PLAIN]), 2),
    }
    if APART not in us:
        less = {name: round(1 - us[FUSED] / each, 4) for name, each in us.items() if name != FUSED}
        return {**found, "less_time": less}
    return {
        **found,
        "grouped_attention": {
            "gave_us": round(us[APART] - us[FUSED], 2),
            "less_time_percent": round(100 * (1 - us[FUSED] / us[APART]), 2),
            "rest_less_time_percent": round(100 * (1 - us[APART] / us[PLAIN]), 2),
        },
    }


def measure(model: Any, batch: int, *, captured: bool, in_fp8: bool = False) -> dict[str, Any]:
    """All sides at one batch size."""
    torch._dynamo.reset()
    forward, on_gpu = model.forward, dist.get_backend() == "nccl"
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if on_gpu and not captured:
        how["mode"] = "reduce-overhead"
    configs = QUANTISED_SIDES if in_fp8 else SIDES
    reports: dict[str, list[fuseplan.Report]] = {name: [] for name in configs}
    sides = {PLAIN: Step(model, batch, torch.compile(forward, **how))}
    for name, config in configs.items():
        fused = fuseplan.compile(forward, config=config, on_report=reports[name].append, **how)
        sides[name] = Step(model, batch, fused)
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
        **({"fused_apart": reports[APART][-1].fused} if APART in reports else {}),
        "applied": sorted({f"{f.rule}:{f.provider}" for graph in graphs for f in graph.applied}),
        "refused": sorted({r.detail for graph in graphs for r in graph.refusals if r.detail})[:6],
        "logits_relative_difference": float((logits[FUSED] - logits[PLAIN]).norm() / logits[PLAIN].norm()),
        "profile": {name: profiled(step) for name, step in sides.items()} if on_gpu else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=[*SHAPES])
    parser.add_argument("--quantised", choices=FORMATS, help="linear layers take and hold fp8")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--captured", action="store_true", help="each step in one CUDA graph, captured by hand")
    parser.add_argument("--write", action="store_true", help="write results/decode_*DEVICExRANKS*.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rank, on_gpu = int(os.environ["RANK"]), arguments.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    ranks, rows = dist.get_world_size(), list[dict[str, Any]]()
    in_fp8, suffix = arguments.quantised is not None, "_captured" * arguments.captured
    name = torch.cuda.get_device_name().split()[1].lower() if on_gpu else "cpu"
    path = arguments.out / f"decode_{'quantised_' * in_fp8}{name}x{ranks}{suffix}.json"
    with torch.no_grad():
        model = model_of(arguments.model, arguments.layers, rank, device)
        by = {"quantised": arguments.quantised, "by": quantised(model, arguments.quantised)} if in_fp8 else {}
        result = {
            "what": WHAT,
            "command": f"torchrun --nproc-per-node {ranks} benchmarks/decode.py {shlex.join(sys.argv[1:])}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions() if on_gpu else {"torch": torch.__version__},
            "ranks": ranks,
            "model": arguments.model,
            **by,
            "layers": arguments.layers,
            "rows": rows,
        }
        for batch in arguments.batch:
            rows.append(measure(model, batch, captured=arguments.captured, in_fp8=in_fp8))
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                if arguments.write:
                    path.write_text(json.dumps(result, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
