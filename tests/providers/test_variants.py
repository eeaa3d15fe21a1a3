"""Which machine code a call needs follows from its rows: verification runs all of it, and none is compiled later."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops, registered_kernel
from fuseplan.verification.specs import ODD_SIZES
from tests.providers.test_compiles import FAMILIES, stand_ins

LAST = 8192
ROWS = (*range(1, 1100), *range(1100, LAST, 37), LAST)
FP8 = torch.float8_e4m3fn
L2 = 50 * 2**20
"""Bytes, of an H100."""


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
    "qk_norm_rope": lambda rows, width: (
        of(rows, width // 64, 128), of(rows, 8, 128), of(128), of(128), of(rows, 1, 64), of(rows, 1, 64), 1e-6,
        "llama", "products",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("width", [4096, *(pytest.param(width, marks=pytest.mark.nightly) for width in (2880, 8192))])
def test_sizes_that_are_verified_need_all_the_code_that_others_need(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[tuple[str, str]] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        needed.append((kernel.__name__, str(sorted(constants.items(), key=str))))

    others = stand_ins("cuda", note) | {"cache_bytes": lambda device: L2}
    for family in FAMILIES:
        for each in others.keys() & vars(family).keys():
            monkeypatch.setattr(family, each, others[each])
    kernel = registered_kernel(ops[name].name, "triton")
    assert kernel is not None

    def code_of(rows: int) -> tuple[tuple[str, str], ...]:
        needed.clear()
        kernel(*ARGUMENTS[name](rows, width))
        return tuple(needed)

    verified = {code_of(rows) for rows in (*ODD_SIZES, LAST)}
    assert verified == {code_of(rows) for rows in ROWS}
