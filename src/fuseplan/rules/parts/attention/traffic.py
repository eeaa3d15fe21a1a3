"""Prices of attention over shared heads: copies of keys and values, and the kernel that reads them.

    kernel = latency + key * keys + max(bytes / bandwidth, operations / rate)

`latency` is the kernel's time with next to nothing to read, including its launch. A kernel that doesn't split the keys
of a query among programs walks along them, which takes `key` for each; the model adds that, though part of it overlaps
with memory. fuseplan's own kernel splits the keys for any query, and has its own latency. Repeated heads are read as
often as they are repeated; before that, Inductor writes them, in one kernel for the keys and one for the values.
Attention that is spelled out is two matrix products, with scores written and read between them.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fuseplan.devices.hardware import Hardware
from fuseplan.rules.parts.traffic import Kernel

Heads: TypeAlias = Literal["repeated", "shared", "packed", "split"]
"""How a kernel reads keys and values whose heads several heads of queries share; `grouped` prices each.

`repeated`  copied for each head of queries
`shared`    as they are
`packed`    as they are, the queries that share a head stacked as if they were tokens
`split`     as they are, by fuseplan's own kernel, which splits the keys of any query among programs
"""


@dataclass(frozen=True, kw_only=True)
class AttentionRegion:
    """One attention, and the copies before it, at one size.

    Attributes:
        batch: rows of the batch.
        q_heads: heads of the queries.
        heads: heads of keys and values, unrepeated.
        queries: query tokens of a row.
        keys: the most keys that a query sees.
        width: head dimension.
        itemsize: bytes of an element.
        kernel: the kernel in the graph.
        copies: whether repeated heads are written to memory; copies of a single head are a view.
        is_causal: whether queries see only the keys before them, which halves the work.
        passes: passes over all scores between the two matrix products, where the graph spells attention out; 0: the
            graph calls a kernel.
    """

    batch: int
    q_heads: int
    heads: int
    queries: int
    keys: int
    width: int
    itemsize: int
    kernel: str
    copies: bool = True
    is_causal: bool = False
    passes: int = 0

    @property
    def groups(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.q_heads // self.heads

    @property
    def shared_bytes(self) -> int:
        """Bytes of all keys, or of all values, unrepeated."""
        return self.batch * self.heads * self.keys * self.width * self.itemsize

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries, or of the result."""
        return self.batch * self.q_heads * self.queries * self.width * self.itemsize

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores, or of all weights."""
        return self.batch * self.q_heads * self.queries * self.keys * self.itemsize

    @property
    def operations(self) -> float:
        """The number of multiplications and additions."""
        share = 0.5 if self.is_causal else 1.0
        return 4.0 * share * self.batch * self.q_heads * self.queries * self.keys * self.width


def repeated(hardware: Hardware, region: AttentionRegion) -> tuple[Kernel, ...]:
    """The kernels of the unfused graph."""
    copied = region.shared_bytes * (1 + region.groups)
    copy = Kernel(
        name="repeat heads", launch=_up(hardware.launch.value), memory=_up(hardware.memory_ns(copied))
    )  # fmt: skip
    if region.passes and region.queries == 1 and hardware.attention.joins_row:
        return (_joined(hardware, region),)
    copies = (copy, copy) if region.copies else ()
    return (*copies, *(_spelled(hardware, region) if region.passes else (_attention(hardware, region, "repeated"),)))


def grouped(hardware: Hardware, region: AttentionRegion, form: Heads) -> tuple[Kernel, ...]:
    """The kernels without repeated heads, in a form; `repeated` is the reference behind an opaque op."""
    if form == "repeated":
        opaque = Kernel(name="opaque op", launch=_up(hardware.launch.value))
        return (*repeated(hardware, region), opaque)
    return (_attention(hardware, region, form),)


def _joined(hardware: Hardware, region: AttentionRegion) -> Kernel:
    """The kernel that Inductor generates for a whole spelled-out attention of a single query."""
    nbytes = 2 * region.shared_bytes + 2 * region.query_bytes + 2 * region.score_bytes
    return Kernel(
        name="attention, generated", launch=_up(hardware.launch.value),
        memory=_up(max(hardware.memory_ns(nbytes), region.operations / _product_rate(hardware, region))),
    )  # fmt: skip


def _product_rate(hardware: Hardware, region: AttentionRegion) -> float:
    constants = hardware.attention
    return (constants.narrow_product_rate if region.itemsize < 4 else constants.product_rate).value


def _spelled(hardware: Hardware, region: AttentionRegion) -> tuple[Kernel, ...]:
    """Two matrix products, and between them kernels that read and write all scores."""
    launch = _up(hardware.launch.value)
    read = region.shared_bytes * (region.groups if region.copies else 1) + region.query_bytes + region.score_bytes
    product = Kernel(
        name="product of matrices", launch=launch,
        memory=_up(max(hardware.memory_ns(read), region.operations / 2 / _product_rate(hardware, region))),
        kind="attention",
    )  # fmt: skip
    scores = Kernel(name="softmax", launch=launch, memory=_up(hardware.memory_ns(2 * region.score_bytes)))
    return (product, *(scores,) * region.passes, product)


def _attention(hardware: Hardware, region: AttentionRegion, form: Heads) -> Kernel:
    constants = hardware.attention
    is_single = region.queries == 1 and form != "packed"
    narrow = constants.narrow_row_rate if region.itemsize < 4 else constants.row_rate
    rate = narrow if is_single and form != "split" else constants.rate
    latency = constants.split if form == "split" else constants.latency
    times = region.groups if form == "repeated" and region.copies else 1
    nbytes = 2 * region.shared_bytes * times + 2 * region.query_bytes
    # cuDNN splits the keys of single queries, and flash attention packs heads and splits them by itself.
    splits = form == "split" or region.queries > 1 or region.kernel == "flash"
    splits = splits or (region.kernel == "cudnn" and form != "packed")
    walked = 0.0 if splits else constants.key.value * region.keys
    return Kernel(
        name=f"attention ({'triton, split keys' if form == 'split' else f'{region.kernel}, {form} heads'})",
        launch=_up(latency.value + walked),
        memory=_up(max(hardware.memory_ns(nbytes), region.operations / rate.value)),
        kind="split" if form == "split" else "attention",
    )


def _up(ns: float) -> int:
    return math.ceil(ns)
