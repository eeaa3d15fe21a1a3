"""What the cost model knows of a device: constants, each with its unit and where it comes from."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal

Vendor = Literal["nvidia", "amd", "cpu"]
EXCHANGES: Final = ("triton", "flashinfer", "aiter")
"""The fields of `Hardware` that say how kernels exchange rows with other ranks."""
GENERATED: Final = "generated"
"""The kind of what Inductor generates."""
FUSED: Final = "fused"
"""The kind of a fused op that stays on one device."""
KINDS: Final = (
    GENERATED, f"{GENERATED} quant", f"{GENERATED} rotary", FUSED, f"{FUSED} quant", f"{FUSED} rotary", "reduce",
    *EXCHANGES, "attention", "split", "linear", "skinny", "eager",
)  # fmt: skip
"""The kinds of kernels that the model is more or less far off for: Inductor's and fused ops on one device, each by what
else they do, all-reduces that aren't fused, fused ones by how they exchange rows, torch's attention and fuseplan's,
torch's linear layers and fuseplan's, and references op by op.
"""
TORCH: Final = "torch"
"""The reducer of an all-reduce of torch.distributed: its library chooses the algorithm. Other reducers are an engine,
which chooses by size and number of ranks, and an op of torch that says the algorithm, such as `ONE_SHOT`.
"""
ONE_SHOT: Final = "symm_mem one-shot"
"""The reducer `torch.ops.symm_mem.one_shot_all_reduce`."""


@dataclass(frozen=True)
class Constant:
    """A number of the model.

    Attributes:
        value: in `unit`.
        unit: `ns`, `GB/s` (1e9 bytes a second, which is bytes a nanosecond), `GFLOP/s`, `bytes` or `times`.
        source: the datasheet, measurement or publication it was read from, or what it was derived from.
    """

    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far the model is off: standard deviations, as shares of what it says.

    Attributes:
        less: of times that are shorter.
        more: of times that are longer.
    """

    less: float
    more: float


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way in which a library runs an all-reduce of N ranks, over links from one to the next or through the switch.

    time = latency + (steps - 2) * step + crossing * bytes / bandwidth

    | algorithm | steps     | crossing    | |
    |-----------|-----------|-------------|-|
    | `ring`    | 2 (N - 1) | 2 (N - 1)/N | every rank reduces a share and passes it on |
    | `tree`    | 2 (N - 1) | 2           | up a chain and down again |
    | `nvls`    | N         | (N + 1)/N   | the switch adds and hands out: three ranks at least |

    Attributes:
        name: the library's, with the algorithm and the protocol, e.g. `NCCL ring LL`.
        algorithm: the row of the table.
        latency: of an empty all-reduce of two ranks, its launch included.
        step: what each step beyond the first two adds.
        bandwidth: of a rank's link, in one direction, as achieved.
    """

    name: str
    algorithm: Literal["ring", "tree", "nvls"] = "ring"
    latency: Constant
    step: Constant
    bandwidth: Constant

    def serves(self, ranks: int) -> bool:
        """Whether it can run among so many ranks."""
        return self.algorithm != "nvls" or ranks > 2

    def latency_ns(self, ranks: int) -> float:
        """Of an empty all-reduce."""
        steps = ranks if self.algorithm == "nvls" else 2 * (ranks - 1)
        return self.latency.value + (steps - 2) * self.step.value

    def wire_ns(self, nbytes: float, ranks: int) -> float:
        """What the bytes take beyond that."""
        crossing = {"ring": 2 * (ranks - 1) / ranks, "tree": 2.0, "nvls": (ranks + 1) / ranks}[self.algorithm]
        return crossing * nbytes / self.bandwidth.value


@dataclass(frozen=True, kw_only=True)
class Shots:
    """One way in which a kernel of one launch runs an all-reduce in the memory of its N ranks.

    time = latency + log2(N / 2) * step + crossing * bytes / min(bandwidth, (N - 1) * peer) + copies

    | algorithm  | crossing    | |
    |------------|-------------|-|
    | `one-shot` | N - 1       | every rank reads all rows of all others |
    | `two-shot` | 2 (N - 1)/N | every rank reduces its share, and hands the result on |
    | `multimem` | (N + 1)/N   | the switch adds a share for each rank, and hands out what it writes |

    Attributes:
        name: its owner's and the algorithm's, e.g. `vLLM custom two-shot`.
        algorithm: the row of the table.
        latency: of an empty one of two ranks: its launch, and waiting for the other rank.
        step: what waiting for twice as many ranks adds.
        bandwidth: of all of a rank's links in one direction, as achieved.
        peer: of what a kernel has under way with one other rank.
        copies: how many kernels beside it copy rows into a buffer that others can read, and out of it.
    """

    name: str
    algorithm: Literal["one-shot", "two-shot", "multimem"]
    latency: Constant
    step: Constant
    bandwidth: Constant
    peer: Constant
    copies: int = 0

    def latency_ns(self, ranks: int) -> float:
        """Of an empty all-reduce, without copies."""
        return self.latency.value + math.log2(ranks / 2) * self.step.value

    def wire_ns(self, nbytes: float, ranks: int) -> float:
        """What the bytes take beyond that."""
        crossing = {"one-shot": ranks - 1, "two-shot": 2 * (ranks - 1) / ranks, "multimem": (ranks + 1) / ranks}
        return crossing[self.algorithm] * nbytes / min(self.bandwidth.value, (ranks - 1) * self.peer.value)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What an engine's all-reduce calls for some sizes.

    Attributes:
        kernel: one of the device's `Shots`, by name.
        below: by the number of ranks that it serves, the size in bytes from which on it doesn't.
    """

    kernel: str
    below: Mapping[int, int]

    def takes(self, nbytes: float, ranks: int) -> bool:
        """Whether it is called for so many bytes among so many ranks."""
        return nbytes < self.below.get(ranks, 0)


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """What an engine's all-reduce calls, by size and number of ranks: the first choice that takes them, or else the
    library.

    Attributes:
        source: which version of which code.
        choices: in the order in which they are asked.
    """

    source: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class Peers:
    """How a kernel of one launch exchanges rows with the other ranks.

    Attributes:
        signal: what waiting for the other rank of two costs: a barrier, or Lamport's spinning on the data.
        second: the same of the second wait of two shots.
        step: what waiting for twice as many ranks adds, once however often the kernel waits.
        bandwidth: of one link in one direction, as achieved by loads and stores of a kernel.
        mesh: whether each pair of ranks has a link of its own, as on AMD's boards, or one switched link is shared.
        stages: whether a rank first copies its rows to a buffer that the others can read.
        buffered: how often what it is sent goes through a rank's memory: as it comes, as it is read, as it is cleared.
    """

    signal: Constant
    second: Constant
    step: Constant
    bandwidth: Constant
    mesh: bool
    stages: bool
    buffered: int = 0


