"""Decode steps and a prefill of unmodified Hugging Face models on one device, on a static cache: fuseplan beside plain
torch.compile, and beside what else somebody could do: pass `enable_gqa=True` by hand, freeze the weights, take flex
attention, or write the model anew.

python -m benchmarks.decode_one_gpu [--model llama-3.1-8b qwen3-8b] [--layers 8] [--device cpu] [--write]
    [--workload decode] [--peers enable_gqa hand-written] [--leave-one-out] [--captured]
    [--quantised fp8_rows fp8_blocks]
"""

import argparse
import contextlib
import copy
import datetime
import functools
import gc
import itertools
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StaticCache
from transformers.integrations import sdpa_attention

import fuseplan
from benchmarks.graphs import Figure, figure, versions
from benchmarks.hand_written import HandWritten
from benchmarks.published_shapes import CHANGED, SHAPES, VOCABULARY, model_of
from benchmarks.quantised import ATTENTION, FLAGS, FORMATS, LEFT, quantised, stored_bytes
from fuseplan.config import FUSION_FLAGS
from fuseplan.rules.families import BUILT_IN_RULES

REPEATS, STEPS = 15, 20
WHAT = (
    "microseconds a step, [median, interquartile range] of interleaved repeats, in one process; random weights, "
    "vocabulary 32000, a static cache filled with random keys and values up to the position; on a GPU bfloat16, "
    "mode='reduce-overhead', under torch.compiler.set_stance(skip_guard_eval_unsafe=True); enable_gqa: torch.compile "
    "where transformers' use_gqa_in_sdpa always says yes; freezing: torch.compile with freezing=True; flex_attention: "
    "torch.compile with that attn_implementation, graph breaks allowed; hand-written: benchmarks/hand_written.py under "
    "torch.compile; early launches: with Inductor's triton.enable_pdl; "
    "captured: in one CUDA graph that was captured by hand, as engines do, in place of that mode; "
    "without FLAG: fuseplan with that flag of PassConfig off, gave_us: what it takes longer so; failed: "
    "errors of those that gave no time; bytes_limit_us: all weights but the embedding's, and the valid part of the "
    "cache, once, at the bandwidth of a copy in this run, times_limit: times as long; logits: largest difference to "
    "the model in float64, each side's own, or to plain torch.compile's; quantised: how all linear layers but lm_head "
    "are, by: what quantised them; less_time: by which part of it a step of fuseplan is shorter than that side's"
)
PLAIN, BY_HAND, FROZEN, FLEX, WRITTEN = "torch.compile", "enable_gqa", "freezing", "flex_attention", "hand-written"
FUSED, ROUNDED, PACKED = "fuseplan", "fuseplan, allow_rounding_changes", "fuseplan, packed"
CACHED = "fuseplan, cached attention"
EARLY = ", early launches"
PEERS = (BY_HAND, FROZEN, FLEX, WRITTEN, FUSED)
QUANTISED_PEERS = (ATTENTION, LEFT, FUSED)
MORE_PEERS = (ROUNDED, PACKED, CACHED, ATTENTION, LEFT, PLAIN + EARLY, FUSED + EARLY)


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
    *(Workload(batch=batch, position=position, cache=8192) for batch, position in ((8, 8000), (8, 2000), (32, 8000))),
    Workload(batch=1, tokens=2048, cache=2304),
)
CPU_WORKLOADS = (
    Workload(batch=1, position=800, cache=1024),
    Workload(batch=4, position=800, cache=1024),
    Workload(batch=1, tokens=256, cache=1024),
)


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


def cache_of(model: Any, work: Workload) -> Any:
    """A static one, still empty."""
    return StaticCache(config=model.config, max_cache_len=work.cache)


