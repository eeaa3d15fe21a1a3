"""First tokens and tokens of vLLM without and with fuseplan's plugin: engines on the same GPUs hold the same random
model and take turns.

python -m benchmarks.vllm_turns [--model qwen3-8b llama-3.1-8b-fp8] [--tp 1] [--sides stock flags fuseplan] [--write]

vLLM has to be installed, and fuseplan as a package with its entry point; weights need about 20 GB of memory a side.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDES = {
    "stock": "vLLM's own fusions off",
    "flags": "those of its own on that the model has sites for",
    "fuseplan": "the plugin, vLLM's own fusions off",
    "without": "the same without linear layers, which have a compile range of their own, of up to 32 tokens",
}
PLUGGED: dict[str, dict[str, bool]] = {
    "fuseplan": {},
    "without": {"fuse_merged_linear": False, "fuse_skinny_linear": False, "fuse_scaled_linear": False},
}
"""What the plugin is asked for on its sides."""
FIRST, LAST = 15, 2
"""Repeats in a turn of a call for one token: of short prompts, and of long ones."""
PROMPTS = {"1 x 20": (1, 20), "1 x 64": (1, 64), "8 x 128": (8, 128), "32 x 1000": (32, 1000)}
"""Requests and tokens of each."""
CAPTURED = [1, 2, 4, 8, 16, 32]
TOKENS = 60
"""Generated for the time a token."""
FLAGS = (
    "fuse_allreduce_rms", "fuse_norm_quant", "fuse_act_quant", "enable_qk_norm_rope_fusion", "fuse_attn_quant"
)  # fmt: skip
"""vLLM's own fusions."""
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
"""NVLink's multicast is off, since it wasn't to be used; so is what needs another compiler or a network."""
_COMMON = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "attention_bias": False,
    "initializer_range": 0.02, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 40960,
}  # fmt: skip
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 14336, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "vocab_size": 128256, "mlp_bias": False, "num_hidden_layers": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 12288, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "vocab_size": 151936, "sliding_window": None, "use_sliding_window": False,
        "num_hidden_layers": 36,
    },
    "llama-3.1-8b": _LLAMA,
    "llama-3.1-8b-fp8": _LLAMA,
    "gpt-oss-120b": _COMMON | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
        "num_attention_heads": 64, "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128,
        "num_experts_per_tok": 4, "experts_per_token": 4, "num_hidden_layers": 36, "rms_norm_eps": 1e-5,
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
        "initial_context_length": 4096, "max_position_embeddings": 131072, "attention_dropout": 0.0,
        "output_router_logits": False, "router_aux_loss_coef": 0.9,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                       "lm_head"],
        },
    },
}  # fmt: skip
"""Configurations; where the name ends in fp8, vLLM quantises weights, and activations per token."""
WHAT = (
    "milliseconds, [median, lower and upper quartile] of interleaved turns of engines on the same GPUs; ttft: a call "
    "of LLM.generate for one token, by requests x tokens of a prompt; tpot: by requests, prompts of 1,000 and of 64 "
    "tokens, what a token takes the requests that get their first one last, so that no prompt is read meanwhile, by "
    "the engine's clock; against: a turn's median of fuseplan over the other side's, "
    "less 1, [median, least, most] of the turns; random weights, CUDA graphs of 1 to 32 tokens; load_s: seconds until "
    "LLM() is there, all sides starting at once with cold caches, warm_s: once more, from their caches; "
    "compiled_while_serving: Triton kernels, in the calls and turns, as vLLM's own monitor names them"
)
MONITOR = re.compile(r"Triton kernel JIT compilation during inference: (\w+)")


def flags_of(model: str, tp: int) -> list[str]:
    """Fusions of vLLM's that the model has sites for."""
    wanted = {
        "fuse_allreduce_rms": tp > 1,
        "enable_qk_norm_rope_fusion": model.startswith("qwen3"),
        "fuse_norm_quant": "fp8" in model,
        "fuse_act_quant": "fp8" in model,
    }
    return [flag for flag, is_on in wanted.items() if is_on]


def quartiles(samples: list[float]) -> list[float]:
    """[median, lower quartile, upper quartile]"""
    low, middle, high = statistics.quantiles(samples, n=4)
    return [round(each, 3) for each in (middle, low, high)]


