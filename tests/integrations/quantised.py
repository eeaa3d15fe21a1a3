"""What libraries quantise in their tests, and how they are imported."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LAYERS = 2


class Block(nn.Module):
    """A norm whose result two layers quantise, each by itself, and an activation that a third one does."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        down: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + down


def blocks(width: int, inner: int) -> nn.Sequential:
    """LAYERS of them, in bfloat16, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, inner) for _ in range(LAYERS))).eval().bfloat16()


@contextmanager
def quiet(library: str) -> Iterator[Any]:
    """A library, if it is installed, without what it logs of other versions and platforms."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield pytest.importorskip(library)
    finally:
        logging.disable(before)
