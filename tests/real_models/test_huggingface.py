"""Unmodified Hugging Face models, compiled on the CPU with fuseplan beside plain `torch.compile`.

The models run on a gloo group of one rank, split by a tensor-parallel plan through hooks: their all-reduces are real,
so that there is something to fuse in a model that neither pads nor quantises.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

import fuseplan
from fuseplan.integrations import transformers as huggingface

LAYERS = 2
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 128}
COMMON = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "head_dim": 16}


@dataclass(frozen=True)
class Case:
    """A model: its configuration, and how many norms of which width a layer has beside the two on the hidden size."""

    config: dict[str, Any]
    head_norms: int = 0


CASES = {
    "llama": Case({"model_type": "llama", **COMMON}),
    "qwen3": Case({"model_type": "qwen3", **COMMON}, head_norms=2),
    "gpt_oss": Case({"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, **COMMON}),
    "mixtral": Case({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **COMMON}),
}


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    world = dist.group.WORLD
    assert world is not None
    yield world
    dist.destroy_process_group()


def build(name: str, group: dist.ProcessGroup) -> nn.Module:
    torch.manual_seed(0)
    config = huggingface.config_from_dict(CASES[name].config, name)
    model = huggingface.build(config, None, name)
    # GPT-OSS has no tp_plan of its own.
    plan = {"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.mlp.experts": "moe_tp_experts"}
    huggingface.shard(model, group, name, plan if name == "gpt_oss" else None)
    return model


def generate(forward: Callable[..., Any], model: Any, batch: int) -> list[Tensor]:
    """Logits of a prefill of 6 tokens and of two decode steps on a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = (torch.arange(batch * 8).reshape(batch, 8) * 7) % 128
    steps = [ids[:, :6], ids[:, 6:7], ids[:, 7:8]]
    logits = []
    start = 0
    for step in steps:
        positions = torch.arange(start, start + step.shape[1])
        mask = torch.ones(batch, start + step.shape[1], dtype=torch.long)
        everyone = positions[None].expand(batch, -1)
        out = forward(step, past_key_values=cache, position_ids=everyone, attention_mask=mask, use_cache=True)
        logits.append(out.logits.clone())
        start += step.shape[1]
    return logits


@pytest.mark.parametrize("name", sorted(CASES))
def test_fused_agrees_with_plain_compile(name: str, group: dist.ProcessGroup) -> None:
    case = CASES[name]
    model = build(name, group)
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding, allreduce_rms)")
    with torch.inference_mode():
        for batch in (1, 2):
            torch._dynamo.reset()
            expected = generate(torch.compile(model), model, batch)
            torch._dynamo.reset()
            reports.clear()
            actual = generate(fuseplan.compile(model, config=config, on_report=reports.append), model, batch)
            assert len(reports) >= 2, "prefill and decode are graphs of their own"
            for report in reports:
                assert report.fused["allreduce_rms"] == 2 * LAYERS, json.dumps(report.recognized)
                assert norms(report, 64) == 2 * LAYERS + 1
                assert norms(report, 16) == case.head_norms * LAYERS
            for left, right in zip(actual, expected, strict=True):
                assert torch.isfinite(left).all()
                # Inside its own kernels Inductor keeps bf16 intermediates in float32, a fused op rounds them: a few
                # units in the last place of bf16 (2 ** -8) after each of the 2 * LAYERS fusions.
                torch.testing.assert_close(left, right, rtol=2**-5, atol=2**-5)


def norms(report: fuseplan.Report, width: int) -> int:
    return sum(report.recognized.get(f"{op}[{width}]", 0) for op in ("rms_norm", "fused_add_rms_norm"))
