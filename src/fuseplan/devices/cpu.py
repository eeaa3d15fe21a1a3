"""Any CPU: there is one profile for all of them."""

from typing import Final

from fuseplan.devices.derivation import ns, operations, rate, ratio, size
from fuseplan.devices.errors import UNMEASURED_ERRORS
from fuseplan.devices.hardware import Attention, Hardware, Linear, Protocol
from fuseplan.devices.profile import DeviceProfile

_NOMINAL = "nominal: an order of magnitude, since this is any CPU"
_CPU_ATTENTION = (
    "one thread of an x86-64 CPU, torch 2.13, 2026-11-28: _scaled_dot_product_flash_attention_for_cpu of one query on "
    "1,024 and 1,280 keys, 8 and 32 heads in groups of four, heads of 64 and 128; `rate` with heads packed"
)
_CPU_SPELLED = (
    "one thread of an x86-64 CPU, torch 2.13, 2026-11-29: eager attention as Inductor compiles it, 8 heads of 64 in "
    "groups of four, batch 4 and 1,024 keys, or batch 1 and 512 keys"
)
CPU: Final = Hardware(
    name="cpu",
    vendor="cpu",
    launch=ns(5000, _NOMINAL),
    generated_norm=ns(0, _NOMINAL),
    cache=size(16e6, _NOMINAL),
    cache_bandwidth=rate(200, _NOMINAL),
    memory_bandwidth=rate(50, _NOMINAL),
    strided_copy=rate(50, _NOMINAL),
    attention=Attention(
        latency=ns(5000, _NOMINAL),
        split=ns(5000, _NOMINAL),
        key=ns(0, _NOMINAL),
        rate=operations(38, _CPU_ATTENTION),
        row_rate=operations(28, _CPU_ATTENTION),
        narrow_row_rate=operations(2.9, _CPU_ATTENTION),
        product_rate=operations(40, f"{_CPU_SPELLED}: 43 for one query, 17 for 4 and 47 for 512, all included"),
        narrow_product_rate=operations(215, f"{_CPU_SPELLED}: 512 queries, by its AMX; 40 for one query, 54 for 4"),
        joins_row=True,
    ),
    linear=Linear(
        library=ns(5000, _NOMINAL),
        skinny=ns(5000, _NOMINAL),
        idle=ratio(1, _NOMINAL),
        idle_few=ratio(1, _NOMINAL),
        scaled_library=ns(5000, _NOMINAL),
        scaled_column=ns(0, _NOMINAL),
        scaled=ns(5000, _NOMINAL),
    ),
    library=(
        Protocol(
            name="gloo",
            latency=ns(100_000, _NOMINAL),
            step=ns(20_000, _NOMINAL),
            bandwidth=rate(2, _NOMINAL),
        ),
    ),
    errors=UNMEASURED_ERRORS,
)

DEVICES: Final = (DeviceProfile(name="cpu", vendor="cpu", description="any CPU that torch runs on", hardware=CPU),)
