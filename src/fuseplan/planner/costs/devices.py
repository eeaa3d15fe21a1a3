"""The constants of each device, with their sources. No number of the cost model stands anywhere else.

Where nobody has measured a constant on a device, it is derived from one that somebody has, and its source says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from fuseplan.planner.costs.hardware import Aiter, Attention, Constant, Gate, Hardware, Peers, Protocol

_RUN_1 = (
    "benchmarks/data/h200x2-ar-add-rms-pad.json, 2 x H200, 2026-11-22: fitted on run 1, columns U, C, B, D, by "
    "benchmarks/calibrate_costs.py on 2026-11-23"
)
_RUN_2 = _RUN_1.replace("run 1, columns U, C, B, D,", "run 2, column F,")
_GPU_BENCHES = "github.com/te42kyfo/gpu-benches, gpu-small-kernels/h200_graph.txt (streams in a CUDA graph)"
_H100_COPY = "benchmarks/data/h100-add-rms-pad.json, H100, 2026-11-22: copies at 3002 GB/s"
_NCCL = "NCCL 2.30, src/graph/tuning.cc"
_AITER = (
    "benchmarks/data/mi355x-aiter-published.json: fitted on the one-stage tables of EmbeddedLLM/vllm#81 and "
    "ROCm/aiter#3458 (MI355X, 2026) by benchmarks/calibrate_costs.py"
)


def _ns(value: float, source: str) -> Constant:
    return Constant(value, "ns", source)


def _rate(value: float, source: str) -> Constant:
    return Constant(value, "GB/s", source)


def _size(value: float, source: str) -> Constant:
    return Constant(value, "bytes", source)


def _operations(value: float, source: str) -> Constant:
    return Constant(value, "GFLOP/s", source)


_ATTENTION_RUN = "benchmarks/results/decode_one_gpu_h100.json, H100, 2026-11-28"
_H100_RATE = "half of 798 TFLOP/s, an 8192^3 product in bfloat16 on an H100; the same whatever is fused"
H100_ATTENTION: Final = Attention(
    latency=_ns(8000, f"{_ATTENTION_RUN}: cuDNN on unrepeated heads at batch 1, 9.2 us, less the bytes"),
    key=_ns(18.5, f"{_ATTENTION_RUN}: cuDNN on packed heads at batch 8, 31.6 us for 1,280 keys, less the latency"),
    rate=_operations(400_000, _H100_RATE),
    row_rate=_operations(400_000, "as `rate`: one query waits for memory"),
    narrow_row_rate=_operations(400_000, "as `rate`: one query waits for memory"),
)

H200: Final = Hardware(
    name="h200",
    launch=_ns(1402, _RUN_1),
    generated_norm=_ns(574, f"{_RUN_1}; poorly determined (sigma over 100 %)"),
    cache=_size(33.4e6, f"{_GPU_BENCHES}: fastest at a working set of 33.4 MB, memory's speed at twice that"),
    cache_bandwidth=_rate(5868, f"{_RUN_1}, near 5810 of {_GPU_BENCHES}"),
    memory_bandwidth=_rate(4301, f"datasheet, 4.8 TB/s, times 3002 / 3350 ({_H100_COPY}, datasheet 3.35 TB/s)"),
    strided_copy=_rate(2885, f"{_RUN_1}; poorly determined (sigma of 72 %)"),
    attention=H100_ATTENTION,
    ring=(
        Protocol(
            name="LL",
            latency=_ns(7559, f"{_RUN_1}, near 6.6 us and two steps of {_NCCL}"),
            step=_ns(600, f"{_NCCL}: hwLatencies, NVLink, ring, LL"),
            bandwidth=_rate(146.0, f"{_RUN_1}, near llMaxBws of {_NCCL} (141 on Hopper)"),
        ),
        Protocol(
            name="Simple",
            latency=_ns(18496, f"{_RUN_1}, near 8.4 us and two steps of {_NCCL}"),
            step=_ns(3400, f"{_NCCL}: hwLatencies, NVLink, ring, Simple"),
            bandwidth=_rate(318.6, f"{_RUN_1}, near 18 links of 20.6 (NCCL 2.30, src/graph/topo.h)"),
        ),
    ),
    triton=Peers(
        signal=_ns(5207, f"{_RUN_1} (a barrier by atomics between the two phases of the kernel)"),
        bandwidth=_rate(413.2, f"{_RUN_1}, near 380 (NVIDIA/nccl#1264, p2pBandwidthLatencyTest on H100; 450 on paper)"),
        mesh=False,
        stages=True,
    ),
    flashinfer=Peers(
        signal=_ns(2829, f"{_RUN_2} (Lamport: readers spin on the data)"),
        bandwidth=_rate(276.7, _RUN_2),
        mesh=False,
        stages=False,
    ),
)


def _scaled(constant: Constant, factor: float, why: str) -> Constant:
    return replace(constant, value=round(constant.value * factor, 1), source=f"H200's times {factor:.3g}: {why}")


def _like_h200(constant: Constant, why: str) -> Constant:
    return replace(constant, source=f"H200's, {why}")


def _attention_like(what: str) -> Attention:
    """H100's attention on a device on which nobody has measured it."""
    return Attention(
        **{
            name: replace(getattr(H100_ATTENTION, name), source=f"H100's, {what}")
            for name in ("latency", "key", "rate", "row_rate", "narrow_row_rate")
        }
    )


