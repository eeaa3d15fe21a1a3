"""Constants of a device that has no profile: a measured one's, times ratios of properties that torch reports."""

from dataclasses import dataclass, replace
from typing import Any, Final

from fuseplan.devices.derivation import COPIED, PLAIN, derived, exchanges, rate, scaled
from fuseplan.devices.errors import UNMEASURED_ERRORS
from fuseplan.devices.hardware import Constant, Hardware, Vendor
from fuseplan.devices.known import PROFILES
from fuseplan.devices.nvidia import L2_BYTES

ASSUMED: Final = "assumed"
"""The prefix of an unknown constant's source."""
BASES: Final = {"amd": "mi300x", "nvidia": "h200"}
"""By vendor, the device whose constants are taken."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Properties of a device that torch reports.

    Attributes:
        processors: streaming multiprocessors or compute units; 0: unknown.
        cache: bytes of L2; 0: unknown.
        clock_khz: of the memory; 0: unknown.
        bus_bits: of the memory; 0: unknown.
    """

    processors: int = 0
    cache: int = 0
    clock_khz: int = 0
    bus_bits: int = 0


def unknown_hardware(name: str, vendor: Vendor, facts: Facts) -> Hardware:
    """Constants of a device that has no profile, by properties that torch reports; missing ones are assumed.

    Args:
        name: of the device.
        vendor: `nvidia` or `amd`.
        facts: torch's report.
    """
    known = PROFILES[BASES[vendor]]
    base = known.hardware
    assert base is not None
    whose = base.name.upper()

    def same(constant: Constant) -> Constant:
        return replace(constant, source=f"{ASSUMED}: {whose}'s, since {name} has no profile")

    made: dict[str, Any] = {part: same(getattr(base, part)) for part in PLAIN}
    if facts.processors:
        for part in ("cache_bandwidth", "strided_copy"):
            why = f"torch reports {facts.processors} processors, {whose} has {known.processors}"
            made[part] = scaled(whose, getattr(base, part), facts.processors / known.processors, why)
    if facts.cache and vendor == "nvidia":
        why = f"torch reports {facts.cache / 1e6:.3g} MB of L2, {whose} has {L2_BYTES / 1e6:g}"
        made["cache"] = scaled(whose, base.cache, facts.cache / L2_BYTES, why)
    if facts.clock_khz and facts.bus_bits:
        paper = 2 * facts.clock_khz * 1e3 * facts.bus_bits / 8 / 1e9
        why = f"torch reports {facts.bus_bits} bits at {facts.clock_khz / 1000:.0f} MHz, {paper:.0f} GB/s on paper"
        made["memory_bandwidth"] = rate(round(paper * COPIED, 1), f"{why}, times 3002 / 3350 as on H100")
    return replace(
        base,
        name=name,
        errors=UNMEASURED_ERRORS,
        attention=derived(base.attention, same),
        linear=derived(base.linear, same),
        **made,
        **exchanges(base, same),
    )
