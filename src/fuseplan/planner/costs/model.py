"""What a fused op and the ops it replaces cost on a device: a roofline, and alpha-beta for what crosses ranks.

    kernel = launch + signal + staging + memory + wire

`memory` are the bytes read and written over the bandwidth of cache or memory, `wire` those that cross links over the
links' bandwidth; both go on at the same time. `signal` is waiting for other ranks and `staging` what is copied before.
A region takes as long as its kernels one after the other, as they run inside a CUDA graph.

How Inductor leaves what is not fused:

- An all-reduce is a kernel of the communication library.
- Residual add and norm are one row reduction, SiLU-and-mul is one pointwise kernel.
- fp8 quantisation joins the kernel before it: static is pointwise, and the row maximum of dynamic is a reduction over
  the rows that this kernel holds already. After an opaque fused op it is a kernel of its own.
- Normed and rotated queries are one kernel and keys another, the fewest that it can be: two reductions of other sizes.
- A pad is a kernel of its own: it iterates over another width than the norm. In eager mode it is two, `fill_` of the
  whole output and `copy_` into a part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fuseplan.devices.hardware import Aiter, Gate, Hardware, Peers, Protocol
from fuseplan.providers import BUILT_IN_PROVIDERS, ONE_KERNEL, Timing

Core: TypeAlias = Literal["rms_norm", "silu_and_mul", "attention"]
Epilogue: TypeAlias = Literal["pad", "static_fp8_quant", "dynamic_fp8_quant", "rotary"]
PadLowering: TypeAlias = Literal["inductor", "eager"]

FP8_BYTES = 1
SCALE_BYTES = 4
EAGER_BYTES = 8
"""A kernel of an eager reference reads and writes float32."""

BUILT_IN_TIMINGS: Mapping[str, Timing] = {each.name: each.timing for each in BUILT_IN_PROVIDERS if each.timing}
"""By the provider's name."""

EAGER_KERNELS = {
    "rms_norm": 11,
    "residual": 4,
    "silu_and_mul": 7,
    "static_fp8_quant": 5,
    "dynamic_fp8_quant": 10,
    "rotary": 34,
}
"""At most how many kernels the parts of a reference launch in eager mode; tests count them."""


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A rotary embedding of normed queries, and of the normed keys beside them.

    Attributes:
        q_heads: heads of the queries.
        k_heads: heads of the keys.
        angles: cosines and sines a token.
    """

    q_heads: int
    k_heads: int
    angles: int


@dataclass(frozen=True, kw_only=True)
class Region:
    """The ops that a fused op stands for, at one size.

    Attributes:
        core: what is in the middle.
        reduce: whether an all-reduce comes before it.
        residual: whether a residual is added before it.
        epilogue: what comes after it.
        tokens: rows; where queries are rotated, a row for each of their heads.
        width: of the core's result: hidden, or intermediate size.
        padded: width after the pad; equal to `width` where there is no pad.
        itemsize: bytes of an activation.
        ranks: of the group that reduces, 1 where nothing is reduced.
        keeps_core: whether the core's own result is needed beside the epilogue's. Free for a pad, whose slice it is.
        rotation: of a `rotary` epilogue, whose region has the norm of the keys, too.
    """

    core: Core
    tokens: int
    width: int
    padded: int
    itemsize: int = 2
    reduce: bool = False
    residual: bool = False
    epilogue: Epilogue | None = None
    ranks: int = 1
    keeps_core: bool = False
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        assert min(self.tokens, self.width, self.itemsize, self.ranks) >= 1, self
        assert (self.padded >= self.width) if self.epilogue == "pad" else (self.padded == self.width), self
        assert not (self.reduce and self.ranks == 1), self
        assert (self.rotation is None) is (self.epilogue != "rotary"), self
        assert self.core == "rms_norm" or not (self.reduce or self.residual or self.epilogue == "pad"), self

    @property
    def row_bytes(self) -> int:
        """Bytes of one activation of the core's width."""
        return self.tokens * self.width * self.itemsize

    @property
    def read_bytes(self) -> int:
        """What the core reads: its activations and the norm's weight; of queries and keys both, and the angles."""
        if self.rotation is not None:
            return self.rotated_bytes(self.rotation.q_heads + self.rotation.k_heads) + 2 * self.width * self.itemsize
        if self.core == "silu_and_mul":
            return 2 * self.row_bytes
        return (1 + self.residual) * self.row_bytes + self.width * self.itemsize

    @property
    def written_bytes(self) -> int:
        """What a kernel of core and epilogue writes: the result, and the sum where one is yielded."""
        total = self.row_bytes if self.residual or self.reduce else 0
        core = self.row_bytes if self.keeps_core and self.epilogue != "pad" and self.epilogue else 0
        return self.result_bytes + core + total

    @property
    def result_bytes(self) -> int:
        """The last op's own result."""
        if self.epilogue == "pad":
            return self.tokens * self.padded * self.itemsize
        if self.epilogue is None:
            return self.row_bytes
        if self.rotation is not None:
            return self._heads_bytes(self.rotation.q_heads + self.rotation.k_heads)
        scales = self.tokens * SCALE_BYTES if self.epilogue == "dynamic_fp8_quant" else 0
        return self.tokens * self.width * FP8_BYTES + scales

    def rotated_bytes(self, heads: int) -> int:
        """What a rotation reads of so many heads and of the angles."""
        assert self.rotation is not None
        return self._heads_bytes(heads) + self.tokens // self.rotation.q_heads * self.rotation.angles * self.itemsize

    def _heads_bytes(self, heads: int) -> int:
        assert self.rotation is not None
        return self.row_bytes // self.rotation.q_heads * heads

    def without_epilogue(self) -> "Region":
        """The same without what comes after the core."""
        return replace(self, epilogue=None, padded=self.width, rotation=None)

    def without_reduce(self) -> "Region":
        """The same on an activation that is reduced already."""
        return replace(self, reduce=False, ranks=1)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel's time, term by term, in nanoseconds."""

    name: str
    launch: int = 0
    signal: int = 0
    staging: int = 0
    memory: int = 0
    wire: int = 0

    @property
    def ns(self) -> int:
        """launch + signal + staging + memory + wire"""
        return self.launch + self.signal + self.staging + self.memory + self.wire


