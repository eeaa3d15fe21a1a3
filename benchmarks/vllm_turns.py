"""First tokens and tokens of vLLM on one GPU, without and with fuseplan's plugin: two engines hold the same random
model and take turns.

python -m benchmarks.vllm_turns [--model qwen3-8b llama-3.1-8b-fp8] [--layers 12] [--write]

vLLM has to be installed, and fuseplan as a package with its entry point; weights need about 20 GB of memory a side.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDES = ("stock", "fuseplan")
TURNS, FIRST, LAST = 5, 7, 2
"""Of each side, and repeats in a turn of a call for one token: of short prompts, and of long ones."""
PROMPTS = {"1 x 20": (1, 20), "1 x 64": (1, 64), "8 x 128": (8, 128), "32 x 1000": (32, 1000)}
"""Requests and tokens of each."""
CAPTURED = [1, 2, 4, 8, 16, 32]
TOKENS = 60
"""Generated for the time a token."""
FLAGS = (
    "fuse_allreduce_rms", "fuse_norm_quant", "fuse_act_quant", "enable_qk_norm_rope_fusion", "fuse_attn_quant"
)  # fmt: skip
"""vLLM's own fusions, off on both sides."""
_COMMON = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "attention_bias": False,
    "initializer_range": 0.02, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 40960,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 12288, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "vocab_size": 151936, "sliding_window": None, "use_sliding_window": False,
    },
    "llama-3.1-8b-fp8": _COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 14336, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "vocab_size": 128256, "mlp_bias": False,
    },
}  # fmt: skip
"""Configurations; where the name ends in fp8, vLLM quantises weights, and activations per token."""
WHAT = (
    "milliseconds, [median, lower and upper quartile] of interleaved turns of two engines on one GPU; ttft: a call of "
    "LLM.generate for one token, by requests x tokens of a prompt; tpot: (a call for 61 tokens less a call for one) / "
    "60, by requests, prompts of 1,000 and of 64 tokens; random weights, vLLM's own fusions off, CUDA graphs of 1 to "
    "32 tokens; load_s: seconds until LLM() is there, both sides starting at once with cold caches"
)


def quartiles(samples: list[float]) -> list[float]:
    """[median, lower quartile, upper quartile]"""
    low, middle, high = statistics.quantiles(samples, n=4)
    return [round(each, 3) for each in (middle, low, high)]


class Turn:
    """A file that says whose turn it is.

    Args:
        folder: of both sides.
        side: this one.
    """

    def __init__(self, folder: Path, side: str) -> None:
        self.path, self.side, self.ready = folder / "turn", side, folder / f"{side}.ready"

    def begin(self) -> None:
        """Waits until both sides are there."""
        self.ready.touch()
        while not all((self.path.parent / f"{side}.ready").exists() for side in SIDES):
            time.sleep(0.05)
        if self.side == SIDES[0]:
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
        self.pass_on(f"{number} {SIDES[1]}" if self.side == SIDES[0] else f"{number + 1} {SIDES[0]}")


def run_side(side: str, model: str, layers: int, folder: Path) -> None:
    """One engine; prints what it measured as JSON in its last line."""
    path = folder / side
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**MODELS[model], "num_hidden_layers": layers}))
    start = time.perf_counter()
    import vllm

    engine = vllm.LLM(
        model=str(path), load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=32,
        max_num_batched_tokens=8192, gpu_memory_utilization=0.35, kv_cache_memory_bytes=12 << 30,
        compilation_config={"pass_config": dict.fromkeys(FLAGS, False), "cudagraph_capture_sizes": CAPTURED},
        enable_prefix_caching=False, disable_log_stats=True, **({"quantization": "fp8"} if "fp8" in model else {}),
    )  # fmt: skip
    load_s = round(time.perf_counter() - start, 1)
    rng = random.Random(0)
    prompts = {
        name: [{"prompt_token_ids": [rng.randrange(1000, 120000) for _ in range(length)]} for _ in range(count)]
        for name, (count, length) in PROMPTS.items()
    }

    def call(name: str, tokens: int) -> float:
        how = vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        begun = time.perf_counter()
        engine.generate(prompts[name], how, use_tqdm=False)
        return (time.perf_counter() - begun) * 1e3

    ttft: dict[str, list[float]] = {name: [] for name in prompts}
    tpot: dict[str, list[float]] = {"32": [], "1": []}

    def measure() -> None:
        for name, samples in ttft.items():
            samples += [call(name, 1) for _ in range(LAST if name == "32 x 1000" else FIRST)]
        for requests, name in (("32", "32 x 1000"), ("1", "1 x 64")):
            first = call(name, 1)
            tpot[requests].append((call(name, TOKENS + 1) - first) / TOKENS)

    measure()
    for samples in (*ttft.values(), *tpot.values()):
        samples.clear()
    turn = Turn(folder, side)
    turn.begin()
    for number in range(TURNS):
        turn.taken(number, measure)
    found = {
        "load_s": load_s, "vllm": vllm.__version__,
        "ttft": {name: quartiles(samples) for name, samples in ttft.items()},
        "tpot": {name: quartiles(samples) for name, samples in tpot.items()},
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    os._exit(0)


def measure_model(model: str, layers: int) -> dict[str, Any]:
    """Both sides of a model.

    Raises:
        RuntimeError: a side failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {}
        for side in SIDES:
            caches = {
                key: str(folder / f"caches-{side}" / key.lower())
                for key in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
            }
            command = [sys.executable, "-m", "benchmarks.vllm_turns", "--side", side, "--folder", name]
            running[side] = subprocess.Popen(
                [*command, "--model", model, "--layers", str(layers)], stdout=subprocess.PIPE, text=True,
                env={
                    **os.environ, **caches, "FUSEPLAN_VLLM": str(int(side == SIDES[1])),
                    "FUSEPLAN_REPORT_DIR": str(folder / "report"),
                },
            )  # fmt: skip
        said = {side: process.communicate()[0].strip().splitlines() for side, process in running.items()}
        failed = [side for side, process in running.items() if process.returncode]
        if failed:
            raise RuntimeError(f"{model}: {' and '.join(failed)} failed; its output stands above")
        reports = [json.loads(path.read_text()) for path in sorted((folder / "report").glob("*.json"))]
        fused = reports[0].get("fused", {}) if reports else {}
        return {
            "model": model, "layers": layers, "fused": {name: count for name, count in fused.items() if count},
            **{side: json.loads(lines[-1]) for side, lines in said.items()},
        }  # fmt: skip


def main() -> None:
    """Measures, prints a line for each model, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/vllm_turns_DEVICE.json")
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.model[0], arguments.layers, arguments.folder)
    rows = []
    for model in arguments.model:
        rows.append(measure_model(model, arguments.layers))
        print(json.dumps(rows[-1]), flush=True)
    import torch

    result = {
        "what": WHAT,
        "command": f"python -m benchmarks.vllm_turns --layers {arguments.layers} --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__},
        "rows": rows,
    }
    if arguments.write:
        name = torch.cuda.get_device_name().split()[1].lower()
        path = Path(__file__).parent / f"results/vllm_turns_{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
