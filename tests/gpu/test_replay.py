"""Kernels that are launched again without the host working them out. Skipped without a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.dialect import ops, registered_kernel
from fuseplan.distributed.workspace import loopback
from fuseplan.providers.triton.launches import Replay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPS = [
    name for name, op in ops.items()
    if op.fused and not op.collective and hasattr(registered_kernel(name, "triton"), "__wrapped__")
]  # fmt: skip


class Watched(TorchDispatchMode):
    """In which nothing is replayed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def worked_out(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Results of a kernel that is launched as for the first time."""
    kernel = registered_kernel(name, "triton")
    assert kernel is not None
    with Watched():  # type: ignore[no-untyped-call]
        return _all(kernel(*arguments))


def _all(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def called(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Results of the op as graphs call it."""
    return _all(ops[name].implementation("triton")(*arguments))


def check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.float(), other.float())


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """What was launched again."""
    seen: list[Replay] = []
    launch = Replay.__call__

    def noted(self: Replay, inputs: Any) -> Any:
        seen.append(self)
        return launch(self, inputs)

    monkeypatch.setattr(Replay, "__call__", noted)
    return seen


@pytest.mark.parametrize("name", OPS)
def test_ops_compute_the_same_when_they_are_launched_again(name: str, replays: list[Replay]) -> None:
    for sample in ops[name].samples:
        for seed in range(3):
            arguments = sample.make(torch.device("cuda"), torch.Generator().manual_seed(seed))
            check(called(name, arguments), worked_out(name, arguments))
    assert len(replays) >= 2


def _arguments(seed: int, rows: int = 7, offset: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x, residual = (
        torch.randn(rows * 512 + offset, device="cuda", generator=generator).bfloat16()[offset:].view(rows, 512)
        for _ in range(2)
    )
    return x, residual, torch.ones(512, device="cuda").bfloat16(), 1e-5, "gpt_oss", 64


NAME = "fused_add_rms_norm_pad"


def test_other_sizes_alignment_and_shared_memory_are_told_apart() -> None:
    for seed in range(2):
        for rows, offset in ((7, 0), (16, 0), (7, 1), (1, 0), (7, 8)):
            arguments = _arguments(seed, rows, offset)
            check(called(NAME, arguments), worked_out(NAME, arguments))
        x, _, *rest = _arguments(seed)
        check(called(NAME, (x, x, *rest)), worked_out(NAME, (x, x, *rest)))
        strided = x.t().contiguous().t()
        check(called(NAME, (strided, x, *rest)), worked_out(NAME, (strided, x, *rest)))


def test_graphs_and_other_streams(replays: list[Replay]) -> None:
    called(NAME, _arguments(0))
    before, held = len(replays), _arguments(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = called(NAME, held)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = called(NAME, held)
    for old, new in zip(held[:2], _arguments(2)[:2], strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert len(replays) == before + 2
    check(aside, worked_out(NAME, _arguments(1)))
    check(captured, worked_out(NAME, _arguments(2)))


def test_results_are_of_one_call_each() -> None:
    first, second = called(NAME, _arguments(0)), called(NAME, _arguments(0))
    third = called(NAME, _arguments(0))
    assert len({each.data_ptr() for results in (first, second, third) for each in results}) == 6


@pytest.fixture
def group() -> Iterator[str]:
    """Of two ranks, of which one is here and plays both."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    with loopback():
        yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()


def test_all_reduces_are_launched_again_in_their_workspace(group: str, replays: list[Replay]) -> None:
    name = "all_reduce_fused_add_rms_norm_pad"
    for rows in (7, 300, 7, 7, 300, 2100):  # the last in several launches
        for seed in range(3):
            arguments = (*_arguments(seed, rows), group)
            check(called(name, arguments), worked_out(name, arguments))
    assert len(replays) >= 15
