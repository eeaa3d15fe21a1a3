"""Zero padding of the last dimension, which kernels for experts ask of their activations."""

from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect.norm import random_tensor
from fuseplan.dialect.registry import Sample, define


def pad_reference(x: Tensor, right: int) -> Tensor:
    """y = torch.nn.functional.pad(x, (0, right))

    Args:
        x: [..., hidden].
        right: zeros to append to the last dimension, at least 1.

    Returns:
        [..., hidden + right] in x's dtype, contiguous.
    """
    return torch.nn.functional.pad(x, (0, right)).contiguous()


def pad_fake(x: Tensor, right: int) -> Tensor:
    """Shape and dtype of `pad_reference`."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] + right))


def _sample(shape: tuple[int, ...], right: int) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), right

    return Sample(name=f"{'x'.join(map(str, shape))}+{right}", make=make)


pad = define(
    "pad",
    "(Tensor x, int right) -> Tensor",
    reference=pad_reference,
    fake=pad_fake,
    samples=[_sample((7, 320), 192), _sample((2, 3, 64), 1)],
)
