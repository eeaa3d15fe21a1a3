"""Every Triton kernel compiles for NVIDIA's and AMD's GPUs, on a machine without one; the interpreter takes more."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch

from fuseplan.dialect import SCALED_LINEAR_FAMILY, ops, registered_kernel

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from fuseplan.providers.triton.launching import AMD_SHARED  # noqa: E402
from fuseplan.providers.triton.replay import OPTIONS  # noqa: E402
from tests.forks import Forks  # noqa: E402
from tests.providers.stand_ins import printed_by  # noqa: E402

FAMILIES = [
    import_module(f"fuseplan.providers.triton.{name}")
    for name in (
        "activation", "all_reduce_norm", "attention", "cached_rotary", "launching", "linear", "norm", "qk_norm_rope",
        "scaled_linear",
    )
]  # fmt: skip
TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
WITHOUT_FP8 = {"sm_75": GPUTarget("cuda", 75, 32), "sm_80": GPUTarget("cuda", 80, 32)}
SHARED_BYTES, MULTIPROCESSORS = 232448, 132
"""Of an H100."""
KEPT = ("_and_norm", "_and_activation")
COMPOSED = ("fused_add_rms_norm_", "all_reduce_rms_norm_", "all_reduce_fused_add_rms_norm_")
OPS = [name for name in ops if registered_kernel(name, "triton") is not None]


class Driver:
    """Of a GPU that isn't there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def stand_ins(backend: str, run_kernel: Callable[..., None]) -> dict[str, Any]:
    """What kernels' launchers ask, by name, as a GPU of a vendor would answer."""
    is_nvidia = backend == "cuda"
    return {
        "run_kernel": run_kernel, "is_nvidia": lambda device: is_nvidia, "launches_early": lambda device: is_nvidia,
        "is_amd": lambda device: not is_nvidia,
        "shared_bytes": lambda device: SHARED_BYTES if is_nvidia else AMD_SHARED,
        "multiprocessors": lambda device: MULTIPROCESSORS,
    }  # fmt: skip


def put_in(monkeypatch: pytest.MonkeyPatch, others: dict[str, Any]) -> None:
    """Has the kernels' launchers ask these."""
    for family in FAMILIES:
        for name in others.keys() & vars(family).keys():
            monkeypatch.setattr(family, name, others[name])


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Names and code of kernels that were compiled in place of being launched."""
    target, made = {**TARGETS, **WITHOUT_FP8}[request.param], list[tuple[str, dict[str, Any]]]()

    def compile_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        kernel.device_caches.clear()  # else the target that a kernel was first compiled for stays its own
        asm = kernel.warmup(*arguments, grid=grid, **{**OPTIONS, **constants}).asm
        assert ("ptx" in asm) is (target.backend == "cuda")
        made.append((kernel.__name__, asm))

    others = stand_ins(target.backend, compile_kernel)
    if target.backend == "cuda" and target.arch < 90:
        others["launches_early"] = lambda device: False
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target))
    put_in(monkeypatch, others)
    return made


def of_zeros(rows: int, width: int, features: Sequence[int], fast: bool) -> tuple[Any, ...]:
    """Arguments of layers in fp8 with scales of rows."""
    weights = [torch.zeros(each, width).to(torch.float8_e4m3fn) for each in features]
    scales = [torch.zeros(1, each) for each in features]
    return weights[0][:rows], torch.zeros(rows, 1), *weights, *scales, *[None] * len(features), fast


def is_of_the_day(name: str, target: str) -> bool:
    """Of what is composed, AMD's compiler is asked for each epilogue behind `rms_norm` and `silu_and_mul` alone."""
    return target == "sm_90" or name.endswith("_pad") or not (name.endswith(KEPT) or name.startswith(COMPOSED))


@pytest.mark.parametrize(
    ("compiled", "name", "is_day"),
    [
        pytest.param(
            target, name, is_day, id=f"{target}-{name}-{'day' if is_day else 'night'}",
            marks=[pytest.mark.nightly] * (not is_day or not is_of_the_day(name, target)),
        )
        for target in TARGETS
        for name in OPS
        for is_day in (True, False)
    ],
    indirect=["compiled"],
)  # fmt: skip
def test_kernels_compile(name: str, is_day: bool, compiled: list[tuple[str, dict[str, Any]]], one_rank: str) -> None:
    """By day one sample of each op, and all those of each epilogue for one GPU behind a norm alone or an activation."""
    kernel = registered_kernel(name, "triton")
    assert kernel is not None
    is_nvidia = triton.runtime.driver.active.get_current_target().backend == "cuda"
    # What yields the norm, too, is the kernel of an op above, and a store.
    is_kept = name.endswith(KEPT)
    is_one = is_kept or (is_day and not (is_nvidia and name.startswith(("rms_norm", "silu"))))
    samples = ops[name].samples[: 1 if is_one else None]
    for sample in samples:
        kernel(*sample.make(torch.device("cpu"), torch.Generator().manual_seed(0)))
    assert len(compiled) >= len(samples)
    if is_nvidia or not is_day:
        compile_published(name, kernel, compiled)
    if ops[name].writes:
        compiled = [each for each in compiled if each[0] != "_combine"]
        assert all("tt.assert" in asm["ttir"] for _, asm in compiled), "a position beyond the cache is caught"
        assert all("__assertfail" in asm.get("ptx", "__assertfail") for _, asm in compiled)


