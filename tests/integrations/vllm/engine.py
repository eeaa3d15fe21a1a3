"""One engine in a process of its own: `engine.py REQUEST.json ANSWER.json`.

The request names a model, the engine's arguments and prompts; the answer has greedy tokens, and the log probabilities
of given continuations.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

STEPS = 12


def prompts(tokens: list[list[int]]) -> list[Any]:
    """Prompts as vLLM takes them without a tokenizer."""
    return [{"prompt_token_ids": each} for each in tokens]


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        request["model"], skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4,
        disable_log_stats=True, seed=0, **request["arguments"],
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    generated = llm.generate(prompts(request["prompts"]), greedy, use_tqdm=False)
    tokens = [list(each.outputs[0].token_ids) for each in generated]
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    forced = request.get("forced") or [
        [*prompt, *tail] for prompt, tail in zip(request["prompts"], tokens, strict=True)
    ]
    probabilities = [
        [next(iter(place.values())).logprob for place in each.prompt_logprobs[1:]]
        for each in llm.generate(prompts(forced), scored, use_tqdm=False)
    ]
    answer = {"tokens": tokens, "forced": forced, "log_probabilities": probabilities}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