@dataclass(frozen=True, kw_only=True)
class Gate:
    """When a library takes its one-stage kernel; elsewhere it takes two stages.

    Attributes:
        source: which version of which code.
        max_tokens: rows above which it doesn't.
        widths: row widths it does so for, None for every width.
        max_bytes: by the largest number of ranks it holds for, the size from which on it doesn't; None is no limit.
    """

    source: str
    max_tokens: int | None = None
    widths: frozenset[int] | None = None
    max_bytes: Mapping[int, int | None] = field(default_factory=dict)

    def takes_one_stage(self, *, tokens: int, width: int, nbytes: int, ranks: int) -> bool:
        """Whether rows of that shape go through the one-stage kernel."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            return False
        if self.widths is not None and width not in self.widths:
            return False
        limits = [limit for most, limit in sorted(self.max_bytes.items()) if ranks <= most]
        return bool(limits) and (limits[0] is None or nbytes < limits[0])


@dataclass(frozen=True, kw_only=True)
class Aiter:
    """AITER's all-reduces, which serve the unfused graph as well as the fused ops.

    Attributes:
        peers: its kernels' exchange.
        plain: its gate of the all-reduce alone.
        fused: its gate of the all-reduce fused with a norm.
        norm: what its fused norm kernels without an all-reduce take beyond a launch.
    """

    peers: Peers
    plain: Gate
    fused: Gate
    norm: Constant


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention kernels: torch's, and fuseplan's own.

    Attributes:
        latency: of one with next to nothing to read, its launch included.
        split: the same of fuseplan's kernel that splits the keys, and of the one that puts the parts together.
        key: what each key adds for a query token whose keys aren't split among programs.
        rate: of operations where several queries share the keys that a program reads.
        row_rate: of operations in float32 where one query has them for itself.
        narrow_row_rate: the same in bfloat16 and float16.
        product_rate: of operations in float32 of the products of matrices that a model spells attention out by.
        narrow_product_rate: the same in bfloat16 and float16.
        joins_row: whether Inductor makes one kernel of a single query's products, of what is between them and of the
            copies of heads.
    """

    latency: Constant
    split: Constant
    key: Constant
    rate: Constant
    row_rate: Constant
    narrow_row_rate: Constant
    product_rate: Constant
    narrow_product_rate: Constant
    joins_row: bool = False


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear layers of few rows, which wait for their weights.

    Attributes:
        library: what torch's product takes beside reading them, its launch and further kernels included.
        skinny: the same of fuseplan's kernel.
        idle: how many times as long that reads weights for over 16 rows where half of the processors have no tile.
        idle_few: the same for up to 16 rows, of which tiles are smaller.
        scaled_library: what torch's product of codes in fp8 with scales of rows takes beside going through the width.
        scaled_column: what each column of the width takes it at least, however few features there are.
        scaled: what fuseplan's kernel of such layers takes beside reading the weights.
    """

    library: Constant
    skinny: Constant
    idle: Constant
    idle_few: Constant
    scaled_library: Constant
    scaled_column: Constant
    scaled: Constant


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, with its usual links and libraries, as the cost model sees it.

    Attributes:
        name: a device profile's.
        vendor: likewise.
        launch: a kernel with next to nothing to do, from its predecessor's end to its own, inside a CUDA graph.
        generated_norm: what a row reduction that Inductor generates takes beyond a launch.
        cache: bytes that stay in the last-level cache between two kernels.
        cache_bandwidth: of traffic within the cache.
        memory_bandwidth: of traffic beyond it.
        strided_copy: of eager `copy_` into a narrowed tensor, the second half of eager `F.pad`.
        attention: attention kernels.
        linear: linear layers of few rows.
        library: the all-reduces of torch.distributed, of which the fastest is taken. Empty where AITER replaces them.
        shots: all-reduces of engines, and torch's over symmetric memory.
        engines: which all-reduce an engine calls, by the engine's name.
        triton: the exchange of Triton kernels over symmetric memory, None where there is no Triton.
        flashinfer: FlashInfer's exchange, None off NVIDIA.
        aiter: AITER's, None off AMD.
        errors: how far the model is off, by what the error comes from; see `devices.errors`. What isn't there is exact.
    """

    name: str
    vendor: Vendor
    launch: Constant
    generated_norm: Constant
    cache: Constant
    cache_bandwidth: Constant
    memory_bandwidth: Constant
    strided_copy: Constant
    attention: Attention
    linear: Linear
    library: tuple[Protocol, ...] = ()
    shots: tuple[Shots, ...] = ()
    engines: Mapping[str, Dispatch] = field(default_factory=dict)
    triton: Peers | None = None
    flashinfer: Peers | None = None
    aiter: Aiter | None = None
    errors: Mapping[str, Error] = field(default_factory=dict)

    def constants(self) -> Iterator[tuple[str, Constant]]:
        """Every constant by its dotted name, e.g. `triton.signal` or `ring.LL.latency`."""
        yield from _constants("", self)

    def exchange(self, name: str) -> "Peers | Aiter | None":
        """The constants by which kernels exchange rows with other ranks, by the field; None: the device has none."""
        assert name in EXCHANGES, name
        found: Peers | Aiter | None = getattr(self, name)
        return found

    def memory_ns(self, nbytes: float) -> float:
        """nbytes through cache or memory: all of it through the cache while it fits, nothing from twice its size on.

        A stream larger than a cache that evicts what was used longest ago pushes out what it is about to read.
        """
        cached = max(0.0, min(nbytes, 2 * self.cache.value - nbytes))
        return cached / self.cache_bandwidth.value + (nbytes - cached) / self.memory_bandwidth.value


def _constants(prefix: str, value: Any) -> Iterator[tuple[str, Constant]]:
    if isinstance(value, Constant):
        yield prefix, value
    elif isinstance(value, tuple):
        for item in value:
            yield from _constants(f"{prefix}.{item.name}", item)
    elif is_dataclass(value):
        for item in fields(value):
            yield from _constants(f"{prefix}.{item.name}" if prefix else item.name, getattr(value, item.name))