class Step:
    """A compiled call, with a cache of its own that holds what every side's holds."""

    def __init__(self, model: Any, work: Workload, compiled: Callable[..., Any], *, by_hand: bool = False) -> None:
        device = model.device
        self.work, self.compiled, self.by_hand, self.device = work, compiled, by_hand, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.cache = cache_of(model, work)
        generator = torch.Generator(device).manual_seed(1)
        shape = (work.batch, work.tokens)
        positions = work.position + torch.arange(work.tokens, device=device)
        self.arguments = {
            "input_ids": torch.randint(0, VOCABULARY, shape, device=device, generator=generator),
            "position_ids": positions.expand(shape).contiguous(),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip
        model(**self.arguments)
        self.sliding = [layer for layer in self.cache.layers if layer.is_sliding]
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

    @property
    def valid_bytes(self) -> int:
        """Of keys and values that a call sees."""
        seen = self.work.position + self.work.tokens
        return sum(each[:, :, :seen].nbytes for layer in self.cache.layers for each in (layer.keys, layer.values))

    def __call__(self) -> Tensor:
        """Logits."""
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        for layer in self.sliding:  # a number of Python's: another one is another graph
            layer.cumulative_length_int = self.work.position
        return self.compiled(**self.arguments).logits  # type: ignore[no-any-return]

    def capture(self) -> None:
        """From now on, a call is one replay. It was called before, so that nothing compiles while it is captured."""
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self()
        self.graph = graph
        self.synchronize()

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
    wide.set_experts_implementation("eager")
    cache = cache_of(wide, step.work)
    arguments = {**step.arguments, "past_key_values": cache}
    wide(**arguments)
    for own, other in zip(cache.layers, step.cache.layers, strict=True):
        own.keys.copy_(other.keys)
        own.values.copy_(other.values)
        own.cumulative_length.fill_(step.work.position)
        if own.is_sliding:
            own.cumulative_length_int = step.work.position
    return wide(**arguments).logits  # type: ignore[no-any-return]


def with_attention(model: Any, implementation: str) -> Any:
    """The same model on the same weights, with another attention."""
    held = {id(each): each for each in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, held)
    other.set_attn_implementation(implementation)
    return other


def with_own_code(model: Any) -> Callable[..., Any]:
    """The model, called by code that no other side has: what failed to compile may run eagerly from then on, and with
    it all that share its code.
    """

    def call(**arguments: Any) -> Any:
        return model(**arguments)

    call.__code__ = call.__code__.replace()
    return call


def compiled(name: str, model: Any, reports: list[fuseplan.Report], *, captured: bool = False) -> Callable[..., Any]:
    """A side by its name.

    Raises:
        ValueError: it doesn't exist of this model.
    """
    on_gpu = model.device.type == "cuda"
    how: dict[str, Any] = {
        "fullgraph": True,
        "dynamic": False,
        **({"mode": "reduce-overhead"} if on_gpu and not captured else {}),
    }
    forward, early = with_own_code(model), name.endswith(EARLY)
    fused = functools.partial(fuseplan.compile, forward if early else model)
    name = name.removesuffix(EARLY)
    if name == BY_HAND and model.config._attn_implementation != "sdpa":
        raise ValueError(f"attention of {model.config.model_type} is {model.config._attn_implementation}, not sdpa")
    if name == FROZEN:
        options = {**torch._inductor.list_mode_options(how.pop("mode", "default")), "freezing": True}
        return torch.compile(forward, options=options, **how)
    if name in (PLAIN, BY_HAND):
        return torch.compile(forward, **how)
    if name == FLEX:
        return torch.compile(with_own_code(with_attention(model, FLEX)), **(how | {"fullgraph": False}))
    if name == WRITTEN:
        return torch.compile(HandWritten(model).eval(), **how)
    flags: dict[str, Any] = {}
    if name == PACKED:
        flags = {"force": ("grouped_attention:sdpa_packed",)}
    elif name == ROUNDED:
        flags = {"allow_rounding_changes": True}
    elif name == CACHED:
        flags = {"fuse_cached_attention": True}
    elif name in FLAGS:
        flags = FLAGS[name]
    elif name != FUSED:
        flags = {name.removeprefix("without "): False}
    on_report = reports.append if name in (FUSED, ROUNDED, CACHED) else None
    return fused(config=fuseplan.PassConfig(**flags), on_report=on_report, **how)


def without(reports: list[fuseplan.Report]) -> list[str]:
    """fuseplan without one flag, for each flag whose rules fired."""
    fused = {rule for report in reports for rule, count in report.fused.items() if count}
    fired = {flag for rule in BUILT_IN_RULES if rule.name in fused for flag in rule.flags}
    return [f"without {flag}" for flag in FUSION_FLAGS if flag in fired]


class Sides:
    """All that are timed on one workload. What fails leaves its error and ends nothing.

    Attributes:
        steps: by name, those that ran.
        failed: why the others didn't.
        logits: of the first call.
        compile_s: what that call took.
    """

    def __init__(self, model: Any, work: Workload, *, captured: bool = False) -> None:
        self.model, self.work, self.captured = model, work, captured
        self.steps, self.failed, self.reports = dict[str, Step](), dict[str, str](), list[fuseplan.Report]()
        self.logits, self.compile_s = dict[str, Tensor](), dict[str, float]()

    def add(self, name: str) -> None:
        """Compiles a side and runs it."""
        self.attempt(name, lambda: self._first_run(name))

    def _first_run(self, name: str) -> None:
        own = compiled(name, self.model, self.reports, captured=self.captured)
        step = Step(self.model, self.work, own, by_hand=name == BY_HAND)
        # Dynamo asks the configuration, and not the options, whether it should hand over parameters to be frozen.
        patches = {"freezing": name == FROZEN, "triton.enable_pdl": name.endswith(EARLY)}
        with enable_gqa(step.by_hand), torch._inductor.config.patch(patches):
            start = time.perf_counter()
            logits = step().clone()
            self.compile_s[name] = round(time.perf_counter() - start, 1)
            for _ in range(3):
                step.reset()
                step()
            if self.captured:
                step.capture()
        self.steps[name], self.logits[name] = step, logits

    def attempt(self, name: str, call: Callable[[], Any]) -> None:
        """Calls it; where that fails, the side of that name is no more."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - other people's code, whose errors are its result
            self.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            self.steps.pop(name, None)
            print(f"{name}: {self.failed[name]}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


def measure(
    model: Any,
    work: Workload,
    *,
    peers: list[str],
    leave_one_out: bool,
    precise: bool,
    repeats: int,
    bytes_s: float,
    captured: bool = False,
) -> dict[str, Any]:
    """All sides on one workload."""
    torch._dynamo.reset()
    on_gpu, began = model.device.type == "cuda", time.perf_counter()
    sides = Sides(model, work, captured=captured)
    for name in (PLAIN, *peers):
        sides.add(name)
    for name in without(sides.reports) if leave_one_out else ():
        sides.add(name)
    wanted = list[Tensor]()
    if precise:
        sides.attempt("float64", lambda: wanted.append(exact(model, Step(model, work, model))))
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True) if on_gpu else contextlib.nullcontext():
        for name, step in [*sides.steps.items()]:
            sides.attempt(name, step.repeat)
        times = timed(sides.steps, repeats)
        shown = [name for name in (PLAIN, *peers) if name in sides.steps] if on_gpu else []
        profile = {name: sides.steps[name].profiled() for name in shown}
    return {
        "batch": work.batch, "tokens": work.tokens, "position": work.position, "cache": work.cache,
        **({"captured": True} if captured else {}),
        **{name: each.json() for name, each in times.items()},
        **compared(sides, times, bytes_s), **planned(sides.reports),
        "compile_s": sides.compile_s, "seconds": round(time.perf_counter() - began), "failed": sides.failed,
        **apart(sides.logits, wanted), "profile": profile,
    }  # fmt: skip


def compared(sides: Sides, times: Mapping[str, Figure], bytes_s: float) -> dict[str, Any]:
    """Times beside plain torch.compile's, beside what memory allows, and of fuseplan without one fusion."""
    if not times:
        return {}
    model = sides.model
    embedding, head = (each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()))
    weights = sum(stored_bytes(each) for each in model.parameters())
    weights -= embedding.nbytes if embedding is not head else 0
    limit = (weights + next(iter(sides.steps.values())).valid_bytes) / bytes_s * 1e6
    faster = {name: round(times[PLAIN].us / each.us, 3) for name, each in times.items()} if PLAIN in times else {}
    gave = {
        name.removeprefix("without "): round(each.us - times[FUSED].us, 1)
        for name, each in times.items() if name.startswith("without ") and FUSED in times
    }  # fmt: skip
    less = {
        name: round(1 - times[FUSED].us / times[name].us, 4)
        for name in (PLAIN, ATTENTION, LEFT) if name in times and FUSED in times and ATTENTION in times
    }  # fmt: skip
    return {
        "times_faster": {name: each for name, each in faster.items() if name != PLAIN},
        **({"less_time": less} if less else {}),
        "bytes_limit_us": round(limit, 1),
        "times_limit": {name: round(each.us / limit, 3) for name, each in times.items()},
        **({"gave_us": gave} if gave else {}),
    }