class Turn:
    """A file that says whose turn it is.

    Args:
        folder: of all sides.
        side: this one.
        sides: all of them, in the order in which they take turns.
    """

    def __init__(self, folder: Path, side: str, sides: list[str]) -> None:
        self.folder, self.side, self.sides, self.path = folder, side, sides, folder / "turn"

    def begin(self) -> None:
        """Waits until all sides are there."""
        (self.folder / f"{self.side}.ready").touch()
        while not all((self.folder / f"{side}.ready").exists() for side in self.sides):
            time.sleep(0.05)
        if self.side == self.sides[0]:
            self.pass_on(f"0 {self.side}")

    def pass_on(self, text: str) -> None:
        """Somebody else's turn."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    def taken(self, number: int, measure: Callable[[], None]) -> None:
        """Measures when its turn comes."""
        while not self.path.exists() or self.path.read_text() != f"{number} {self.side}":
            time.sleep(0.02)
        measure()
        at = self.sides.index(self.side) + 1
        self.pass_on(f"{number} {self.sides[at]}" if at < len(self.sides) else f"{number + 1} {self.sides[0]}")


def run_side(arguments: argparse.Namespace) -> None:
    """One engine; prints what it measured as JSON in its last line."""
    side, model, folder = arguments.side, arguments.model[0], arguments.folder
    path = folder / f"{side}-model"
    path.mkdir(exist_ok=True)
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    config = MODELS[model] | layers
    if model.startswith("gpt-oss"):
        config["layer_types"] = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    (path / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    import vllm

    on = flags_of(model, arguments.tp) if side == "flags" else []
    settings: dict[str, Any] = {
        "pass_config": {flag: flag in on for flag in FLAGS},
        "cudagraph_capture_sizes": CAPTURED,
    }
    further: dict[str, Any] = {"quantization": "fp8"} if "fp8" in model else {}
    if PLUGGED.get(side):
        further["additional_config"] = {"fuseplan": PLUGGED[side]}
    engine = vllm.LLM(
        model=str(path), load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=32,
        max_num_batched_tokens=8192, gpu_memory_utilization=0.3, kv_cache_memory_bytes=8 << 30,
        tensor_parallel_size=arguments.tp,
        compilation_config=settings, enable_prefix_caching=False, disable_log_stats=False, **further,
    )  # fmt: skip
    load_s = round(time.perf_counter() - start, 1)
    if arguments.turns == 0:
        print(json.dumps({"warm_s": load_s}), flush=True)
        os._exit(0)
    rng = random.Random(0)
    prompts = {
        name: [{"prompt_token_ids": [rng.randrange(1000, 120000) for _ in range(length)]} for _ in range(count)]
        for name, (count, length) in PROMPTS.items()
    }

    def call(name: str, tokens: int = 1) -> tuple[float, Any]:
        how = vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        begun = time.perf_counter()
        outputs = engine.generate(prompts[name], how, use_tqdm=False)
        return (time.perf_counter() - begun) * 1e3, outputs

    def per_token(name: str) -> float:
        _, outputs = call(name, TOKENS + 1)
        last = max((each.metrics for each in outputs), key=lambda each: each.first_token_ts)
        return (last.last_token_ts - last.first_token_ts) * 1e3 / TOKENS

    turns: list[dict[str, dict[str, list[float]]]] = []

    def measure() -> None:
        ttft = {name: [call(name)[0] for _ in range(LAST if name == "32 x 1000" else FIRST)] for name in prompts}
        tpot = {}
        for requests, name in (("32", "32 x 1000"), ("1", "1 x 64")):
            tpot[requests] = [per_token(name) for _ in range(3)]
        turns.append({"ttft": ttft, "tpot": tpot})

    measure()
    measure()
    turns.clear()
    turn = Turn(folder, side, arguments.sides)
    turn.begin()
    for number in range(arguments.turns):
        turn.taken(number, measure)
    print(json.dumps({"load_s": load_s, "vllm": vllm.__version__, "turns": turns}), flush=True)
    os._exit(0)


def summarised(found: dict[str, Any]) -> dict[str, Any]:
    """What a side measured, its turns taken together."""
    turns = found["turns"]
    kinds = {
        kind: {name: quartiles([each for turn in turns for each in turn[kind][name]]) for name in turns[0][kind]}
        for kind in ("ttft", "tpot")
    }
    return {**{key: value for key, value in found.items() if key != "turns"}, **kinds}


def compared(planned: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """How much more time one side took than another in the same turns: [median, least, most] by what was timed."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("ttft", "tpot"):
        for name in planned[0][kind]:
            changes = [
                statistics.median(mine[kind][name]) / statistics.median(theirs[kind][name]) - 1
                for mine, theirs in zip(planned, other, strict=True)
            ]
            found.setdefault(kind, {})[name] = [
                round(each, 4) for each in (statistics.median(changes), min(changes), max(changes))
            ]
    return found


