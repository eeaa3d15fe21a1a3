"""A decoder written by hand for speed on the weights of a Hugging Face model, as somebody would who has the time:
queries, keys and values by one GEMM, gate and up by another, and attention by `enable_gqa`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

KNOWN = ("llama", "qwen3", "gemma3_text")


class HandWritten(nn.Module):
    """The logits of a Llama, a Qwen3 or a Gemma 3 on its static cache.

    Args:
        model: whose weights are used. Those that are merged are copied, all others shared.

    Raises:
        ValueError: a model of another kind.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        kind = model.config.model_type
        if kind not in KNOWN:
            raise ValueError(f"nobody wrote a {kind} by hand; allowed: {', '.join(KNOWN)}")
        inner, self.config, self.head = model.model, model.config, model.lm_head
        self.embedding, self.norm, self.rotary = inner.embed_tokens, inner.norm, inner.rotary_emb
        self.layers = nn.ModuleList(_Layer(layer) for layer in inner.layers)
        self.kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(self.layers)
        self.by_kind = kind == "gemma3_text"

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past_key_values: Any, use_cache: bool = True
    ) -> CausalLMOutputWithPast:
        """Of ids and positions [B, T]: logits [B, T, vocabulary]. Writes T keys and values a layer."""
        hidden, first = self.embedding(input_ids), {kind: self.kinds.index(kind) for kind in dict.fromkeys(self.kinds)}
        masks = {kind: self._mask(past_key_values.layers[layer], input_ids) for kind, layer in first.items()}
        turns = {
            kind: self.rotary(hidden, position_ids, *([kind] if self.by_kind else [])) for kind in first
        }  # fmt: skip
        for number, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            hidden = layer(hidden, turns[kind], masks[kind], past_key_values, number)
        return CausalLMOutputWithPast(logits=self.head(self.norm(hidden)))

    def _mask(self, layer: Any, input_ids: Tensor) -> Tensor:
        """What each of T queries sees of a layer's cache, [1, 1, T, S]."""
        count, offset = layer.get_mask_sizes(input_ids.shape[1])
        past = layer.cumulative_length_int if layer.is_sliding else layer.cumulative_length
        queries: Tensor = past + torch.arange(input_ids.shape[1], device=input_ids.device)[:, None]
        keys = offset + torch.arange(count, device=input_ids.device)
        seen: Tensor = keys <= queries
        if layer.is_sliding:
            seen = seen & (keys > queries - self.config.sliding_window)
        return seen[None, None]


class _Layer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        own, mlp = layer.self_attn, layer.mlp
        self.qkv = torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight])
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.sizes = [each.weight.shape[0] for each in (own.q_proj, own.k_proj, own.v_proj)]
        self.width, self.scale, self.act, self.out, self.down = (
            own.head_dim,
            own.scaling,
            mlp.act_fn,
            own.o_proj,
            mlp.down_proj,
        )
        nothing = nn.Identity()
        self.before = layer.input_layernorm
        self.q_norm, self.k_norm = getattr(own, "q_norm", nothing), getattr(own, "k_norm", nothing)
        four = hasattr(layer, "pre_feedforward_layernorm")
        self.behind = layer.post_attention_layernorm if four else nothing
        self.before_mlp = layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm
        self.behind_mlp = layer.post_feedforward_layernorm if four else nothing

    def forward(self, hidden: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, cache: Any, number: int) -> Tensor:
        batch, tokens, _ = hidden.shape
        parts = F.linear(self.before(hidden), self.qkv).split(self.sizes, dim=-1)
        q, k, v = (part.view(batch, tokens, -1, self.width) for part in parts)
        cos, sin = (each[:, None] for each in turns)
        q, k = (each.transpose(1, 2) for each in (self.q_norm(q), self.k_norm(k)))
        q, k = q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin
        k, v = cache.update(k, v.transpose(1, 2), number)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
        hidden = hidden + self.behind(self.out(heads.transpose(1, 2).reshape(batch, tokens, -1)))
        gate, up = F.linear(self.before_mlp(hidden), self.gate_up).chunk(2, dim=-1)
        added: Tensor = self.behind_mlp(self.down(self.act(gate) * up))
        return hidden + added


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
