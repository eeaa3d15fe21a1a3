"""Parts as prices see them, for tests."""

from fuseplan.rules.parts import attention, rms_norm, silu_and_mul
from fuseplan.rules.parts.dynamic_fp8 import DynamicFp8
from fuseplan.rules.parts.pad import Padding
from fuseplan.rules.parts.rotary import Rotation
from fuseplan.rules.parts.static_fp8 import StaticFp8

NORM, SILU, ATTENTION = rms_norm.PART.traffic, silu_and_mul.PART.traffic, attention.PART.traffic
STATIC, DYNAMIC = StaticFp8(), DynamicFp8()

__all__ = ["ATTENTION", "DYNAMIC", "NORM", "SILU", "STATIC", "Padding", "Rotation"]
