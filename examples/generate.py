"""Greedy generation on a static cache, with norms in fp8, by plain torch.compile and by fuseplan.

python examples/generate.py [config.json]
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen3Config

import fuseplan
from fuseplan.integrations import transformers as huggingface

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128, **HEADS}
GENERATE = {"cache_implementation": "static", "max_new_tokens": 8, "do_sample": False, "disable_compile": True}


def quantize(module, args, output):
    wide = output.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return ((wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(output.dtype)


torch.manual_seed(0)
config = huggingface.load_config(Path(sys.argv[1])) if sys.argv[1:] else Qwen3Config(**TINY)
model = huggingface.build(config, None, config.model_type)
for layer in model.model.layers:
    layer.input_layernorm.register_forward_hook(quantize)
    layer.post_attention_layernorm.register_forward_hook(quantize)

forward, reports = model.forward, []
ordered = fuseplan.PassConfig(policy="ordered(norm_quant)")  # whatever it costs, here by the reference
fused = fuseplan.compile(forward, config=ordered, on_report=reports.append)
for name, model.forward in {"stock": torch.compile(forward), "fused": fused}.items():
    print(f"{name}  {model.generate(torch.arange(1, 7)[None], **GENERATE)[0, 6:].tolist()}")
for report, graph in zip(reports, ("prompt", "decoding"), strict=True):
    print(f"{graph}: {report.fused}")