def _hopper_protocols(why: str) -> tuple[Protocol, ...]:
    return tuple(
        replace(p, latency=_like_h200(p.latency, why), bandwidth=_like_h200(p.bandwidth, why)) for p in H200.ring
    )


def _hopper_peers(peers: Peers | None, why: str) -> Peers:
    assert peers
    return replace(peers, signal=_like_h200(peers.signal, why), bandwidth=_like_h200(peers.bandwidth, why))


_SAME_DIE = "the same GH100 die, clocks and NVLink 4"
H100: Final = Hardware(
    name="h100",
    launch=_like_h200(H200.launch, _SAME_DIE),
    generated_norm=_like_h200(H200.generated_norm, _SAME_DIE),
    cache=_like_h200(H200.cache, _SAME_DIE),
    cache_bandwidth=_like_h200(H200.cache_bandwidth, _SAME_DIE),
    memory_bandwidth=_rate(3002, _H100_COPY),
    strided_copy=_like_h200(H200.strided_copy, _SAME_DIE),
    attention=H100_ATTENTION,
    ring=_hopper_protocols(_SAME_DIE),
    triton=_hopper_peers(H200.triton, _SAME_DIE),
    flashinfer=_hopper_peers(H200.flashinfer, _SAME_DIE),
)

_UNMEASURED_B200 = "not measured on B200"
_LINKS_B200 = "SM100_NVLINK_BW over SM90_NVLINK_BW, 40.1 / 20.6 (NCCL 2.30, src/graph/topo.h); not measured on B200"


def _b200_peers(peers: Peers | None) -> Peers:
    assert peers
    return replace(
        peers,
        signal=_like_h200(peers.signal, _UNMEASURED_B200),
        bandwidth=_scaled(peers.bandwidth, 40.1 / 20.6, _LINKS_B200),
    )


B200: Final = Hardware(
    name="b200",
    launch=_like_h200(H200.launch, _UNMEASURED_B200),
    generated_norm=_like_h200(H200.generated_norm, _UNMEASURED_B200),
    cache=_scaled(H200.cache, 126 / 50, "L2 of 126 MB over 50 MB; not measured on B200"),
    cache_bandwidth=_scaled(H200.cache_bandwidth, 148 / 132, "SMs, 148 over 132; not measured on B200"),
    memory_bandwidth=_scaled(H200.memory_bandwidth, 8.0 / 4.8, "datasheets, 8 over 4.8 TB/s; not measured on B200"),
    strided_copy=_scaled(H200.strided_copy, 148 / 132, "SMs, 148 over 132; not measured on B200"),
    attention=_attention_like(_UNMEASURED_B200),
    ring=tuple(
        replace(
            protocol,
            latency=_like_h200(protocol.latency, _UNMEASURED_B200),
            bandwidth=_scaled(protocol.bandwidth, factor, why),
        )
        for protocol, factor, why in zip(
            H200.ring,
            (2.0, 40.1 / 20.6),
            (f"llMaxBws of {_NCCL}, Blackwell over Hopper; not measured on B200", _LINKS_B200),
            strict=True,
        )
    ),
    triton=_b200_peers(H200.triton),
    flashinfer=_b200_peers(H200.flashinfer),
)

# vLLM decides for AITER which all-reduce + RMSNorm it runs.
_ONE_STAGE_BYTES: Mapping[int, int | None] = {2: None, 4: 256 * 1024, 8: 128 * 1024}
AITER_GATE_MAY_2026: Final = Gate(
    source="vLLM before #42409 of 2026-05-12 (vllm/_aiter_ops.py), the day before the report on MI355X: one stage for "
    "at most 80 tokens of width 512, 1024, 2048, 4096 or 7168; GPT-OSS's 2880 takes two",
    max_tokens=80,
    widths=frozenset({512, 1024, 2048, 4096, 7168}),
    max_bytes=_ONE_STAGE_BYTES,
)
AITER_GATE_LATER: Final = replace(
    AITER_GATE_MAY_2026,
    source="vLLM since #42409 (use_1stage_fused_ar_rms): one stage for at most 80 tokens of any width",
    widths=None,
)
_PLAIN_GATE: Final = Gate(
    source="AITER 0.1.13, custom_all_reduce.cuh: two ranks always, 4 below 160 KiB, 8 below 80 KiB",
    max_bytes={2: None, 4: 160 * 1024, 8: 80 * 1024},
)

