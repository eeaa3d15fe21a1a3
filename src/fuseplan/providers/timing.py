"""The cost model's prices for a provider's kernels until they are measured."""

from dataclasses import dataclass
from typing import Final, get_args

from fuseplan.config import unknown
from fuseplan.devices import EXCHANGES
from fuseplan.errors import ConfigError
from fuseplan.rules.parts.attention.traffic import Heads


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Prices a fused op as one kernel with the minimum of reads and writes, on any device.

    An all-reduce within the op exchanges rows at a price from constants of the device. With those of one kernel
    (`Peers`), the price is the faster of one-shot and two-shot; with those of a library that chooses between one stage
    and two (`Aiter`), it follows the library's choice. A device without these constants uses those of fuseplan's own
    kernels, and without those, the price is one kernel after the all-reduce of torch.distributed.

    Attributes:
        eager: whether it is the reference, op by op in eager mode, and no kernel.
        exchange: the constants for exchanging rows between ranks, a field of `Hardware`.
        heads: how an attention kernel reads keys and values that several query heads share.
        times: the time of its kernels, as a multiple of a kernel at memory bandwidth.

    Raises:
        ConfigError: unknown constants, an unknown way to read heads, or `times` below 1.
    """

    eager: bool = False
    exchange: str = "triton"
    heads: Heads = "repeated"
    times: float = 1.0

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise unknown("exchange", str(self.exchange), EXCHANGES)
        if self.heads not in get_args(Heads):
            raise unknown("heads", str(self.heads), get_args(Heads))
        if not self.times >= 1:
            raise ConfigError(f"times={self.times!r}: a kernel takes at least as long as memory does: give 1 or more")


ONE_KERNEL: Final = Timing()
"""The timing of fuseplan's own Triton kernels, except for attention, where they split the keys."""
