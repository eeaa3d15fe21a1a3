"""GPT-OSS in plain PyTorch: one device, no fusions, norms in the form that serving engines use.

The residual stream and all norms run on flat tokens; attention alone sees sequences. Tensor parallelism is applied
from outside by `tensor_parallel.shard_`.

Shapes: B batch, S sequence, T = B*S tokens, L positions attended to, H hidden, P padded hidden, E experts,
V vocabulary, Q query heads, K kv heads, G = Q/K query heads per kv head, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseplan.workloads.models.attention import attention
from fuseplan.workloads.models.config import GptOssConfig
from fuseplan.workloads.models.experts import Experts


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`(x * rsqrt(mean(x^2) + eps)) * weight`, normed in float32 and cast before the weight.

    Args:
        x: [T, H], any float dtype.
        weight: [H] of the same dtype.
        eps: Added to the mean of squares.

    Returns:
        [T, H] in the dtype of `x`.
    """
    s = x.float()
    return (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`s = x + residual; (rms_norm(s) * weight, s)`: added in float32, the unrounded sum normed, both results cast.

    Args:
        x: [T, H], any float dtype.
        residual: [T, H] of the same dtype.
        weight: [H] of the same dtype.
        eps: Added to the mean of squares.

    Returns:
        The norm and the new residual, each [T, H] in the dtype of `x`.
    """
    s = x.float() + residual.float()
    y = (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return y, s.to(x.dtype)


def yarn_frequencies(config: GptOssConfig) -> Tensor:
    """RoPE frequencies [D/2] in float32: slow ones divided by the YaRN factor, fast ones kept, a ramp between."""
    D, theta = config.head_dim, config.rope_theta

    def index_of(rotations: float) -> float:
        wavelength = config.yarn_original_positions / (rotations * 2 * math.pi)
        return D * math.log(wavelength) / (2 * math.log(theta))

    low, high = max(index_of(config.yarn_beta_fast), 0), min(index_of(config.yarn_beta_slow), D - 1)
    ramp = ((torch.arange(D // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequency = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    return frequency / config.yarn_factor * ramp + frequency * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (a, b) of the last dim to `(a cos - b sin, b cos + a sin)`.

    Args:
        x: [B, S, heads, D].
        cos: [B, S, 1, D], the same table for both halves.
        sin: [B, S, 1, D], negated in the first half.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


class KVCache(NamedTuple):
    """Keys and values of every layer, preallocated so that shapes stay static; position p lives in slot p.

    Fields hold one tensor a layer, [B, max_len, K, D]. Positions past `max_len` are an index error.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @classmethod
    def empty(cls, model: GptOss, batch: int, max_len: int) -> KVCache:
        """A cache of zeros for this model, on its device, in its dtype and with this rank's kv heads."""

        def zeros(layer: Layer) -> Tensor:
            attn = layer.attention
            return attn.sinks.new_zeros(batch, max_len, attn.kv_heads, attn.head_dim)

        return cls(tuple(map(zeros, model.blocks)), tuple(map(zeros, model.blocks)))

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, S, K, D] at positions [B or 1, S] in place and return all of the layer's keys and values."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer][rows, positions] = k
        self.v[layer][rows, positions] = v
        return self.k[layer], self.v[layer]


class Step(NamedTuple):
    """The values that all layers of one forward pass share: positions of queries and keys, RoPE tables, (B, S), the
    cache.
    """

    queries: Tensor
    keys: Tensor
    cos: Tensor
    sin: Tensor
    shape: tuple[int, int]
    cache: KVCache | None


class RMSNorm(nn.Module):
    """`rms_norm` where the residual stream begins, `fused_add_rms_norm` from there on."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden).normal_(mean=1.0, std=0.1))
        self.eps = config.norm_eps

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T, H] twice -> the norm and the new residual."""
        if residual_TH is None:
            return rms_norm(x_TH, self.weight, self.eps), x_TH
        return fused_add_rms_norm(x_TH, residual_TH, self.weight, self.eps)


class Linear(nn.Module):
    """`x @ weight.T + bias`, random weights that scale their input by `gain`, and small random biases."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=gain * inputs**-0.5))
        self.bias = nn.Parameter(torch.empty(outputs).normal_(std=0.1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention, full or sliding, with a learned sink per head."""

    def __init__(self, config: GptOssConfig, index: int) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.head_dim = config.query_heads, config.kv_heads, config.head_dim
        self.qkv = Linear(config.hidden, (config.query_heads + 2 * config.kv_heads) * config.head_dim)
        self.o_proj: nn.Module = Linear(config.query_heads * config.head_dim, config.hidden)
        self.sinks = nn.Parameter(torch.empty(config.query_heads).normal_())
        self.index, self.window = index, config.sliding_window if config.is_sliding(index) else 0

    def forward(self, x_TH: Tensor, step: Step) -> Tensor:
        """`o_proj(attention(rope(q), rope(k), v))` of `q, k, v = qkv(x)`: [T, H] -> [T, H]."""
        (B, S), Q, K = step.shape, self.query_heads, self.kv_heads
        qk, v = self.qkv(x_TH).view(B, S, Q + 2 * K, self.head_dim).split((Q + K, K), dim=2)
        q, k = rotate(qk, step.cos, step.sin).split((Q, K), dim=2)
        if step.cache is not None:
            k, v = step.cache.write(self.index, step.queries, k, v)
        out = attention(q, k, v, self.sinks, step.queries, step.keys, self.window)
        o_TH: Tensor = self.o_proj(out.view(B * S, Q * self.head_dim))
        return o_TH


