"""Which machine code a call needs follows from its rows: verification runs all of it, and none is compiled later."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseplan.dialect import Rounding, ops, registered_kernel
from fuseplan.distributed.workspace import CAPACITY_BYTES, ONE_SHOT_RANKS, SHOT_BYTES, UNIT_WORDS
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.providers.triton import linear, norm, replay
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.providers.triton.replay import code_key, compile_ahead, needed_code
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification import variants, verifier
from fuseplan.verification.specs import ODD_SIZES, Case, TensorSpec
from tests.providers.test_compiles import FAMILIES, TARGETS, Driver, put_in, stand_ins, triton

LAST = 8192
ROWS = (*range(1, 1100), *range(1100, LAST, 37), LAST)
FP8 = torch.float8_e4m3fn
L2 = {"h100": 50 * 2**20, "h200": 60 * 2**20}
"""Bytes."""


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ARGUMENTS: dict[str, Callable[[int, int], tuple[Any, ...]]] = {
    "rms_norm_dynamic_fp8_quant": lambda rows, width: (
        of(rows, width), of(width), 1e-5, "llama", FP8, 0.0, 0.0, 0.0, None, "multiply",
    ),
    "fused_add_rms_norm_dynamic_fp8_quant": lambda rows, width: (
        of(rows, width), of(rows, width), of(width), 1e-5, "llama", FP8, 0.0, 0.0, 0.0, None, "multiply",
    ),
    "fused_add_rms_norm_pad": lambda rows, width: (
        of(rows, width), of(rows, width), of(width), 1e-5, "gpt_oss", 192,
    ),
    "silu_and_mul_dynamic_fp8_quant": lambda rows, width: (
        of(rows, 2 * width), of(rows, 2 * width), "llama", FP8, 0.0, 0.0, 0.0, None, "multiply",
    ),
    "silu_and_mul_static_fp8_quant": lambda rows, width: (
        of(rows, 2 * width), of(rows, 2 * width), "llama", of(dtype=torch.float32), FP8, "multiply",
    ),
    "rms_norm_mx_fp8_quant": lambda rows, width: (
        of(rows, width), of(width), 1e-5, "llama", 32, FP8, "floor", "swizzled",
    ),
    "qk_norm_rope": lambda rows, width: (
        of(rows, width // 64, 128), of(rows, 8, 128), of(128), of(128), of(rows, 1, 64), of(rows, 1, 64), 1e-6,
        "llama", "products",
    ),
}  # fmt: skip


class Needed(list[tuple[Any, ...]]):
    """What kernels are compiled for."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Instead of launching one."""
        self.append(code_key(kernel, arguments, constants))


@pytest.fixture(params=L2)
def needed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Needed:
    """As on a GPU."""
    found = Needed()
    put_in(monkeypatch, stand_ins("cuda", found) | {"cache_bytes": lambda device: L2[request.param]})
    return found


def check(needed: Needed, run: Callable[[int], Any], sizes: Sequence[int] = (*ODD_SIZES, LAST)) -> None:
    """That sizes which are verified need all the code that others need."""

    def code_of(rows: int) -> tuple[tuple[Any, ...], ...]:
        needed.clear()
        run(rows)
        return tuple(dict.fromkeys(needed))

    verified = {each for rows in sizes for each in code_of(rows)}
    assert verified == {each for rows in ROWS for each in code_of(rows)}


