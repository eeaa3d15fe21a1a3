"""Launches as Python code: what a call of an op launched, written out for calls with alike arguments.

The code allocates results and scratch and launches the kernels, without a loop, since the device may wait for it. It is
made of names that are numbered and of offsets; sizes and all else that a kernel takes are constants by name.
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
"""What a launch is handed for a tensor. Triton takes addresses as they are; tensors it asks for theirs, and the driver
whether the GPU can read there.
"""


@dataclass(frozen=True)
class Launch:
    """A kernel that ran.

    Attributes:
        compiled: its machine code.
        grid: programs.
        arguments: all of them, in the order of its signature; tuples may hold tensors.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


def launcher(compiled: Any, grid: tuple[int, ...], device: int) -> Callable[..., None]:
    """compiled[grid], which launches machine code of Triton on the current stream, without what that works out for
    hooks where none is set.

    Args:
        compiled: the machine code.
        grid: programs, of up to three dimensions.
        device: the index of the GPU that will be the current one.
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
"""Takes memory of the current GPU as Inductor's own code does, which costs the host half of `torch.empty_strided`."""


def _current_device() -> int:
    return torch.cuda.current_device()


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _current_device)
"""Of a process that has launched kernels: `torch.cuda.current_device` looks first whether it has."""


class _Memory(NamedTuple):
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


class _Place(NamedTuple):
    """Where a tensor of a pool lies: its name in code, its first byte, its bytes up to the last, and an element's."""

    name: str
    start: int
    span: int
    itemsize: int

    @classmethod
    def of(cls, name: str, value: Tensor) -> "_Place":
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return cls(name, value.data_ptr(), (last + 1) * value.itemsize, value.itemsize)


class _Written:
    """Arguments of launches as Python code, in which tensors of a pool have names."""

    def __init__(self, pool: Mapping[str, Tensor]) -> None:
        self.places = [_Place.of(name, each) for name, each in pool.items()]
        self.used = set[str]()
        self.constants: dict[str, Any] = {}

    def code(self, value: Any) -> str | None:
        """None where it isn't clear in which tensor of the pool one lies."""
        if isinstance(value, tuple):
            parts = [self.code(each) for each in value]
            return None if None in parts else f"({''.join(f'{part}, ' for part in parts)})"
        if not isinstance(value, Tensor):
            name = f"constant{len(self.constants)}"
            self.constants[name] = value
            return name
        # A launch is handed addresses alone, so views of other shapes are the same argument.
        at, itemsize = value.data_ptr(), value.itemsize
        found = [each for each in self.places if each.start == at and each.itemsize == itemsize]
        found = found or [each for each in self.places if 0 < at - each.start < each.span and each.itemsize == itemsize]
        if len(found) != 1:
            return None
        self.used.add(found[0].name)
        return f"handed({found[0].name})" + (f" + {at - found[0].start}" if at > found[0].start else "")


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> CodeType:
    """Sizes are constants by name, so calls of an op with other numbers of rows have one source."""
    return compile(source, "<launches of fuseplan>", "exec")


@dataclass(frozen=True)
class Replay:
    """What a call launched, for calls with alike arguments.

    Attributes:
        device: the index of the GPU.
        launch: on it, for inputs whose addresses are aligned as those were, what allocates results and scratch and
            launches the kernels: Python code without a loop, since the device may wait for it.
    """

    device: int
    launch: Callable[..., Any]

    @classmethod
    def of(
        cls, launches: Sequence[Launch], inputs: Sequence[Tensor], results: Sequence[Tensor], scratch: Sequence[Tensor]
    ) -> "Replay | None":
        """Of what a call launched on its inputs, results and scratch; None where two of these share memory, so that
        arguments can't be distinguished, or where a launch took another tensor.
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
        """The results, one or a tuple, for inputs whose addresses are aligned as those were."""
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(*inputs)
        return self.launch(*inputs)
