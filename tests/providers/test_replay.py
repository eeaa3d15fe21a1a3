"""What is launched again for alike arguments, by ops and by calls past torch's dispatcher, and what isn't: on kernels
that are Python functions.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fuseplan.caching.content import content_of
from fuseplan.dialect import ops
from fuseplan.distributed.workspace import Workspace
from fuseplan.providers.triton import launches, replay
from fuseplan.providers.triton.replay import Direct, replayed, run_kernel, scratch


class Kernel:
    """Stands for one of Triton's: a function of tensors and constants, compiled for each grid."""

    def __init__(self, function: Callable[..., None], *, interpreted: bool = False) -> None:
        self.function, self.arg_names = function, list(inspect.signature(function).parameters)
        self.interpreted = interpreted
        self.jitted = self.launched = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.jitted += 1
            with _disable_current_modes():  # Triton's kernels call no ops of torch
                self.function(*arguments, **{name: options[name] for name in self.arg_names if name in options})
            return None if self.interpreted else self.launch

        return run

    def launch(self, *arguments: Any) -> None:
        """Its machine code, which takes all arguments by position."""
        self.launched += 1
        self.function(*arguments)

    @property
    def counts(self) -> tuple[int, int]:
        return self.jitted, self.launched


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken for a GPU's."""
    monkeypatch.setattr(replay, "is_on_gpu", lambda value: True)
    monkeypatch.setattr(launches, "empty_strided", lambda *how: torch.empty_strided(how[0], how[1], dtype=how[2]))
    monkeypatch.setattr(launches, "current_device", lambda: -1)
    monkeypatch.setattr(launches, "handed", lambda value: value)
    monkeypatch.setattr(launches, "launcher", lambda compiled, grid, device: compiled)


def add_into(x: Tensor, y: Tensor, outputs: tuple[Any, ...], factor: int) -> None:
    outputs[0].copy_((x + y) * factor)


def double_into(x: Tensor, out: Tensor) -> None:
    out.copy_(2 * x)


def adding(kernel: Kernel) -> Callable[..., Any]:
    def run(x: Tensor, y: Tensor, factor: int) -> Tensor:
        out = x.new_empty(x.shape)
        run_kernel(kernel, (1,), x.reshape(-1, 4), y.reshape(-1, 4), (out.view(-1, 4), 7), factor=factor, num_warps=4)
        return out

    return replayed(run)


def doubling(kernel: Kernel, then: Callable[[Tensor], Any] = lambda out: out) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        out = x.new_empty(x.shape)
        run_kernel(kernel, (1,), x, out)
        return then(out)

    return replayed(run)


def past_the_dispatcher(op: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(Direct(op), "alike")


either_way = pytest.mark.parametrize("called", [lambda op: op, past_the_dispatcher], ids=["op", "direct"])


def test_alike_arguments_are_launched_again_on_new_numbers() -> None:
    kernel = Kernel(add_into)
    run = adding(kernel)
    found = []
    for seed in range(3):
        x, y = torch.full((2, 4), float(seed)), torch.ones(2, 4)
        found.append(run(x, y, 3))
    assert [each[0, 0].item() for each in found] == [3, 6, 9]
    assert kernel.counts == (1, 2)
    assert len({each.data_ptr() for each in found}) == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda: (torch.ones(3, 4), torch.ones(3, 4), 3),
        lambda: (torch.ones(2, 4), torch.ones(2, 4), 2),
        lambda: (torch.ones(2, 4).double(), torch.ones(2, 4).double(), 3),
        lambda: (torch.ones(2, 4).t().contiguous().t(), torch.ones(2, 4), 3),
        lambda: (torch.ones(9)[1:].view(2, 4), torch.ones(2, 4), 3),
    ],
    ids=["rows", "a number", "dtype", "strides", "alignment"],
)
def test_other_arguments_are_worked_out_anew(other: Callable[[], tuple[Any, ...]]) -> None:
    kernel = Kernel(add_into)
    run = adding(kernel)
    run(torch.zeros(2, 4), torch.zeros(2, 4), 3)
    arguments = other()
    torch.testing.assert_close(run(*arguments), (arguments[0] + arguments[1]) * arguments[2])
    assert kernel.counts == (2, 0)


