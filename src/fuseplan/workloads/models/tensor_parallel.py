"""Tensor parallelism from outside: split a model's weights over a process group and put the collectives between.

    column-parallel   qkv and sinks by heads, w13 by gate/up pairs          no communication
    row-parallel      o_proj, w2 by columns                                 all-reduce after
    vocabulary        embedding by rows, lm_head by rows                    all-reduce after, all-gather after

A bias behind an all-reduce stays on the first rank and is zero on the others, so that all ranks have the same graph.
The experts' all-reduce runs inside their op, where the compiler can't see it, or outside of it on request.

Shapes: T tokens, H hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fuseplan.workloads.models.config import GptOssConfig
from fuseplan.workloads.models.experts import Experts, all_reduce
from fuseplan.workloads.models.gpt_oss import GptOss, Layer, Linear


def check_size(config: GptOssConfig, size: int) -> None:
    """Raise a ValueError unless a group of this size divides everything that `shard_` splits."""
    allowed = ", ".join(map(str, config.tensor_parallel_sizes))
    if size < 1:
        raise ValueError(f"tp={size} is not a number of ranks; use one of {allowed} for {config.name}")
    parts = {
        "query heads": config.query_heads,
        "kv heads": config.kv_heads,
        "intermediate channels": config.intermediate,
        "vocabulary entries": config.vocab,
    }
    for part, count in parts.items():
        if count % size:
            raise ValueError(f"tp={size} does not divide {count} {part} of {config.name}; use one of {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's place in a group, and its share of each weight."""

    group: str
    rank: int
    size: int

    @classmethod
    def of(cls, group: ProcessGroup) -> Shard:
        """This process's place in the group."""
        return cls(group=group.group_name, rank=group.rank(), size=group.size())

    def part(self, weight: Tensor, dim: int) -> nn.Parameter:
        """This rank's contiguous share of a weight along a dim, copied so that the whole can be freed."""
        length = weight.shape[dim] // self.size
        share = weight.detach().narrow(dim, self.rank * length, length)
        return nn.Parameter(share.clone(memory_format=torch.contiguous_format))

    def once(self, bias: Tensor | None) -> nn.Parameter:
        """The bias on the first rank and zeros on the others: added once when the ranks' results are summed."""
        assert bias is not None
        return nn.Parameter(bias.detach() if self.rank == 0 else torch.zeros_like(bias.detach()))


class AllReduced(nn.Module):
    """`all_reduce(inner(...))`: a module whose result is a partial sum on each rank."""

    def __init__(self, inner: nn.Module, group: str) -> None:
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, *inputs: Tensor) -> Tensor:
        """The result of `inner`, summed over the ranks."""
        return all_reduce(self.inner(*inputs), self.group)


class VocabParallelEmbedding(nn.Module):
    """`embedding(ids)` where the row is on this rank, else 0; to be summed over the ranks."""

    def __init__(self, weight: nn.Parameter, rank: int) -> None:
        super().__init__()
        self.weight, self.rank = weight, rank

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] int64 -> [T, H]."""
        # Not by a subtraction of the first row: on the first rank that is 0, and Inductor leaves it out.
        rows = self.weight.shape[0]
        elsewhere_T = ids_T.div(rows, rounding_mode="floor") != self.rank
        return nn.functional.embedding(ids_T.remainder(rows), self.weight).masked_fill(elsewhere_T[:, None], 0)


class AllGathered(nn.Module):
    """`cat([inner(x) of every rank], -1)`."""

    def __init__(self, inner: nn.Module, shard: Shard) -> None:
        super().__init__()
        self.inner, self.group, self.size = inner, shard.group, shard.size

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, V], each rank holding V/R of the columns before."""
        ops = torch.ops._c10d_functional
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(self.inner(x_TH), self.size, self.group))
        y_TV: Tensor = gathered.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)
        return y_TV


def shard_layer_(layer: Layer, shard: Shard, *, outer_reduce: bool) -> None:
    """Keep this rank's share of one layer, in place; `outer_reduce` puts the experts' all-reduce outside their op."""
    attention, experts = layer.attention, layer.experts
    assert isinstance(attention.o_proj, Linear)
    assert isinstance(experts, Experts)

    heads = (attention.query_heads, attention.kv_heads, attention.kv_heads)
    sections = [count * attention.head_dim for count in heads]
    for name, whole in list(attention.qkv.named_parameters()):
        shares = [shard.part(section, 0) for section in whole.split(sections)]
        setattr(attention.qkv, name, nn.Parameter(torch.cat([share.detach() for share in shares])))
    attention.sinks = shard.part(attention.sinks, 0)
    attention.query_heads //= shard.size
    attention.kv_heads //= shard.size
    attention.o_proj.weight = shard.part(attention.o_proj.weight, 1)
    attention.o_proj.bias = shard.once(attention.o_proj.bias)
    attention.o_proj = AllReduced(attention.o_proj, shard.group)

    experts.w13, experts.b13 = shard.part(experts.w13, 1), shard.part(experts.b13, 1)
    experts.w2, experts.b2 = shard.part(experts.w2, 2), shard.once(experts.b2)
    if outer_reduce:
        layer.experts = AllReduced(experts, shard.group)
    else:
        experts.group = shard.group


def shard_ends_(model: GptOss, shard: Shard) -> None:
    """Keep this rank's share of the embedding and of the head, in place."""
    assert isinstance(model.embed, nn.Embedding)
    assert isinstance(model.lm_head, Linear)
    rows = shard.part(model.embed.weight, 0)
    model.embed = AllReduced(VocabParallelEmbedding(rows, shard.rank), shard.group)
    model.lm_head.weight = shard.part(model.lm_head.weight, 0)
    model.lm_head = AllGathered(model.lm_head, shard)


def shard_(model: GptOss, group: ProcessGroup, *, outer_reduce: bool = False) -> GptOss:
    """Split a whole model over a process group, in place; its results stay those of the whole.

    Works on real, fake and meta weights and with any backend, the fake one included. A group of one changes nothing.

    Args:
        model: A model that isn't split yet.
        group: The ranks to split over; this process must be one of them.
        outer_reduce: All-reduce the experts' output outside their op, where the compiler sees it.

    Returns:
        The model.

    Raises:
        ValueError: The group's size doesn't divide heads, kv heads, intermediate size or vocabulary, or the model is
            already split.
    """
    shard = Shard.of(group)
    check_size(model.config, shard.size)
    if isinstance(model.lm_head, AllGathered):
        raise ValueError(f"{model.config.name} is already split over a process group; build it anew")
    if shard.size > 1:
        for layer in model.blocks:
            shard_layer_(layer, shard, outer_reduce=outer_reduce)
        shard_ends_(model, shard)
    return model
