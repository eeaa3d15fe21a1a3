"""How constants are written down, and how those of an unmeasured device are derived from another one's."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

from fuseplan.devices.hardware import Attention, Constant, Hardware, Linear, Peers, Protocol, Shots

H100_COPY: Final = "benchmarks/data/h100-add-rms-pad.json, H100, 2026-11-22: copies at 3002 GB/s"
COPIED: Final = 3002 / 3350
"""The share of the memory's bandwidth on paper that a copy reaches on H100."""
PLAIN: Final = ("launch", "generated_norm", "cache", "cache_bandwidth", "memory_bandwidth", "strided_copy")
"""The constants that every device has, its links and libraries aside."""

Like = Callable[[Constant], Constant]
T = TypeVar("T", Attention, Linear, Peers, Protocol, Shots)


def ns(value: float, source: str) -> Constant:
    """Nanoseconds."""
    return Constant(value, "ns", source)


def rate(value: float, source: str) -> Constant:
    """A bandwidth, in GB/s."""
    return Constant(value, "GB/s", source)


def ratio(value: float, source: str) -> Constant:
    """How many times as long."""
    return Constant(value, "times", source)


def size(value: float, source: str) -> Constant:
    """Bytes."""
    return Constant(value, "bytes", source)


def operations(value: float, source: str) -> Constant:
    """Multiplications and additions, in GFLOP/s."""
    return Constant(value, "GFLOP/s", source)


def like(whose: str, why: str) -> Like:
    """Another device's constant, unchanged; its source says whose, and why."""
    return lambda constant: replace(constant, source=f"{whose}'s, {why}")


def scaled(whose: str, constant: Constant, factor: float, why: str) -> Constant:
    """Another device's constant times a ratio."""
    digits = 3 if constant.unit == "times" else 1
    return replace(
        constant, value=round(constant.value * factor, digits), source=f"{whose}'s times {factor:.3g}: {why}"
    )


def derived(base: T, change: Like, **others: Like | None) -> T:
    """A record of constants on another device.

    Args:
        base: the other device's.
        change: applied to its constants.
        others: applied to some of them instead, by name; None: `change`.
    """
    constants = ((each.name, getattr(base, each.name)) for each in fields(base))
    changed: dict[str, Any] = {
        name: (others.get(name) or change)(each) for name, each in constants if isinstance(each, Constant)
    }
    return replace(base, **changed)


def renamed(hardware: Hardware, name: str, source: str, memory: float) -> Hardware:
    """Another device's constants, each with its source, and a memory bandwidth of its own.

    Args:
        hardware: the other device's.
        name: of this one.
        source: the document that says what the two share.
        memory: GB/s on paper.
    """

    def same(constant: Constant) -> Constant:
        return replace(constant, source=f"{hardware.name.upper()}'s, not measured on {name}: {constant.source}")

    paper = f"datasheet, {memory:g} GB/s, times 3002 / 3350 ({H100_COPY}): {source}; not measured on {name}"
    own: dict[str, Any] = {part: same(getattr(hardware, part)) for part in PLAIN}
    own["memory_bandwidth"] = rate(round(memory * COPIED, 1), paper)
    return replace(hardware, name=name, **own, **exchanges(hardware, same))


def exchanges(base: Hardware, change: Like) -> dict[str, Any]:
    """The constants of exchanges between ranks on another device, by field."""
    aiter = base.aiter
    return {
        "library": tuple(derived(each, change) for each in base.library),
        "shots": tuple(derived(each, change) for each in base.shots),
        "triton": base.triton and derived(base.triton, change),
        "flashinfer": base.flashinfer and derived(base.flashinfer, change),
        "aiter": aiter and replace(aiter, peers=derived(aiter.peers, change), norm=change(aiter.norm)),
    }
