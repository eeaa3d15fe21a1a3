"""The constants of a device: its profile's, or those that torch reports, with the ones measured here."""

from typing import Any

import torch

from fuseplan.devices import ASSUMED, DeviceProfile, Facts, Hardware, unknown_hardware
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs.record import cached_record


def hardware_of(profile: DeviceProfile, *, here: bool, multicast: bool = True) -> Hardware:
    """The constants of a device.

    Args:
        profile: its record.
        here: whether it is this machine's, so that measurements made here count.
        multicast: whether this machine lets NVLink's switches add, if they can.
    """
    hardware = profile.hardware or unknown_hardware(profile.name, profile.vendor, _facts() if here else Facts())
    record = cached_record(profile.name) if here else None
    hardware = record.applied(hardware) if record is not None else hardware
    return hardware if not here or (multicast and _has_multicast()) else without_multicast(hardware)


def assumptions(hardware: Hardware) -> list[str]:
    """The constants that are unknown."""
    return [name for name, constant in hardware.constants() if constant.source.startswith(ASSUMED)]


def _has_multicast() -> bool:
    """Whether the switches between this machine's GPUs can add."""
    if not torch.cuda.is_available():
        return False
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory  # a build without torch.distributed has none

    return bool(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, torch.cuda.current_device()))


def _facts() -> Facts:
    if not torch.cuda.is_available():
        return Facts()
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    names = ("multi_processor_count", "L2_cache_size", "memory_clock_rate", "memory_bus_width")
    processors, cache, clock, bus = (int(getattr(properties, name, 0) or 0) for name in names)
    return Facts(processors=processors, cache=cache, clock_khz=clock, bus_bits=bus)