def compile_published(name: str, kernel: Callable[..., Any], compiled: list[tuple[str, dict[str, Any]]]) -> None:
    """Shapes of published models, which take other paths than samples do."""
    expected = {"_attend", "_combine"}
    if name == "grouped_attention":
        q, k = torch.zeros(1, 8, 1, 128).bfloat16(), torch.zeros(1, 2, 1280, 128).bfloat16()
        kernel(q, k, k, None, 1.0, False, "cudnn")
    elif name == "skinny_linear_add_rms_norm":
        # Llama's output projection of few sequences and of many, whose width several programs share.
        for rows in (1, 32):
            x, weight = torch.zeros(rows, 1024).bfloat16(), torch.zeros(4096, 1024).bfloat16()
            kernel(x, weight, None, torch.zeros(rows, 4096).bfloat16(), torch.ones(4096).bfloat16(), 1e-5, "llama")
        expected = {"_linears", "_norm"}
    elif name in {op.name for op in SCALED_LINEAR_FAMILY}:
        # Llama's output projection, gate and up, and a smaller model's q, k and v; several programs share the width of
        # all but gate and up.
        features = {"skinny_scaled_linear": (4096,), "merged_scaled_linear_pair": (14336, 14336)}
        for rows, fast in ((1, True), (32, False)):
            kernel(*of_zeros(rows, 4096, features.get(name, (2048, 512, 512)), fast))
        expected = {"_scaled_linears", "_combine"} - ({"_combine"} if name == "merged_scaled_linear_pair" else set())
        for asm in (asm for kernel, asm in compiled if kernel == "_scaled_linears" and "ptx" in asm):
            assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n(16|32)k32\.f32\.e4m3\.e4m3", asm["ptx"])
    elif name == "fused_attention":
        # Gemma 2's heads, and gpt-oss' in many sequences, whose keys aren't split.
        for batch, q_heads, heads, width, softcap, sinks in ((1, 8, 4, 256, 50.0, False), (64, 64, 8, 64, None, True)):
            q, k = torch.zeros(batch, q_heads, 1, width).bfloat16(), torch.zeros(batch, heads, 1280, width).bfloat16()
            mask = torch.zeros(batch, 1, 1, 1280).bfloat16()
            kernel(q, k, k, mask, torch.zeros(q_heads).bfloat16() if sinks else None, 1.0, softcap, "float32")
    elif name.endswith("rope_cached_attention"):
        # Llama's heads in one sequence and in many, whose keys aren't split.
        *rest, _, scale, is_causal, kernel_name = ops[name].samples[1].make(torch.device("cpu"), torch.Generator())[5:]
        for batch in (1, 64):
            q, k, cache = (torch.zeros(batch, *each, 32).half() for each in ((32, 1), (8, 1), (8, 1280)))
            mask = torch.zeros(batch, 1, 1, 1280).half()
            kernel(q, k, k, cache, cache, *rest, mask, scale, is_causal, kernel_name)
    else:
        return
    assert {kernel for kernel, _ in compiled} == expected


@pytest.mark.parametrize("compiled", WITHOUT_FP8, indirect=True)
@pytest.mark.parametrize("suffix", ["mx_fp4_quant", "nv_fp4_quant"])
def test_fp4_compiles_for_gpus_without_fp8(suffix: str, compiled: list[tuple[str, dict[str, Any]]]) -> None:
    names = [name for name in OPS if suffix in name and not ops[name].collective]
    for name in names:
        sample = ops[name].samples[0].make(torch.device("cpu"), torch.Generator().manual_seed(0))
        kernel = registered_kernel(name, "triton")
        assert kernel is not None
        kernel(*(each.half() if isinstance(each, torch.Tensor) else each for each in sample))
    assert len(compiled) == len(names) == 6


@pytest.mark.parametrize("compiled", [*TARGETS, *WITHOUT_FP8], indirect=True)
def test_codes_in_e5m2_and_scales_in_tiles_compile(compiled: list[tuple[str, dict[str, Any]]]) -> None:
    """Also for GPUs without fp8: such codes are made as integers."""
    x, weight, code = torch.zeros(3, 256).half(), torch.ones(256).half(), torch.float8_e5m2
    calls: dict[str, tuple[Any, ...]] = {
        "silu_and_mul_dynamic_fp8_quant": (x, x, "llama", code, 1e-9, 0.0, 0.0, None, "divide"),
        "rms_norm_static_fp8_quant": (x, weight, 1e-5, "llama", torch.ones(1), code, "multiply"),
        "silu_and_mul_mx_fp8_quant": (x, x, "llama", 32, code, "rceil", "swizzled"),
        "rms_norm_mx_fp4_quant": (x, weight, 1e-5, "llama", 32, "even", "swizzled"),
    }
    for name, arguments in calls.items():
        kernel: Any = registered_kernel(name, "triton")
        kernel(*arguments)
    assert len(compiled) == 4


def test_kernels_compile_while_somebody_watches(forks: Forks) -> None:
    """vLLM does. What Triton 3.6 hands them is JSON, which functions among constants are none."""
    assert printed_by(forks, "run_watched") == ["_norm", "_silu_and_mul", "_qk_norm_rope", "_linears"]