class Layer(nn.Module):
    """Attention, then the mixture of experts, each behind a norm that also adds the residual."""

    def __init__(self, config: GptOssConfig, index: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config)
        self.attention = Attention(config, index)
        self.post_attention_norm = RMSNorm(config)
        self.router = Linear(config.hidden, config.experts, gain=3.0)
        self.experts: nn.Module = Experts(config)
        self.padding = config.padded_hidden - config.hidden

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """[T, H] twice -> the experts' output, to be added to the residual stream, and the stream before it is
        added.
        """
        x_TH, residual_TH = self.input_norm(x_TH, residual_TH)
        x_TH = self.attention(x_TH, step)
        x_TH, residual_TH = self.post_attention_norm(x_TH, residual_TH)
        x_TP = F.pad(x_TH, (0, self.padding)) if self.padding else x_TH
        return self.experts(x_TP, self.router(x_TH)), residual_TH


class GptOss(nn.Module):
    """`lm_head(norm(layers(embed(input_ids))))`, with random weights, on the default device and in the default dtype.

    The weights are random, yet drawn so that rounding doesn't grow into other results. The head is noise plus the
    embedding shifted by one token: as long as the residual stream is intact, greedy decoding has a clear winner at
    every step, the next token id. Routing is sharp and the experts are quiet: little changes where rounding swaps the
    last expert chosen for the first one that isn't.

    Args:
        config: The sizes.
        on_layer: Called with each layer as soon as it exists, so that its weights can be split or moved before the next
            layer takes memory.
    """

    frequencies: Tensor

    def __init__(self, config: GptOssConfig, on_layer: Callable[[Layer], None] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed: nn.Module = nn.Embedding(config.vocab, config.hidden)
        self.lm_head: nn.Module = Linear(config.hidden, config.vocab, bias=False, gain=0.5)
        with torch.no_grad():
            next_token = self.embed.weight.roll(1, 0)
            self.lm_head.weight.add_(next_token, alpha=config.hidden**-0.5)
        self.layers = nn.ModuleList()
        for index in range(config.layers):
            layer = Layer(config, index)
            if on_layer is not None:
                on_layer(layer)
            self.layers.append(layer)
        self.norm = RMSNorm(config)
        self.register_buffer("frequencies", yarn_frequencies(config), persistent=False)
        self.rope_scale = 0.1 * math.log(config.yarn_factor) + 1.0 if config.yarn_factor > 1 else 1.0

    @property
    def blocks(self) -> list[Layer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each position.

        Args:
            input_ids: [B, S] int64.
            positions: [B, S] or [1, S] int64, 0 to S - 1 by default. They turn RoPE, order the causal mask and are the
                slots of the cache.
            cache: Written in place at `positions`; each token attends to all that the cache holds up to its position.

        Returns:
            [B, S, V] in the dtype of the weights.

        Raises:
            ValueError: `input_ids` isn't two-dimensional.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has {input_ids.dim()} dimensions; give [batch, sequence]")
        B, S = input_ids.shape
        if positions is None:
            positions = torch.arange(S, device=input_ids.device)[None]
        x_TH, residual_TH = self.embed(input_ids.flatten()), None
        step = self.step(positions, (B, S), cache, x_TH.dtype)
        for layer in self.layers:
            x_TH, residual_TH = layer(x_TH, residual_TH, step)
        x_TH, _ = self.norm(x_TH, residual_TH)
        logits_TV: Tensor = self.lm_head(x_TH)
        return logits_TV.view(B, S, self.config.vocab)

    def step(self, positions: Tensor, shape: tuple[int, int], cache: KVCache | None, dtype: torch.dtype) -> Step:
        """RoPE tables [B, S, 1, D] in this dtype and the positions that keys are at."""
        angles = (positions[..., None].float() * self.frequencies)[:, :, None]
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        cos, sin = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
        keys = positions if cache is None else torch.arange(cache.k[0].shape[1], device=positions.device)[None]
        return Step(positions, keys, cos, sin, shape, cache)
