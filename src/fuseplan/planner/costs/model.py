"""Costs of a fused op and the ops it replaces on a device: a roofline, and alpha-beta for messages between ranks.

    kernel = launch + signal + staging + memory + wire

`memory` are the bytes read and written over the bandwidth of cache or memory, `wire` those that cross links over the
links' bandwidth; both overlap. `signal` is waiting for other ranks, and `staging` the copies before it. A region takes
as long as its kernels one after the other, as they run inside a CUDA graph.

How Inductor compiles ops that are not fused:

- An all-reduce is a kernel: the communication library's, by the fastest of its algorithms, or where the graph has an
  engine's op or one of torch's over symmetric memory, the kernel that this op runs at the size. Its name says which.
- Residual add and norm are one row reduction, SiLU-and-mul is one pointwise kernel.
- fp8 quantisation joins the kernel before it: static is pointwise, and the row maximum of dynamic is a reduction over
  the rows that this kernel holds already. After an opaque fused op it is a kernel of its own.
- Normed and rotated queries are one kernel and keys another, the fewest that it can be: two reductions of other sizes.
- Keys that are written into a static cache are written by the kernel that rotates them, and values by one of their own.
- A pad is a kernel of its own: it iterates over another width than the norm. In eager mode it is two, `fill_` of the
  whole output and `copy_` into a part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

from fuseplan.devices.hardware import FUSED, GENERATED, Aiter, Hardware, OneStageLimits, Peers, Protocol, Shots
from fuseplan.providers import BUILT_IN_PROVIDERS, ONE_KERNEL, Timing
from fuseplan.rules.parts.traffic import Kernel, Region, total_ns

PadLowering: TypeAlias = Literal["inductor", "eager"]

EAGER_BYTES = 8
"""A kernel of an eager reference reads and writes float32."""

REDUCED = "all_reduce ("
"""The prefix of an unfused all-reduce's name; its library or engine and its algorithm follow."""

BUILT_IN_TIMINGS: Mapping[str, Timing] = {each.name: each.timing for each in BUILT_IN_PROVIDERS if each.timing}
"""By the provider's name."""


