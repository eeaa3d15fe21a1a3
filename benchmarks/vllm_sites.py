"""What fuseplan finds in models as vLLM compiles them: norms, all-reduces, and how many sites each rule has.

    PYTHONPATH=src .venv-vllm/bin/python benchmarks/vllm_sites.py [--write]

Each model is of a published architecture, cut to a few narrow layers with dummy weights, and runs on one rank and on
two, in engines of vLLM's build for CPUs with the plugin switched on by its environment variable.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import vllm
from committed import main

LAYERS = 2
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
    "qwen3": {},
}
ARCHITECTURES = {"gpt_oss": "GptOssForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
RANKS = (1, 2)
ENVIRONMENT = {
    "FUSEPLAN_VLLM": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def start(model: str, folder: Path) -> None:
    """An engine for each number of ranks, in this process. Workers write their reports before their engine is up."""
    from transformers import AutoConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = COMMON | MODELS[model]
    AutoConfig.for_model(model, **settings, architectures=[ARCHITECTURES[model]]).save_pretrained(folder)
    for tp in RANKS:
        os.environ["FUSEPLAN_REPORT_DIR"] = str(folder / f"reports_{tp}")
        engine = vllm.LLM(
            str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=4,
            tensor_parallel_size=tp,
        )
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def found(model: str) -> dict[str, Any]:
    """What the ranks report, which is the same on each."""
    from fuseplan.record import Report
    from fuseplan.record.serialization import from_json

    rows = {}
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--engines", model, name]
        own = {"VLLM_CACHE_ROOT": f"{name}/cache"}
        subprocess.run(command, env=os.environ | ENVIRONMENT | own, check=True, stdout=sys.stderr)
        for tp in RANKS:
            texts = [path.read_text() for path in Path(name).glob(f"reports_{tp}/rank_*.json")]
            reports = [from_json(Report, json.loads(text)) for text in texts]
            counts = [{"recognised": dict(sorted(each.recognized.items())), "sites": each.matched} for each in reports]
            assert len(counts) == tp
            assert all(each == counts[0] for each in counts)
            rows[f"{model} TP={tp}"] = counts[0]
    return rows


def measure() -> dict[str, Any]:
    """All models on all numbers of ranks."""
    table = {name: row for model in MODELS for name, row in found(model).items()}
    return {"vllm": vllm.__version__, "layers": LAYERS, "models": table}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engines"]:
        start(sys.argv[2], Path(sys.argv[3]))
    else:
        what = f"counts in models of {LAYERS} layers, one graph for all numbers of tokens, the same on every rank"
        main("vllm_sites", __doc__ or "", what, measure)
