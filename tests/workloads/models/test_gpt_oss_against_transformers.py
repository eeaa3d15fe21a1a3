"""The reference model computes what Hugging Face's GPT-OSS computes from the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fuseplan.workloads.models import GptOss, workload

transformers = pytest.importorskip("transformers")


def hugging_face_twin(model: GptOss) -> nn.Module:
    c = model.config
    config = transformers.GptOssConfig(
        num_hidden_layers=c.layers,
        num_local_experts=c.experts,
        num_experts_per_tok=c.experts_per_token,
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.intermediate,
        num_attention_heads=c.query_heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        sliding_window=c.sliding_window,
        attn_implementation="eager",
    )
    twin: nn.Module = transformers.GptOssForCausalLM(config).eval()
    copy_weights(model, twin)
    return twin


@torch.no_grad()
def copy_weights(model: GptOss, twin: nn.Module) -> None:
    c = model.config
    source, copied = dict(model.named_parameters()), {}
    sections = [heads * c.head_dim for heads in (c.query_heads, c.kv_heads, c.kv_heads)]
    for i in range(c.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", source[f"{ours}attention.qkv.{kind}"].split(sections), strict=True):
                copied[f"{theirs}self_attn.{name}_proj.{kind}"] = part
            copied[f"{theirs}self_attn.o_proj.{kind}"] = source[f"{ours}attention.o_proj.{kind}"]
            copied[f"{theirs}mlp.router.{kind}"] = source[f"{ours}router.{kind}"]
        copied[theirs + "self_attn.sinks"] = source[ours + "attention.sinks"]
        copied[theirs + "input_layernorm.weight"] = source[ours + "input_norm.weight"]
        copied[theirs + "post_attention_layernorm.weight"] = source[ours + "post_attention_norm.weight"]
        copied[theirs + "mlp.experts.gate_up_proj"] = source[ours + "experts.w13"][..., : c.hidden].mT
        copied[theirs + "mlp.experts.gate_up_proj_bias"] = source[ours + "experts.b13"]
        copied[theirs + "mlp.experts.down_proj"] = source[ours + "experts.w2"][:, : c.hidden].mT
        copied[theirs + "mlp.experts.down_proj_bias"] = source[ours + "experts.b2"][:, : c.hidden]
    copied["model.embed_tokens.weight"] = source["embed.weight"]
    copied["model.norm.weight"] = source["norm.weight"]
    copied["lm_head.weight"] = source["lm_head.weight"]
    targets = dict(twin.named_parameters())
    assert copied.keys() == targets.keys()
    for name, target in targets.items():
        target.copy_(copied[name])


@torch.no_grad()
def test_logits_agree_with_hugging_face() -> None:
    tiny = workload("gpt-oss-120b-tiny")
    model = tiny.build(dtype=torch.float32)
    (input_ids,) = tiny.example_inputs(sequence=40, batch=2)  # well past the sliding window of 8

    logits = model(input_ids)
    expected = hugging_face_twin(model)(input_ids).logits

    assert expected.std() > 0.5  # logits of a size at which the tolerance says something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
