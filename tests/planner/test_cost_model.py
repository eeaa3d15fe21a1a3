"""The formulas of the cost model by hand, on a device with round constants."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.contest import Contest
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs import AITER_GATE_LATER, AITER_GATE_MAY_2026, HARDWARE, Kernel, OneStageLimits, Region
from tests.planner.parts import DYNAMIC, NORM, SILU, STATIC, Padding
from tests.planner.round_device import DEVICE, GATE, WITH_AITER

MODEL, AITER = Contest(DEVICE), Contest(WITH_AITER)


def region(**changes: Any) -> Region:
    """Ten rows of 100 bf16 values: 2000 bytes."""
    given: dict[str, Any] = {"core": NORM, "tokens": 10, "width": 100, **changes}
    return Region(**given)


PADDED = {"tail": Padding(padded=128)}
REDUCED = {"reduce": True, "ranks": 4}


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, 0), (2000, 20), (1e6, 10_000), (1.5e6, 5_000 + 100_000), (2e6, 200_000), (3e6, 300_000)],
)
def test_a_stream_leaves_the_cache_between_its_size_and_twice_that(nbytes: float, expected: float) -> None:
    assert DEVICE.memory_ns(nbytes) == expected


@pytest.mark.parametrize(
    ("changes", "read", "written", "result"),
    [
        ({}, 2200, 2000, 2000),
        ({"itemsize": 4}, 4400, 4000, 4000),
        ({"residual": True}, 4200, 4000, 2000),
        ({**REDUCED, "residual": True}, 4200, 4000, 2000),
        ({"core": SILU}, 4000, 2000, 2000),
        (PADDED, 2200, 2560, 2560),
        ({"tail": STATIC, "keeps_core": True}, 2200, 3000, 1000),
        ({"tail": DYNAMIC}, 2200, 1040, 1040),
        ({"tail": DYNAMIC, "residual": True, "keeps_core": True}, 4200, 5040, 1040),
    ],
)
def test_bytes_of_a_region(changes: dict[str, Any], read: int, written: int, result: int) -> None:
    given = region(**changes)
    assert (given.read_bytes, given.written_bytes, given.result_bytes) == (read, written, result)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Kernel(name="rms_norm", launch=1100, memory=42)),
        ({"residual": True}, Kernel(name="rms_norm", launch=1100, memory=82)),
        ({"tail": STATIC}, Kernel(name="rms_norm+static_fp8_quant", launch=1100, memory=32)),
        ({"core": SILU}, Kernel(name="silu_and_mul", launch=1000, memory=60)),
        ({"core": SILU, "tail": DYNAMIC}, Kernel(name="silu_and_mul+dynamic_fp8_quant", launch=1100, memory=51)),
    ],
)
def test_a_core_is_one_generated_kernel(changes: dict[str, Any], expected: Kernel) -> None:
    assert MODEL.core(region(**changes)) == (expected,)


PAD = Kernel(name="pad", launch=1000, memory=46)
EAGER_PAD = (Kernel(name="fill_", launch=1000, memory=26), Kernel(name="copy_", launch=1000, memory=40 + 200))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (PADDED, PAD),
        ({"tail": STATIC}, Kernel(name="static_fp8_quant", launch=1000, memory=30)),
        ({"tail": DYNAMIC}, Kernel(name="dynamic_fp8_quant", launch=1100, memory=31)),
    ],
)
def test_an_epilogue_behind_an_opaque_op_is_a_kernel(changes: dict[str, Any], expected: Kernel) -> None:
    assert MODEL.epilogue(region(**changes)) == (expected,)
    eager = Contest(DEVICE, pad="eager").epilogue(region(**changes))
    assert eager == (EAGER_PAD if changes is PADDED else (expected,))


def test_parts_of_a_nanosecond_add_up_before_they_are_rounded() -> None:
    """3.96 ns in the cache, and 19.8 for the strides."""
    assert MODEL.strided_copy(396) == Kernel(name="copy_", launch=1000, memory=24)


COPY = Kernel(name="copy", launch=1000, memory=40)


@pytest.mark.parametrize(
    ("reducer", "ranks", "tokens", "expected"),
    [
        ("own one-shot", 2, 10, (Kernel(name="all_reduce (own one-shot)", launch=1500, wire=500),)),
        ("own one-shot", 8, 10, (Kernel(name="all_reduce (own one-shot)", launch=1500 + 2 * 200, wire=700),)),
        ("own multimem", 4, 10, (COPY, Kernel(name="all_reduce (own multimem)", launch=1800, wire=125), COPY)),
        ("engine", 4, 9, (Kernel(name="all_reduce (own one-shot)", launch=1700, wire=450),)),
        ("engine", 4, 10, (COPY, Kernel(name="all_reduce (own multimem)", launch=1800, wire=125), COPY)),
        ("engine", 4, 20, (Kernel(name="all_reduce (LL)", launch=3200, wire=750),)),
        ("nobody's", 2, 10, (Kernel(name="all_reduce (LL)", launch=2000, wire=250),)),
        ("nobody's", 4, 10, (Kernel(name="all_reduce (LL)", launch=2000 + 4 * 300, wire=375),)),
        ("nobody's", 4, 10_000, (Kernel(name="all_reduce (Simple)", launch=5000 + 4 * 1000, wire=75_000),)),
        ("torch", 4, 100_000, (Kernel(name="all_reduce (NVLS)", launch=200_200, wire=500_000),)),
        ("torch", 2, 100_000, (Kernel(name="all_reduce (Simple)", launch=5000, wire=500_000),)),
    ],
)
def test_an_engine_and_an_op_of_torch_say_which_all_reduce_runs(
    reducer: str, ranks: int, tokens: int, expected: tuple[Kernel, ...]
) -> None:
    assert MODEL.reduce(region(reduce=True, ranks=ranks, tokens=tokens, reducer=reducer)) == expected


def test_without_multicast_no_switch_adds() -> None:
    bare = without_multicast(DEVICE)
    assert [each.name for each in bare.library] == ["LL", "Simple"]
    assert [each.name for each in bare.shots] == ["own one-shot"]
    assert bare.engines == DEVICE.engines
    for name in ("h100", "h200", "b200", "b300"):
        # Its own kernel then runs up to 8 MiB: the tables of smaller sizes are for machines with symmetric memory.
        assert without_multicast(HARDWARE[name]).engines == HARDWARE["a100"].engines
    assert without_multicast(HARDWARE["l40s"]) == HARDWARE["l40s"]


@pytest.mark.parametrize(
    ("device", "ranks", "nbytes", "expected"),
    [
        ("h200", 8, 256 * 1024, "symm_mem multimem"),
        ("h200", 8, 64 * 1024**2 + 2, "NCCL NVLS"),
        ("h100", 2, 8 * 1024**2 - 1, "vLLM custom one-shot"),
        ("h100", 2, 8 * 1024**2, "symm_mem two-shot"),
        ("h100", 4, 512 * 1024, "vLLM custom two-shot"),
        ("h100", 3, 1024, "NCCL ring LL"),
        ("b200", 4, 2 * 1024**2, "symm_mem two-shot"),
        ("b300", 8, 2 * 1024**2, "vLLM custom two-shot"),
        ("a100", 8, 8 * 1024**2, "NCCL ring LL128"),
        ("l40s", 2, 1024, "vLLM custom one-shot"),
        ("mi300x", 8, 1024, "AITER one-stage"),
    ],
)
def test_what_vllm_calls(device: str, ranks: int, nbytes: int, expected: str) -> None:
    region = Region(core=NORM, tokens=1, width=nbytes, itemsize=1, reduce=True, ranks=ranks, reducer="vllm")
    names = [kernel.name for kernel in Contest(HARDWARE[device]).reduce(region) if kernel.name != "copy"]
    assert names == [f"all_reduce ({expected})"]


def one_shot(wire: int, **terms: int) -> Kernel:
    given = {"name": f"all_reduce (AITER {'two' if terms.get('signal') == 100 else 'one'}-stage)", "launch": 1000}
    return Kernel(**{**given, "signal": 50, "memory": 40, "wire": wire, **terms})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "tokens", "expected"),
    [
        (4, 10, one_shot(500)),  # each pair of ranks has a link
        (4, 19, one_shot(950, memory=76)),
        (4, 20, one_shot(500, memory=80, signal=100)),
        (8, 10, one_shot(125, signal=100)),
    ],
)
def test_aiter_reduces_in_one_stage_or_in_two(ranks: int, tokens: int, expected: Kernel) -> None:
    assert AITER.reduce(region(reduce=True, ranks=ranks, tokens=tokens)) == (expected,)


RING = Kernel(name="all_reduce (LL)", launch=3200, wire=375)
SUM_NORM = Kernel(name="rms_norm", launch=1100, memory=82)


def test_unfused_parts_follow_each_other() -> None:
    assert MODEL.unfused(region(**REDUCED, **PADDED, residual=True)) == (RING, SUM_NORM, PAD)
    quantised = Kernel(name="rms_norm+dynamic_fp8_quant", launch=1100, memory=33)
    assert MODEL.unfused(region(**REDUCED, tail=DYNAMIC)) == (RING, quantised)


EAGER = Kernel(name="eager", launch=1000, memory=80)


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [({}, 11), ({"residual": True}, 15), ({"tail": STATIC}, 16), ({"tail": DYNAMIC}, 21), ({"core": SILU}, 7)],
)
def test_a_reference_is_many_kernels(changes: dict[str, Any], kernels: int) -> None:
    assert MODEL.fused(region(**changes), "torch") == (EAGER,) * kernels


def exchange(name: str = "all_reduce+rms_norm", **terms: int) -> Kernel:
    return Kernel(**{"name": name, "launch": 1000, "memory": 62, **terms})  # type: ignore[arg-type]


LOCAL = Kernel(name="rms_norm+pad", launch=1000, memory=48)
TWO = {"reduce": True, "ranks": 2}


@pytest.mark.parametrize(
    ("model", "provider", "changes", "expected"),
    [
        # A reference reduces before, and pads as eager mode does.
        (MODEL, "torch", {**REDUCED, **PADDED}, (RING, *(EAGER,) * 11, *EAGER_PAD)),
        # Without an all-reduce, it is one local kernel.
        (MODEL, "somebody", PADDED, (LOCAL,)), (AITER, "triton", PADDED, (LOCAL,)),
        (AITER, "aiter", PADDED, (replace(LOCAL, launch=1070),)),
        # Rows are exchanged in one shot or in two.
        (MODEL, "triton", TWO, (exchange(signal=400, staging=40, wire=125),)),
        (MODEL, "aiter", TWO, (exchange(signal=400, staging=40, wire=125),)),  # the device has no AITER
        (MODEL, "triton", REDUCED, (exchange(signal=400, staging=40, wire=375),)),
        (MODEL, "flashinfer", TWO, (exchange(signal=200, wire=250),)),
        (MODEL, "flashinfer", REDUCED, (exchange(signal=400, wire=375),)),  # 400 + 375 beside 200 + 750
        # Without an exchange, the all-reduce comes before.
        (Contest(replace(DEVICE, triton=None)), "triton", REDUCED, (RING, exchange())),
        (Contest(replace(WITH_AITER, triton=None)), "triton", TWO, (one_shot(500), exchange())),
        (AITER, "aiter", REDUCED, (exchange(signal=50, wire=500),)),
        (AITER, "aiter", {**REDUCED, "tokens": 11},
         (Kernel(name="reduce_scatter", launch=1000, signal=50, memory=44, wire=275),
          Kernel(name="load_rms_norm", launch=1000, memory=68))),
    ],
)  # fmt: skip
def test_kernels_of_a_fused_op(
    model: Contest, provider: str, changes: dict[str, Any], expected: tuple[Kernel, ...]
) -> None:
    assert model.fused(region(**changes), provider) == expected


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 0}, {"width": 0}, {"itemsize": 0}, {"ranks": 0}, {"tail": Padding(padded=99)}, {"reduce": True},
     {"core": SILU, "residual": True}, {"core": SILU, **REDUCED}],
)  # fmt: skip
def test_a_region_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        region(**changes)


KIB = 1024
NARROW = replace(GATE, widths=frozenset({5}))
assert HARDWARE["mi355x"].aiter is not None
PLAIN = HARDWARE["mi355x"].aiter.plain
"""Of AITER's all-reduce alone."""


