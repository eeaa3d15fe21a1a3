"""Implementations of fused ops, with their availability and the arguments they accept."""

from fuseplan.devices import PROFILES, DeviceProfile, device_profile, local_profile, local_vendor
from fuseplan.providers.declared import Cost, KernelCost
from fuseplan.providers.gates import Offer
from fuseplan.providers.provider import Needs, Provider, provider_of, without_shared_memory
from fuseplan.providers.reference import PROVIDER as REFERENCE
from fuseplan.providers.registry import BUILT_IN_PROVIDERS, ENGINE_PROVIDERS
from fuseplan.providers.timing import ONE_KERNEL, Timing

__all__ = [
    "BUILT_IN_PROVIDERS",
    "ENGINE_PROVIDERS",
    "ONE_KERNEL",
    "PROFILES",
    "REFERENCE",
    "Cost",
    "DeviceProfile",
    "KernelCost",
    "Needs",
    "Offer",
    "Provider",
    "Timing",
    "device_profile",
    "local_profile",
    "local_vendor",
    "provider_of",
    "without_shared_memory",
]