def move(session: int, cores: list[int]) -> None:
    """Lets all processes of a session run on these cores alone."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                for task in (path / "task").iterdir():
                    os.sched_setaffinity(int(task.name), cores)


def run_sides(arguments: argparse.Namespace, model: str, folder: Path, turns: int) -> dict[str, Any]:
    """What all sides of a model print.

    Raises:
        RuntimeError: a side failed.
    """
    running = {}
    # The engines' processes poll: each side has cores of its own, and others in the next round.
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // len(arguments.sides)
    blocks = [cores[number * share : (number + 1) * share] for number in range(len(arguments.sides))]
    (folder / "turn").unlink(missing_ok=True)
    for number, side in enumerate(arguments.sides):
        caches = {
            key: str(folder / f"caches-{side}" / key.lower())
            for key in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
        }
        own = ",".join(map(str, blocks[number]))
        command = ["taskset", "-c", own, sys.executable, "-m", "benchmarks.vllm_turns", "--side", side]
        command += ["--folder", str(folder), "--model", model, "--turns", str(turns), "--tp", str(arguments.tp)]
        command += ["--layers", str(arguments.layers), "--sides", *arguments.sides]
        running[side] = subprocess.Popen(
            command, stdout=(folder / f"{side}.out").open("w"), stderr=(folder / f"{side}.log").open("a"),
            start_new_session=True,
            env={
                **ENVIRONMENT, **os.environ, **caches, "FUSEPLAN_VLLM": str(int(side in PLUGGED)),
                "FUSEPLAN_REPORT_DIR": str(folder / f"report-{side}"),
            },
        )  # fmt: skip
    round_ = 0
    try:
        while any(process.poll() is None for process in running.values()):
            if any(process.poll() for process in running.values()):
                break
            if (folder / "turn").exists() and (number := int((folder / "turn").read_text().split()[0])) > round_:
                round_ = number
                for at, process in enumerate(running.values()):
                    move(process.pid, blocks[(at + round_) % len(blocks)])
            time.sleep(0.05)
    finally:
        # An engine's own processes outlive the one that made it.
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for side, process in running.items():
        if process.returncode:
            print(*((folder / f"{side}.{kind}").read_text(errors="replace")[-6000:] for kind in ("log", "out")))
    if failed := [side for side, process in running.items() if process.returncode]:
        raise RuntimeError(f"{model}: {' and '.join(failed)} failed, or were stopped; their output stands above")
    return {side: json.loads((folder / f"{side}.out").read_text().strip().splitlines()[-1]) for side in running}


def compiled_kernels(folder: Path, side: str) -> dict[str, int]:
    """What vLLM's monitor saw compiled while a side served: variants of each kernel."""
    said = "".join((folder / f"{side}.{kind}").read_text(errors="replace") for kind in ("log", "out"))
    return dict(Counter(MONITOR.findall(said)))


def fused_in(folder: Path) -> dict[str, int]:
    """Fusions of a worker's whole model, by rule."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))][:1]
    return dict(Counter(each["rule"] for report in reports for graph in report["graphs"] for each in graph["applied"]))


def measure_model(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """All sides of a model.

    Raises:
        RuntimeError: a side failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep / f"{model}-{arguments.tp}" if arguments.keep else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = run_sides(arguments, model, folder, arguments.turns)
        compiled = {side: compiled_kernels(folder, side) for side in found}
        warm = run_sides(arguments, model, folder, 0) if arguments.warm else {side: {} for side in found}
        fused = {side: fused_in(folder / f"report-{side}") for side in PLUGGED if side in found}
    layers = arguments.layers or MODELS[model]["num_hidden_layers"]
    result = {
        "model": model, "layers": layers, "tp": arguments.tp, "turns": arguments.turns,
        "flags_on": flags_of(model, arguments.tp), "fused": {},
    }  # fmt: skip
    for side, each in found.items():
        result[side] = summarised(each) | warm[side] | {"compiled_while_serving": compiled[side]}
    for plugged, rules in fused.items():
        against = {
            side: compared(found[plugged]["turns"], each["turns"]) for side, each in found.items() if side != plugged
        }
        prefix = "" if plugged == "fuseplan" else f"{plugged}_"
        result |= {f"{prefix}fused": rules, f"{prefix}against": against}
    return result


def main() -> None:
    """Measures, prints a line for each model, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=["qwen3-8b", "llama-3.1-8b-fp8"])
    parser.add_argument("--layers", type=int, default=0, help="instead of the model's own number")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of an engine (default: 1)")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=["stock", "fuseplan"])
    parser.add_argument("--turns", type=int, default=9, help="of each side (default: 9)")
    parser.add_argument("--warm", action="store_true", help="start all sides once more, from their caches")
    parser.add_argument("--keep", type=Path, help="a folder for logs, reports and caches")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--write", action="store_true", help="put the rows into benchmarks/results/vllm_turns_DEVICE.json"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments)
    rows = []
    for model in arguments.model:
        rows.append(measure_model(arguments, model))
        print(json.dumps(rows[-1]), flush=True)
    if not arguments.write:
        return
    import torch

    device = torch.cuda.get_device_name()
    path = arguments.out / f"vllm_turns_{device.split()[1].lower()}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(row["model"], row["tp"]) for row in rows}
    layers = f" --layers {arguments.layers}" if arguments.layers else ""
    command = (
        f"python -m benchmarks.vllm_turns --model {' '.join(arguments.model)} --tp {arguments.tp} "
        f"--turns {arguments.turns} --sides {' '.join(arguments.sides)}{layers} --write"
    )
    run = {"command": command, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    result = {
        "what": WHAT,
        "sides": SIDES,
        "device": device,
        "versions": {"torch": torch.__version__},
        "rows": [row for row in before if (row["model"], row["tp"]) not in new] + [{**row, **run} for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
