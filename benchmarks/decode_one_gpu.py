"""Decode steps and a prefill of unmodified Hugging Face models on one device, on a static cache: fuseplan beside plain
torch.compile, and beside torch.compile of a model that is made to pass `enable_gqa=True` by hand.

python -m benchmarks.decode_one_gpu [--model llama-3.1-8b qwen3-8b] [--layers 8] [--device cpu] [--write]
"""

import argparse
import contextlib
import copy
import datetime
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.integrations import sdpa_attention

import fuseplan
from benchmarks.graphs import Figure, figure, versions

VOCABULARY = 32000
REPEATS, STEPS = 15, 20
WHAT = (
    "microseconds a step, [median, interquartile range] of interleaved repeats, in one process; random weights, "
    "vocabulary 32000, a static cache filled with random keys and values up to the position; on a GPU bfloat16, "
    "mode='reduce-overhead', under torch.compiler.set_stance(skip_guard_eval_unsafe=True); enable_gqa: torch.compile "
    "where transformers' use_gqa_in_sdpa always says yes; logits: largest difference to the model in float64, each "
    "side's own"
)
PLAIN, BY_HAND, FUSED, PACKED = "torch.compile", "enable_gqa", "fuseplan", "fuseplan, packed"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call of a model.

    Attributes:
        batch: rows.
        tokens: of a row, 1 for a step of decoding.
        position: of the first token; so many keys are valid before it.
        cache: keys that the static cache has room for.
    """

    batch: int
    tokens: int = 1
    position: int = 0
    cache: int

    @property
    def name(self) -> str:
        """`decode`, `long` for a step on a long cache, or `prefill`."""
        return "prefill" if self.tokens > 1 else "long" if self.cache > 4096 else "decode"


WORKLOADS = (
    *(Workload(batch=batch, position=1000, cache=1280) for batch in (1, 8, 32)),
    *(Workload(batch=8, position=position, cache=8192) for position in (8000, 2000)),
    Workload(batch=1, tokens=2048, cache=2304),
)
CPU_WORKLOADS = (
    Workload(batch=1, position=800, cache=1024),
    Workload(batch=4, position=800, cache=1024),
    Workload(batch=1, tokens=256, cache=1024),
)


def model_of(name: str, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights in a published model's shape; on a CPU of a sixteenth of its width."""
    small = device.type == "cpu"
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2} if small else {}
    heads = heads or {"num_attention_heads": 32, "num_key_value_heads": 8}
    common: dict[str, Any] = {
        "hidden_size": 512 if small else 4096, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "max_position_embeddings": 16384, **heads,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "llama-3.1-8b":
        width = 1024 if small else 14336
        config = LlamaConfig(intermediate_size=width, rope_theta=5e5, rms_norm_eps=1e-5, **common)
    else:
        config = Qwen3Config(intermediate_size=1024 if small else 12288, head_dim=64 if small else 128, **common)
    made = LlamaForCausalLM if isinstance(config, LlamaConfig) else Qwen3ForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return made(config).eval()  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def enable_gqa(on: bool) -> Iterator[None]:
    """Lets transformers pass `enable_gqa=True` with a mask, too."""
    before = sdpa_attention.use_gqa_in_sdpa
    if on:
        sdpa_attention.use_gqa_in_sdpa = _always
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = before


def _always(*arguments: Any, **named: Any) -> bool:
    return True


class Step:
    """A compiled call, with a cache of its own that holds what every side's holds."""

    def __init__(self, model: Any, work: Workload, compiled: Callable[..., Any], *, by_hand: bool = False) -> None:
        device = model.device
        self.work, self.compiled, self.by_hand, self.device = work, compiled, by_hand, device
        self.cache = StaticCache(config=model.config, max_cache_len=work.cache)
        generator = torch.Generator(device).manual_seed(1)
        shape = (work.batch, work.tokens)
        positions = work.position + torch.arange(work.tokens, device=device)
        self.arguments = {
            "input_ids": torch.randint(0, VOCABULARY, shape, device=device, generator=generator),
            "position_ids": positions.expand(shape).contiguous(),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip
        model(**self.arguments)
        for layer in self.cache.layers:
            for value in (layer.keys, layer.values):
                value.normal_(generator=generator)
            for value in vars(layer).values():
                if isinstance(value, Tensor):
                    torch._dynamo.mark_static_address(value)
        self.reset()

    def reset(self) -> None:
        """Back to the workload's position."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.work.position)

    def __call__(self) -> Tensor:
        """Logits."""
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(**self.arguments).logits  # type: ignore[no-any-return]

    def repeat(self) -> float:
        """Microseconds a step."""
        steps = STEPS if self.work.tokens == 1 else 4
        with enable_gqa(self.by_hand):
            self.reset()
            self.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                if self.work.tokens > 1:
                    self.reset()
                self()
            self.synchronize()
            return (time.perf_counter() - start) / steps * 1e6

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def profiled(self) -> list[list[Any]]:
        """The kernels of a step that take the most: microseconds, calls, name."""
        with (
            enable_gqa(self.by_hand),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
        ):
            for _ in range(3):
                self.reset()
                self()
            torch.cuda.synchronize()
        events = [(e.self_device_time_total / 3, e.count / 3, e.key[:90]) for e in profile.key_averages()]
        return [[round(us, 1), round(count, 1), name] for us, count, name in sorted(events, reverse=True)[:12]]


def timed(sides: Mapping[str, Step], repeats: int) -> dict[str, Figure]:
    """A step of each side, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        for name, step in sides.items():
            samples[name].append(step.repeat())
    gc.enable()
    return {name: figure(each) for name, each in samples.items()}


def exact(model: Any, step: Step) -> Tensor:
    """The logits of a call in float64."""
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("eager")
    cache = StaticCache(config=wide.config, max_cache_len=step.work.cache)
    arguments = {**step.arguments, "past_key_values": cache}
    wide(**arguments)
    for own, other in zip(cache.layers, step.cache.layers, strict=True):
        own.keys.copy_(other.keys)
        own.values.copy_(other.values)
        own.cumulative_length.fill_(step.work.position)
    return wide(**arguments).logits  # type: ignore[no-any-return]


def measure(model: Any, work: Workload, *, precise: bool, packed: bool, repeats: int) -> dict[str, Any]:
    """All sides on one workload."""
    torch._dynamo.reset()
    on_gpu, reports = model.device.type == "cuda", list[fuseplan.Report]()
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False, **({"mode": "reduce-overhead"} if on_gpu else {})}
    forward = model.forward
    sides = {
        PLAIN: Step(model, work, torch.compile(forward, **how)),
        BY_HAND: Step(model, work, torch.compile(forward, **how), by_hand=True),
        FUSED: Step(model, work, fuseplan.compile(forward, on_report=reports.append, **how)),
    }
    if packed:
        forced = fuseplan.PassConfig(force=("grouped_attention:sdpa_packed",))
        sides[PACKED] = Step(model, work, fuseplan.compile(forward, config=forced, **how))
    wanted = exact(model, sides[PLAIN]) if precise else None
    logits, compile_s = {}, {}
    for name, step in sides.items():
        with enable_gqa(step.by_hand):
            start = time.perf_counter()
            logits[name] = step().clone()
            compile_s[name] = round(time.perf_counter() - start, 1)
            for _ in range(3):
                step.reset()
                step()
    stance = torch.compiler.set_stance(skip_guard_eval_unsafe=True) if on_gpu else contextlib.nullcontext()
    with stance:
        times = timed(sides, repeats)
        profile = {name: step.profiled() for name, step in sides.items()} if on_gpu else {}
    graphs = [graph for report in reports for graph in report.graphs]
    return {
        "batch": work.batch, "tokens": work.tokens, "position": work.position, "cache": work.cache,
        **{name: each.json() for name, each in times.items()},
        "times_faster": {name: round(times[PLAIN].us / times[name].us, 3) for name in sides if name != PLAIN},
        "fused": {name: count for name, count in reports[-1].fused.items() if count},
        "applied": sorted({f"{f.rule}:{f.provider}" for graph in graphs for f in graph.applied}),
        "refused": sorted({r.detail for graph in graphs for r in graph.refusals})[:6],
        "modelled_saved_us": round(reports[-1].saved_us, 1),
        "compile_s": compile_s,
        "logits_apart_from_plain": {
            name: float((each - logits[PLAIN]).abs().max()) for name, each in logits.items() if name != PLAIN
        },
        **({"logits_apart_from_float64": {
            name: float((each.double() - wanted).abs().max()) for name, each in logits.items()
        }} if wanted is not None else {}),
        "profile": profile,
    }  # fmt: skip


def main() -> None:
    """Measures, prints a line for each workload, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=["llama-3.1-8b", "qwen3-8b"])
    parser.add_argument("--layers", type=int, help="8 on a GPU, 4 on a CPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"])
    parser.add_argument("--workload", nargs="*", default=["decode", "long", "prefill"])
    parser.add_argument("--packed", action="store_true", help="beside them, packed heads by force, at batch 8")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/decode_one_gpu_DEVICE.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device, on_gpu = torch.device(arguments.device), arguments.device == "cuda"
    layers = arguments.layers or (8 if on_gpu else 4)
    name = torch.cuda.get_device_name().split()[1].lower() if on_gpu else "cpu"
    rows: list[dict[str, Any]] = []
    result = {
        "what": WHAT,
        "command": f"python -m benchmarks.decode_one_gpu --device {arguments.device} --layers {layers} "
        f"--dtype {' '.join(arguments.dtype)} --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **(versions() if on_gpu else {}),
        },
        "layers": layers,
        "rows": rows,
    }
    torch._dynamo.config.recompile_limit = 64
    path = arguments.out / f"decode_one_gpu_{name}.json"
    with torch.inference_mode():
        for model_name in arguments.model:
            for dtype in arguments.dtype:
                model = model_of(model_name, layers, device, getattr(torch, dtype))
                for work in WORKLOADS if on_gpu else CPU_WORKLOADS:
                    if work.name not in arguments.workload:
                        continue
                    row = measure(
                        model, work, precise=not on_gpu or work.batch == 1, repeats=arguments.repeats,
                        packed=arguments.packed and work.tokens == 1 and work.batch == 8,
                    )  # fmt: skip
                    rows.append({"model": model_name, "dtype": dtype, **row})
                    shown = {key: value for key, value in rows[-1].items() if key != "profile"}
                    print(json.dumps(shown), flush=True)
                    if arguments.write:
                        path.write_text(json.dumps(result, indent=1) + "\n")
                    gc.collect()
                    if on_gpu:
                        torch.cuda.empty_cache()
                del model


if __name__ == "__main__":
    main()