@pytest.mark.parametrize(
    ("gate", "tokens", "width", "nbytes", "ranks", "expected"),
    [
        (GATE, 10, 5, 1, 2, True), (GATE, 11, 5, 1, 2, False),
        (GATE, 10, 5, 3999, 3, True), (GATE, 10, 5, 3999, 4, True), (GATE, 10, 5, 4000, 4, False),
        (replace(GATE, max_tokens=None), 11, 5, 1, 2, True),
        (NARROW, 1, 5, 1, 2, True), (NARROW, 1, 6, 1, 2, False),
        (OneStageLimits(source="no ranks"), 1, 1, 1, 2, False),
        (AITER_GATE_MAY_2026, 80, 2048, 10**9, 2, True), (AITER_GATE_MAY_2026, 81, 2048, 1, 2, False),
        (AITER_GATE_LATER, 80, 2880, 256 * KIB - 1, 4, True), (AITER_GATE_LATER, 80, 2880, 256 * KIB, 4, False),
        (PLAIN, 10**6, 7, 10**9, 2, True),
        (PLAIN, 10**6, 7, 160 * KIB - 1, 4, True), (PLAIN, 10**6, 7, 160 * KIB, 4, False),
    ],
)  # fmt: skip
def test_a_gate_by_tokens_width_bytes_and_ranks(
    gate: OneStageLimits, tokens: int, width: int, nbytes: int, ranks: int, expected: bool
) -> None:
    assert gate.takes_one_stage(tokens=tokens, width=width, nbytes=nbytes, ranks=ranks) is expected


