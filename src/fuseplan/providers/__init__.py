"""Implementations of fused ops: when each is available, what it accepts."""

from fuseplan.devices import PROFILES, DeviceProfile, device_profile, local_profile, local_vendor
from fuseplan.providers.declared import Cost, KernelCost
from fuseplan.providers.gates import Offer
from fuseplan.providers.registry import BUILT_IN_PROVIDERS, Provider, provider_of, without_shared_memory

__all__ = [
    "BUILT_IN_PROVIDERS",
    "PROFILES",
    "Cost",
    "DeviceProfile",
    "KernelCost",
    "Offer",
    "Provider",
    "device_profile",
    "local_profile",
    "local_vendor",
    "provider_of",
    "without_shared_memory",
]
