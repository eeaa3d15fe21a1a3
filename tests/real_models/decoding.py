"""Small Hugging Face models that generate text on a static cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

ROWS, LAYERS, CACHE, PROMPT = 3, 2, 32, 7
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "initializer_range": 0.3,
}  # fmt: skip
IDS = (torch.arange(ROWS * 12).reshape(ROWS, 12) * 11) % 64


def built(model_type: str, **settings: Any) -> Any:
    """A model whose weights are as far apart as trained ones: with those that it begins with, all logits are near 0."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


def step(model: Any, queries: int = 1, batch: int = ROWS, prompt: int = PROMPT, padded: int = 0) -> dict[str, Any]:
    """The arguments of one step behind a prompt whose second row is padded at the left."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    mask = torch.ones(batch, prompt + queries, dtype=torch.long)
    mask[1:2, :padded] = 0
    with torch.no_grad():
        model(input_ids=IDS[:batch, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
    return {
        "input_ids": IDS[:batch, :queries], "position_ids": torch.arange(prompt, prompt + queries).expand(batch, -1),
        "attention_mask": mask, "past_key_values": cache, "use_cache": True,
    }  # fmt: skip


def held(cache: Any) -> list[Tensor]:
    """The keys and values of all layers."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
