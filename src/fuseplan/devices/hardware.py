"""The cost model's constants of a device, each with its unit and its source."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal

Vendor = Literal["nvidia", "amd", "cpu"]
EXCHANGES: Final = ("triton", "flashinfer", "aiter")
"""The fields of `Hardware` that say how kernels exchange rows with other ranks."""
GENERATED: Final = "generated"
"""The kind of kernels that Inductor generates."""
FUSED: Final = "fused"
"""The kind of a fused op that stays on one device."""
KINDS: Final = (
    GENERATED, f"{GENERATED} quant", f"{GENERATED} rotary", FUSED, f"{FUSED} quant", f"{FUSED} rotary", "reduce",
    *EXCHANGES, "attention", "split", "linear", "skinny", "eager",
)  # fmt: skip
"""The kinds of kernels, which differ in the model's error: Inductor's and fused ops on one device, each by their
further work, unfused all-reduces, fused ones by how they exchange rows, torch's attention and fuseplan's, torch's
linear layers and fuseplan's, and references op by op.
"""
TORCH: Final = "torch"
"""The reducer of an all-reduce of torch.distributed: its library chooses the algorithm. Other reducers are engines,
which choose by size and number of ranks, and ops of torch that name the algorithm, such as `ONE_SHOT`.
"""
ONE_SHOT: Final = "symm_mem one-shot"
"""The reducer `torch.ops.symm_mem.one_shot_all_reduce`."""


@dataclass(frozen=True)
class Constant:
    """A number of the model.

    Attributes:
        value: in `unit`.
        unit: `ns`, `GB/s` (1e9 bytes a second, which is bytes a nanosecond), `GFLOP/s`, `bytes` or `times`.
        source: the datasheet, measurement or publication that it comes from, or its derivation.
    """

    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Error:
    """The model's error: standard deviations, as shares of the modelled time.

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
        step: the time of each step beyond the first two.
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
        """The time of an empty all-reduce."""
        steps = ranks if self.algorithm == "nvls" else 2 * (ranks - 1)
        return self.latency.value + (steps - 2) * self.step.value

    def wire_ns(self, nbytes: float, ranks: int) -> float:
        """The further time of the bytes."""
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
    | `multimem` | (N + 1)/N   | the switch adds a share for each rank, and hands out its result |

    Attributes:
        name: its owner's and the algorithm's, e.g. `vLLM custom two-shot`.
        algorithm: the row of the table.
        latency: of an empty one of two ranks: its launch, and waiting for the other rank.
        step: the extra wait for twice as many ranks.
        bandwidth: of all of a rank's links in one direction, as achieved.
        peer: bandwidth that a kernel reaches with one other rank, limited by its bytes in flight.
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
        """The time of an empty all-reduce, without copies."""
        return self.latency.value + math.log2(ranks / 2) * self.step.value

    def wire_ns(self, nbytes: float, ranks: int) -> float:
        """The further time of the bytes."""
        crossing = {"one-shot": ranks - 1, "two-shot": 2 * (ranks - 1) / ranks, "multimem": (ranks + 1) / ranks}
        return crossing[self.algorithm] * nbytes / min(self.bandwidth.value, (ranks - 1) * self.peer.value)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One kernel of an engine's all-reduce, with its sizes.

    Attributes:
        kernel: one of the device's `Shots`, by name.
        below: by the number of ranks, the size in bytes from which on it isn't called.
    """

    kernel: str
    below: Mapping[int, int]

    def takes(self, nbytes: float, ranks: int) -> bool:
        """Whether it is called for so many bytes among so many ranks."""
        return nbytes < self.below.get(ranks, 0)


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The kernels of an engine's all-reduce, by size and number of ranks: the first choice that takes them, or else the
    library.

    Attributes:
        source: the code, with its version.
        choices: in the order in which they are tried.
    """

    source: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class Peers:
    """How a kernel of one launch exchanges rows with the other ranks.

    Attributes:
        signal: the wait for the other rank of two: a barrier, or Lamport's spinning on the data.
        second: the second wait of two shots.
        step: the extra wait for twice as many ranks, once however often the kernel waits.
        bandwidth: of one link in one direction, as achieved by loads and stores of a kernel.
        mesh: whether each pair of ranks has a link of its own, as on AMD's boards, or one switched link is shared.
        stages: whether a rank first copies its rows to a buffer that the others can read.
        buffered: how often received data goes through a rank's memory: when it arrives, is read, and is cleared.
    """

    signal: Constant
    second: Constant
    step: Constant
    bandwidth: Constant
    mesh: bool
    stages: bool
    buffered: int = 0


