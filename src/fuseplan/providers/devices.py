"""Device profiles: the accelerators that fuseplan has constants for, and which of them is here."""

import re
from dataclasses import dataclass
from typing import Literal

import torch

from fuseplan.config import unknown

Vendor = Literal["nvidia", "amd", "cpu"]


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        name: `h200`.
        vendor: whose software stack it needs.
        description: for a person.
        reported: torch's names of it, each as a regular expression for the whole of one.
        processors: multiprocessors or compute units of a whole one; 0: any number. A part of one, such as a MIG slice
            or a partition, is another device.
    """

    name: str
    vendor: Vendor
    description: str
    reported: tuple[str, ...] = ()
    processors: int = 0


def _nvidia(name: str, description: str, processors: int, *reported: str) -> DeviceProfile:
    names = tuple(f"(NVIDIA )?{text}" for text in reported)
    return DeviceProfile(
        name=name, vendor="nvidia", description=f"NVIDIA {description}", reported=names, processors=processors
    )


def _amd(name: str, description: str, processors: int, *reported: str) -> DeviceProfile:
    return DeviceProfile(
        name=name, vendor="amd", description=f"AMD Instinct {description}", reported=reported, processors=processors
    )


PROFILES = {
    profile.name: profile
    for profile in (
        _nvidia("a100", "A100 SXM, 80 GB", 108, "A100-SXM4-80GB"),
        _nvidia("a100-40gb", "A100 SXM, 40 GB", 108, "A100-SXM4-40GB"),
        _nvidia("a100-pcie", "A100 PCIe, 80 GB", 108, "A100 80GB PCIe"),
        _nvidia("a100-pcie-40gb", "A100 PCIe, 40 GB", 108, "A100-PCIE-40GB"),
        _nvidia("l40s", "L40S", 142, "L40S"),
        _nvidia("rtx4090", "GeForce RTX 4090", 128, "GeForce RTX 4090"),
        _nvidia("h20-96gb", "H20, 96 GB", 78, "H20"),
        _nvidia("h100", "H100 SXM", 132, "H100 80GB HBM3"),
        _nvidia("h100-pcie", "H100 PCIe", 114, "H100 PCIe"),
        _nvidia("h100-nvl", "H100 NVL", 132, "H100 NVL"),
        _nvidia("h200", "H200 SXM", 132, "H200"),
        _nvidia("gh200", "GH200, 96 GB", 132, "GH200 480GB"),
        _nvidia("gh200-144gb", "GH200, 144 GB", 132, "GH200 144G HBM3e"),
        _nvidia("b200", "B200", 148, "B200"),
        _nvidia("b300", "B300 SXM", 148, "B300 SXM6 AC"),
        _amd("mi300x", "MI300X", 304, r"AMD Instinct MI300X( OAM| VF)?"),
        _amd("mi325x", "MI325X", 304, r"AMD Instinct MI325X( OAM| VF)?"),
        _amd("mi355x", "MI355X", 256, r"AMD Instinct MI355X( OAM| VF)?"),
        DeviceProfile(name="cpu", vendor="cpu", description="any CPU that torch runs on"),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """The profile of that name, or of this machine's device where it is called so.

    Raises:
        ConfigError: there is none; the text names the near spelling.
    """
    if name not in PROFILES:
        here = local_profile()
        if here.name == name:
            return here
        raise unknown("device", name, {**PROFILES, here.name: here})
    return PROFILES[name]


def local_profile() -> DeviceProfile:
    """The profile of this machine's accelerator, the current one of several; one that nobody knows has its own name."""
    vendor = local_vendor()
    if vendor == "cpu":
        return PROFILES["cpu"]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return profile_of(properties.name, vendor, int(getattr(properties, "multi_processor_count", 0)))


def profile_of(reported: str, vendor: Vendor, processors: int = 0) -> DeviceProfile:
    """The profile of a device.

    Args:
        reported: torch's name of it.
        vendor: whose it is.
        processors: how many multiprocessors or compute units torch reports; 0: it doesn't say.
    """
    for profile in PROFILES.values():
        is_whole = processors in (0, profile.processors)
        if profile.vendor == vendor and is_whole and any(re.fullmatch(text, reported) for text in profile.reported):
            return profile
    name = re.sub(r"[^a-z0-9.]+", "-", reported.lower()).strip("-.") or "gpu"
    name = name if name.startswith(f"{vendor}-") else f"{vendor}-{name}"
    if any(re.fullmatch(text, reported) for profile in PROFILES.values() for text in profile.reported):
        name, reported = f"{name}-{processors}", f"{processors} processors of {reported}"
    return DeviceProfile(
        name=name[:80], vendor=vendor, description=f"{reported}, which has no profile", processors=processors
    )


def local_vendor() -> Vendor:
    """Whose accelerator torch sees on this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    return "amd" if torch.version.hip else "nvidia"
