"""Models in the shapes of published ones, with random weights, fewer layers and a smaller vocabulary."""

from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 32000
SHAPES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama-3.1-8b": (
        LlamaConfig, LlamaForCausalLM,
        {"hidden_size": 4096, "intermediate_size": 14336, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    ),
    "qwen3-8b": (Qwen3Config, Qwen3ForCausalLM, {"hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128}),
    "gemma-3-12b": (
        Gemma3TextConfig, Gemma3ForCausalLM,
        {
            "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "head_dim": 256,
            "sliding_window": 1024,
        },
    ),
    "gpt-oss-20b": (
        GptOssConfig, GptOssForCausalLM,
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "head_dim": 64,
            "sliding_window": 128, "num_local_experts": 4, "max_position_embeddings": 131072,
        },
    ),
}  # fmt: skip
CHANGED = {
    "gpt-oss-20b": "4 experts a layer in place of 32, so that each token reads all of them, as it reads 4 of 32",
}
"""What is another than published, beside the number of layers, the vocabulary and the weights."""
SMALL: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


def config_of(name: str, layers: int, device: torch.device) -> Any:
    """Of a published model's shape; on a CPU 512 wide, with 8 heads to 2, whatever the model."""
    config, _, own = SHAPES[name]
    common: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16384}
    shape = {**common, **own, **(SMALL if device.type == "cpu" else {})}
    return config(num_hidden_layers=layers, vocab_size=VOCABULARY, **shape)


def model_of(name: str, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights in the shape of `config_of`."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return SHAPES[name][1](config_of(name, layers, device)).eval()  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(before)