def planned(reports: list[fuseplan.Report]) -> dict[str, Any]:
    """What fuseplan chose, and what it expected of that."""
    if not reports:
        return {}
    graphs = [graph for report in reports for graph in report.graphs]
    return {
        "fused": {name: count for name, count in reports[-1].fused.items() if count},
        "applied": sorted({f"{f.rule}:{f.provider}" for graph in graphs for f in graph.applied}),
        "refused": sorted({r.detail for graph in graphs for r in graph.refusals})[:6],
        "modelled_saved_us": round(reports[-1].saved_us, 1),
    }


def apart(logits: Mapping[str, Tensor], wanted: list[Tensor]) -> dict[str, Any]:
    """How far logits are from plain torch.compile's, and from those in float64."""
    found = {}
    for what, reference in (("plain", logits.get(PLAIN)), ("float64", wanted[0] if wanted else None)):
        if reference is not None:
            found[f"logits_apart_from_{what}"] = {
                name: float((each - reference).abs().max()) for name, each in logits.items() if each is not reference
            }
    return found


def copy_bytes_s(device: torch.device) -> float:
    """Bytes that a copy reads and writes a second."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    into, times = torch.empty_like(source), 30
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        for _ in range(times):
            into.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    return 2 * source.nbytes * times / took


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["llama-3.1-8b", "qwen3-8b"], choices=[*SHAPES])
    parser.add_argument("--layers", type=int, help="8 on a GPU, 4 on a CPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"])
    parser.add_argument("--workload", nargs="*", default=["decode", "long", "prefill"])
    parser.add_argument("--batch", nargs="*", type=int, help="of these batch sizes alone")
    parser.add_argument("--peers", nargs="*", choices=(*PEERS, *MORE_PEERS), help="beside torch.compile")
    parser.add_argument("--quantised", nargs="*", default=[], choices=FORMATS, help="models of which layers take fp8")
    parser.add_argument("--leave-one-out", action="store_true", help="fuseplan without each flag that fired, too")
    parser.add_argument("--captured", action="store_true", help="each call in one CUDA graph, captured by hand")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/decode_one_gpu_DEVICE.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    if arguments.peers is None:
        arguments.peers = QUANTISED_PEERS if arguments.quantised else PEERS
    return arguments


def main() -> None:
    """Measures, prints a line for each workload, and writes what was asked for."""
    arguments = parsed()
    warnings.simplefilter("ignore")
    device, on_gpu = torch.device(arguments.device), arguments.device == "cuda"
    layers = arguments.layers or (8 if on_gpu else 4)
    name = torch.cuda.get_device_name().split()[1].lower() if on_gpu else "cpu"
    rows, bytes_s = list[dict[str, Any]](), copy_bytes_s(device)
    result = {
        "what": WHAT,
        "command": "python -m benchmarks.decode_one_gpu " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **(versions() if on_gpu else {}),
        },
        "layers": layers,
        "changed": {name: CHANGED[name] for name in arguments.model if name in CHANGED},
        "copy_gb_s": round(bytes_s / 1e9, 1),
        "rows": rows,
    }
    torch._dynamo.config.recompile_limit = 64
    path = arguments.out / f"decode_one_gpu_{'quantised_' * bool(arguments.quantised)}{name}.json"
    works = [
        work for work in (WORKLOADS if on_gpu else CPU_WORKLOADS)
        if work.name in arguments.workload and work.batch in (arguments.batch or [work.batch])
    ]  # fmt: skip
    with torch.inference_mode():
        for model_name, dtype, how in itertools.product(
            arguments.model, arguments.dtype, arguments.quantised or [None]
        ):
            model = model_of(model_name, layers, device, getattr(torch, dtype))
            by = {"quantised": how, "by": quantised(model, how)} if how else {}
            for work in works:
                row = measure(
                    model, work, peers=[*arguments.peers], leave_one_out=arguments.leave_one_out,
                    precise=not how and (not on_gpu or work.batch == 1), repeats=arguments.repeats, bytes_s=bytes_s,
                    captured=arguments.captured,
                )  # fmt: skip
                rows.append({"model": model_name, "dtype": dtype, **by, **row})
                print(json.dumps({key: value for key, value in rows[-1].items() if key != "profile"}), flush=True)
                if arguments.write:
                    path.write_text(json.dumps(result, indent=1) + "\n")
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
            del model


if __name__ == "__main__":
    main()
