"""Launches that the host has worked out before.

Before a kernel runs, its function chooses tiles and allocates results, and Triton binds some twenty arguments and looks
the machine code up. That takes the host several times as long as a launch of Inductor's own code, and where no CUDA
graph covers a call the device waits for it. All of it follows from shapes, strides, dtypes, alignment and numbers, so
for alike arguments the same machine code is launched again, on these arguments and on new results.

Code that Inductor has written knows shapes, strides, dtypes and numbers when it is compiled. It calls `Direct`, which
spares it torch's dispatcher and a look at every argument.
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
"""Kinds of arguments that are remembered of each op; then all of them are forgotten."""

ALIGNED: Final = 16
"""Bytes of an address that Triton compiles for."""

OPTIONS: Final[Mapping[str, Any]] = {"enable_fp_fusion": True}
"""Of the compiler, for kernels that don't say otherwise. Triton 3.9 warns where it isn't said whether a product and a
sum may be rounded once, and 3.10 will round them apart.
"""

_RECORDING: ContextVar["_Recording | None"] = ContextVar("recording", default=None)

_NEEDED: ContextVar["dict[object, _Needed] | None"] = ContextVar("needed", default=None)
"""What is collected in place of launches, the first of those that need the same machine code, by `code_key`."""

MOST_COMPILERS: Final = 8
"""Kernels that are compiled at a time."""

_REPLAYED: ContextVar["list[Replay] | None"] = ContextVar("replayed", default=None)
"""What calls launch again, or would if they came once more."""


class _Recording(TorchDispatchMode):
    """What a call launches and allocates, and whether that is all it does to tensors."""

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
    """kernel[grid](*arguments, **constants), so that it can be launched again.

    Args:
        kernel: of Triton.
        grid: programs.
        arguments: the first of its signature.
        constants: the others, and options of the compiler.
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
    """What distinguishes machine code of a kernel of Triton, as far as it follows from numbers and dtypes: constants,
    options, dtypes, and of integers whether they are 1, or multiples of `ALIGNED`.
    """
    free = {each.name for each in kernel.params if each.do_not_specialize}
    named = zip(kernel.arg_names, arguments, strict=False)
    plain = [(name, each) for name, value in named for each in (value if isinstance(value, tuple) else (value,))]
    integers = ((name, each) for name, each in plain if type(each) is int and name not in free)
    known = tuple((name, each == 1, each % ALIGNED == 0) for name, each in integers)
    dtypes = tuple(each.dtype for _, each in plain if isinstance(each, Tensor))
    return kernel.__name__, tuple(sorted((name, repr(value)) for name, value in constants.items())), known, dtypes


def needed_code(call: Callable[[], Any], mode: TorchDispatchMode) -> frozenset[object]:
    """What distinguishes the machine code that a call of ops would launch, which launches nothing; empty where it can't
    be called so.

    Args:
        call: on tensors without data.
        mode: theirs.
    """
    try:
        with mode, _collected() as needed:
            call()
    except Exception:  # noqa: BLE001 - verification runs the call, and says what is wrong with it
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
    """Compiles and loads what calls of ops would launch, several kernels at a time, and launches nothing. What can't be
    compiled fails when it is launched.

    Args:
        calls: on tensors of whatever content.
    """
    from triton import AsyncCompileMode

    with _collected() as needed, _Recording():  # a mode, under which nothing is remembered to be launched again
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
    """Loads machine code on a tensor's device, and makes the launcher of its signature, for which Triton 3.6 runs a C
    compiler.

    Args:
        code: of `warmup`, which yields a future while kernels are compiled several at a time.
        tensor: one of the kernel's arguments.
    """
    from triton import FutureKernel

    with contextlib.suppress(Exception), torch.cuda.device_of(tensor):
        kernel = code.result() if isinstance(code, FutureKernel) else code  # in Triton 3.6 it can't do more
        kernel.run  # noqa: B018 - a property that does it all


def scratch(value: Tensor) -> Tensor:
    """The same tensor, just allocated: it is no result, but what a call's kernels hand on to each other."""
    recording = _RECORDING.get()
    if recording is not None:
        recording.scratch.append(value)
    return value


class _Known:
    """What an op has run so far, which changes nothing that it computes, and so is no part of its content."""

    @functools.cached_property
    def replays(self) -> dict[tuple[Any, ...], Replay]:
        """By what distinguishes calls."""
        return {}


def replayed(run: Callable[..., Any]) -> Callable[..., Any]:
    """An op's function which launches again what it has launched for alike arguments before.

    Args:
        run: launches kernels by `run_kernel` alone, and yields new tensors, one or a tuple. What it does must follow
            from its arguments, of tensors from their shapes, strides, dtypes, devices and alignment. The first of them
            is a tensor; a workspace is the same one, which the caller holds.

    Returns:
        A function of the same arguments and results.
    """
    known = _Known()

    @functools.wraps(run)
    def run_or_replay(*arguments: Any) -> Any:
        if _len_torch_dispatch_stack():  # a dispatch mode is active, as in verification, which poisons allocations
            return run(*arguments)
        kinds, inputs = list[Any](), list[Tensor]()
        for each in arguments:  # in line, since it is paid for at every call
            if isinstance(each, Tensor):
                inputs.append(each)
                # Not whether it is aligned alone: a part of what isn't may be.
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
    """What calls with one key launch.

    Attributes:
        replay: it.
        places: of the arguments that are tensors.
    """

    replay: Replay
    places: tuple[int, ...]


class Direct:
    """An op as compiled graphs call it, which say by a key what a call's arguments are like.

    A call whose key is known, and whose tensors are aligned, launches what the one before it with that key did. All
    others are calls of the op, and so are those that a profiler or a dispatch mode should see.

    Args:
        op: the overload.
        workspace: of a call's arguments, for ops between ranks.
    """

    def __init__(self, op: Callable[..., Any], workspace: Callable[..., Workspace] | None = None) -> None:
        self.op, self.workspace = op, workspace
        self.sites: dict[Hashable, _Site] = {}

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """op(*arguments)

        Args:
            key: equal for calls whose tensors have equal shapes, strides (but of dimensions of one element), dtypes and
                devices, and whose other arguments are equal.
            arguments: the op's.
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
        """Calls the op, and remembers what it launched."""
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
    """Whether kernels are compiled, and not interpreted, where a tensor lies."""
    return value.is_cuda
