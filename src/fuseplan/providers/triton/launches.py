"""Launches as Python code: the launches of one call of an op, written out for calls with similar arguments.

The code allocates results and scratch and launches the kernels, without a loop, since the device may wait for it. It
uses numbered names and offsets; sizes and other kernel arguments are named constants.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards

handed = Tensor.data_ptr
"""Turns a tensor into a launch argument. Triton takes addresses as they are; of a tensor it queries the address, and
then the driver, for whether the GPU can read there.
"""


@dataclass(frozen=True)
class Launch:
    """A kernel that ran.

    Attributes:
        compiled: its machine code.
        grid: its grid of programs.
        arguments: all arguments, in the order of its signature; tuples may hold tensors.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


def launcher(compiled: Any, grid: tuple[int, ...], device: int) -> Callable[..., None]:
    """compiled[grid], which launches Triton's machine code on the current stream, without preparing the hooks'
    arguments where no hook is set.

    Args:
        compiled: the machine code.
        grid: the grid of programs, with up to three dimensions.
        device: the index of the GPU that is current at the launch.
    """
    from triton import knobs
    from triton.runtime import driver

    grid = (*grid, 1, 1)[:3]
    runtime, run, launch = knobs.runtime, compiled[grid], compiled.run
    function, metadata, stream_of = compiled.function, compiled.packed_metadata, driver.active.get_current_stream

    def launched(*arguments: Any) -> None:
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            if hook is not None and getattr(hook, "calls", True):
                run(*arguments)
                return
        launch(*grid, stream_of(device), function, metadata, None, None, None, *arguments)

    return launched


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    guards, "_empty_strided_cuda", _empty_strided
)
"""Allocates memory on the current GPU like Inductor's own code, which takes the host half as long as
`torch.empty_strided`.
"""


def _current_device() -> int:
    return torch.cuda.current_device()


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _current_device)
"""The current device, in a process that has launched kernels: `torch.cuda.current_device` first checks for that."""


class _Memory(NamedTuple):
    """Memory that is allocated for every call."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, value: Tensor) -> "_Memory | None":
        """The memory of a tensor that fills its storage; None for any other."""
        if value.storage_offset() or value.untyped_storage().nbytes() != value.nbytes:
            return None
        return cls(tuple(value.shape), value.stride(), value.dtype)


class _Place(NamedTuple):
    """A pool's tensor in memory: its name in code, address, bytes from first to last, and bytes of an element."""

    name: str
    start: int
    span: int
    itemsize: int

    @classmethod
    def of(cls, name: str, value: Tensor) -> "_Place":
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return cls(name, value.data_ptr(), (last + 1) * value.itemsize, value.itemsize)


class _Written:
    """Writes arguments of launches as Python code, with names for the tensors of a pool."""

    def __init__(self, pool: Mapping[str, Tensor]) -> None:
        self.places = [_Place.of(name, each) for name, each in pool.items()]
        self.used = set[str]()
        self.constants: dict[str, Any] = {}

    def code(self, value: Any) -> str | None:
        """The code of an argument; None if it contains a tensor whose place in the pool is ambiguous."""
        if isinstance(value, tuple):
            parts = [self.code(each) for each in value]
            return None if None in parts else f"({''.join(f'{part}, ' for part in parts)})"
        if not isinstance(value, Tensor):
            name = f"constant{len(self.constants)}"
            self.constants[name] = value
            return name
        # A launch takes only addresses, so views with other shapes are the same argument.
        at, itemsize = value.data_ptr(), value.itemsize
        found = [each for each in self.places if each.start == at and each.itemsize == itemsize]
        found = found or [each for each in self.places if 0 < at - each.start < each.span and each.itemsize == itemsize]
        if len(found) != 1:
            return None
        self.used.add(found[0].name)
        return f"handed({found[0].name})" + (f" + {at - found[0].start}" if at > found[0].start else "")


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> CodeType:
    """Compiles source, cached: sizes are named constants, so calls with other numbers of rows share it."""
    return compile(source, "<launches of fuseplan>", "exec")


@dataclass(frozen=True)
class Replay:
    """The launches of a call, for calls with similar arguments.

    Attributes:
        device: the index of the GPU.
        launch: allocates results and scratch on it and launches the kernels, for inputs with addresses aligned as in
            the original call: Python code without a loop, since the device may wait for it.
    """

    device: int
    launch: Callable[..., Any]

    @classmethod
    def of(
        cls, launches: Sequence[Launch], inputs: Sequence[Tensor], results: Sequence[Tensor], scratch: Sequence[Tensor]
    ) -> "Replay | None":
        """The replay of a call's launches on its inputs, results and scratch. None where two of these share memory, so
        that arguments are ambiguous, or where a launch took another tensor.
        """
        made = {f"made{place}": each for place, each in enumerate((*results, *scratch))}
        pool = {f"input{place}": each for place, each in enumerate(inputs)} | made
        memory = {name: _Memory.like(each) for name, each in made.items()}
        addresses = {each.data_ptr() for each in pool.values()}
        if None in memory.values() or 0 in addresses or len(addresses) != len(pool):
            return None
        written = _Written(pool)
        arguments = [written.code(each.arguments) for each in launches]
        if None in arguments or not made.keys() <= written.used:
            return None
        device = inputs[0].get_device()
        kernels = [launcher(each.compiled, each.grid, device) for each in launches]
        named = written.constants | {f"kernel{place}": each for place, each in enumerate(kernels)}
        lines = [
            f"def launch({', '.join(list(pool)[: len(inputs)])}):",
            *(f"    {name} = empty_strided(*memory_{name})" for name in made),
            *(f"    kernel{place}{each}" for place, each in enumerate(arguments)),
            f"    return {', '.join(list(made)[: len(results)])}",
        ]
        named |= {f"memory_{name}": each for name, each in memory.items()}
        named |= {"handed": handed, "empty_strided": empty_strided}
        exec(_compiled("\n".join(lines)), named)
        return cls(device=device, launch=named["launch"])

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The results, one or a tuple, for inputs with addresses aligned as in the original call."""
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(*inputs)
        return self.launch(*inputs)