def test_arguments_that_share_memory_tell_nothing_about_those_that_do_not() -> None:
    kernel = Kernel(add_into)
    run = adding(kernel)
    x = torch.ones(2, 4)
    assert run(x, x, 1)[0, 0] == 2
    assert run(x, torch.full((2, 4), 5.0), 1)[0, 0] == 6
    assert run(x, x, 1)[0, 0] == 2
    assert kernel.counts == (2, 1)


def test_strides_that_ask_for_a_copy_are_never_replayed() -> None:
    kernel = Kernel(add_into)
    run = adding(kernel)
    for value in (1.0, 2.0):
        x = torch.full((2, 3, 4), value).transpose(0, 1)
        assert run(x, torch.zeros(3, 2, 4), 1)[0, 0, 0] == value
    assert kernel.counts == (2, 0)


class At:
    """An address, as launches are handed: a place in a tensor."""

    def __init__(self, tensor: Tensor, offset: int = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: int) -> "At":
        return At(self.tensor, self.offset + offset)

    @staticmethod
    def reached(given: "Tensor | At", numbers: int) -> Tensor:
        """So many numbers from there on."""
        if isinstance(given, Tensor):
            return given.view(-1)[:numbers]
        return given.tensor.view(-1)[given.offset // given.tensor.itemsize :][:numbers]


def double_some(x: Any, out: Any, numbers: int) -> None:
    At.reached(out, numbers).copy_(2 * At.reached(x, numbers))


def in_two(kernel: Kernel) -> Callable[..., Any]:
    """Of several launches, each of a part of the rows."""

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        for start in range(0, len(x), 2):
            part = slice(start, start + 2)
            run_kernel(kernel, (1,), x[part], out.view(-1, 4)[part], numbers=4 * len(x[part]))
        return out

    return replayed(run)


def test_calls_in_several_launches_are_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "handed", At)
    kernel = Kernel(double_some)
    run = in_two(kernel)
    for seed in range(3):
        x = torch.arange(20.0).view(5, 4) + seed
        torch.testing.assert_close(run(x), 2 * x)
    assert kernel.counts == (3, 6)


def test_what_is_compiled_has_nothing_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are numbered, and offsets; numbers, texts and names of kernels are constants."""
    sources: list[str] = []
    compiled = launches._compiled

    def noted(source: str) -> Any:
        sources.append(source)
        return compiled(source)

    monkeypatch.setattr(launches, "_compiled", noted)
    monkeypatch.setattr(launches, "handed", At)

    def run(x: Tensor, text: str) -> Tensor:
        out = x.new_empty(x.shape)
        for start in range(0, len(x), 2):
            run_kernel(
                Kernel(lambda x, out, numbers, text: double_some(x, out, numbers)), (1,), x[start : start + 2],
                out[start : start + 2], numbers=4 * len(x[start : start + 2]), text=text,
            )  # fmt: skip
        return out

    replays = replayed(run)
    for _ in range(2):
        replays(torch.ones(3, 4), "__import__('os')")
    (source,) = sources
    known = {"def", "launch", "input", "made", "empty_strided", "memory_made", "kernel", "handed", "constant", "return"}
    assert set(re.findall(r"[A-Za-z_]+|'|\"", source)) == known


def test_parts_are_as_aligned_as_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for an aligned address is never launched on another, whatever the tensor that it is a part of."""
    monkeypatch.setattr(launches, "handed", At)
    kernel = Kernel(double_some)

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(3)
        run_kernel(kernel, (1,), x[1], out, numbers=3)
        return out

    replays, memory = replayed(run), torch.arange(16.0)
    assert memory.data_ptr() % replay.ALIGNED == 0
    for first in (1, 2):
        x = memory[first : first + 6].view(2, 3)
        assert (x[1].data_ptr() % replay.ALIGNED == 0) == (first == 1)
        torch.testing.assert_close(replays(x), 2 * x[1])
    assert kernel.counts == (2, 0)


