"""What pricing needs to know of parts: the bytes that they read and write, and the kernels that Inductor makes of them.

A core says this of itself as a `Middle`, an epilogue as a `Tail`; a `Region` puts some of them together, at one size.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from fuseplan.devices.hardware import GENERATED, TORCH


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel's time, term by term, in nanoseconds.

    Attributes:
        name: of the op or ops.
        launch: of itself.
        signal: waiting for other ranks.
        staging: copying to where other ranks can read.
        memory: bytes read and written.
        wire: bytes over links.
        kind: one of `devices.hardware.KINDS`, by which the model is more or less far off.
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
        """What doesn't depend on the bytes: launch + signal"""
        return self.launch + self.signal

    @property
    def moved(self) -> int:
        """What depends on the bytes: staging + memory + wire"""
        return self.staging + self.memory + self.wire

    @property
    def ns(self) -> int:
        """launch + signal + staging + memory + wire"""
        return self.launch + self.signal + self.staging + self.memory + self.wire


class Clock(Protocol):
    """What times the kernels of a part: the cost model of a device."""

    @property
    def is_eager(self) -> bool:
        """Whether parts that aren't fused are run by eager PyTorch, not by Inductor."""

    def local(self, name: str, nbytes: float, *, reduces_rows: bool = False) -> Kernel:
        """A kernel that reads and writes so many bytes; of reductions over rows, as Inductor generates it."""

    def strided_copy(self, nbytes: float) -> Kernel:
        """A copy of so many bytes into a part of a larger tensor, in eager PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Middle:
    """A core, as prices see it.

    Attributes:
        name: of the part.
        inputs: activations that it reads, each of its result's size; a residual aside.
        has_weight: whether it reads a weight of one row, too.
        reads_sums: whether a residual may be added before it, and an all-reduce stand there.
        reduces_rows: whether it is a reduction over rows.
        eager_kernels: at most how many kernels its reference launches in eager mode; tests count them.
        residual_kernels: likewise, how many more of them where it adds a residual.
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
    """An epilogue at a site, with all of its arguments that prices depend on; each part has a class of its own.

    Attributes:
        name: of the part.
        reduces_rows: whether it is a reduction over rows.
        yields_core: whether the core's own result is part of what it yields, for nothing.
        eager_kernels: at most how many kernels its reference launches in eager mode; tests count them.
        kind: what makes the model more or less far off for kernels that do this, too; see `devices.hardware.KINDS`.
    """

    name: ClassVar[str]
    reduces_rows: ClassVar[bool] = False
    yields_core: ClassVar[bool] = False
    eager_kernels: ClassVar[int] = 0
    kind: ClassVar[str] = ""

    @classmethod
    def stands_alone(cls, core: Middle) -> bool:
        """Whether Inductor leaves it a kernel of its own behind a core: it iterates over another width."""
        return False

    def stays_apart(self, core: Middle) -> bool:
        """Whether it is a kernel of its own behind a core, unfused."""
        return self.stands_alone(core)

    def text(self, width: int) -> str:
        """For a signature.

        Args:
            width: of the core's result.
        """
        return self.name

    def fits(self, width: int) -> bool:
        """Whether it can stand behind rows of a width."""
        return True

    def result_bytes(self, region: "Region") -> int:
        """What it yields."""
        raise NotImplementedError

    def read_bytes(self, region: "Region") -> int | None:
        """What core and epilogue read together, where that isn't what the core reads."""
        return None

    def joined(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """The kernels that Inductor makes of the core and of it, where it doesn't stand alone."""
        reduces_rows = region.core.reduces_rows or self.reduces_rows
        nbytes = region.read_bytes + region.written_bytes
        return (clock.local(f"{region.core.name}+{self.name}", nbytes, reduces_rows=reduces_rows),)

    def alone(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """Its kernels behind an op that Inductor can't see into."""
        nbytes = region.row_bytes + region.result_bytes
        return (clock.local(self.name, nbytes, reduces_rows=self.reduces_rows),)

    def behind(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """What Inductor has in the kernels of core and epilogue and an op that takes both leaves to it."""
        return ()

    def at_site(self) -> "Tail":
        """The same as it stands in the site's shape, whatever else a fusion takes along with it."""
        return self

    def eager(self, clock: Clock, region: "Region") -> tuple[Kernel, ...]:
        """Kernels of its reference beside `eager_kernels`, which read and write a whole activation each."""
        return ()

    def eager_count(self, core: Middle) -> int:
        """How many of those kernels there are."""
        return self.eager_kernels


@dataclass(frozen=True, kw_only=True)
class Region:
    """The ops that a fused op stands for, at one size.

    Attributes:
        core: what is in the middle.
        reduce: whether an all-reduce comes before it.
        residual: whether a residual is added before it.
        tail: what comes after it.
        tokens: rows; where queries are rotated, a row for each of their heads.
        width: of the core's result: hidden, or intermediate size.
        itemsize: bytes of an activation.
        ranks: of the group that reduces, 1 where nothing is reduced.
        keeps_core: whether the core's own result is needed beside the epilogue's.
        reducer: whose all-reduce stands in the graph; see `devices.hardware.TORCH`.
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
        """Of the kernel that does all of it."""
        parts = ("all_reduce" * self.reduce, self.core.name, self.tail.name if self.tail else "")
        return "+".join(part for part in parts if part)

    @property
    def row_bytes(self) -> int:
        """Bytes of one activation of the core's width."""
        return self.tokens * self.width * self.itemsize

    @property
    def read_bytes(self) -> int:
        """What the parts read that take activations from memory."""
        own = self.tail.read_bytes(self) if self.tail else None
        if own is not None:
            return own
        weight = self.width * self.itemsize * self.core.has_weight
        return (self.core.inputs + self.residual) * self.row_bytes + weight

    @property
    def written_bytes(self) -> int:
        """What a kernel of core and epilogue writes: the result, and the sum where one is yielded."""
        total = self.row_bytes if self.residual or self.reduce else 0
        core = self.row_bytes if self.keeps_core and self.tail and not self.tail.yields_core else 0
        return self.result_bytes + core + total

    @property
    def result_bytes(self) -> int:
        """The last op's own result."""
        return self.tail.result_bytes(self) if self.tail else self.row_bytes

    def without_tail(self) -> "Region":
        """The same without what comes after the core."""
        return replace(self, tail=None)

    def without_reduce(self) -> "Region":
        """The same on an activation that is reduced already."""
        return replace(self, reduce=False, ranks=1)


def total_ns(kernels: tuple[Kernel, ...]) -> int:
    """Kernels one after the other."""
    return sum(kernel.ns for kernel in kernels)
