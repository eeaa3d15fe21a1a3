"""Models split by their own plans on fake tensors, and the collectives that they then run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.integrations import transformers as huggingface


@contextmanager
def ranks(count: int) -> Iterator[dist.ProcessGroup]:
    """A fake group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "_c10d_functional" and op._opname != "wait_tensor":
            self.counts[op._opname] += 1
        return op(*args, **(kwargs or {}))


def run(config: Any, group: dist.ProcessGroup | None) -> tuple[Any, Counter[str]]:
    """A model from its configuration, split over a group, and what its ranks exchange in a forward pass."""
    config.use_cache = False
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        model = huggingface.build(config, group, config.model_type)
        ids = torch.randint(config.get_text_config().vocab_size, (1, 16))
        with Collectives() as seen, torch.no_grad():
            model(ids)
    return model, seen.counts