def test_parts_of_tensors_that_are_interleaved_are_never_replayed() -> None:
    """In which of them a part lies doesn't follow from where it is."""
    kernel = Kernel(double_some)

    def run(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(4)
        run_kernel(kernel, (1,), x[1], out, numbers=4)
        return out

    replays = replayed(run)
    for seed in range(2):
        both = torch.arange(16.0).view(2, 8) + seed
        torch.testing.assert_close(replays(both[:, :4], both[:, 4:]), 2 * both[1, :4])
    assert kernel.counts == (2, 0)


@either_way
def test_what_else_is_done_to_tensors_is_never_left_out(called: Callable[..., Any]) -> None:
    kernel = Kernel(double_into)
    run = called(doubling(kernel, then=lambda out: out.add_(1)))
    assert [run(torch.full((4,), value))[0].item() for value in (1.0, 2.0)] == [3, 5]
    assert kernel.counts == (2, 0)


def test_scratch_is_allocated_for_each_call() -> None:
    kernel = Kernel(double_into)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        between, out, other = scratch(x.new_empty(x.shape)), x.new_empty(x.shape), x.new_empty(x.shape)
        run_kernel(kernel, (1,), x, between)
        run_kernel(kernel, (1,), between, out)
        run_kernel(kernel, (1,), out, other)
        return out, other

    replays = replayed(run)
    for value in (1.0, 2.0, 3.0):
        assert [each[0].item() for each in replays(torch.full((4,), value))] == [4 * value, 8 * value]
    assert kernel.counts == (3, 6)


def test_results_that_no_kernel_wrote_or_that_are_part_of_memory_are_never_replayed() -> None:
    kernel = Kernel(double_into)

    def run(x: Tensor, part: bool) -> tuple[Tensor, Tensor]:
        out, other = x.new_empty(x.shape), x.new_empty(2 * x.numel())[: x.numel()]
        run_kernel(kernel, (1,), x, out)
        if part:
            run_kernel(kernel, (1,), x, other)
        return out, other

    replays = replayed(run)
    for part in (True, False):
        for value in (1.0, 2.0):
            assert replays(torch.full((4,), value), part)[0][0] == 2 * value
    assert kernel.launched == 0


class Seeing(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is torch.ops.aten.new_empty.default
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_every_allocation() -> None:
    kernel = Kernel(double_into)
    run = doubling(kernel)
    run(torch.ones(4))
    with Seeing() as mode:  # type: ignore[no-untyped-call]
        run(torch.ones(4))
    assert mode.seen == 1
    assert kernel.launched == 0


def test_what_is_interpreted_has_no_machine_code() -> None:
    kernel = Kernel(double_into, interpreted=True)
    run = doubling(kernel)
    assert [run(torch.ones(4))[0] for _ in range(2)] == [2, 2]
    assert kernel.counts == (2, 0)


@either_way
def test_what_raises_is_not_remembered(called: Callable[..., Any]) -> None:
    def fails(x: Tensor, out: Tensor) -> None:
        raise RuntimeError("no such kernel")

    kernel = Kernel(fails)
    run = called(doubling(kernel))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such kernel"):
            run(torch.ones(4))
    kernel.function = double_into
    assert run(torch.ones(4))[0] == 2
    assert replay._REPLAYED.get() is None


def test_what_was_launched_changes_no_key() -> None:
    """Cached graphs would be compiled anew after it."""
    assert content_of(ops.rms_norm_pad.kernel("triton")).key is not None
    run = adding(Kernel(add_into))
    before = content_of(run)
    for _ in range(2):
        run(torch.ones(2, 4), torch.ones(2, 4), 1)
    assert content_of(run).is_same(before)


def test_no_more_than_so_many_kinds_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_KNOWN", 2)
    kernel = Kernel(add_into)
    run = adding(kernel)
    for rows in (1, 2, 3, 1):
        run(torch.ones(rows, 4), torch.ones(rows, 4), 1)
    assert kernel.counts == (4, 0)
    run(torch.ones(1, 4), torch.ones(1, 4), 1)
    assert kernel.launched == 1


class OfNobody(Workspace):
    """A workspace that no group has."""

    def __init__(self, serial: int) -> None:
        self.serial, self.words, self.times_held = serial, torch.full((4,), float(serial)), 0
        self.peer_offsets, self.state, self.failure = (torch.zeros(4) for _ in range(3))

    def held(self) -> Any:
        self.times_held += 1
        return contextlib.nullcontext()


@pytest.mark.parametrize("is_direct", [False, True])
def test_a_call_in_another_workspace_is_another_call(is_direct: bool) -> None:
    kernel, current = Kernel(add_into), list[OfNobody]()

    def run(x: Tensor, workspace: Workspace) -> Tensor:
        out = x.new_empty(x.shape)
        run_kernel(kernel, (1,), x, workspace.tensors[0], (out,), factor=1)
        return out

    replays = replayed(run)

    def op(x: Tensor) -> Any:
        return replays(x, current[-1])

    direct, spaces = Direct(op, workspace=lambda x: current[-1]), {serial: OfNobody(serial) for serial in (1, 2)}
    for serial in (1, 2, 1, 2):
        current.append(spaces[serial])
        assert (direct("alike", torch.zeros(4)) if is_direct else op(torch.zeros(4)))[0] == serial
    assert kernel.counts == (2, 2)
    assert [each.times_held for each in spaces.values()] == [is_direct] * 2


# Past the dispatcher.


class Counted:
    """An op, and how often it was called as one."""

    def __init__(self) -> None:
        self.kernel, self.called = Kernel(double_into), 0
        self.run = doubling(self.kernel)

    def __call__(self, x: Tensor) -> Any:
        self.called += 1
        return self.run(x)


def test_a_known_key_launches_without_the_op() -> None:
    op = Counted()
    direct = Direct(op)
    assert [direct("alike", torch.full((4,), float(seed)))[0].item() for seed in range(3)] == [0, 2, 4]
    assert (op.called, op.kernel.counts) == (1, (1, 2))
    assert direct("more rows", torch.ones(8)).tolist() == [2] * 8
    assert direct("alike", torch.ones(4)).tolist() == [2] * 4
    assert (op.called, op.kernel.counts) == (2, (2, 3))


def test_what_the_op_knew_is_launched_at_once() -> None:
    op = Counted()
    op(torch.ones(4))
    direct = Direct(op)
    assert [direct("alike", torch.ones(4))[0].item() for _ in range(2)] == [2, 2]
    assert (op.called, op.kernel.counts) == (2, (1, 2))


@pytest.mark.parametrize("first", [0, 1])
def test_tensors_that_are_not_aligned_are_the_ops(first: int) -> None:
    op, memory = Counted(), torch.arange(16.0)
    direct = Direct(op)
    for offset in (first, 1 - first, first, 1 - first):
        assert direct("alike", memory[offset : offset + 4]).tolist() == [2.0 * (offset + each) for each in range(4)]
    assert (op.called, op.kernel.jitted) == (3, 2)


def test_modes_and_profilers_see_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    op, x = Counted(), torch.ones(4)
    direct = Direct(op)
    for _ in range(2):
        direct("alike", x)
    assert op.called == 1
    with Seeing():  # type: ignore[no-untyped-call]
        assert direct("alike", x)[0] == 2
    assert op.called == 2
    monkeypatch.setattr(profiler, "_is_profiler_enabled", True)
    assert direct("alike", x)[0] == 2
    assert op.called == 3


def test_two_ops_in_one_are_not_one_launch() -> None:
    op = Counted()
    direct = Direct(lambda x: op(op(x)))
    assert [direct("alike", torch.full((4,), value))[0].item() for value in (1.0, 2.0)] == [4, 8]


def test_no_more_than_so_many_keys_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_KNOWN", 2)
    direct = Direct(Counted())
    for rows in (1, 2, 3):
        direct(rows, torch.ones(rows))
    assert list(direct.sites) == [3]


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
