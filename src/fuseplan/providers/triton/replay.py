"""Launches that the host has worked out before.

Before a kernel runs, its function chooses tiles and allocates results, and Triton binds some twenty arguments and looks
the machine code up. That takes the host several times as long as a launch of Inductor's own code, and where no CUDA
graph covers a call the device waits for it. All of it follows from shapes, strides, dtypes, alignment and numbers, so
for alike arguments the same machine code is launched again, on these arguments and on new results.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.distributed.workspace import Workspace

MOST_KNOWN: Final = 1024
"""Kinds of arguments that are remembered of each op; then all of them are forgotten."""

ALIGNED: Final = 16
"""Bytes of an address that Triton compiles for."""

_RECORDING: ContextVar["_Recording | None"] = ContextVar("recording", default=None)

_NEEDED: ContextVar[list[object] | None] = ContextVar("needed", default=None)
"""What is collected in place of launches."""


@dataclass(frozen=True)
class _Launch:
    """A kernel that ran.

    Attributes:
        run: launches its machine code on a grid.
        arguments: all of them, in the order of its signature; tuples may hold tensors.
    """

    run: Callable[..., None]
    arguments: tuple[Any, ...]


class _Recording(TorchDispatchMode):
    """What a call launches and allocates, and whether that is all it does to tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[_Launch] = []
        self.scratch: list[Tensor] = []
        self.is_whole = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.is_whole &= func.is_view or name.startswith(("empty", "new_empty"))
        return func(*args, **(kwargs or {}))


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
        needed.append(code_key(kernel, arguments, constants))
        return
    compiled = kernel[grid](*arguments, **constants)
    recording = _RECORDING.get()
    if recording is not None and compiled is None:  # it was interpreted
        recording.is_whole = False
    elif recording is not None:
        further = (constants[name] for name in kernel.arg_names[len(arguments) :])
        recording.launches.append(_Launch(compiled[(*grid, 1, 1)[:3]], (*arguments, *further)))


