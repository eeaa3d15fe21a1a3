"""Unfused all-reduces of NVIDIA's GPUs: NCCL's, vLLM's own kernels, and torch's over symmetric memory.

`benchmarks/calibrate_reduces.py` fits the constants; vLLM's choices by size are read off its source.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from fuseplan.devices.derivation import derived, like, ns, rate, scaled
from fuseplan.devices.hardware import ONE_SHOT, Choice, Constant, Dispatch, Hardware, Protocol, Shots

NCCL: Final = "NCCL 2.30, src/graph/tuning.cc"
OURS: Final = (
    "benchmarks/results/region_h100x2.json, region_h200x2.json and region_h100x4.json: fitted by "
    "benchmarks/calibrate_reduces.py on 2026-11-29"
)
_HOPPER: Final = (
    "benchmarks/data/all-reduces-published.json, H100 and H200 (vLLM #24111, #42324): fitted by "
    "benchmarks/calibrate_reduces.py on 2026-11-29"
)
_BLACKWELL: Final = _HOPPER.replace("H100 and H200", "B200").replace("#24111, #42324", "#24111, #24532, #42324")
CUSTOM_ONE_SHOT, CUSTOM_TWO_SHOT = "vLLM custom one-shot", "vLLM custom two-shot"
TWO_SHOT, MULTIMEM = "symm_mem two-shot", "symm_mem multimem"
KIB, MIB = 2**10, 2**20


def _nccl(name: str, source: str, latency: float, step: float, bandwidth: float) -> Protocol:
    algorithm: Any = name.split(maxsplit=1)[0].lower()
    return Protocol(
        name=f"NCCL {name}", algorithm=algorithm, latency=ns(latency, source), step=ns(step, source),
        bandwidth=rate(bandwidth, source),
    )  # fmt: skip


def _tree(ring: Protocol, latency: float, step: float) -> Protocol:
    """The tree of a ring's protocol: on one node a chain, whose rate is the ring's."""
    return Protocol(
        name=ring.name.replace("ring", "tree"), algorithm="tree",
        latency=scaled("the ring", ring.latency, latency, f"baseLat of {NCCL}"),
        step=scaled("the ring", ring.step, step, f"hwLatencies of {NCCL}, NVLink"),
        bandwidth=scaled("the ring", ring.bandwidth, 1.0, f"{NCCL}, within a node"),
    )  # fmt: skip


def _shots(
    name: str, source: str, latency: float, step: float, bandwidth: float, peer: float, copies: int = 0
) -> Shots:
    algorithm: Any = name.rsplit(maxsplit=1)[-1]
    return Shots(
        name=name, algorithm=algorithm, latency=ns(latency, source), step=ns(step, source),
        bandwidth=rate(bandwidth, source), peer=rate(peer, source), copies=copies,
    )  # fmt: skip


def _library(ll: Protocol, ll128: Protocol, simple: Protocol, nvls: Protocol) -> tuple[Protocol, ...]:
    return ll, ll128, simple, _tree(ll, 6.8 / 6.6, 1.0), _tree(simple, 1.0, 4.0 / 3.4), nvls


HOPPER_LIBRARY: Final = _library(
    _nccl("ring LL", OURS, 9139, 1166, 136.3),
    _nccl("ring LL128", _HOPPER, 17664, 394, 266.4),
    _nccl("ring Simple", OURS, 17738, 3400, 266.6),
    _nccl("NVLS", _HOPPER, 39679, 101, 267.2),
)
HOPPER_SHOTS: Final = (
    _shots(CUSTOM_ONE_SHOT, _HOPPER, 3804, 947, 325.5, 250.0),
    _shots(CUSTOM_TWO_SHOT, _HOPPER, 10019, 1104, 300.0, 60.0),
    _shots(ONE_SHOT, OURS, 7652, 3136, 294.9, 168.4),
    _shots(TWO_SHOT, _HOPPER, 7960, 877, 301.0, 120.0, copies=2),
    _shots(MULTIMEM, _HOPPER, 6536, 450, 304.1, 120.0, copies=2),
)


def _wider(constant: Constant) -> Constant:
    why = "SM100_NVLINK_BW over SM90_NVLINK_BW, 40.1 / 20.6 (NCCL 2.30, src/graph/topo.h); not measured on B200"
    return scaled("H200", constant, 40.1 / 20.6, why)


_AS_HOPPER: Final = like("H200", "not measured on B200")
BLACKWELL_LIBRARY: Final = _library(
    _nccl("ring LL", _BLACKWELL, 11676, 878, 262.1),
    _nccl("ring LL128", _BLACKWELL, 22600, 431, 603.6),
    *(derived(each, _AS_HOPPER, bandwidth=_wider) for each in (HOPPER_LIBRARY[2], HOPPER_LIBRARY[5])),
)
BLACKWELL_SHOTS: Final = (
    _shots(CUSTOM_ONE_SHOT, _BLACKWELL, 4593, 1215, 600.0, 125.6),
    _shots(CUSTOM_TWO_SHOT, _BLACKWELL, 10898, 1132, 300.0, 67.9),
    derived(HOPPER_SHOTS[2], _AS_HOPPER, bandwidth=_wider),
    _shots(TWO_SHOT, _BLACKWELL, 11283, 1059, 574.6, 233.2, copies=2),
    _shots(MULTIMEM, _BLACKWELL, 9915, 543, 317.3, 215.3, copies=2),
)


def _vllm(custom: Mapping[int, int], symmetric: Mapping[int, int], multimem: frozenset[int], where: str) -> Dispatch:
    """vLLM's all-reduce with its defaults.

    Args:
        custom: by ranks, the size in bytes below which its own kernel runs; at most 8 MiB, the size of its buffer.
        symmetric: by ranks, the size up to which torch's kernels over symmetric memory run.
        multimem: the numbers of ranks for which that kernel is multimem.
        where: the tables' keys.
    """
    one_stage = {2: 8 * MIB, 4: 512 * KIB, 6: 256 * KIB, 8: 256 * KIB}
    below = {ranks: min(limit, 8 * MIB) for ranks, limit in custom.items()}
    up_to = {ranks: limit + 1 for ranks, limit in symmetric.items()}
    choices = (
        Choice(kernel=CUSTOM_ONE_SHOT, below={ranks: min(limit, one_stage[ranks]) for ranks, limit in below.items()}),
        Choice(kernel=CUSTOM_TWO_SHOT, below={ranks: limit for ranks, limit in below.items() if ranks > 2}),
        Choice(kernel=MULTIMEM, below={ranks: limit for ranks, limit in up_to.items() if ranks in multimem}),
        Choice(kernel=TWO_SHOT, below={ranks: limit for ranks, limit in up_to.items() if ranks not in multimem}),
    )
    source = (
        f"vLLM 0.22 to 0.32: cuda_communicator.py, {where} of all_reduce_utils.py and symm_mem.py, and "
        "custom_all_reduce.cuh for one stage; without NCCL's symmetric memory, which an environment variable switches "
        "on, and without FlashInfer's all-reduce, which newer ones ask first where it is installed"
    )
    return Dispatch(source=source, choices=tuple(choice for choice in choices if choice.below))


_EVEN = (2, 4, 6, 8)
ANY_VLLM: Final = {"vllm": _vllm(dict.fromkeys(_EVEN, 8 * MIB), {}, frozenset(), "no table: only its own kernel,")}
PAIR_VLLM: Final = {"vllm": _vllm({2: 8 * MIB}, {}, frozenset(), "no table: only its own kernel, of two ranks,")}
HOPPER_VLLM: Final = {
    "vllm": _vllm(
        {2: 64 * MIB, 4: 32 * MIB, 6: 512 * KIB, 8: 256 * KIB}, {2: 64 * MIB, 4: 32 * MIB, 6: 64 * MIB, 8: 64 * MIB},
        frozenset({4, 6, 8}), "9.0",
    )
}  # fmt: skip
B200_VLLM: Final = {
    "vllm": _vllm(
        {2: 2 * MIB, 4: 2 * MIB, 6: MIB, 8: MIB}, {2: 8 * MIB, 4: 32 * MIB, 6: 128 * MIB, 8: 128 * MIB},
        frozenset({6, 8}), "10.0",
    )
}  # fmt: skip
B300_VLLM: Final = {
    "vllm": _vllm(
        {2: 4 * MIB, 4: 4 * MIB, 6: 8 * MIB, 8: 4 * MIB}, {2: 4 * MIB, 4: 32 * MIB, 6: 32 * MIB, 8: 64 * MIB},
        frozenset({6, 8}), "10.3",
    )
}  # fmt: skip


def without_multicast(hardware: Hardware) -> Hardware:
    """A device whose switch can't add, or isn't there: no NVLS, no multimem, and vLLM leaves symmetric memory off, so
    that its own kernel runs up to the size of its buffer.
    """
    choices = (choice for dispatch in hardware.engines.values() for choice in dispatch.choices)
    symmetric = any(choice.kernel in (MULTIMEM, TWO_SHOT) for choice in choices)
    return replace(
        hardware,
        library=tuple(each for each in hardware.library if each.algorithm != "nvls"),
        shots=tuple(each for each in hardware.shots if each.algorithm != "multimem"),
        engines=ANY_VLLM if symmetric else hardware.engines,
    )
