"""The formulas of the cost model by hand, on a device with round constants."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.contest import Contest
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs import AITER_GATE_LATER, AITER_GATE_MAY_2026, HARDWARE, Gate, Kernel, Region, total_ns
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
        (REDUCED, 2200, 4000, 2000),
        ({**REDUCED, "residual": True}, 4200, 4000, 2000),
        ({"core": SILU}, 4000, 2000, 2000),
        (PADDED, 2200, 2560, 2560),
        ({**PADDED, "keeps_core": True}, 2200, 2560, 2560),
        ({"keeps_core": True}, 2200, 2000, 2000),
        ({"tail": STATIC}, 2200, 1000, 1000),
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
        (REDUCED, Kernel(name="rms_norm", launch=1100, memory=42)),
        ({"residual": True}, Kernel(name="rms_norm", launch=1100, memory=82)),
        ({"tail": STATIC}, Kernel(name="rms_norm+static_fp8_quant", launch=1100, memory=32)),
        ({"core": SILU}, Kernel(name="silu_and_mul", launch=1000, memory=60)),
        ({"core": SILU, "tail": STATIC}, Kernel(name="silu_and_mul+static_fp8_quant", launch=1000, memory=50)),
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


@pytest.mark.parametrize(
    ("ranks", "tokens", "expected"),
    [
        (2, 10, Kernel(name="all_reduce (LL)", launch=2000, wire=250)),
        (4, 10, Kernel(name="all_reduce (LL)", launch=2000 + 4 * 300, wire=375)),
        (4, 10_000, Kernel(name="all_reduce (Simple)", launch=5000 + 4 * 1000, wire=75_000)),
    ],
)
def test_an_all_reduce_takes_the_fastest_protocol(ranks: int, tokens: int, expected: Kernel) -> None:
    assert MODEL.reduce(region(reduce=True, ranks=ranks, tokens=tokens)) == (expected,)


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
        ("engine", 2, 10, (Kernel(name="all_reduce (LL)", launch=2000, wire=250),)),
        ("nobody's", 2, 10, (Kernel(name="all_reduce (LL)", launch=2000, wire=250),)),
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
        ("h200", 8, 256 * 1024 - 1, "vLLM custom one-shot"),
        ("h200", 8, 256 * 1024, "symm_mem multimem"),
        ("h200", 8, 64 * 1024**2 + 2, "NCCL NVLS"),
        ("h100", 2, 8 * 1024**2 - 1, "vLLM custom one-shot"),
        ("h100", 2, 8 * 1024**2, "symm_mem two-shot"),
        ("h100", 4, 512 * 1024, "vLLM custom two-shot"),
        ("h100", 3, 1024, "NCCL ring LL"),
        ("b200", 4, 2 * 1024**2, "symm_mem two-shot"),
        ("b200", 8, 2 * 1024**2, "symm_mem multimem"),
        ("b300", 8, 2 * 1024**2, "vLLM custom two-shot"),
        ("a100", 8, 4 * 1024**2, "vLLM custom two-shot"),
        ("a100", 8, 8 * 1024**2, "NCCL ring LL128"),
        ("l40s", 2, 1024, "vLLM custom one-shot"),
        ("l40s", 4, 1024, "NCCL ring LL"),
        ("rtx4090", 2, 1024, "NCCL ring LL"),
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
        (2, 10, one_shot(500)),
        (4, 10, one_shot(500)),  # each pair of ranks has a link
        (4, 19, one_shot(950, memory=76)),
        (4, 20, one_shot(500, memory=80, signal=100)),
        (8, 10, one_shot(125, signal=100)),
        (2, 1000, one_shot(50_000, memory=4000)),
    ],
)
def test_aiter_reduces_in_one_stage_or_in_two(ranks: int, tokens: int, expected: Kernel) -> None:
    assert AITER.reduce(region(reduce=True, ranks=ranks, tokens=tokens)) == (expected,)


RING = Kernel(name="all_reduce (LL)", launch=3200, wire=375)
SUM_NORM = Kernel(name="rms_norm", launch=1100, memory=82)


def test_unfused_parts_follow_each_other() -> None:
    everything = region(**REDUCED, **PADDED, residual=True)
    assert MODEL.unfused(everything) == (RING, SUM_NORM, PAD)
    assert MODEL.unfused_ns(everything) == 3575 + 1182 + 1046
    assert MODEL.unfused(region(residual=True)) == (SUM_NORM,)
    quantised = Kernel(name="rms_norm+dynamic_fp8_quant", launch=1100, memory=33)
    assert MODEL.unfused(region(**REDUCED, tail=DYNAMIC)) == (RING, quantised)


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [({}, 11), ({"residual": True}, 15), ({"tail": STATIC}, 16), ({"tail": DYNAMIC}, 21), ({"core": SILU}, 7),
     ({"core": SILU, "tail": STATIC}, 12)],
)  # fmt: skip
def test_a_reference_is_many_kernels(changes: dict[str, Any], kernels: int) -> None:
    eager = Kernel(name="eager", launch=1000, memory=80)
    assert MODEL.fused(region(**changes), "torch") == (eager,) * kernels
    assert MODEL.fused_ns(region(**changes), "torch") == 1080 * kernels


def test_a_reference_reduces_before_and_pads_as_eager_does() -> None:
    eager = Kernel(name="eager", launch=1000, memory=80)
    assert MODEL.fused(region(**REDUCED, **PADDED), "torch") == (RING, *(eager,) * 11, *EAGER_PAD)


@pytest.mark.parametrize("provider", ["triton", "flashinfer", "aiter", "somebody"])
def test_without_an_all_reduce_a_fused_op_is_one_local_kernel(provider: str) -> None:
    assert MODEL.fused(region(**PADDED), provider) == (Kernel(name="rms_norm+pad", launch=1000, memory=48),)


def test_aiter_adds_what_its_norms_take() -> None:
    assert AITER.fused(region(**PADDED), "aiter") == (Kernel(name="rms_norm+pad", launch=1070, memory=48),)
    assert AITER.fused(region(**PADDED), "triton") == (Kernel(name="rms_norm+pad", launch=1000, memory=48),)


def exchange(name: str = "all_reduce+rms_norm", **terms: int) -> Kernel:
    return Kernel(**{"name": name, "launch": 1000, "memory": 62, **terms})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("provider", "ranks", "expected"),
    [
        ("triton", 2, exchange(signal=400, staging=40, wire=125)),
        ("somebody", 2, exchange(signal=400, staging=40, wire=125)),
        ("aiter", 2, exchange(signal=400, staging=40, wire=125)),  # the device has no AITER
        ("triton", 4, exchange(signal=400, staging=40, wire=375)),
        ("flashinfer", 2, exchange(signal=200, wire=250)),
        ("flashinfer", 4, exchange(signal=400, wire=375)),  # two shots: 400 + 375 beside 200 + 750
    ],
)
def test_a_fused_all_reduce_exchanges_rows_in_one_shot_or_in_two(provider: str, ranks: int, expected: Kernel) -> None:
    assert MODEL.fused(region(reduce=True, ranks=ranks), provider) == (expected,)


def test_without_an_exchange_the_all_reduce_comes_before_the_fused_op() -> None:
    local = Kernel(name="all_reduce+rms_norm", launch=1000, memory=62)
    assert Contest(replace(DEVICE, triton=None)).fused(region(**REDUCED), "triton") == (RING, local)
    without = Contest(replace(WITH_AITER, triton=None))
    assert without.fused(region(reduce=True, ranks=2), "triton") == (one_shot(500), local)


def test_aiter_fuses_in_one_launch_or_in_two() -> None:
    assert AITER.fused(region(**REDUCED), "aiter") == (exchange(signal=50, wire=500),)
    assert AITER.fused(region(**REDUCED, tokens=11), "aiter") == (
        Kernel(name="reduce_scatter", launch=1000, signal=50, memory=44, wire=275),
        Kernel(name="load_rms_norm", launch=1000, memory=68),
    )


def test_what_a_fusion_leaves_of_a_site_runs_unfused() -> None:
    site = region(**REDUCED, **PADDED, residual=True)
    norm_pad = MODEL.fused(site.without_reduce(), "triton")
    reduce_norm = MODEL.fused(site.without_tail(), "triton")
    assert MODEL.alternative(site, None, "triton") == MODEL.unfused(site)
    assert MODEL.alternative(site, site.without_reduce(), "triton") == (RING, *norm_pad)
    assert MODEL.alternative(site, site.without_tail(), "triton") == (*reduce_norm, PAD)
    assert MODEL.alternative(site, site, "triton") == MODEL.fused(site, "triton")
    alone = region(residual=True)
    assert MODEL.alternative(alone, alone, "triton") == MODEL.fused(alone, "triton")
    saved = MODEL.unfused_ns(site) - MODEL.alternative_ns(site, site, "triton")
    assert saved == 5803 - total_ns(MODEL.fused(site, "triton"))
    assert MODEL.name == "round"


def test_a_part_of_a_region_keeps_the_rest() -> None:
    site = region(**REDUCED, **PADDED, residual=True)
    assert site.without_tail() == region(**REDUCED, residual=True)
    assert site.without_reduce() == region(**PADDED, residual=True)


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
        (GATE, 10, 5, 4000, 2, True), (GATE, 10, 5, 1, 5, False),
        (replace(GATE, max_tokens=None), 11, 5, 1, 2, True),
        (NARROW, 1, 5, 1, 2, True), (NARROW, 1, 6, 1, 2, False),
        (Gate(source="no ranks"), 1, 1, 1, 2, False),
        (AITER_GATE_MAY_2026, 80, 2048, 10**9, 2, True), (AITER_GATE_MAY_2026, 81, 2048, 1, 2, False),
        (AITER_GATE_MAY_2026, 80, 2880, 1, 2, False),
        (AITER_GATE_LATER, 80, 2880, 256 * KIB - 1, 4, True), (AITER_GATE_LATER, 80, 2880, 256 * KIB, 4, False),
        (AITER_GATE_LATER, 80, 2880, 128 * KIB - 1, 8, True), (AITER_GATE_LATER, 80, 2880, 128 * KIB, 8, False),
        (PLAIN, 10**6, 7, 10**9, 2, True),
        (PLAIN, 10**6, 7, 160 * KIB - 1, 4, True), (PLAIN, 10**6, 7, 160 * KIB, 4, False),
        (PLAIN, 10**6, 7, 80 * KIB - 1, 8, True), (PLAIN, 10**6, 7, 80 * KIB, 8, False),
    ],
)  # fmt: skip
def test_a_gate_by_tokens_width_bytes_and_ranks(
    gate: Gate, tokens: int, width: int, nbytes: int, ranks: int, expected: bool
) -> None:
    assert gate.takes_one_stage(tokens=tokens, width=width, nbytes=nbytes, ranks=ranks) is expected


def test_constants_have_dotted_names() -> None:
    assert [name for name, _ in DEVICE.constants()] == [
        "launch", "generated_norm", "cache", "cache_bandwidth", "memory_bandwidth", "strided_copy",
        "attention.latency", "attention.split", "attention.key", "attention.rate", "attention.row_rate",
        "attention.narrow_row_rate", "attention.product_rate", "attention.narrow_product_rate",
        "linear.library", "linear.skinny", "linear.idle", "linear.idle_few",
        "linear.scaled_library", "linear.scaled_column", "linear.scaled",
        "library.LL.latency", "library.LL.step", "library.LL.bandwidth",
        "library.Simple.latency", "library.Simple.step", "library.Simple.bandwidth",
        "library.NVLS.latency", "library.NVLS.step", "library.NVLS.bandwidth",
        *(f"shots.own {name}.{part}" for name in ("one-shot", "multimem")
          for part in ("latency", "step", "bandwidth", "peer")),
        "triton.signal", "triton.second", "triton.step", "triton.bandwidth",
        "flashinfer.signal", "flashinfer.second", "flashinfer.step", "flashinfer.bandwidth",
    ]  # fmt: skip
    assert dict(WITH_AITER.constants())["aiter.peers.signal"].value == 50
    assert dict(WITH_AITER.constants())["aiter.norm"].value == 70


# What nobody has measured on a device is derived from what somebody has: (device, from which, by what, constants).
DERIVED = [
    ("h100", "h200", 1, ("launch", "generated_norm", "cache", "cache_bandwidth", "strided_copy", "triton.signal",
                         "triton.bandwidth", "flashinfer.signal", "flashinfer.bandwidth",
                         "library.NCCL ring LL.latency", "shots.symm_mem multimem.bandwidth")),
    ("b200", "h200", 1, ("launch", "generated_norm", "triton.signal", "flashinfer.signal",
                         "library.NCCL ring Simple.latency", "shots.symm_mem one-shot.latency")),
    ("b200", "h200", 126 / 50, ("cache",)),
    ("b200", "h200", 148 / 132, ("cache_bandwidth", "strided_copy")),
    ("b200", "h200", 8 / 4.8, ("memory_bandwidth",)),
    ("b200", "h200", 40.1 / 20.6, ("library.NCCL ring Simple.bandwidth", "library.NCCL NVLS.bandwidth",
                                   "triton.bandwidth", "flashinfer.bandwidth")),
    ("b300", "b200", 1, ("library.NCCL ring LL.latency", "shots.vLLM custom one-shot.peer", "triton.second")),
    ("a100", "h200", 12 * 20 / (18 * 20.6), ("library.NCCL ring LL128.bandwidth",
                                             "shots.vLLM custom two-shot.bandwidth")),
    ("mi355x", "h200", 256 / 132, ("strided_copy",)),
    ("mi300x", "h200", 304 / 132, ("strided_copy",)),
    ("mi300x", "mi355x", 1, ("launch", "cache", "cache_bandwidth", "aiter.norm")),
    ("mi325x", "mi300x", 1, ("aiter.peers.signal", "aiter.peers.bandwidth", "triton.signal")),
]  # fmt: skip


@pytest.mark.parametrize(("device", "origin", "factor", "names"), DERIVED)
def test_derived_constants(device: str, origin: str, factor: float, names: tuple[str, ...]) -> None:
    derived, known = dict(HARDWARE[device].constants()), dict(HARDWARE[origin].constants())
    for name in names:
        assert derived[name].value == pytest.approx(factor * known[name].value, abs=0.051), name


def test_links_and_staging_of_each_vendor() -> None:
    for name in ("h100", "h200", "b200"):
        triton, flashinfer = HARDWARE[name].triton, HARDWARE[name].flashinfer
        assert triton is not None
        assert flashinfer is not None
        assert (triton.mesh, triton.stages, flashinfer.mesh, flashinfer.stages) == (False, False, False, False)
        assert (triton.buffered, flashinfer.buffered) == (0, 3)
    for name in ("mi300x", "mi355x"):
        triton, aiter = HARDWARE[name].triton, HARDWARE[name].aiter
        assert triton is not None
        assert aiter is not None
        assert (triton.mesh, triton.stages, aiter.peers.mesh, aiter.peers.stages) == (True, False, True, False)
