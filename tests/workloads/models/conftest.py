from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

FakeGroup = Callable[..., ProcessGroup]


@pytest.fixture
def fake_group() -> Iterator[FakeGroup]:
    """`fake_group(size, rank=0)`: a process group of which only this rank exists."""

    def start(size: int, rank: int = 0) -> ProcessGroup:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        world = dist.group.WORLD
        assert world is not None
        return world

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()
