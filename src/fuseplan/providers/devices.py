"""Device profiles: the accelerators whose providers fuseplan knows."""

from dataclasses import dataclass
from typing import Literal

import torch

from fuseplan.config import unknown


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        name: `h200`.
        vendor: whose software stack it needs.
        description: for a person.
    """

    name: str
    vendor: Literal["nvidia", "amd", "cpu"]
    description: str


PROFILES = {
    profile.name: profile
    for profile in (
        DeviceProfile(name="h100", vendor="nvidia", description="NVIDIA H100 SXM"),
        DeviceProfile(name="h200", vendor="nvidia", description="NVIDIA H200 SXM"),
        DeviceProfile(name="b200", vendor="nvidia", description="NVIDIA B200"),
        DeviceProfile(name="mi300x", vendor="amd", description="AMD Instinct MI300X"),
        DeviceProfile(name="mi355x", vendor="amd", description="AMD Instinct MI355X"),
        DeviceProfile(name="cpu", vendor="cpu", description="any CPU that torch runs on"),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """The profile of that name.

    Raises:
        ConfigError: there is none; the text names the near spelling.
    """
    if name not in PROFILES:
        raise unknown("device", name, PROFILES)
    return PROFILES[name]


def local_profile() -> DeviceProfile:
    """The profile of this machine's accelerator; of an unknown one that of the vendor's that is nearest in age."""
    vendor = local_vendor()
    if vendor == "cpu":
        return PROFILES["cpu"]
    name = torch.cuda.get_device_name(0).lower()
    known = [profile for profile in PROFILES.values() if profile.vendor == vendor and profile.name in name]
    return known[0] if known else PROFILES["mi300x" if vendor == "amd" else "h100"]


def local_vendor() -> Literal["nvidia", "amd", "cpu"]:
    """Whose accelerator torch sees on this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    return "amd" if torch.version.hip else "nvidia"
