"""Writing new keys and values into a static cache; `fuseplan.rules.parts.cached_rotary` finds such writes in graphs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fuseplan.graph.facts import hint, tensor_of
from fuseplan.graph.ops import Draw, Indices, Sample, define, random_tensor
from fuseplan.rules.parts.base import Part, Reported, rows_of

CACHES: Final = ("k_cache", "v_cache")
"""The arguments that the op writes to."""

DRAWS: Mapping[str, Draw | Indices] = {"positions": Indices(of="k_cache", dim=2)}


def cache_write_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """cache[:, :, positions] = x, for keys and for values, on copies of the caches

    Args:
        k: [batch, heads, tokens, head_dim].
        v: [batch, heads, tokens, value_dim], k's dtype.
        k_cache: [batch, heads, length, head_dim], k's dtype.
        v_cache: [batch, heads, length, value_dim], k's dtype.
        positions: [tokens], integers; negative ones count from the end. Which of several equal ones wins is undefined.

    Returns:
        The updated (k_cache, v_cache).

    Raises:
        IndexError: a position lies outside of the cache.
    """
    at = (None, None, positions)
    return torch.ops.aten.index_put.default(k_cache, at, k), torch.ops.aten.index_put.default(v_cache, at, v)


def cache_write_fake(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and layouts of `cache_write_reference`."""
    return torch.empty_like(k_cache), torch.empty_like(v_cache)


def bytes_of(caches: Iterable[object]) -> int:
    """The bytes of the values of nodes, as traced."""
    values = [value for node in caches if (value := tensor_of(node)) is not None]
    return sum(math.prod(map(hint, value.shape)) * value.dtype.itemsize for value in values)


def _sample(
    batch: int, heads: int, tokens: int, widths: tuple[int, int], length: int, dtype: torch.dtype
) -> Sample:  # fmt: skip
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        shapes = [(batch, heads, size, width) for size in (tokens, length) for width in widths]
        tensors = [random_tensor(shape, dtype, device, generator) for shape in shapes]
        return *tensors, torch.randperm(length, generator=generator)[:tokens].to(device)

    return Sample(name=f"{rows_of((batch, heads, tokens, *widths, length))}-{str(dtype)[6:]}", make=make)


cache_write = define(
    "cache_write",
    "(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions) -> (Tensor, Tensor)",
    reference=cache_write_reference,
    fake=cache_write_fake,
    samples=(
        _sample(2, 3, 1, (16, 16), 5, torch.bfloat16),
        _sample(3, 2, 4, (6, 10), 9, torch.float32),
    ),
    draws=DRAWS,
)

PART = Part(name="cache_write", ops=(cache_write,), reported=Reported.BY_RULE)
