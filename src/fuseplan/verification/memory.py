"""Memory that exposes reads of uninitialised memory and writes outside of a tensor.

Arguments have margins of NaN, and every allocation is filled with NaN.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.dialect import Draw, Indices, draw_activations, kernel_of
from fuseplan.graph.facts import group_size
from fuseplan.verification.specs import ALIGNMENT, TensorSpec

aten, functional = torch.ops.aten, torch.ops._c10d_functional
ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


NANS = {torch.float8_e4m3fnuz: 0x80, torch.float8_e5m2fnuz: 0x80, torch.float8_e8m0fnu: 0xFF}
"""The byte of NaN in the fp8 formats in which 0x7f is a number."""


def poison(tensor: Tensor) -> Tensor:
    """Fills a tensor with NaN; integers with the largest one, or 0x7f in bytes, and booleans with True."""
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8).fill_(NANS.get(tensor.dtype, 0x7F)).view(tensor.dtype)
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


class SeeingMode(TorchDispatchMode):
    """A mode that stays active inside fuseplan's own ops, whose kernels would otherwise run without it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one op."""
        kernel = kernel_of(func)
        if kernel is None:
            return self.run(func, args, kwargs or {})
        with self:
            return kernel(*args, **(kwargs or {}))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs any op except fuseplan's."""
        raise NotImplementedError


class Poisoned(SeeingMode):
    """Fills everything that this thread allocates from Python with NaN."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an op; an allocation is poisoned.

        Raises:
            MemoryError: the system has overcommitted its memory, and would kill the process for using it.
        """
        result = func(*args, **kwargs)
        if func not in ALLOCATIONS:
            return result
        if result.device.type == "cpu" and result.nbytes > physical_memory():
            raise MemoryError(f"{result.nbytes:,} bytes were asked for; this machine has {physical_memory():,}")
        return poison(result)


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite if the system doesn't report it."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Loopback(SeeingMode):
    """Runs this thread's all-reduces as if every rank had the same values, without sending or waiting."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an op; an all-reduce is `reduced`."""
        if func is functional.all_reduce.default:
            return self.reduced(args[0], args[2])
        if func is functional.wait_tensor.default:
            return args[0].clone()
        return func(*args, **kwargs)

    def reduced(self, x: Tensor, group_name: Any) -> Tensor:
        """x times the number of ranks."""
        return x.contiguous() * (group_size(str(group_name)) or 1)  # contiguous, like torch's result


class Gathered(Loopback):
    """Runs this thread's all-reduces by gathering the values of all ranks and summing them here: exact in float64, and
    in narrower dtypes rounded once. Every rank has to run the same.
    """

    def reduced(self, x: Tensor, group_name: Any) -> Tensor:
        """The sum over all ranks."""
        group: dist.ProcessGroup = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined]
        # As bytes: not every backend knows every dtype.
        mine = x.contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        return torch.stack([part.view(x.dtype).view(x.shape) for part in parts]).sum(0)


def poison_allocator(device: torch.device, size: int) -> None:
    """Leaves NaN in the next blocks of a caching allocator, for kernels that don't allocate from Python.

    Args:
        device: has an effect on devices with a caching allocator.
        size: bytes of the largest block.
    """
    if device.type == "cuda":
        blocks = [poison(torch.empty(max(size, 1024) // 4, device=device)) for _ in range(4)]
        del blocks


@dataclass(frozen=True, eq=False)
class Guarded:
    """An argument in the middle of its own buffer.

    Attributes:
        tensor: the argument.
        buffer: the whole buffer, including margins.
        before: a copy of the buffer from when the argument was made.
    """

    tensor: Tensor
    buffer: Tensor
    before: Tensor

    @property
    def is_untouched(self) -> bool:
        """Whether neither the argument nor its margins were written to."""
        return torch.equal(self.buffer.view(torch.uint8), self.before.view(torch.uint8))

    @property
    def of_before(self) -> Tensor:
        """The argument's original value."""
        return _placed(self.before, self.tensor)

    def copied(self) -> "Guarded":
        """A copy of the argument's original value, in its own buffer."""
        buffer = self.before.clone()
        return Guarded(_placed(buffer, self.tensor), buffer, self.before)

    @property
    def is_written_inside(self) -> bool:
        """Whether writes went only to the argument: neither to margins nor to gaps between its elements."""
        wanted = self.before.clone()
        _placed(wanted, self.tensor).copy_(self.tensor)
        return torch.equal(self.buffer.view(torch.uint8), wanted.view(torch.uint8))


def _placed(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer.as_strided(like.shape, like.stride(), like.storage_offset())


def make_arguments(
    arguments: Mapping[str, Any], draw_of: Callable[[str], Draw | Indices], seed: int
) -> dict[str, Any]:  # fmt: skip
    """Fresh random arguments: a `Guarded` for each `TensorSpec`, plain values as they are.

    Args:
        arguments: arguments of a case.
        draw_of: the draw of an argument, by name.
        seed: equal seeds draw equal arguments.
    """
    devices = {spec.device for spec in arguments.values() if isinstance(spec, TensorSpec)}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    made: dict[str, Any] = {}
    for name, spec in arguments.items():
        if not isinstance(spec, TensorSpec):
            made[name] = spec
        elif spec.same_as is not None:
            made[name] = made[spec.same_as]
        else:
            made[name] = _guarded(spec, _draw(draw_of(name), arguments), generators[spec.device])
    return made


def unguarded(made: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without their margins."""
    return {name: value.tensor if isinstance(value, Guarded) else value for name, value in made.items()}


def _draw(draw: Draw | Indices, arguments: Mapping[str, Any]) -> Draw:
    if not isinstance(draw, Indices):
        return draw
    length: int = arguments[draw.of].shape[draw.dim]

    def places(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
        count = math.prod(shape)
        # Not the first position if there are others: a kernel that counts from it would pass.
        first = min(1, length - count)
        drawn = torch.randperm(length - first, device=device, generator=generator)[:count]
        return drawn.add(first).view(shape)

    return places


def _guarded(spec: TensorSpec, draw: Draw, generator: torch.Generator) -> Guarded:
    margin = 4 * ALIGNMENT // spec.dtype.itemsize
    shift = margin + spec.misalignment // spec.dtype.itemsize
    buffer = poison(torch.empty(shift + spec.extent + margin, dtype=spec.dtype, device=spec.device))
    # With a stride of 0, all rows share memory.
    stored = tuple(1 if step == 0 else size for size, step in zip(spec.shape, spec.stride, strict=True))
    values = _values(spec, stored, draw, generator)
    if spec.extent:
        buffer.as_strided(stored, spec.stride, shift).copy_(values)
    return Guarded(buffer.as_strided(spec.shape, spec.stride, shift), buffer, buffer.clone())


def _values(spec: TensorSpec, shape: tuple[int, ...], draw: Draw, generator: torch.Generator) -> Tensor:
    if spec.fill is not None:
        return torch.full(shape, spec.fill, dtype=spec.dtype, device=spec.device)
    if spec.dtype.is_floating_point or draw is not draw_activations:
        return draw(shape, spec.device, generator)
    return torch.randint(0, 2, shape, device=spec.device, generator=generator)