def case(values: tuple[Any, ...], rows: int) -> Case:
    """Arguments without data as verification has them."""
    arguments = {
        f"{position}": TensorSpec(
            dtype=each.dtype, shape=(*each.shape,), stride=each.stride(), misalignment=0, device=torch.device("cpu")
        )
        if isinstance(each, Tensor) else each
        for position, each in enumerate(values)
    }  # fmt: skip
    return Case(tokens=rows, arguments=arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("width", [4096, *(pytest.param(width, marks=pytest.mark.nightly) for width in (2880, 8192))])
def test_sizes_that_are_verified_need_all_the_code_that_others_need(
    name: str, width: int, needed: Needed, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = ops[name]
    kernel = registered_kernel(op.name, "triton")
    assert kernel is not None

    def case_at(match: Any, sizes: Any, rows: int) -> Case:
        return case(ARGUMENTS[name](rows, width), rows)

    def needs(call: Callable[[], Any], mode: Any) -> frozenset[object]:
        needed.clear()
        with mode:
            call()
        return frozenset(needed)

    monkeypatch.setattr(variants, "case_of", case_at)
    match: Any = SimpleNamespace(rule=SimpleNamespace(op=op), provider="triton")
    graph: Any = None
    odd = [case_at(None, None, rows) for rows in (1, 7, 33, LAST)]
    sizes = [*(each.tokens for each in odd), *variants.with_further_code(match, odd, graph, (1, LAST), needs)]
    assert len(sizes) < 12
    check(needed, lambda rows: kernel(*ARGUMENTS[name](rows, width)), sizes)


def test_code_is_asked_for_and_none_is_launched() -> None:
    kernel = registered_kernel("rms_norm_dynamic_fp8_quant", "triton")
    assert kernel is not None
    mode = FakeTensorMode()
    with mode:
        x, weight = torch.empty(3, 64).bfloat16(), torch.empty(64).bfloat16()
    rest = (1e-5, "llama", FP8, 0.0, 0.0, 0.0, None, "multiply")
    (found,) = needed_code(lambda: kernel(x, weight, *rest), mode)
    assert "'_norm'" in str(found)
    assert "('WIDTH', '64')" in str(found)
    assert needed_code(lambda: kernel(x, weight), mode) == frozenset()


def test_code_is_compiled_ahead_once_and_none_is_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(TARGETS["sm_90"]))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", None)  # by which kernels are launched
    put_in(monkeypatch, stand_ins("cuda", replay.run_kernel) | {"cache_bytes": lambda device: L2["h200"]})
    compiled: list[str] = []
    compiler = triton.compiler.compile

    def compile_kernel(source: Any, **how: Any) -> Any:
        compiled.append(source.fn.__name__)
        return compiler(source, **how)

    monkeypatch.setattr(triton.compiler, "compile", compile_kernel)

    for kernel in (norm._norm, linear._linears):
        kernel.device_caches.clear()
    rms_norm, skinny = (registered_kernel(name, "triton") for name in ("rms_norm_pad", "skinny_linear"))
    assert rms_norm is not None
    assert skinny is not None
    half = functools.partial(torch.empty, dtype=torch.float16)

    def refused() -> None:
        raise ValueError

    norms = [functools.partial(rms_norm, half(rows, 64), half(64), 1e-5, "llama", 8) for rows in (2, 2, 3)]
    layer = functools.partial(skinny, half(2, 128), half(64, 128), None)
    compile_ahead([refused, *norms, layer])
    assert sorted(compiled) == ["_linears", "_norm"]
    compile_ahead([*norms, layer])
    assert len(compiled) == 2, "it is there already"
    for kernel in (norm._norm, linear._linears):
        ((code,),) = [cache[0].values() for cache in kernel.device_caches.values()]
        assert "ptx" in code.asm
        kernel.device_caches.clear()


def test_code_is_loaded_that_is_handed_over_as_a_future() -> None:
    loaded: list[str] = []

    class Code:
        @property
        def run(self) -> None:
            loaded.append("now")

    class Future(triton.FutureKernel):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:  # that of Triton 3.6 has none
            raise AttributeError(name)

    handed = futures.Future[Code]()
    handed.set_result(Code())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", contextlib.nullcontext)
        for code in (Code(), Future(lambda kernel: None, handed)):
            replay._load(code, torch.empty(1))
    assert len(loaded) == 2


def test_layers_that_are_alike_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(match: Any, *_: Any) -> tuple[int, ...]:
        asked.append(match)
        return 5, 2

    def case_of(rows: int) -> Case:
        there = torch.device("cuda")
        x = TensorSpec(dtype=FP8, shape=(rows, 64), stride=(64, 1), misalignment=0, device=there)
        return Case(tokens=rows, arguments={"x": x})

    (triton_provider,) = [each for each in BUILT_IN_PROVIDERS if each.name == "triton"]
    rule = next(each for each in BUILT_IN_RULES if not each.op.collective)
    monkeypatch.setattr(verifier, "cases_of", lambda match, *_, **__: (case_of(match.rows), case_of(9)))
    monkeypatch.setattr(verifier, "case_of", lambda match, sizes, rows: case_of(rows))
    monkeypatch.setattr(verifier, "with_further_code", ask)
    checks = verifier.Verifier(mode="first-use", providers=[triton_provider], deadline_s=60.0)
    unused: Any = None
    for rows in (1, 1, 3, 1):
        match: Any = SimpleNamespace(rule=rule, provider="triton", rows=rows)
        assert checks._cases(match, unused, (1, 2), False) == tuple(map(case_of, sorted((rows, 2, 5, 9))))
    checks._cases(SimpleNamespace(rule=rule, provider="triton", rows=1), unused, (1, 3), False)  # type: ignore[arg-type]
    assert [match.rows for match in asked] == [1, 3, 1]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("width", [4096, 2880])
def test_so_do_all_reduces(ranks: int, width: int, needed: Needed) -> None:
    all_reduce_norm: Any = next(family for family in FAMILIES if family.__name__.endswith("all_reduce_norm"))
    one_shot = ranks <= ONE_SHOT_RANKS
    shot = (CAPACITY_BYTES if one_shot else max(SHOT_BYTES, CAPACITY_BYTES // ranks)) // 2
    workspace: Any = SimpleNamespace(
        ranks=ranks, rank=0, processors=132, one_shot=one_shot, loopback=False, timed=True, timeout=1,
        shot_words=shot // UNIT_WORDS * UNIT_WORDS, sums_at=0, held=contextlib.nullcontext,
        tensors=(of(1),) * 4,
        sums_words=0 if one_shot else CAPACITY_BYTES // 2 // UNIT_WORDS * UNIT_WORDS, require=lambda *words: None,
    )  # fmt: skip
    norm = all_reduce_norm.Norm(weight=of(width), eps=1e-5, rounding=Rounding.LLAMA)
    store = epilogue_of(None)()
    check(needed, lambda rows: all_reduce_norm.launch(of(rows, width), of(rows, width), norm, store, workspace))
