"""Traffic of parts, for prices: the bytes that they read and write, and the kernels that Inductor makes of them.

A core declares its traffic as a `Middle`, an epilogue as a `Tail`; a `Region` combines them at one size.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from fuseplan.devices.hardware import GENERATED, TORCH


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel's time, term by term, in nanoseconds.

    Attributes:
        name: its op or ops.
        launch: time of the launch.
        signal: time spent waiting for other ranks.
        staging: time to copy to memory that other ranks can read.
        memory: time to read and write memory.
        wire: time to send over links.
        kind: one of `devices.hardware.KINDS`; the error of the cost model is known for each.
    """

    name: str
    launch: int = 0
    signal: int = 0
    staging: int = 0
    memory: int = 0
    wire: int = 0
    kind: str = field(default=GENERATED, compare=False)

    @property
    def fixed(self) -> int:
        """The time that doesn't depend on bytes: launch + signal"""
        return self.launch + self.signal

    @property
    def moved(self) -> int:
        """The time that depends on bytes: staging + memory + wire"""
        return self.staging + self.memory + self.wire

    @property
    def ns(self) -> int:
        """launch + signal + staging + memory + wire"""
        return self.launch + self.signal + self.staging + self.memory + self.wire


class Clock(Protocol):
    """The cost model of a device, which times the kernels of a part."""

    @property
    def is_eager(self) -> bool:
        """Whether unfused parts run in eager PyTorch, not in Inductor."""

    def local(self, name: str, nbytes: float, *, reduces_rows: bool = False) -> Kernel:
        """A kernel that reads and writes this many bytes; for reductions over rows, as Inductor generates it."""

    def strided_copy(self, nbytes: float) -> Kernel:
        """A copy of this many bytes into a part of a larger tensor, in eager PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Middle:
    """The traffic of a core.

    Attributes:
        name: the part's name.
        inputs: number of activations that it reads, each of its result's size, without a residual.
        has_weight: whether it also reads a weight of one row.
        reads_sums: whether a residual add and an all-reduce may come before it.
        reduces_rows: whether it is a reduction over rows.
        eager_kernels: the most kernels its reference launches in eager mode; tests count them.
        residual_kernels: the most further kernels where it adds a residual; tests count them.
    """

    name: str
    inputs: int = 1
    has_weight: bool = False
    reads_sums: bool = False
    reduces_rows: bool = False
    eager_kernels: int = 0
    residual_kernels: int = 0


@dataclass(frozen=True, kw_only=True)
class Tail:
    """An epilogue at a site, with all of its arguments that prices depend on; each part has its own class.

    Attributes:
        name: the part's name.
        reduces_rows: whether it is a reduction over rows.
        yields_core: whether its results include the core's own result, at no cost.
        eager_kernels: the most kernels its reference launches in eager mode; tests count them.
        kind: suffix of the kernel kind, which the error of the cost model depends on; see `devices.hardware.KINDS`.
    """

    name: ClassVar[str]
    reduces_rows: ClassVar[bool] = False
    yields_core: ClassVar[bool] = False
    eager_kernels: ClassVar[int] = 0
    kind: ClassVar[str] = ""

    @classmethod
    def stands_alone(cls, core: Middle) -> bool:
        """Whether Inductor keeps it in a separate kernel behind a core because it iterates over another width."""
        return False

    def stays_apart(self, core: Middle) -> bool:
        """Whether it is a separate kernel behind a core when unfused."""
        return self.stands_alone(core)

    def text(self, width: int) -> str:
        """Its text in a signature.

        Args:
            width: the width of the core's result.
        """
        return self.name

    def fits(self, width: int) -> bool:
        """Whether it can follow rows of this width."""
        return True

    def result_bytes(self, region: "Region") -> int:
        """Bytes of its results."""
        raise NotImplementedError

    def read_bytes(self, region: "Region") -> int | None:
        """Bytes that core and epilogue read together; None where those are the core's."""
        return None

    def joined(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """The kernels that Inductor makes of core and epilogue, where the epilogue doesn't stand alone."""
        reduces_rows = region.core.reduces_rows or self.reduces_rows
        nbytes = region.read_bytes + region.written_bytes
        return (clock.local(f"{region.core.name}+{self.name}", nbytes, reduces_rows=reduces_rows),)

    def alone(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """Its kernels behind an op that Inductor can't see into."""
        nbytes = region.row_bytes + region.result_bytes
        return (clock.local(self.name, nbytes, reduces_rows=self.reduces_rows),)

    def behind(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """The kernels left to Inductor behind an op that takes core and epilogue: work that it would otherwise do in
        theirs.
        """
        return ()

    def at_site(self) -> "Tail":
        """The epilogue in the site's shape, without anything else that a fusion takes along with it."""
        return self

    def eager(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """Kernels of its reference beyond `eager_kernels`, which each read and write a whole activation."""
        return ()

    def eager_count(self, core: Middle) -> int:
        """The number of `eager_kernels` behind a core."""
        return self.eager_kernels


@dataclass(frozen=True, kw_only=True)
class Region:
    """The ops that a fused op replaces, at one size.

    Attributes:
        core: the core.
        reduce: whether an all-reduce comes before the core.
        residual: whether a residual is added before the core.
        tail: the epilogue.
        tokens: number of rows; where queries are rotated, a row for each of their heads.
        width: width of the core's result: hidden, or intermediate size.
        itemsize: bytes of an element of an activation.
        ranks: ranks of the group that reduces, 1 without an all-reduce.
        keeps_core: whether the core's own result is needed beside the epilogue's.
        reducer: the library of the all-reduce in the graph; see `devices.hardware.TORCH`.
    """

    core: Middle
    tokens: int
    width: int
    itemsize: int = 2
    reduce: bool = False
    residual: bool = False
    tail: Tail | None = None
    ranks: int = 1
    keeps_core: bool = False
    reducer: str = TORCH

    def __post_init__(self) -> None:
        assert min(self.tokens, self.width, self.itemsize, self.ranks) >= 1, self
        assert not (self.reduce and self.ranks == 1), self
        assert self.core.reads_sums or not (self.reduce or self.residual), self
        assert self.tail is None or self.tail.fits(self.width), self

    @property
    def name(self) -> str:
        """The name of a kernel for the whole region."""
        parts = ("all_reduce" * self.reduce, self.core.name, self.tail.name if self.tail else "")
        return "+".join(part for part in parts if part)

    @property
    def row_bytes(self) -> int:
        """Bytes of one activation of the core's width."""
        return self.tokens * self.width * self.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes read by the parts that take activations from memory."""
        own = self.tail.read_bytes(self) if self.tail else None
        if own is not None:
            return own
        weight = self.width * self.itemsize * self.core.has_weight
        return (self.core.inputs + self.residual) * self.row_bytes + weight

    @property
    def written_bytes(self) -> int:
        """Bytes that a kernel of core and epilogue writes: the result, and the sum where one is yielded."""
        total = self.row_bytes if self.residual or self.reduce else 0
        core = self.row_bytes if self.keeps_core and self.tail and not self.tail.yields_core else 0
        return self.result_bytes + core + total

    @property
    def result_bytes(self) -> int:
        """Bytes of the last op's result."""
        return self.tail.result_bytes(self) if self.tail else self.row_bytes

    def without_tail(self) -> "Region":
        """The region without its epilogue."""
        return replace(self, tail=None)

    def without_reduce(self) -> "Region":
        """The region on an activation that is reduced already."""
        return replace(self, reduce=False, ranks=1)


def total_ns(kernels: tuple[Kernel, ...]) -> int:
    """The time of kernels one after the other."""
    return sum(kernel.ns for kernel in kernels)