def test_constants_have_dotted_names() -> None:
    constants = dict(DEVICE.constants())
    assert len([*DEVICE.constants()]) == len(constants) == 46
    names = ("launch", "attention.narrow_product_rate", "linear.idle_few", "library.LL.step", "shots.own multimem.peer")
    assert {*names, "triton.second", "flashinfer.bandwidth"} <= {*constants}
    more = dict(WITH_AITER.constants())
    assert (more["aiter.peers.signal"].value, more["aiter.norm"].value) == (50, 70)


# What nobody has measured on a device is derived from what somebody has: (device, from which, by what, constants).
DERIVED = [
    ("h100", "h200", 1, ("launch", "generated_norm", "cache", "strided_copy", "triton.signal", "flashinfer.bandwidth")),
    ("b200", "h200", 1, ("launch", "library.NCCL ring Simple.latency", "shots.symm_mem one-shot.latency")),
    ("b200", "h200", 40.1 / 20.6, ("library.NCCL ring Simple.bandwidth", "library.NCCL NVLS.bandwidth")),
    ("a100", "h200", 12 * 20 / (18 * 20.6), ("library.NCCL ring LL128.bandwidth",)),
    ("mi355x", "h200", 256 / 132, ("strided_copy",)),
    ("mi300x", "mi355x", 1, ("launch", "cache", "cache_bandwidth", "aiter.norm")),
]


@pytest.mark.parametrize(("device", "origin", "factor", "names"), DERIVED)
def test_derived_constants(device: str, origin: str, factor: float, names: tuple[str, ...]) -> None:
    derived, known = dict(HARDWARE[device].constants()), dict(HARDWARE[origin].constants())
    for name in names:
        assert derived[name].value == pytest.approx(factor * known[name].value, abs=0.051), name


def test_links_and_staging_of_each_vendor() -> None:
    for name in ("h100", "h200", "b200"):
        exchanges = [each for each in (HARDWARE[name].triton, HARDWARE[name].flashinfer) if each]
        assert [(each.mesh, each.stages, each.buffered) for each in exchanges] == [(False, False, 0), (False, False, 3)]
    for name in ("mi300x", "mi355x"):
        triton, aiter = HARDWARE[name].triton, HARDWARE[name].aiter
        assert triton is not None
        assert aiter is not None
        assert (triton.mesh, triton.stages, aiter.peers.mesh, aiter.peers.stages) == (True, False, True, False)
