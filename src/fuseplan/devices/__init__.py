"""The devices that fuseplan knows, a file a vendor: torch's names of them, and the constants of the cost model."""

from fuseplan.devices.hardware import (
    EXCHANGES,
    Aiter,
    Constant,
    Hardware,
    OneStageLimits,
    Peers,
    Protocol,
    Vendor,
)
from fuseplan.devices.known import (
    HARDWARE,
    PROFILES,
    asked_profile,
    default_profile,
    device_profile,
    local_profile,
    local_vendor,
    profile_of,
)
from fuseplan.devices.profile import VENDOR_NAMES, DeviceProfile
from fuseplan.devices.unknown import ASSUMED, Facts, unknown_hardware
