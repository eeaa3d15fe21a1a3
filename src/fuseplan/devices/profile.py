"""One kind of device, in one record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fuseplan.devices.hardware import Hardware, Vendor

VENDOR_NAMES: Final[Mapping[str, str]] = {"nvidia": "NVIDIA GPUs", "amd": "AMD GPUs", "cpu": "CPUs"}
"""Vendors' devices, for a person."""


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        name: `h200`.
        vendor: the vendor, whose software stack it needs.
        description: for a person.
        reported: torch's names of it, each as a regular expression for the whole of one.
        processors: multiprocessors or compute units of a whole one; 0: any number. A part of one, such as a MIG slice
            or a partition, is another device.
        hardware: the constants of its cost model, each with its source; None for an unknown device, which is priced by
            properties that torch reports.
    """

    name: str
    vendor: Vendor
    description: str
    reported: tuple[str, ...] = ()
    processors: int = 0
    hardware: Hardware | None = None
