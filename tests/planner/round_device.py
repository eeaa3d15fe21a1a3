"""A device whose constants are round, so that prices can be worked out by hand."""

from dataclasses import replace

from fuseplan.devices.hardware import Attention, Choice, Dispatch, Linear, Shots
from fuseplan.planner.costs import Aiter, Constant, Hardware, OneStageLimits, Peers, Protocol


def ns(value: float) -> Constant:
    return Constant(value, "ns", "round")


def rate(value: float) -> Constant:
    return Constant(value, "GB/s", "round")


def operations(value: float) -> Constant:
    return Constant(value, "GFLOP/s", "round")


SAME = Constant(1, "times", "round")

DEVICE = Hardware(
    name="round", vendor="nvidia", launch=ns(1000), generated_norm=ns(100),
    cache=Constant(1e6, "bytes", "round"), cache_bandwidth=rate(100), memory_bandwidth=rate(10), strided_copy=rate(20),
    attention=Attention(
        latency=ns(3000), split=ns(2000), key=ns(10), rate=operations(100), row_rate=operations(50),
        narrow_row_rate=operations(5), product_rate=operations(200), narrow_product_rate=operations(400),
    ),
    linear=Linear(
        library=ns(4000), skinny=ns(2500), idle=SAME, idle_few=SAME,
        scaled_library=ns(4000), scaled_column=ns(20), scaled=ns(3000),
    ),
    library=(
        Protocol(name="LL", latency=ns(2000), step=ns(300), bandwidth=rate(8)),
        Protocol(name="Simple", latency=ns(5000), step=ns(1000), bandwidth=rate(40)),
        Protocol(name="NVLS", algorithm="nvls", latency=ns(200_000), step=ns(100), bandwidth=rate(50)),
    ),
    shots=(
        Shots(name="own one-shot", algorithm="one-shot", latency=ns(1500), step=ns(200), bandwidth=rate(20),
              peer=rate(4)),
        Shots(name="own multimem", algorithm="multimem", latency=ns(1500), step=ns(300), bandwidth=rate(20),
              peer=rate(20), copies=2),
    ),
    engines={
        "engine": Dispatch(
            source="round",
            choices=(Choice(kernel="own one-shot", below={4: 2000}), Choice(kernel="own multimem", below={4: 4000})),
        )
    },
    triton=Peers(signal=ns(400), second=ns(400), step=ns(0), bandwidth=rate(16), mesh=False, stages=True),
    flashinfer=Peers(signal=ns(200), second=ns(200), step=ns(0), bandwidth=rate(8), mesh=False, stages=False),
)  # fmt: skip
GATE = OneStageLimits(source="round", max_tokens=10, max_bytes={2: None, 4: 4000})
WITH_AITER = replace(
    DEVICE, vendor="amd", library=(), shots=(), engines={}, flashinfer=None,
    aiter=Aiter(
        peers=Peers(signal=ns(50), second=ns(50), step=ns(0), bandwidth=rate(4), mesh=True, stages=False),
        plain=replace(GATE, max_tokens=None), fused=GATE, norm=ns(70),
    ),
)  # fmt: skip
