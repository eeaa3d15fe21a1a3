"""Workloads for `fuseplan tune` and `fuseplan bench` that take a second or two to compile."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import all_reduce, gpt_oss, randn

WIDTH = 64
Workload = tuple[Callable[..., Any], tuple[Tensor, ...]]
torch.set_num_threads(1)


def pads(tp: int) -> Workload:
    """One norm and pad."""

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = gpt_oss(x, residual, weight)
        return F.pad(y, (0, 16)), total

    return model, (randn(16, WIDTH), randn(16, WIDTH), torch.ones(WIDTH).bfloat16())


def reduces(tp: int) -> Workload:
    """One norm and pad behind an all-reduce, as a layer has it."""
    group = dist.group.WORLD
    assert group is not None
    name, (model, inputs) = group.group_name, pads(tp)

    def reduced(x: Tensor, square: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return model(all_reduce(x @ square, name), residual, weight)

    return reduced, (inputs[0], randn(WIDTH, WIDTH), *inputs[1:])


def fails_on_rank_1(tp: int) -> Workload:
    """Rank 1 has no workload; rank 0 waits for it."""
    if os.environ["RANK"] == "1":
        raise ValueError("not on this one")
    return reduces(tp)


def plain(tp: int) -> Workload:
    """Nothing to fuse."""
    return torch.sin, (randn(16, WIDTH),)


def raises(tp: int) -> Workload:
    """A model that can't be run."""

    def model(x: Tensor) -> Tensor:
        raise RuntimeError("no such luck\non two lines")

    return model, (randn(16, WIDTH),)
