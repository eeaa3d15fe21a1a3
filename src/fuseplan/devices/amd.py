"""AMD's GPUs: torch's names of them, and the constants of each with their sources. None of them was measured for
fuseplan: times of AITER's kernels are fitted on published tables, and the rest follows from H200 and datasheets.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from fuseplan.devices.derivation import H100_COPY, derived, like, ns, rate, renamed, scaled, size
from fuseplan.devices.errors import UNMEASURED_ERRORS
from fuseplan.devices.hardware import Aiter, Constant, Hardware, OneStageLimits, Peers
from fuseplan.devices.nvidia import H100_ATTENTION, H200, H200_LINEAR
from fuseplan.devices.profile import DeviceProfile

_AITER = (
    "benchmarks/data/mi355x-aiter-published.json: fitted on the one-stage tables of EmbeddedLLM/vllm#81 and "
    "ROCm/aiter#3458 (MI355X, 2026) by benchmarks/calibrate_costs.py"
)
_CUSTOM = (
    "benchmarks/data/all-reduces-published.json, four MI300X (SGLang #6619): fitted by benchmarks/calibrate_reduces.py "
    "on 2026-11-29"
)

# vLLM decides for AITER which all-reduce + RMSNorm it runs.
_ONE_STAGE_BYTES: Mapping[int, int | None] = {2: None, 4: 256 * 1024, 8: 128 * 1024}
AITER_GATE_MAY_2026: Final = OneStageLimits(
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
_PLAIN_GATE: Final = OneStageLimits(
    source="AITER 0.1.13, custom_all_reduce.cuh: two ranks always, 4 below 160 KiB, 8 below 80 KiB",
    max_bytes={2: None, 4: 160 * 1024, 8: 80 * 1024},
)


def _copies(units: int) -> Constant:
    return scaled("H200", H200.strided_copy, units / 132, "CUs over SMs; not measured on AMD")


MI355X: Final = Hardware(
    name="mi355x",
    vendor="amd",
    launch=ns(
        3300,
        "vllm#54787, comment of 2026-09-03: all-reduce and a Triton norm take 22.64 us, fused 19.32, in HIP graphs",
    ),
    generated_norm=like("H200", "not measured on AMD")(H200.generated_norm),
    cache=size(171e6, "Infinity Cache of 256 MB times 33.4 / 50, the part of H200's L2 that a stream keeps"),
    cache_bandwidth=rate(
        10331, "Infinity Cache, 17.2 TB/s on paper, times 5868 / 9770, H200's stream over its L2 reads (gpu-benches)"
    ),
    memory_bandwidth=rate(7169, f"datasheet, 8 TB/s, times 3002 / 3350 ({H100_COPY}); not measured on AMD"),
    strided_copy=_copies(256),
    attention=derived(H100_ATTENTION, like("H100", "not measured on AMD")),
    linear=derived(H200_LINEAR, like("H200", "not measured on AMD")),
    triton=Peers(
        signal=ns(1044, f"AITER's: {_AITER}"),
        second=ns(1044, f"AITER's: {_AITER}"),
        step=ns(0, f"AITER's: {_AITER}"),
        bandwidth=rate(63.6, f"AITER's: {_AITER}"),
        mesh=True,
        stages=False,
    ),
    aiter=Aiter(
        peers=Peers(
            signal=ns(1044, _AITER),
            second=ns(1044, _AITER),
            step=ns(0, f"{_AITER}, on four ranks alone"),
            bandwidth=rate(63.6, f"{_AITER}; 76.8 on paper"),
            mesh=True,
            stages=False,
        ),
        plain=_PLAIN_GATE,
        fused=AITER_GATE_MAY_2026,
        norm=ns(
            1219,
            "ROCm/aiter#1981, 2026-02-05: the Triton add + RMSNorm + pad takes 4.519 us for a row of 2880 once tuned "
            "(6.479 before), less the launch",
        ),
    ),
    errors=UNMEASURED_ERRORS,
)


def _mi300x() -> Hardware:
    assert MI355X.aiter and MI355X.triton
    link = rate(40.6, f"{_CUSTOM}; 64 on paper, and ScalarLM measured 50 GB/s for copies between peers")
    signal = ns(3375, _CUSTOM)

    def exchange(of: Peers) -> Peers:
        return replace(of, signal=signal, second=signal, step=same(of.step), bandwidth=link)

    same = like("MI355X", "not measured on MI300X")
    return replace(
        MI355X,
        name="mi300x",
        launch=same(MI355X.launch),
        memory_bandwidth=rate(4749, f"datasheet, 5.3 TB/s, times 3002 / 3350 ({H100_COPY}); not measured on AMD"),
        strided_copy=_copies(304),
        triton=exchange(MI355X.triton),
        aiter=replace(MI355X.aiter, peers=exchange(MI355X.aiter.peers), norm=same(MI355X.aiter.norm)),
    )


MI300X: Final = _mi300x()


def _gpu(name: str, description: str, processors: int, hardware: Hardware) -> DeviceProfile:
    return DeviceProfile(
        name=name, vendor="amd", description=f"AMD Instinct {description}",
        reported=(f"AMD Instinct {description}( OAM| VF)?",), processors=processors, hardware=hardware,
    )  # fmt: skip


_AS_MI300X = "AMD Instinct MI325X datasheet: CDNA 3 with 304 CUs and 256 MB of Infinity Cache, as MI300X"
DEVICES: Final = (
    _gpu("mi300x", "MI300X", 304, MI300X),
    _gpu("mi325x", "MI325X", 304, renamed(MI300X, "mi325x", _AS_MI300X, 6000)),
    _gpu("mi355x", "MI355X", 256, MI355X),
)
"""One record each."""
