"""Constants of devices that nobody has measured for fuseplan: those of a measured one, times ratios of what vendors
print in their datasheets, or of what torch reports. The source of each says so.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

from fuseplan.planner.costs.devices import B200, H100_COPY, H200, MI300X, NCCL, attention_like
from fuseplan.planner.costs.hardware import Constant, Hardware, Peers, Protocol

ASSUMED: Final = "assumed"
"""How the source of a constant starts that nothing is known of."""

_SMS, _L2_BYTES = 132, 50e6
_COPIED = 3002 / 3350
"""Of the memory's bandwidth on paper, what a copy moves on H100."""
_PCIE = {4: 24.0, 5: 48.0}
"""GB/s of 16 lanes in one direction, by generation, as NCCL counts them."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What a vendor prints of an NVIDIA GPU.

    Attributes:
        name: the profile's.
        source: the document.
        memory: GB/s.
        processors: streaming multiprocessors.
        cache: bytes of L2.
        nvlink: times the bandwidth of H200's links, 18 of NVLink 4; None: it has none.
        pcie: the generation of its PCI Express.
        reaches_peers: whether a kernel can read and write another GPU's memory.
        low_latency: GB/s of NCCL's LL on one node.
    """

    name: str
    source: str
    memory: float
    processors: int
    cache: float
    nvlink: float | None = None
    pcie: int = 4
    reaches_peers: bool = True
    low_latency: float = 141.0


_A100 = "NVIDIA A100 Tensor Core GPU datasheet (June 2021) and architecture whitepaper"
_AMPERE_LINKS = 12 * 20.0 / (18 * 20.6)
_H100 = "NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet"
SHEETS: Final = (
    Sheet(name="a100", source=_A100, memory=2039, processors=108, cache=40e6, nvlink=_AMPERE_LINKS, low_latency=87.7),
    Sheet(name="a100-40gb", source=_A100, memory=1555, processors=108, cache=40e6, nvlink=_AMPERE_LINKS,
          low_latency=87.7),
    Sheet(name="a100-pcie", source=_A100, memory=1935, processors=108, cache=40e6, low_latency=87.7),
    Sheet(name="a100-pcie-40gb", source=_A100, memory=1555, processors=108, cache=40e6, low_latency=87.7),
    Sheet(name="l40s", source="NVIDIA L40S datasheet and NVIDIA Ada GPU Architecture whitepaper", memory=864,
          processors=142, cache=96e6, low_latency=87.7),
    Sheet(name="rtx4090", source="NVIDIA Ada GPU Architecture whitepaper, GeForce RTX 4090", memory=1008,
          processors=128, cache=72e6, reaches_peers=False, low_latency=87.7),
    Sheet(name="h100-pcie", source=_H100, memory=2000, processors=114, cache=50e6, pcie=5),
    Sheet(name="h100-nvl", source="NVIDIA H100 NVL datasheet", memory=3900, processors=132, cache=50e6, pcie=5),
    Sheet(name="h20-96gb", source="NVIDIA H20 datasheet", memory=4000, processors=78, cache=60e6, nvlink=1.0),
    Sheet(name="gh200", source=_GH200, memory=4000, processors=132, cache=50e6, nvlink=1.0),
    Sheet(name="gh200-144gb", source=_GH200, memory=4900, processors=132, cache=50e6, nvlink=1.0),
)  # fmt: skip


def _of(sheet: Sheet) -> Hardware:
    unmeasured = f"{sheet.source}; not measured on {sheet.name}"

    def like(constant: Constant) -> Constant:
        return replace(constant, source=f"H200's, not measured on {sheet.name}")

    def scaled(constant: Constant, factor: float, why: str) -> Constant:
        value = round(constant.value * factor, 1)
        return replace(constant, value=value, source=f"H200's times {factor:.3g}: {why}; {unmeasured}")

    share = sheet.processors / _SMS
    processors = f"SMs, {sheet.processors} over {_SMS}"
    lanes = _PCIE[sheet.pcie]
    over_pcie = f"PCI Express {sheet.pcie}.0, 16 lanes, {lanes:g} GB/s (NCCL 2.30, src/graph/topo.h)"

    def links(constant: Constant) -> Constant:
        if sheet.nvlink is not None:
            return scaled(constant, sheet.nvlink, "NVLinks")
        return replace(constant, value=lanes, source=f"{over_pcie}; {unmeasured}")

    def peers(of: Peers | None) -> Peers | None:
        reached = of is not None and sheet.reaches_peers
        return replace(of, signal=like(of.signal), bandwidth=links(of.bandwidth)) if reached and of else None

    low, simple = H200.ring
    slowest = sheet.low_latency if sheet.nvlink is not None else min(lanes / 2, sheet.low_latency)
    steps = (low.step, simple.step)
    if sheet.nvlink is None:
        steps = tuple(
            Constant(ns, "ns", f"{NCCL}: hwLatencies, PCI, ring, {protocol}")
            for ns, protocol in ((1000, "LL"), (5700, "Simple"))
        )  # type: ignore[assignment]
    return Hardware(
        name=sheet.name,
        launch=like(H200.launch),
        generated_norm=like(H200.generated_norm),
        cache=scaled(H200.cache, sheet.cache / _L2_BYTES, f"L2 of {sheet.cache / 1e6:g} MB over 50 MB"),
        cache_bandwidth=scaled(H200.cache_bandwidth, share, processors),
        memory_bandwidth=Constant(
            round(sheet.memory * _COPIED, 1), "GB/s",
            f"datasheet, {sheet.memory:g} GB/s, times 3002 / 3350 ({H100_COPY}); {unmeasured}",
        ),
        strided_copy=scaled(H200.strided_copy, share, processors),
        attention=attention_like(like),
        ring=(
            Protocol(name="LL", latency=like(low.latency), step=steps[0], bandwidth=Constant(
                slowest, "GB/s", f"llMaxBws of {NCCL}, or half of the lanes where that is less; {unmeasured}")),
            Protocol(name="Simple", latency=like(simple.latency), step=steps[1], bandwidth=links(simple.bandwidth)),
        ),
        triton=peers(H200.triton),
        flashinfer=peers(H200.flashinfer),
    )  # fmt: skip


