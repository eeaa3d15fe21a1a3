"""Every device that has a profile, and the profile of this machine's."""

import re
from collections.abc import Mapping
from typing import Final

import torch

from fuseplan.config import unknown
from fuseplan.devices import amd, cpu, nvidia
from fuseplan.devices.hardware import Hardware, Vendor
from fuseplan.devices.profile import DeviceProfile
from fuseplan.errors import ConfigError

PROFILES: Final = {profile.name: profile for profile in (*nvidia.DEVICES, *amd.DEVICES, *cpu.DEVICES)}
HARDWARE: Final[Mapping[str, Hardware]] = {
    name: profile.hardware for name, profile in PROFILES.items() if profile.hardware is not None
}
"""The constants of each."""


def device_profile(name: str) -> DeviceProfile:
    """The profile of that name, or of this machine's device if that is its name.

    Raises:
        ConfigError: there is none; the text names the near spelling.
    """
    if name not in PROFILES:
        here = local_profile()
        if here.name == name:
            return here
        raise unknown("device", name, {**PROFILES, here.name: here})
    return PROFILES[name]


def default_profile() -> DeviceProfile:
    """The profile of this machine's GPU where there is one, else of an H200."""
    here = local_profile()
    return PROFILES["h200"] if here.vendor == "cpu" else here


def asked_profile(device: DeviceProfile | str | None) -> DeviceProfile | None:
    """The profile for a profile, a name or None; None: this machine, with its available providers.

    Raises:
        ConfigError: as for `device_profile`, or it is none of these.
    """
    if not isinstance(device, DeviceProfile | str | None):
        raise ConfigError(f"device={device!r}: allowed are None, names of devices and profiles")
    if local_vendor() == "cpu" and device in (None, "cpu"):
        return default_profile() if device is None else None
    return device_profile(device) if isinstance(device, str) else device


def local_profile() -> DeviceProfile:
    """The profile of this machine's accelerator, the current one of several; an unknown one has its own name."""
    vendor = local_vendor()
    if vendor == "cpu":
        return PROFILES["cpu"]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return profile_of(properties.name, vendor, int(getattr(properties, "multi_processor_count", 0)))


def profile_of(reported: str, vendor: Vendor, processors: int = 0) -> DeviceProfile:
    """The profile of a device.

    Args:
        reported: torch's name of it.
        vendor: its vendor.
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
    """The vendor of the accelerator that torch sees on this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    return "amd" if torch.version.hip else "nvidia"
