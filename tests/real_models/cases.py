"""The Hugging Face models that are run, small: what is in their configurations, and how many norms that makes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import profile

from fuseplan.integrations import splitting
from fuseplan.integrations import transformers as huggingface

LAYERS, HIDDEN, HEAD = 2, 64, 16
COMMON = {
    "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "vocab_size": 128,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

ROUNDOFF = 2**-8
"""A value that bf16, with its 8 bits of significand, rounds is off by at most this share of it."""


@dataclass(frozen=True)
class Case:
    """A model, without weights.

    Attributes:
        config: the fields of its `config.json`.
        head_norms: norms a layer on queries and keys, beside its two on the residual stream.
        normed_before_add: two further norms a layer, on what is added to the residual stream: its all-reduces go into
            those, as they do into its two on the residual stream elsewhere.
        plan: how to split it over the ranks where it brings no `tp_plan` of its own.
        distribution: transformers' setting to split it over two ranks; empty: fuseplan splits it.
        reduced: all-reduces a layer in that split that go straight into a norm, or into a residual add and a norm.
    """

    config: Mapping[str, Any]
    head_norms: int = 0
    normed_before_add: bool = False
    plan: Mapping[str, str] | None = None
    distribution: Mapping[str, Any] = field(default_factory=lambda: {"tp_plan": "auto"})
    reduced: int = 2

    @property
    def last(self) -> str:
        """The module of a layer that adds to the residual stream after attention."""
        has_experts = {"num_local_experts", "num_experts"} & self.config.keys()
        return "mlp.experts" if has_experts else "mlp.down_proj"

    @property
    def op(self) -> str:
        """What an all-reduce and the norm behind it are fused to."""
        return "all_reduce_rms_norm" if self.normed_before_add else "all_reduce_fused_add_rms_norm"

    @property
    def norms(self) -> dict[str, int]:
        """What there is to recognise: the first norm has no residual to add."""
        heads = {f"rms_norm[{HEAD}]": self.head_norms * LAYERS} if self.head_norms else {}
        plain = 2 * LAYERS * self.normed_before_add + 1
        return {f"fused_add_rms_norm[{HIDDEN}]": 2 * LAYERS, f"rms_norm[{HIDDEN}]": plain, **heads}

    def build(self, group: dist.ProcessGroup | None) -> nn.Module:
        """The model with random bf16 weights, the same on every rank; split where there is a group."""
        torch.manual_seed(0)
        name = self.config["model_type"]
        model = huggingface.build(huggingface.config_from_dict(self.config, name), None, name)
        if group is not None:
            splitting.shard(model, group, name, self.plan)
        return model


CASES = {
    "llama": Case({"model_type": "llama", **COMMON}),
    "qwen3": Case({"model_type": "qwen3", **COMMON}, head_norms=2),
    "gpt_oss": Case(
        {"model_type": "gpt_oss", **MOE, **COMMON},
        plan={"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.mlp.experts": "moe_tp_experts"},
        distribution={"tp_size": 2, "ep_size": 2},  # its own plan splits by expert and leaves attention whole
        reduced=1,
    ),
    "mixtral": Case({"model_type": "mixtral", **MOE, **COMMON}),
    "gemma3": Case(
        {"model_type": "gemma3_text", "query_pre_attn_scalar": HEAD, **COMMON}, head_norms=2, normed_before_add=True
    ),
    "phi3": Case({"model_type": "phi3", "pad_token_id": 0, **COMMON}, distribution={}),
    "qwen3_moe": Case(
        {
            "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
            "norm_topk_prob": True, **COMMON,
        },
        head_norms=2,
    ),
}  # fmt: skip


def norms(recognized: Mapping[str, int]) -> dict[str, int]:
    """The norms among what a report recognised."""
    return {op: count for op, count in recognized.items() if "rms_norm" in op}


def fused_calls(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What `run` returns, and how often it calls each fused op: whatever a report says, this is what ran.

    Compiling calls ops too, so `run` should find its graphs compiled.
    """
    # torch 2.11 warns of what else it would forget.
    with profile(acc_events=True) as profiled:
        result = run()
    names = [event.name for event in profiled.events() if event.name.startswith("fuseplan::")]
    return result, dict(Counter(name.removeprefix("fuseplan::") for name in names))
