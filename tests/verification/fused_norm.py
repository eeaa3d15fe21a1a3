"""A fused op with kernels that are wrong in one way each."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect import define, ops
from fuseplan.providers import Provider, provider_of
from fuseplan.rules import Rule
from tests.helpers import HIDDEN, llama

WEIGHT = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
Kernel = Callable[..., Any]


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    y, total = ops.fused_add_rms_norm.reference(x, residual, weight, eps, rounding)
    return torch.relu(y), total


add_norm_relu = define(
    "add_norm_relu",
    "(Tensor x, Tensor residual, Tensor weight, float eps, str rounding) -> (Tensor, Tensor)",
    reference=reference, fake=ops.fused_add_rms_norm.fake, samples=ops.fused_add_rms_norm.samples,
    draws=ops.fused_add_rms_norm.draws, fused=True,
)  # fmt: skip


class AddNormRelu(Rule):
    """fused_add_rms_norm -> relu  =>  one op.   y = relu(rms_norm(x + residual) * weight)"""

    name, flags, op, core = "add_norm_relu", (), add_norm_relu, ops.fused_add_rms_norm
    uuid = "add_norm_relu 1"

    def pattern(self, x: Any, residual: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        y, total = ops.fused_add_rms_norm(x, residual, weight, eps, rounding)
        return torch.ops.aten.relu.default(y), total

    def replacement(self, x: Any, residual: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        fused = add_norm_relu(x, residual, weight, eps, rounding)
        return fused[0], fused[1]


def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, total = llama(x, residual, weight)
    return y.relu(), total


_numbers = itertools.count()


def provider(kernel: Kernel, op: Any = add_norm_relu, **arguments: Any) -> Provider:
    """A provider under a name of its own: torch keeps every kernel that it was ever given."""
    arguments.setdefault("uuid", kernel.__name__)
    return provider_of(f"{kernel.__name__}_{next(_numbers)}", {op: kernel}, cost=0.0, **arguments)


def right(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    return reference(x, residual, weight, eps, rounding)


def raises(*arguments: Any) -> Any:
    raise ZeroDivisionError("division\nby zero")


def hangs(*arguments: Any) -> Any:
    while True:
        time.sleep(0.05)


def yields_nan(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    return torch.full_like(y, float("nan")), total


def reads_what_was_never_written(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """vLLM #41972: the pattern without a residual passed `empty_like` as the residual."""
    return reference(x, torch.empty_like(residual), *rest)


def forgets_the_last_rows(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    rows = y.shape[0] // 4 * 4
    out = torch.empty_like(y)
    out[:rows] = y[:rows]
    return out, total


def wrong_above_4096(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """vLLM #57681: a fused kernel wrong only above some size."""
    y, total = reference(x, *rest)
    y[4096:] = y[:1]
    return y, total


def reads_beyond_the_end(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    beyond = x.as_strided((x.numel() + 1,), (1,), x.storage_offset())[-1]
    return y + 0 * beyond, total


def drops_the_epsilon(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str) -> Any:
    return reference(x, residual, weight, 1e-12, rounding)


def rounds_too_coarsely(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    return y.to(torch.float8_e4m3fn).to(y.dtype), total


def swaps_the_rows(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    return y.flip(0), total


FAULTS: dict[Kernel, str] = {
    raises: "the kernel raises ZeroDivisionError: division by zero",
    hangs: "the kernel did not end within 0.5 s",
    yields_nan: r"result 0: element \[0, 0\] is nan where \S+ is exact; 64 of 64 are wrong",
    reads_what_was_never_written: r"result 0: element \[0, 0\] is nan",
    forgets_the_last_rows: r"at 1 tokens: result 0: element \[0, 0\] is nan",
    wrong_above_4096: r"at 8192 tokens: result 0: element \[\d+, \d+\] is \S+ where \S+ is exact: off by",
    reads_beyond_the_end: "result 0: .* is nan",
    drops_the_epsilon: "result 0: element",
    rounds_too_coarsely: "result 0: element .* off by",
    swaps_the_rows: "at 5 tokens: result 0: element",
}