_UNMEASURED_AMD = "not measured on AMD"
MI355X: Final = Hardware(
    name="mi355x",
    launch=_ns(
        3300,
        "vllm#54787, comment of 2026-09-03: all-reduce and a Triton norm take 22.64 us, fused 19.32, in HIP graphs",
    ),
    generated_norm=_like_h200(H200.generated_norm, _UNMEASURED_AMD),
    cache=_size(171e6, "Infinity Cache of 256 MB times 33.4 / 50, the part of H200's L2 that a stream keeps"),
    cache_bandwidth=_rate(
        10331, "Infinity Cache, 17.2 TB/s on paper, times 5868 / 9770, H200's stream over its L2 reads (gpu-benches)"
    ),
    memory_bandwidth=_rate(7169, f"datasheet, 8 TB/s, times 3002 / 3350 ({_H100_COPY}); not measured on AMD"),
    strided_copy=_scaled(H200.strided_copy, 256 / 132, "CUs over SMs; not measured on AMD"),
    attention=_attention_like(_UNMEASURED_AMD),
    triton=Peers(
        signal=_ns(1044, f"AITER's: {_AITER}"),
        bandwidth=_rate(63.6, f"AITER's: {_AITER}"),
        mesh=True,
        stages=True,
    ),
    aiter=Aiter(
        peers=Peers(
            signal=_ns(1044, _AITER),
            bandwidth=_rate(63.6, f"{_AITER}; 76.8 on paper"),
            mesh=True,
            stages=False,
        ),
        plain=_PLAIN_GATE,
        fused=AITER_GATE_MAY_2026,
        norm=_ns(
            1219,
            "ROCm/aiter#1981, 2026-02-05: the Triton add + RMSNorm + pad takes 4.519 us for a row of 2880 once tuned "
            "(6.479 before), less the launch",
        ),
    ),
)


def _mi300x() -> Hardware:
    assert MI355X.aiter and MI355X.triton
    link = _rate(
        round(MI355X.aiter.peers.bandwidth.value * 64 / 76.8, 1),
        "MI355X's times 64 / 76.8, the links on paper; ScalarLM measured 50 GB/s for copies between peers",
    )

    def like(constant: Constant) -> Constant:
        return replace(constant, source="MI355X's, not measured on MI300X")

    def peers(of: Peers) -> Peers:
        return replace(of, signal=like(of.signal), bandwidth=link)

    return replace(
        MI355X,
        name="mi300x",
        launch=like(MI355X.launch),
        memory_bandwidth=_rate(4749, f"datasheet, 5.3 TB/s, times 3002 / 3350 ({_H100_COPY}); not measured on AMD"),
        strided_copy=_scaled(H200.strided_copy, 304 / 132, "CUs over SMs; not measured on AMD"),
        triton=peers(MI355X.triton),
        aiter=replace(MI355X.aiter, peers=peers(MI355X.aiter.peers), norm=like(MI355X.aiter.norm)),
    )


MI300X: Final = _mi300x()

_NOMINAL = "nominal: an order of magnitude, since this is any CPU"
_CPU_ATTENTION = (
    "one thread of an x86-64 CPU, torch 2.13, 2026-11-28: _scaled_dot_product_flash_attention_for_cpu of one query on "
    "1,024 and 1,280 keys, 8 and 32 heads in groups of four, heads of 64 and 128; `rate` with heads packed"
)
CPU: Final = Hardware(
    name="cpu",
    launch=_ns(5000, _NOMINAL),
    generated_norm=_ns(0, _NOMINAL),
    cache=_size(16e6, _NOMINAL),
    cache_bandwidth=_rate(200, _NOMINAL),
    memory_bandwidth=_rate(50, _NOMINAL),
    strided_copy=_rate(50, _NOMINAL),
    attention=Attention(
        latency=_ns(5000, _NOMINAL),
        key=_ns(0, _NOMINAL),
        rate=_operations(38, _CPU_ATTENTION),
        row_rate=_operations(28, _CPU_ATTENTION),
        narrow_row_rate=_operations(2.9, _CPU_ATTENTION),
    ),
    ring=(
        Protocol(
            name="gloo",
            latency=_ns(100_000, _NOMINAL),
            step=_ns(20_000, _NOMINAL),
            bandwidth=_rate(2, _NOMINAL),
        ),
    ),
)

HARDWARE: Final[Mapping[str, Hardware]] = {
    hardware.name: hardware for hardware in (H100, H200, B200, MI300X, MI355X, CPU)
}
"""By the names of the device profiles."""
