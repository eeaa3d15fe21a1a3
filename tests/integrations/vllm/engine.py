"""Engines one after the other in one process: `python -m tests.integrations.vllm.engine REQUEST ANSWER`, two files.

The request names a model, prompts, and for each engine environment variables and arguments. The answer has for each
engine its greedy tokens, and the log probabilities of the first engine's continuations.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from tests.integrations.vllm.missing_ops import define

STEPS = 12


def prompts(tokens: list[list[int]]) -> list[Any]:
    """Prompts as vLLM takes them without a tokenizer."""
    return [{"prompt_token_ids": each} for each in tokens]


def generate(llm: LLM, given: list[list[int]]) -> list[list[int]]:
    """Greedy continuations."""
    greedy = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts(given), greedy, use_tqdm=False)]


def score(llm: LLM, forced: list[list[int]]) -> list[list[float]]:
    """The log probability of each token but the first, after those before it."""
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    return [
        [next(iter(place.values())).logprob for place in each.prompt_logprobs[1:]]
        for each in llm.generate(prompts(forced), scored, use_tqdm=False)
    ]


def compile_as_on_gpus() -> None:
    """Lets vLLM's own backend compile, which the platform of CPUs switches off."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def update_and_split(cls: type, config: Any) -> None:
        is_asked_for = config.compilation_config.mode == CompilationMode.VLLM_COMPILE
        update(config)
        if is_asked_for:
            config.compilation_config.mode = CompilationMode.VLLM_COMPILE
            config.compilation_config.ir_enable_torch_wrap = True

    CpuPlatform.check_and_update_config = classmethod(update_and_split)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    ops = define() if request["as_on_gpus"] else None
    if ops is not None:
        compile_as_on_gpus()
    forced, answers = request["forced"], []
    for each in request["engines"]:
        print("--- next engine ---", flush=True)
        os.environ.update(each["variables"])
        llm = LLM(
            request["model"], skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4,
            disable_log_stats=True, seed=0, **each["arguments"],
        )  # fmt: skip
        tokens = generate(llm, request["prompts"])
        forced = forced or [[*prompt, *tail] for prompt, tail in zip(request["prompts"], tokens, strict=True)]
        answers.append({"tokens": tokens, "forced": forced, "log_probabilities": score(llm, forced)})
        for name in each["variables"]:
            del os.environ[name]
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