def code_key(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """What distinguishes machine code of a kernel of Triton, as far as it follows from numbers: its constants and
    options, and of integers whether they are 1, or multiples of `ALIGNED`.
    """
    free = {each.name for each in kernel.params if each.do_not_specialize}
    named = zip(kernel.arg_names, arguments, strict=False)
    plain = ((name, each) for name, value in named for each in (value if isinstance(value, tuple) else (value,)))
    integers = [(name, each) for name, each in plain if type(each) is int and name not in free]
    known = tuple((name, each == 1, each % ALIGNED == 0) for name, each in integers)
    return kernel.__name__, tuple(sorted((name, repr(value)) for name, value in constants.items())), known


def needed_code(call: Callable[[], Any], mode: TorchDispatchMode) -> frozenset[object]:
    """What distinguishes the machine code that a call of ops would launch, which launches nothing; empty where it can't
    be called so.

    Args:
        call: on tensors without data.
        mode: theirs.
    """
    needed = list[object]()
    token = _NEEDED.set(needed)
    try:
        with mode:
            call()
    except Exception:  # noqa: BLE001 - verification runs the call, and says what is wrong with it
        return frozenset()
    finally:
        _NEEDED.reset(token)
    return frozenset(needed)


def scratch(value: Tensor) -> Tensor:
    """The same tensor, just allocated: it is no result, but what a call's kernels hand on to each other."""
    recording = _RECORDING.get()
    if recording is not None:
        recording.scratch.append(value)
    return value


@dataclass(frozen=True)
class _Memory:
    """Memory that is allocated for every call."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, value: Tensor) -> "_Memory | None":
        """That of a tensor which is all of its storage; None for any other."""
        if value.storage_offset() or value.untyped_storage().nbytes() != value.nbytes:
            return None
        return cls(tuple(value.shape), value.stride(), value.dtype)


@dataclass(frozen=True)
class _Template:
    """Arguments of a launch, of which some are tensors of a pool.

    Attributes:
        values: all of them, with None in the place of tensors, and of tuples that hold some.
        tensors: (position, place in the pool).
        tuples: (position, template).
    """

    values: tuple[Any, ...]
    tensors: tuple[tuple[int, int], ...]
    tuples: "tuple[tuple[int, _Template], ...]"

    @classmethod
    def of(cls, arguments: tuple[Any, ...], pool: Sequence[Tensor]) -> "_Template | None":
        """None where a tensor isn't in the pool."""
        values, tensors, tuples = list(arguments), [], []
        for position, value in enumerate(arguments):
            if isinstance(value, Tensor):
                found = [place for place, each in enumerate(pool) if each.data_ptr() == value.data_ptr()]
                if not found or pool[found[0]].itemsize != value.itemsize:  # a launch is handed addresses alone
                    return None
                tensors.append((position, found[0]))
            elif isinstance(value, tuple):
                inner = cls.of(value, pool)
                if inner is None:
                    return None
                if not inner.places:
                    continue
                tuples.append((position, inner))
            else:
                continue
            values[position] = None  # so that no tensor is kept alive
        return cls(tuple(values), tuple(tensors), tuple(tuples))

    @property
    def places(self) -> set[int]:
        """Of all tensors."""
        return {place for _, place in self.tensors}.union(*(inner.places for _, inner in self.tuples))

    def filled(self, pool: Sequence[Tensor]) -> list[Any]:
        """The arguments."""
        values = list(self.values)
        for position, place in self.tensors:
            values[position] = pool[place]
        for position, inner in self.tuples:
            values[position] = tuple(inner.filled(pool))
        return values


@dataclass(frozen=True)
class Replay:
    """What a call launched, for calls with alike arguments.

    Attributes:
        device: the index of the GPU.
        memory: results, then scratch.
        results: how many of it are results.
        launches: what launches a kernel's machine code on a grid, and its arguments.
    """

    device: int
    memory: tuple[_Memory, ...]
    results: int
    launches: tuple[tuple[Callable[..., None], _Template], ...]

    @classmethod
    def of(cls, recording: _Recording, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> "Replay | None":
        """Of what was recorded; None where it did more than launch kernels on these tensors, or where two of them share
        memory, so that arguments can't be distinguished.
        """
        made = [*results, *recording.scratch]
        pool = [*inputs, *made]
        memory = [_Memory.like(each) for each in made]
        addresses = {each.data_ptr() for each in pool}
        if not recording.is_whole or None in memory or 0 in addresses or len(addresses) != len(pool):
            return None
        templates = [_Template.of(each.arguments, pool) for each in recording.launches]
        if None in templates:
            return None
        known = [each for each in templates if each is not None]
        if not {*range(len(inputs), len(pool))} <= set[int]().union(*(each.places for each in known)):
            return None
        return cls(
            device=pool[0].get_device(),
            memory=tuple(each for each in memory if each is not None),
            results=len(results),
            launches=tuple((one.run, template) for one, template in zip(recording.launches, known, strict=True)),
        )

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results for inputs whose addresses are aligned as those were."""
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self(inputs)
        made = [empty_strided(each.shape, each.strides, each.dtype) for each in self.memory]
        pool = (*inputs, *made)
        for run, template in self.launches:
            run(*template.filled(pool))  # on the current stream
        return tuple(made[: self.results])


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    guards, "_empty_strided_cuda", _empty_strided
)
"""Takes memory of the current GPU as Inductor's own code does, which costs the host half of `torch.empty_strided`."""


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
                is_aligned = each.data_ptr() % ALIGNED == 0
                kinds.append((each.shape, each.stride(), each.dtype, each.get_device(), is_aligned))
            elif isinstance(each, Workspace):
                inputs += each.tensors
                kinds.append(each.serial)
            else:
                kinds.append(each)
        key = tuple(kinds)
        replay = known.replays.get(key)
        if replay is not None:
            results = replay(inputs)
            return results if len(results) > 1 else results[0]
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
        replay = Replay.of(recording, inputs, results)
        if replay is not None:
            known.replays[key] = replay
        return yielded

    return run_or_replay


def is_on_gpu(value: Tensor) -> bool:
    """Whether kernels are compiled, and not interpreted, where a tensor lies."""
    return value.is_cuda