@dataclass(frozen=True, kw_only=True)
class OneStageLimits:
    """When a library takes its one-stage kernel; elsewhere it takes two stages.

    Attributes:
        source: the code, with its version.
        max_tokens: rows above which it doesn't.
        widths: row widths it does so for, None for every width.
        max_bytes: by the largest number of ranks that it applies to, the size from which on it doesn't; None is no
            limit.
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
        norm: the time of its fused norm kernels without an all-reduce beyond a launch.
    """

    peers: Peers
    plain: OneStageLimits
    fused: OneStageLimits
    norm: Constant


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention kernels: torch's, and fuseplan's own.

    Attributes:
        latency: of a kernel with next to nothing to read, its launch included.
        split: the latency of fuseplan's kernel that splits the keys, with that of the kernel that combines the parts.
        key: the extra time of each key for a query token whose keys aren't split among programs.
        rate: of operations where several queries share the keys that a program reads.
        row_rate: of operations in float32 where one query has the keys to itself.
        narrow_row_rate: the same in bfloat16 and float16.
        product_rate: of operations in float32 of the matrix products in attention that a model spells out.
        narrow_product_rate: the same in bfloat16 and float16.
        joins_row: whether Inductor makes one kernel of a single query's products, the ops between them and the copies
            of heads.
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
        library: the time of torch's product beside reading the weights, its launch and further kernels included.
        skinny: the same for fuseplan's kernel.
        idle: how many times as long that kernel reads weights for over 16 rows where half of the processors have no
            tile.
        idle_few: the same for up to 16 rows, whose tiles are smaller.
        scaled_library: the time of torch's product of fp8 codes with scales of rows beside that of the columns.
        scaled_column: the least time of each column of the width, however few features there are.
        scaled: the time of fuseplan's kernel for such layers beside reading the weights.
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
        name: the device profile's.
        vendor: the device profile's.
        launch: the time of a kernel with next to no work, from its predecessor's end to its own, inside a CUDA graph.
        generated_norm: the time of a row reduction that Inductor generates beyond a launch.
        cache: bytes that stay in the last-level cache between two kernels.
        cache_bandwidth: of traffic within the cache.
        memory_bandwidth: of traffic beyond it.
        strided_copy: of eager `copy_` into a narrowed tensor, the second half of eager `F.pad`.
        attention: attention kernels.
        linear: linear layers of few rows.
        library: the all-reduces of torch.distributed; the fastest one counts. Empty where AITER replaces them.
        shots: all-reduces of engines, and torch's over symmetric memory.
        engines: the all-reduce that an engine calls, by the engine's name.
        triton: the exchange of Triton kernels over symmetric memory, None where there is no Triton.
        flashinfer: FlashInfer's exchange, None off NVIDIA.
        aiter: AITER's, None off AMD.
        errors: the model's errors, by source; see `devices.errors`. Missing sources are exact.
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
        """The constants for exchanging rows with other ranks, by field; None: the device has none."""
        assert name in EXCHANGES, name
        found: Peers | Aiter | None = getattr(self, name)
        return found

    def memory_ns(self, nbytes: float) -> float:
        """nbytes through cache or memory: all of it through the cache while it fits, nothing from twice its size on.

        A stream larger than a cache with LRU eviction evicts the lines that it is about to read.
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
