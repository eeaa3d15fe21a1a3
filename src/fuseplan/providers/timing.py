"""How the cost model prices a provider's kernels before anybody has measured them."""

from dataclasses import dataclass
from typing import Final, get_args

from fuseplan.config import unknown
from fuseplan.devices import EXCHANGES
from fuseplan.errors import ConfigError
from fuseplan.rules.parts.attention.traffic import Heads


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A fused op as one kernel that reads and writes what the op must, wherever it runs.

    An all-reduce within the op exchanges rows by constants of the device. Where these are of one kernel (`Peers`), it
    is priced as the faster of one shot and two; where they are of a library that chooses between one stage and two
    (`Aiter`), as that library chooses; where the device has none, as by those of fuseplan's own kernels; and where it
    hasn't these either, as one kernel after the all-reduce of torch.distributed.

    Attributes:
        eager: it is no kernel but the reference, op by op in eager mode.
        exchange: the constants by which ranks exchange rows, as a field of `Hardware`.
        heads: how an attention kernel reads keys and values that several heads of queries share.
        times: how many times as long as a kernel at the memory's bandwidth its kernels take.

    Raises:
        ConfigError: no such constants, or no such way to read heads, are known, or `times` isn't at least 1.
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
"""As fuseplan's own Triton kernels are priced, but for attention, whose keys these split."""
