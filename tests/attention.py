"""Attention over heads that several queries share, in the spellings that models have, and near them; and its graphs as
a GPU's would be, without one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fuseplan.dialect import ATTENTION_KERNELS
from fuseplan.graph.facts import tensor_of
from tests.helpers import post_grad, randn

BATCH, HEADS, SHARED, HEAD_DIM, KEYS = 3, 8, 2, 16, 32
GROUPS = HEADS // SHARED
Repeat = Callable[[Tensor], Tensor]


def hugging_face(x: Tensor) -> Tensor:
    """`repeat_kv` of transformers."""
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, GROUPS, length, width)
    return x.reshape(batch, heads * GROUPS, length, width)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(GROUPS, dim=1)


def stacked(x: Tensor) -> Tensor:
    return torch.stack([x] * GROUPS, dim=2).flatten(1, 2)


def tokens_first(x: Tensor) -> Tensor:
    """Meta's, of [B, S, heads, D], before heads and tokens change places."""
    batch, heads, length, width = x.shape
    x = x.transpose(1, 2)[:, :, :, None, :].expand(batch, length, heads, GROUPS, width)
    return x.reshape(batch, length, heads * GROUPS, width).transpose(1, 2)


def tokens_first_interleaved(x: Tensor) -> Tensor:
    return x.transpose(1, 2).repeat_interleave(GROUPS, dim=2).transpose(1, 2).contiguous()


SPELLINGS: dict[str, Repeat] = {
    each.__name__: each for each in (hugging_face, interleaved, stacked, tokens_first, tokens_first_interleaved)
}


def tiled(x: Tensor) -> Tensor:
    """All heads after each other, again and again: no grouped query attention."""
    return x.repeat(1, GROUPS, 1, 1)


def attend(repeat: Repeat, **how: Any) -> Callable[..., Tensor]:
    """SDPA over repeated heads."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, **how)

    return attention


def inputs(
    queries: int = 1, dtype: torch.dtype = torch.bfloat16, *, masked: bool = True, batch: int = BATCH,
    shared: int = SHARED, keys: int = KEYS,
) -> list[Tensor]:  # fmt: skip
    """q, k, v and a mask of truths in which every query sees a key."""
    q = randn(batch, HEADS, queries, HEAD_DIM, dtype=dtype, seed=1)
    k, v = (randn(batch, shared, keys, HEAD_DIM, dtype=dtype, seed=seed) for seed in (2, 3))
    last = torch.arange(keys - queries, keys)[:, None] - 3 * torch.arange(batch)[:, None, None, None]
    seen = torch.arange(keys) <= last
    return [q, k, v, *([seen] if masked else [])]


def decode(repeat: Repeat = hugging_face, queries: int = 1, dtype: torch.dtype = torch.bfloat16) -> fx.Graph:
    """The graph of masked attention."""
    return post_grad(attend(repeat), *inputs(queries, dtype))


def on_gpu(graph: fx.Graph, kernel: str = "cudnn") -> fx.Graph:
    """A graph of the CPU's attention as torch would trace it on CUDA, with fake values there: a mask is expanded to all
    heads where memory-efficient attention reads it.
    """
    moved = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    mode: Any = next(value.fake_mode for node in graph.nodes if isinstance(value := tensor_of(node), FakeTensor))

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = moved.call_function(target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
        with mode:
            node.meta["val"] = target(*given[0], **given[1])
        return node

    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cuda", 0)}
        if node.op == "placeholder":
            values[node], value = moved.placeholder(node.name), node.meta["val"]
            if isinstance(value, Tensor):
                with mode:
                    value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            values[node].meta["val"] = value
        elif node.op == "output":
            values[node] = moved.output(args[0])
        elif node.target is ATTENTION_KERNELS["cpu"].target:
            q, k, v, *rest = args
            mask, causal = kwargs.get("attn_mask"), bool(rest[1:] and rest[1])
            if mask is not None and kernel == "efficient":
                q_shape, k_shape = q.meta["val"].shape, k.meta["val"].shape
                mask = call(torch.ops.aten.expand.default, mask, [*q_shape[:3], k_shape[2]])
            arguments: dict[str, tuple[Any, ...]] = {
                "cudnn": (q, k, v, mask, False, 0.0, causal), "flash": (q, k, v, 0.0, causal),
                "efficient": (q, k, v, mask, False, 0.0, causal), "overrideable": (q, k, v, mask, 0.0, causal),
            }  # fmt: skip
            scale = {"scale": kwargs["scale"]} if "scale" in kwargs else {}
            values[node] = call(ATTENTION_KERNELS[kernel].target, *arguments[kernel], **scale)
        else:
            values[node] = call(node.target, *args, **kwargs)
        values[node].meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")})
    return moved
