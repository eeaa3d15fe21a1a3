"""The reference of every fused op in plain PyTorch: correct on any device, but not fast."""

from typing import Final

from fuseplan.devices import VENDOR_NAMES
from fuseplan.dialect import ops
from fuseplan.providers.gates import Offer
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing

PROVIDER: Final = Provider(
    name="torch",
    description="plain PyTorch, the reference of every fused op; NCCL and gloo",
    vendors=frozenset(VENDOR_NAMES),
    package=None,
    install="",
    implements={op.name: Offer() for op in ops.values() if op.fused},
    timing=Timing(eager=True),
)