def _renamed(hardware: Hardware, name: str, source: str, memory: float | None = None) -> Hardware:
    """Another device's constants, each with its source, and a memory bandwidth of one's own."""

    def like(value: Any) -> Any:
        if isinstance(value, Constant):
            return replace(value, source=f"{hardware.name.upper()}'s, not measured on {name}: {value.source}")
        if isinstance(value, Peers):
            return replace(value, signal=like(value.signal), bandwidth=like(value.bandwidth))
        if isinstance(value, Protocol):
            return replace(value, latency=like(value.latency), step=like(value.step), bandwidth=like(value.bandwidth))
        return value

    aiter = hardware.aiter
    made = replace(
        hardware, name=name,
        **{part: like(getattr(hardware, part)) for part in (*PLAIN, "triton", "flashinfer")},
        ring=tuple(map(like, hardware.ring)),
        aiter=replace(aiter, peers=like(aiter.peers), norm=like(aiter.norm)) if aiter is not None else None,
    )  # fmt: skip
    if memory is None:
        return made
    paper = f"datasheet, {memory:g} GB/s, times 3002 / 3350 ({H100_COPY}): {source}; not measured on {name}"
    return replace(made, memory_bandwidth=Constant(round(memory * _COPIED, 1), "GB/s", paper))


PLAIN: Final = ("launch", "generated_norm", "cache", "cache_bandwidth", "memory_bandwidth", "strided_copy")
"""The constants that every device has, its links and libraries aside."""

DERIVED: Final = (
    *map(_of, SHEETS),
    _renamed(B200, "b300", "NVIDIA DGX B300 datasheet: 8 TB/s and NVLink 5, as B200", 8000),
    _renamed(MI300X, "mi325x", "AMD Instinct MI325X datasheet: CDNA 3 with 304 CUs and 256 MB of Infinity Cache, as "
             "MI300X", 6000),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What torch reports of a device.

    Attributes:
        processors: streaming multiprocessors or compute units; 0: it doesn't say.
        cache: bytes of L2; 0: likewise.
        clock_khz: of the memory; 0: likewise.
        bus_bits: of the memory; 0: likewise.
    """

    processors: int = 0
    cache: int = 0
    clock_khz: int = 0
    bus_bits: int = 0


def unknown_hardware(name: str, vendor: str, facts: Facts) -> Hardware:
    """Constants of a device that has no profile, by what torch reports of it; what that doesn't tell is assumed.

    Args:
        name: of the device.
        vendor: `nvidia` or `amd`.
        facts: what torch reports.
    """
    base = MI300X if vendor == "amd" else H200
    whose, processors = base.name.upper(), 304 if vendor == "amd" else _SMS

    def like(value: Constant) -> Constant:
        return replace(value, source=f"{ASSUMED}: {whose}'s, since {name} has no profile")

    def scaled(value: Constant, factor: float, why: str) -> Constant:
        return replace(value, value=round(value.value * factor, 1), source=f"{whose}'s times {factor:.3g}: {why}")

    def peers(of: Peers | None) -> Peers | None:
        return replace(of, signal=like(of.signal), bandwidth=like(of.bandwidth)) if of is not None else None

    made = {part: like(getattr(base, part)) for part in PLAIN}
    if facts.processors:
        for part in ("cache_bandwidth", "strided_copy"):
            why = f"torch reports {facts.processors} processors, {whose} has {processors}"
            made[part] = scaled(getattr(base, part), facts.processors / processors, why)
    if facts.cache and vendor == "nvidia":
        why = f"torch reports {facts.cache / 1e6:.3g} MB of L2, {whose} has 50"
        made["cache"] = scaled(base.cache, facts.cache / _L2_BYTES, why)
    if facts.clock_khz and facts.bus_bits:
        paper = 2 * facts.clock_khz * 1e3 * facts.bus_bits / 8 / 1e9
        why = f"torch reports {facts.bus_bits} bits at {facts.clock_khz / 1000:.0f} MHz, {paper:.0f} GB/s on paper"
        made["memory_bandwidth"] = Constant(round(paper * _COPIED, 1), "GB/s", f"{why}, times 3002 / 3350 as on H100")
    ring = tuple(replace(p, latency=like(p.latency), step=like(p.step), bandwidth=like(p.bandwidth)) for p in base.ring)
    aiter = base.aiter
    if aiter is not None:
        aiter = replace(aiter, peers=peers(aiter.peers) or aiter.peers, norm=like(aiter.norm))
    return Hardware(
        name=name,
        attention=attention_like(like),
        ring=ring,
        triton=peers(base.triton),
        flashinfer=peers(base.flashinfer),
        aiter=aiter,
        **made,
    )
