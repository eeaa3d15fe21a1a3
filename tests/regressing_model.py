"""A small model whose layers lose their fusions when a file beside it says so. Tests copy it to where they need it."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

PLANTED = Path(__file__).with_name("planted.txt")
LAYERS = 4
HIDDEN = 64


class Layer(nn.Module):
    def __init__(self, group: str | None, obstacle: str | None) -> None:
        super().__init__()
        self.group, self.obstacle = group, obstacle
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        # [in, out], as GPT-2's weights are, which no fusion takes.
        self.proj = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.experts = nn.Parameter(torch.randn(2 * HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = x @ self.proj
        if self.group is not None:
            x = collectives.all_reduce(x, "sum", self.group)  # type: ignore[arg-type]
        if self.obstacle == "scale":
            x = x * 0.5
        residual = residual + x
        y = self.norm(residual)
        y = torch.cat([y, y], -1) if self.obstacle == "no pad" else F.pad(y, (0, HIDDEN))
        return y @ self.experts, residual


class Model(nn.Module):
    def __init__(self, group: str | None, obstacles: dict[int, str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(group, obstacles.get(layer)) for layer in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + residual


def build(tp: int) -> tuple[Model, tuple[Tensor]]:
    """The model in the default process group, with what the file plants: lines of layer and obstacle."""
    lines = PLANTED.read_text().splitlines() if PLANTED.exists() else []
    obstacles = {int(layer): obstacle for layer, _, obstacle in (line.partition(" ") for line in lines)}
    group = dist.group.WORLD.group_name if tp > 1 and dist.group.WORLD is not None else None
    return Model(group, obstacles).to(torch.bfloat16), (torch.randn(8, HIDDEN, dtype=torch.bfloat16),)


def plant(folder: Path, *lines: str) -> None:
    """Plants obstacles in the copy in a folder, in place of those that are there."""
    (folder / PLANTED.name).write_text("\n".join(lines))
