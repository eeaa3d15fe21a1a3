"""Small Hugging Face models that generate text on a static cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fuseplan

LAYERS, CACHE, PROMPT = 2, 32, 7
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "initializer_range": 0.3,
}  # fmt: skip
IDS = (torch.arange(3 * PROMPT).reshape(3, PROMPT) * 11) % 64


def built(model_type: str, **settings: Any) -> Any:
    """A model whose weights are as far apart as trained ones: with those that it begins with, all logits are near 0."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


def check_generated(model: Any, ids: Tensor, **how: Any) -> list[fuseplan.Report]:
    """Equal tokens with and without `fuseplan.compile`, whose reports are returned."""
    asked: dict[str, Any] = {
        "max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "disable_compile": True,
        "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(ids, **asked)
    reports: list[fuseplan.Report] = []
    model.forward = fuseplan.compile(model.forward, on_report=reports.append, **how)
    assert torch.equal(model.generate(ids, **asked), expected)
    return reports
