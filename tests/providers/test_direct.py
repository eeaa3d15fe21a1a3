"""Calls of ops past torch's dispatcher: on kernels that are Python functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.distributed.workspace import Workspace
from fuseplan.providers.triton import launches, replay
from fuseplan.providers.triton.replay import Direct, replayed, run_kernel
from tests.providers.test_replay import Kernel, OfNobody, on_cpu

__all__ = ["on_cpu"]


def scale_into(x: Tensor, out: Tensor, factor: int) -> None:
    out.copy_(x * factor)


class Scaling:
    """An op, and how often it was called as one."""

    def __init__(self) -> None:
        self.kernel, self.called = Kernel(scale_into), 0
        self.run = replayed(self._run)

    def _run(self, x: Tensor, factor: int) -> Tensor:
        out = x.new_empty(x.shape)
        run_kernel(self.kernel, (1,), x, out, factor=factor)
        return out

    def __call__(self, x: Tensor, factor: int) -> Any:
        self.called += 1
        return self.run(x, factor)


@pytest.fixture
def op() -> Scaling:
    return Scaling()


def test_a_known_key_launches_without_the_op(op: Scaling) -> None:
    direct = Direct(op)
    found = [direct("alike", torch.full((4,), float(seed)), 3)[0].item() for seed in range(3)]
    assert found == [0, 3, 6]
    assert (op.called, op.kernel.jitted, op.kernel.launched) == (1, 1, 2)
    assert direct("more rows", torch.ones(8), 2).tolist() == [2] * 8
    assert direct("alike", torch.ones(4), 3).tolist() == [3] * 4
    assert (op.called, op.kernel.jitted, op.kernel.launched) == (2, 2, 3)


def test_what_the_op_knew_is_launched_at_once(op: Scaling) -> None:
    direct = Direct(op)
    op(torch.ones(4), 3)
    assert [direct("alike", torch.ones(4), 3)[0].item() for _ in range(2)] == [3, 3]
    assert (op.called, op.kernel.jitted, op.kernel.launched) == (2, 1, 2)


@pytest.mark.parametrize("first", [0, 1])
def test_tensors_that_are_not_aligned_are_the_ops(op: Scaling, first: int) -> None:
    direct = Direct(op)
    memory = torch.arange(16.0)
    for offset in (first, 1 - first, first, 1 - first):
        assert direct("alike", memory[offset : offset + 4], 2).tolist() == [2.0 * (offset + each) for each in range(4)]
    assert op.kernel.jitted == 2
    assert op.called == 3


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_ops(op: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    direct, x = Direct(op), torch.ones(4)
    for _ in range(2):
        direct("alike", x, 1)
    assert op.called == 1
    with Watching():  # type: ignore[no-untyped-call]
        assert direct("alike", x, 1)[0] == 1
    assert op.called == 2
    monkeypatch.setattr(profiler, "_is_profiler_enabled", True)
    assert direct("alike", x, 1)[0] == 1
    assert op.called == 3


def test_what_is_no_launch_alone_stays_the_ops() -> None:
    kernel = Kernel(scale_into)

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        run_kernel(kernel, (1,), x, out, factor=2)
        return out.add_(1)

    direct = Direct(replayed(run))
    assert [direct("alike", torch.full((4,), value))[0].item() for value in (1.0, 2.0)] == [3, 5]
    assert (kernel.jitted, kernel.launched) == (2, 0)


def test_two_ops_in_one_are_not_one_launch(op: Scaling) -> None:
    direct = Direct(lambda x, factor: op(op(x, factor), factor))
    assert [direct("alike", torch.full((4,), value), 3)[0].item() for value in (1.0, 2.0)] == [9, 18]


def test_an_op_that_raises_is_not_remembered(op: Scaling) -> None:
    direct, function = Direct(op), op.kernel.function

    def fails(x: Tensor, out: Tensor, factor: int) -> None:
        raise RuntimeError("no such kernel")

    op.kernel.function = fails
    with pytest.raises(RuntimeError, match="no such kernel"):
        direct("alike", torch.ones(4), 3)
    op.kernel.function = function
    assert direct("alike", torch.ones(4), 3)[0] == 3
    assert replay._REPLAYED.get() is None


def test_no_more_than_so_many_keys_are_remembered(op: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_KNOWN", 2)
    direct = Direct(op)
    for rows in (1, 2, 3):
        direct(rows, torch.ones(rows), 1)
    assert list(direct.sites) == [3]


def test_a_call_in_another_workspace_is_another_call() -> None:
    kernel = Kernel(lambda x, words, out, factor: out.copy_((x + words) * factor))
    current: list[OfNobody] = []

    def run(x: Tensor, workspace: Workspace) -> Tensor:
        out = x.new_empty(x.shape)
        run_kernel(kernel, (1,), x, workspace.tensors[0], out, factor=1)
        return out

    inner, called = replayed(run), []

    def op(x: Tensor) -> Any:
        called.append(x)
        return inner(x, current[-1])

    direct = Direct(op, workspace=lambda x: current[-1])
    spaces = {serial: OfNobody(serial) for serial in (1, 2)}
    for serial in (1, 2, 1, 2):
        current.append(spaces[serial])
        assert direct("alike", torch.zeros(4))[0] == serial
    assert len(called) == 2
    assert [each.times_held for each in spaces.values()] == [1, 1]


def test_hooks_of_triton_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launcher` goes by Triton's own way where somebody watches launches."""
    knobs = pytest.importorskip("triton").knobs
    driver = pytest.importorskip("triton.runtime").driver
    seen: list[Any] = []

    class Active:
        @staticmethod
        def get_current_stream(device: int) -> int:
            return 7 + device

    class Code:
        function, packed_metadata = "function", "metadata"

        def run(self, *arguments: Any) -> None:
            seen.append(arguments)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: seen.append((grid, "by Triton", *arguments))

    monkeypatch.setattr(type(driver), "active", Active(), raising=False)
    launch = replay_launcher(Code(), (5,), 1)
    launch(64, 3)
    chain = knobs.HookChain()
    chain.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", chain)
    launch(64, 3)
    assert seen == [(5, 1, 1, 8, "function", "metadata", None, None, None, 64, 3), ((5, 1, 1), "by Triton", 64, 3)]


replay_launcher = launches.launcher
"""Before `on_cpu` replaces it."""
