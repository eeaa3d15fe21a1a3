"""The models that engines run: no token of theirs hangs on rounding, and a lost all-reduce can't be missed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integrations.vllm.checkpoints import CLOSE, CONFIGS
from tests.integrations.vllm.conftest import PROMPTS

STEPS = 12


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint(request.param), dtype=torch.bfloat16)
    return loaded.eval()


@torch.no_grad()
def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    scores: torch.Tensor = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return scores


def test_tokens_are_decided_and_reductions_show(model: Any) -> None:
    generated = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(STEPS):
            best, second = log_probabilities(model, tokens)[-1].topk(2).values
            assert best - second > 2 * CLOSE
            tokens.append(int(log_probabilities(model, tokens)[-1].argmax()))
        generated.append(tokens)
    whole = [log_probabilities(model, tokens) for tokens in generated]
    # What the first of two ranks has of a layer's attention before it is reduced.
    weight = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, weight.shape[1] // 2 :] = 0
    moved = [
        (log_probabilities(model, tokens) - before)[:-1].gather(-1, torch.tensor(tokens[1:])[:, None]).abs().max()
        for tokens, before in zip(generated, whole, strict=True)
    ]
    assert max(moved) > 4 * CLOSE