def total_ns(kernels: tuple[Kernel, ...]) -> int:
    """Kernels one after the other."""
    return sum(kernel.ns for kernel in kernels)


class CostModel:
    """Prices regions on one device.

    A site of a graph has parts: all-reduce, core, epilogue. A fusion takes some of them; what it leaves is run
    unfused. `alternative_ns` prices a site under one fusion, `saving_ns` is what that saves.
    """

    def __init__(
        self, hardware: Hardware, *, pad: PadLowering = "inductor", timings: Mapping[str, Timing] = BUILT_IN_TIMINGS
    ) -> None:
        """Prices for `hardware`.

        Args:
            hardware: one of `HARDWARE`.
            pad: who runs a pad that isn't fused: Inductor, as in a compiled graph, or eager PyTorch, as in the
                probe whose columns U and B calibrate the model.
            timings: how kernels are priced, by the provider's name.
        """
        self.hardware = hardware
        self.pad = pad
        self.timings = timings

    @property
    def name(self) -> str:
        """The device's name."""
        return self.hardware.name

    # A site under one alternative.

    def alternative_ns(self, site: Region, taken: Region | None, provider: str) -> int:
        """`site` with the parts `taken` run by `provider` as one op, and the rest as Inductor leaves it."""
        return total_ns(self.alternative(site, taken, provider))

    def alternative(self, site: Region, taken: Region | None, provider: str) -> tuple[Kernel, ...]:
        """The kernels of `alternative_ns`."""
        if taken is None:
            return self.unfused(site)
        assert taken.core == site.core and taken.residual == site.residual, (site, taken)
        assert taken.epilogue in (None, site.epilogue) and taken.reduce <= site.reduce, (site, taken)
        before = self.reduce(site) if site.reduce and not taken.reduce else ()
        after = self.epilogue(site) if site.epilogue and not taken.epilogue else ()
        return (*before, *self.fused(taken, provider), *after)

    def saving_ns(self, site: Region, taken: Region, provider: str) -> int:
        """What fusing `taken` saves at `site`; negative where it costs."""
        return self.unfused_ns(site) - self.alternative_ns(site, taken, provider)

    # What is not fused.

    def unfused_ns(self, region: Region) -> int:
        """All of a region's parts as Inductor leaves them."""
        return total_ns(self.unfused(region))

    def unfused(self, region: Region) -> tuple[Kernel, ...]:
        """The kernels of `unfused_ns`."""
        before = self.reduce(region) if region.reduce else ()
        rest = region.without_reduce()
        if region.epilogue == "pad":
            return (*before, *self.core(rest.without_epilogue()), *self.epilogue(rest))
        return (*before, *self.core(rest))

    def reduce(self, region: Region) -> tuple[Kernel, ...]:
        """The all-reduce alone."""
        if (aiter := self.hardware.aiter) is not None:
            if _takes_one_stage(aiter.plain, region):
                return (self._one_shot("all_reduce", region, aiter.peers, 2 * region.row_bytes),)
            return (self._two_shot("all_reduce", region, aiter.peers, 2 * region.row_bytes),)
        kernels = [_ring(protocol, region) for protocol in self.hardware.ring]
        return (min(kernels, key=lambda kernel: kernel.ns),)

    def core(self, region: Region) -> tuple[Kernel, ...]:
        """The kernel that Inductor makes of the core and of a quantisation after it; all-reduces don't count."""
        rest = region.without_reduce()
        if region.rotation is not None:
            return tuple(self._rotated(region, heads) for heads in (region.rotation.q_heads, region.rotation.k_heads))
        rows = region.core == "rms_norm" or region.epilogue == "dynamic_fp8_quant"
        extra = self.hardware.generated_norm.value if rows else 0.0
        name = f"{region.core}+{region.epilogue}" if region.epilogue else region.core
        return (self._local(name, rest.read_bytes + rest.written_bytes, extra),)

    def epilogue(self, region: Region) -> tuple[Kernel, ...]:
        """The epilogue alone, behind an op that Inductor can't see into."""
        read, written = region.row_bytes, region.result_bytes
        if region.rotation is not None:
            rotated = self._local("rotary", region.rotated_bytes(region.rotation.q_heads) + region.row_bytes)
            return (rotated, self._rotated(region, region.rotation.k_heads))
        if region.epilogue == "pad" and self.pad == "eager":
            moved = 2 * region.row_bytes
            copied = self.hardware.memory_ns(moved) + moved / self.hardware.strided_copy.value
            copy = Kernel(name="copy_", launch=_up(self.hardware.launch.value), memory=_up(copied))
            return (self._local("fill_", written), copy)
        extra = self.hardware.generated_norm.value if region.epilogue == "dynamic_fp8_quant" else 0.0
        return (self._local(str(region.epilogue), read + written, extra),)

    def copy(self, nbytes: int) -> Kernel:
        """A copy of a value of so many bytes, in a kernel of its own: it is read and written."""
        return self._local("copy", 2 * nbytes)

    def _rotated(self, region: Region, heads: int) -> Kernel:
        """Norm and rotation of so many heads, as Inductor generates them."""
        assert region.rotation is not None
        written = region.row_bytes // region.rotation.q_heads * heads
        nbytes = region.rotated_bytes(heads) + written + region.width * region.itemsize
        return self._local("rms_norm+rotary", nbytes, self.hardware.generated_norm.value)

    # What is fused.

    def fused_ns(self, region: Region, provider: str) -> int:
        """One fused op of all of a region's parts, by `provider`: see `fused`."""
        return total_ns(self.fused(region, provider))

    def fused(self, region: Region, provider: str) -> tuple[Kernel, ...]:
        """The kernels of `fused_ns`.

        It is priced as its timing says. A provider without one is taken to be one kernel, which is no more than an
        assumption: the model can say what one would take, and not that somebody's op is one.
        """
        timing = self.timing(provider)
        if timing.eager:
            return self._eager(region)
        exchange = self.hardware.exchange(timing.exchange)
        staged = exchange if isinstance(exchange, Aiter) else None
        peers = exchange.peers if isinstance(exchange, Aiter) else exchange or self.hardware.triton
        local = region.read_bytes + region.written_bytes
        name = "+".join(part for part in ("all_reduce" * region.reduce, region.core, region.epilogue) if part)
        if not region.reduce or peers is None:
            kernel = self._local(name, local, staged.norm.value if staged else 0.0)
            return (*self.reduce(region), kernel) if region.reduce else (kernel,)
        one_shot = (self._one_shot(name, region, peers, local),)
        if staged is not None:
            if _takes_one_stage(staged.fused, region):
                return one_shot
            # Two launches: the reduced rows reach every rank's buffer, then each rank norms all of them.
            scatter = self._two_shot("reduce_scatter", region, peers, 2 * region.row_bytes, barriers=1)
            return (scatter, self._local(f"load_{name.removeprefix('all_reduce+')}", local))
        return min(one_shot, (self._two_shot(name, region, peers, local),), key=total_ns)

    def timing(self, provider: str) -> Timing:
        """How a provider's kernels are priced: one of which nobody has said it as one kernel."""
        return self.timings.get(provider, ONE_KERNEL)

    def _eager(self, region: Region) -> tuple[Kernel, ...]:
        """The reference: each kernel is priced as if it read and wrote a whole float32 activation."""
        count = EAGER_KERNELS[region.core] + EAGER_KERNELS["residual"] * region.residual
        count += EAGER_KERNELS.get(region.epilogue or "", 0)
        count += EAGER_KERNELS[region.core] if region.rotation is not None else 0
        kernels = tuple(self._local("eager", EAGER_BYTES * region.tokens * region.width) for _ in range(count))
        eager = CostModel(self.hardware, pad="eager")
        before = self.reduce(region) if region.reduce else ()
        return (*before, *kernels, *(eager.epilogue(region) if region.epilogue == "pad" else ()))

    # Kernels.

    def _local(self, name: str, nbytes: float, extra: float = 0.0) -> Kernel:
        return Kernel(
            name=name,
            launch=_up(self.hardware.launch.value + extra),
            memory=_up(self.hardware.memory_ns(nbytes)),
        )

    def _one_shot(self, name: str, region: Region, peers: Peers, local: int) -> Kernel:
        """Every rank reads all rows of every other rank."""
        links = region.ranks - 1 if peers.mesh else 1
        wire = (region.ranks - 1) * region.row_bytes / links / peers.bandwidth.value
        return self._exchange(name, region, peers, local, wire, barriers=1)

    def _two_shot(self, name: str, region: Region, peers: Peers, local: int, barriers: int = 2) -> Kernel:
        """Every rank reduces its share of the rows and hands the result to every other rank."""
        links = region.ranks - 1 if peers.mesh else 1
        share = region.row_bytes / region.ranks
        wire = 2 * (region.ranks - 1) * share / links / peers.bandwidth.value
        return self._exchange(name, region, peers, local, wire, barriers)

    def _exchange(self, name: str, region: Region, peers: Peers, local: int, wire: float, barriers: int) -> Kernel:
        staging = self.hardware.memory_ns(2 * region.row_bytes) if peers.stages else 0.0
        return Kernel(
            name=name,
            launch=_up(self.hardware.launch.value),
            signal=barriers * _up(peers.signal.value),
            staging=_up(staging),
            memory=_up(self.hardware.memory_ns(local)),
            wire=_up(wire),
        )


def _ring(protocol: Protocol, region: Region) -> Kernel:
    steps = 2 * (region.ranks - 1)
    latency = protocol.latency.value + (steps - 2) * protocol.step.value
    wire = steps / region.ranks * region.row_bytes / protocol.bandwidth.value
    return Kernel(name=f"all_reduce ({protocol.name})", launch=_up(latency), wire=_up(wire))


def _takes_one_stage(gate: Gate, region: Region) -> bool:
    return gate.takes_one_stage(tokens=region.tokens, width=region.width, nbytes=region.row_bytes, ranks=region.ranks)


def _up(ns: float) -> int:
    return math.ceil(ns)