class CostModel:
    """Prices regions on one device.

    A site of a graph has parts: all-reduce, core, epilogue. A fusion takes some of them; the rest runs unfused.
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

    # Unfused ops.

    def unfused(self, region: Region) -> tuple[Kernel, ...]:
        """All of a region's parts as Inductor leaves them."""
        before = self.reduce(region) if region.reduce else ()
        rest = region.without_reduce()
        if region.tail is not None and region.tail.stays_apart(region.core):
            return (*before, *self.core(rest.without_tail()), *self.epilogue(rest))
        return (*before, *self.core(rest))

    def reduce(self, region: Region) -> tuple[Kernel, ...]:
        """The all-reduce alone."""
        if (aiter := self.hardware.aiter) is not None:
            local = 2 * region.row_bytes
            if _takes_one_stage(aiter.plain, region):
                return (self._one_shot(f"{REDUCED}AITER one-stage)", region, aiter.peers, local, "reduce"),)
            return (self._two_shot(f"{REDUCED}AITER two-stage)", region, aiter.peers, local, "reduce"),)
        shots = self._shots(region)
        if shots is not None:
            return self.shot(shots, region)
        served = [each for each in self.hardware.library if each.serves(region.ranks)]
        return (min((_by_library(each, region) for each in served), key=lambda kernel: kernel.ns),)

    def _shots(self, region: Region) -> Shots | None:
        """The kernel that the engine or the op in the graph calls; None: the library's."""
        dispatch, name = self.hardware.engines.get(region.reducer), region.reducer
        if dispatch is not None:
            takes = (each.kernel for each in dispatch.choices if each.takes(region.row_bytes, region.ranks))
            name = next(takes, "")
        return next((each for each in self.hardware.shots if each.name == name), None)

    def shot(self, shots: Shots, region: Region) -> tuple[Kernel, ...]:
        """The all-reduce alone, by a kernel in the memory of the ranks, with the copies before and after it."""
        latency, wire = shots.latency_ns(region.ranks), shots.wire_ns(region.row_bytes, region.ranks)
        kernel = Kernel(name=f"{REDUCED}{shots.name})", launch=_up(latency), wire=_up(wire), kind="reduce")
        copies = [self.copy(region.row_bytes) for _ in range(shots.copies)]
        return (*copies[:1], kernel, *copies[1:])

    def core(self, region: Region) -> tuple[Kernel, ...]:
        """The kernels that Inductor makes of the core and of an epilogue after it; all-reduces don't count."""
        rest = region.without_reduce()
        if rest.tail is not None:
            return _doing(rest.tail.joined(self, rest), rest)
        nbytes = rest.read_bytes + rest.written_bytes
        return (self.local(rest.core.name, nbytes, reduces_rows=rest.core.reduces_rows),)

    def epilogue(self, region: Region) -> tuple[Kernel, ...]:
        """The epilogue alone, behind an op that Inductor can't see into."""
        assert region.tail is not None
        return _doing(region.tail.alone(self, region), region)

    def copy(self, nbytes: int) -> Kernel:
        """A copy of a value of so many bytes, in a kernel of its own that reads and writes it."""
        return self.local("copy", 2 * nbytes)

    # Fused ops.

    def fused(self, region: Region, provider: str) -> tuple[Kernel, ...]:
        """One fused op for all parts of a region, by `provider`.

        It is priced as its timing says. A provider without one is taken to be one kernel, which is no more than an
        assumption: the model knows the price of one kernel, but not whether a user's op is one.
        """
        timing = self.timing(provider)
        if timing.eager:
            return self._eager(region)
        exchange = self.hardware.exchange(timing.exchange)
        staged = exchange if isinstance(exchange, Aiter) else None
        peers = exchange.peers if isinstance(exchange, Aiter) else exchange or self.hardware.triton
        local = round(timing.times * (region.read_bytes + region.written_bytes))
        name = region.name
        if not region.reduce or peers is None:
            kernels = (self._kernel(name, local, staged.norm.value if staged else 0.0, FUSED),)
            return (*(self.reduce(region) if region.reduce else ()), *_doing(kernels, region))
        kind = timing.exchange if exchange else Timing.exchange
        one_shot = (self._one_shot(name, region, peers, local, kind),)
        if staged is not None:
            if _takes_one_stage(staged.fused, region):
                return one_shot
            # Two launches: the reduced rows reach every rank's buffer, then each rank norms all of them.
            scatter = self._two_shot("reduce_scatter", region, peers, 2 * region.row_bytes, kind, barriers=1)
            return (scatter, self._kernel(f"load_{name.removeprefix('all_reduce+')}", local, kind=FUSED))
        return min(one_shot, (self._two_shot(name, region, peers, local, kind),), key=total_ns)

    def timing(self, provider: str) -> Timing:
        """How a provider's kernels are priced: without a declaration as one kernel."""
        return self.timings.get(provider, ONE_KERNEL)

    def _eager(self, region: Region) -> tuple[Kernel, ...]:
        """The reference: each kernel is priced as if it read and wrote a whole float32 activation."""
        count = region.core.eager_kernels + region.core.residual_kernels * region.residual
        count += region.tail.eager_count(region.core) if region.tail else 0
        kernels = (self._kernel("eager", EAGER_BYTES * region.tokens * region.width, kind="eager"),) * count
        eager = CostModel(self.hardware, pad="eager")
        before = self.reduce(region) if region.reduce else ()
        return (*before, *kernels, *(region.tail.eager(eager, region) if region.tail else ()))

    # Kernels.

    @property
    def is_eager(self) -> bool:
        """Whether a pad that isn't fused is run by eager PyTorch."""
        return self.pad == "eager"

    def local(self, name: str, nbytes: float, *, reduces_rows: bool = False) -> Kernel:
        """A kernel that reads and writes so many bytes; of reductions over rows, as Inductor generates it."""
        return self._kernel(name, nbytes, self.hardware.generated_norm.value if reduces_rows else 0.0)

    def strided_copy(self, nbytes: float) -> Kernel:
        """A copy of so many bytes into a part of a larger tensor, in eager PyTorch."""
        copied = self.hardware.memory_ns(nbytes) + nbytes / self.hardware.strided_copy.value
        return Kernel(name="copy_", launch=_up(self.hardware.launch.value), memory=_up(copied))

    def _kernel(self, name: str, nbytes: float, extra: float = 0.0, kind: str = GENERATED) -> Kernel:
        return Kernel(
            name=name,
            launch=_up(self.hardware.launch.value + extra),
            memory=_up(self.hardware.memory_ns(nbytes)),
            kind=kind,
        )

    def _one_shot(self, name: str, region: Region, peers: Peers, local: int, kind: str) -> Kernel:
        """Every rank reads all rows of every other rank."""
        links = region.ranks - 1 if peers.mesh else 1
        wire = (region.ranks - 1) * region.row_bytes / links / peers.bandwidth.value
        sent = peers.buffered * region.ranks * region.row_bytes
        return self._exchange(name, region, peers, local + sent, wire, kind, barriers=1)

    def _two_shot(self, name: str, region: Region, peers: Peers, local: int, kind: str, barriers: int = 2) -> Kernel:
        """Every rank reduces its share of the rows and hands the result to every other rank."""
        links = region.ranks - 1 if peers.mesh else 1
        share = region.row_bytes / region.ranks
        wire = 2 * (region.ranks - 1) * share / links / peers.bandwidth.value
        sent = peers.buffered * 2 * region.row_bytes
        return self._exchange(name, region, peers, local + sent, wire, kind, barriers)

    def _exchange(
        self, name: str, region: Region, peers: Peers, local: int, wire: float, kind: str, barriers: int
    ) -> Kernel:  # fmt: skip
        staging = self.hardware.memory_ns(2 * region.row_bytes) if peers.stages else 0.0
        signal = peers.signal.value + (barriers - 1) * peers.second.value
        return Kernel(
            name=name,
            launch=_up(self.hardware.launch.value),
            signal=_up(signal + math.log2(region.ranks / 2) * peers.step.value),
            staging=_up(staging),
            memory=_up(self.hardware.memory_ns(local)),
            wire=_up(wire),
            kind=kind,
        )


def _doing(kernels: tuple[Kernel, ...], region: Region) -> tuple[Kernel, ...]:
    """Kernels of the kind that the region's epilogue makes them."""
    kind = region.tail.kind if region.tail is not None else ""
    return tuple(replace(each, kind=f"{each.kind} {kind}") for each in kernels) if kind else kernels


def _by_library(protocol: Protocol, region: Region) -> Kernel:
    latency, wire = protocol.latency_ns(region.ranks), protocol.wire_ns(region.row_bytes, region.ranks)
    return Kernel(name=f"{REDUCED}{protocol.name})", launch=_up(latency), wire=_up(wire), kind="reduce")


def _takes_one_stage(gate: OneStageLimits, region: Region) -> bool:
    return gate.takes_one_stage(tokens=region.tokens, width=region.width, nbytes=region.row_bytes, ranks=region.ranks)


def _up(ns: float) -> int:
    return math.ceil(ns)
