"""Small models that vLLM loads from disk, with random weights under which each token is decided clearly, and a lost
all-reduce shows: `test_checkpoints.py` holds both.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LAYERS, HIDDEN, HEAD, VOCABULARY = 2, 256, 64, 512
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
CLOSE = 0.25
"""Of log probabilities; 0.16 was seen. bf16 rounds by 2^-9, and engines differ in where a reduced sum is rounded, if at
all."""
CONFIGS: dict[str, dict[str, Any]] = {"llama": COMMON, "qwen3": COMMON, "gpt_oss": {**COMMON, **GPT_OSS}}
DEEPER = 4
"""Layers of a model with pieces that are alike."""


def save(name: str, folder: Path, *, layers: int = LAYERS) -> Path:
    """Writes a checkpoint with a tokenizer of numbered words, the same each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGS[name] | {"num_hidden_layers": layers})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            else:
                parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.1)
        # As in fuseplan's own workloads: routing is sharp, what layers add is quiet beside the embedding, and the head
        # has an opinion, so that rounding doesn't grow into other experts and other tokens.
        for parameter_name, parameter in model.named_parameters():
            if "router.weight" in parameter_name:
                parameter.mul_(12.0)
            elif "experts.down_proj" in parameter_name:
                parameter.mul_(0.15)
            elif parameter_name.endswith(("o_proj.weight", "mlp.down_proj.weight")):
                parameter.mul_(0.5)
        model.model.embed_tokens.weight.mul_(8.0)
        model.lm_head.weight.mul_(0.3).add_(model.model.embed_tokens.weight.roll(7, 0), alpha=0.375)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder
