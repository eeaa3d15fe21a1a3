"""Replays of launches that the host has prepared before.

Before a kernel runs, its function chooses tiles and allocates results, and Triton binds some twenty arguments and looks
up the machine code. That takes the host several times as long as a launch from Inductor's own code, and outside of CUDA
graphs the device waits for it. All of it follows from shapes, strides, dtypes, alignment and numbers, so for similar
arguments the same machine code is launched again, on these arguments and on new results.

Inductor's generated code knows shapes, strides, dtypes and numbers when it is compiled. It calls `Direct`, which
bypasses torch's dispatcher and the inspection of each argument.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.distributed.workspace import Workspace
from fuseplan.providers.triton.launches import Launch, Replay

MOST_KNOWN: Final = 1024
"""The most kinds of arguments remembered for each op; beyond, all of them are forgotten."""

ALIGNED: Final = 16
"""The alignment of addresses, in bytes, that Triton specialises for."""

OPTIONS: Final[Mapping[str, Any]] = {"enable_fp_fusion": True}
"""Default compiler options. Triton 3.9 warns unless a kernel says whether a product and a sum may be rounded once; 3.10
will round them separately.
"""

_RECORDING: ContextVar["_Recording | None"] = ContextVar("recording", default=None)

_NEEDED: ContextVar["dict[object, _Needed] | None"] = ContextVar("needed", default=None)
"""Launches that are collected instead of made: for each `code_key`, the first one that needs that machine code."""

MOST_COMPILERS: Final = 8
"""The most kernels compiled at a time."""

_REPLAYED: ContextVar["list[Replay] | None"] = ContextVar("replayed", default=None)
"""Replays that calls run, or that the next such calls would run."""


class _Recording(TorchDispatchMode):
    """Records the launches and allocations of a call, and whether it does nothing else to tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.scratch: list[Tensor] = []
        self.is_whole = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.is_whole &= func.is_view or name.startswith(("empty", "new_empty"))
        return func(*args, **(kwargs or {}))


class _Needed(NamedTuple):
    """A launch that isn't made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants), recorded for replays.

    Args:
        kernel: a Triton kernel.
        grid: the grid of programs.
        arguments: the first arguments of its signature.
        constants: the other arguments, and options of the compiler.
    """
    needed = _NEEDED.get()
    if needed is not None:
        needed.setdefault(code_key(kernel, arguments, constants), _Needed(kernel, grid, arguments, constants))
        return
    compiled = kernel[grid](*arguments, **{**OPTIONS, **constants})
    recording = _RECORDING.get()
    if recording is not None and compiled is None:  # it was interpreted
        recording.is_whole = False
    elif recording is not None:
        further = (constants[name] for name in kernel.arg_names[len(arguments) :])
        recording.launches.append(Launch(compiled, grid, (*arguments, *further)))


def code_key(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key of a Triton kernel's machine code, as far as this follows from numbers and dtypes: constants, options,
    dtypes, and whether each integer is 1 or a multiple of `ALIGNED`.
    """
    free = {each.name for each in kernel.params if each.do_not_specialize}
    named = zip(kernel.arg_names, arguments, strict=False)
    plain = [(name, each) for name, value in named for each in (value if isinstance(value, tuple) else (value,))]
    integers = ((name, each) for name, each in plain if type(each) is int and name not in free)
    known = tuple((name, each == 1, each % ALIGNED == 0) for name, each in integers)
    dtypes = tuple(each.dtype for _, each in plain if isinstance(each, Tensor))
    return kernel.__name__, tuple(sorted((name, repr(value)) for name, value in constants.items())), known, dtypes


def needed_code(call: Callable[[], Any], mode: TorchDispatchMode) -> frozenset[object]:
    """Keys of the machine code that a call of ops would launch, without launching it; empty if the call fails.

    Args:
        call: a call on tensors without data.
        mode: the mode of these tensors.
    """
    try:
        with mode, _collected() as needed:
            call()
    except Exception:  # noqa: BLE001 - verification runs the call and reports the error
        return frozenset()
    return frozenset(needed)


@contextlib.contextmanager
def _collected() -> Iterator[dict[object, _Needed]]:
    needed = dict[object, _Needed]()
    token = _NEEDED.set(needed)
    try:
        yield needed
    finally:
        _NEEDED.reset(token)


def compile_ahead(calls: Iterable[Callable[[], Any]]) -> None:
    """Compiles and loads the kernels that calls of ops would launch, several at a time, and launches none. A kernel
    that can't be compiled fails when it is launched.

    Args:
        calls: calls on tensors with any content.
    """
    from triton import AsyncCompileMode

    with _collected() as needed, _Recording():  # a dispatch mode, so that no replays are recorded
        for call in calls:
            with contextlib.suppress(Exception):
                call()
    with ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1)) as pool:
        found = list[tuple[Any, Tensor]]()
        with AsyncCompileMode(pool, ignore_errors=True):
            for kernel, grid, arguments, constants in needed.values():
                with contextlib.suppress(Exception):
                    code = kernel.warmup(*arguments, grid=grid, **{**OPTIONS, **constants})
                    found.append((code, next(each for each in arguments if isinstance(each, Tensor))))
        for code, tensor in found:
            pool.submit(_load, code, tensor)


def _load(code: Any, tensor: Tensor) -> None:
    """Loads machine code on a tensor's device, and makes the launcher for its signature, for which Triton 3.6 runs a C
    compiler.

    Args:
        code: the result of `warmup`, a future while several kernels are compiled at a time.
        tensor: one of the kernel's arguments.
    """
    from triton import FutureKernel

    with contextlib.suppress(Exception), torch.cuda.device_of(tensor):
        kernel = code.result() if isinstance(code, FutureKernel) else code  # Triton 3.6's future has no other method
        kernel.run  # noqa: B018 - a property that loads and makes the launcher


def scratch(value: Tensor) -> Tensor:
    """Registers a tensor, just allocated, as scratch that a call's kernels pass to each other, and returns it."""
    recording = _RECORDING.get()
    if recording is not None:
        recording.scratch.append(value)
    return value


class _Known:
    """The replays of an op so far. They don't change its results, so they are no part of its content."""

    @functools.cached_property
    def replays(self) -> dict[tuple[Any, ...], Replay]:
        """Replays by the kinds of arguments."""
        return {}


def replayed(run: Callable[..., Any]) -> Callable[..., Any]:
    """An op's function with replays: it repeats the launches that it made before for similar arguments.

    Args:
        run: launches kernels only by `run_kernel`, and yields new tensors, one or a tuple. Its launches must follow
            from its arguments, and from shapes, strides, dtypes, devices and alignment of tensors. The first argument
            is a tensor; a workspace argument is always the same one, held by the caller.

    Returns:
        A function of the same arguments and results.
    """
    known = _Known()

    @functools.wraps(run)
    def run_or_replay(*arguments: Any) -> Any:
        if _len_torch_dispatch_stack():  # a dispatch mode is active, as in verification, which poisons allocations
            return run(*arguments)
        kinds, inputs = list[Any](), list[Tensor]()
        for each in arguments:  # inline, since every call pays for it
            if isinstance(each, Tensor):
                inputs.append(each)
                # Not only whether it is aligned: a part of an unaligned tensor may be.
                kinds.append((each.shape, each.stride(), each.dtype, each.get_device(), each.data_ptr() % ALIGNED))
            elif isinstance(each, Workspace):
                inputs += each.tensors
                kinds.append(each.serial)
            else:
                kinds.append(each)
        key = tuple(kinds)
        replay = known.replays.get(key)
        if replay is not None:
            _note(replay)
            return replay(inputs)
        if not is_on_gpu(inputs[0]):
            return run(*arguments)
        with _Recording() as recording:
            token = _RECORDING.set(recording)
            try:
                yielded = run(*arguments)
            finally:
                _RECORDING.reset(token)
        if len(known.replays) >= MOST_KNOWN:
            known.replays.clear()
        results = yielded if isinstance(yielded, tuple) else (yielded,)
        replay = Replay.of(recording.launches, inputs, results, recording.scratch) if recording.is_whole else None
        if replay is not None:
            known.replays[key] = replay
            _note(replay)
        return yielded

    run_or_replay.direct = Direct  # type: ignore[attr-defined]
    return run_or_replay


def _note(replay: Replay) -> None:
    replayed = _REPLAYED.get()
    if replayed is not None:
        replayed.append(replay)


class _Site(NamedTuple):
    """The launches of calls with one key.

    Attributes:
        replay: the replay of the launches.
        places: positions of the tensor arguments.
    """

    replay: Replay
    places: tuple[int, ...]


class Direct:
    """An op in the form that compiled graphs call, with a key for the properties of a call's arguments.

    A call with a known key and aligned tensors repeats the launches of the previous call with that key. All others are
    calls of the op, and so are calls that a profiler or a dispatch mode should see.

    Args:
        op: the overload.
        workspace: finds the workspace for a call's arguments, for ops between ranks.
    """

    def __init__(self, op: Callable[..., Any], workspace: Callable[..., Workspace] | None = None) -> None:
        self.op, self.workspace = op, workspace
        self.sites: dict[Hashable, _Site] = {}

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """op(*arguments)

        Args:
            key: equal for calls whose tensors have equal shapes, strides (except of dimensions of one element), dtypes
                and devices, and whose other arguments are equal.
            arguments: the op's arguments.
        """
        if self.workspace is not None:
            workspace = self.workspace(*arguments)
            site = self.sites.get((key, workspace.serial))
        else:
            workspace, site = None, self.sites.get(key)
        if site is None or profiler._is_profiler_enabled or _len_torch_dispatch_stack():
            return self._first(key if workspace is None else (key, workspace.serial), arguments)
        inputs = [arguments[place] for place in site.places]
        for each in inputs:
            if each.data_ptr() % ALIGNED:
                return self.op(*arguments)
        if workspace is None:
            return site.replay(inputs)
        with workspace.held():
            return site.replay((*inputs, *workspace.tensors))

    def _first(self, key: Hashable, arguments: tuple[Any, ...]) -> Any:
        """Calls the op, and remembers its launches."""
        replays = list[Replay]()
        token = _REPLAYED.set(replays)
        try:
            results = self.op(*arguments)
        finally:
            _REPLAYED.reset(token)
        places = tuple(place for place, each in enumerate(arguments) if isinstance(each, Tensor))
        if len(replays) == 1 and not any(arguments[place].data_ptr() % ALIGNED for place in places):
            if len(self.sites) >= MOST_KNOWN:
                self.sites.clear()
            self.sites[key] = _Site(replays[0], places)
        return results


def is_on_gpu(value: Tensor) -> bool:
    """Whether kernels on a tensor's device are compiled, and not interpreted."""
    return value.is_cuda
