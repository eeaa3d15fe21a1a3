"""All-reduce as one op: the functional collective and its wait."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fuseplan.dialect.norm import random_tensor
from fuseplan.dialect.registry import Sample, define


def all_reduce_reference(x: Tensor, group_name: str) -> Tensor:
    """y = sum over the ranks of the group of x, in x's dtype

    Equals `wait_tensor(_c10d_functional.all_reduce(x, "sum", group_name))`.

    Args:
        x: any shape and dtype that the group's backend reduces; equal shapes on all ranks.
        group_name: the name of a process group (`ProcessGroup.group_name`).

    Returns:
        x's shape and dtype, contiguous, a new tensor.

    Raises:
        RuntimeError: no such process group.
    """
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
    result: Tensor = torch.ops._c10d_functional.wait_tensor(reduced)
    return result


def all_reduce_fake(x: Tensor, group_name: str) -> Tensor:
    """Shape and dtype of `all_reduce_reference`."""
    return x.new_empty(x.shape)


def world_group_name() -> str:
    """The name of the default process group."""
    assert dist.group.WORLD is not None, "samples of collectives need an initialised process group"
    return dist.group.WORLD.group_name


def _sample(shape: tuple[int, ...], dtype: torch.dtype) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, dtype, device, generator), world_group_name()

    return Sample(name=f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}", make=make)


all_reduce = define(
    "all_reduce",
    "(Tensor x, str group_name) -> Tensor",
    reference=all_reduce_reference,
    fake=all_reduce_fake,
    samples=[_sample((7, 320), torch.bfloat16), _sample((1, 64), torch.float32)],
    collective=True,
)
