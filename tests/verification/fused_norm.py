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


def provider(kernel: Kernel, **arguments: Any) -> Provider:
    """A provider under a name of its own: torch keeps every kernel that it was ever given."""
    arguments.setdefault("uuid", kernel.__name__)
    return provider_of(f"{kernel.__name__}_{next(_numbers)}", {add_norm_relu: kernel}, cost=0.0, **arguments)


def right(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    return reference(x, residual, weight, eps, rounding)


def raises(*arguments: Any) -> Any:
    raise ZeroDivisionError("division\nby zero")


def exits(*arguments: Any) -> Any:
    raise SystemExit(3)


def hangs(*arguments: Any) -> Any:
    while True:
        time.sleep(0.05)


def yields_nan(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    return torch.full_like(y, float("nan")), total


def another_shape(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    return y[..., :-1].contiguous(), total


def another_dtype(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    return y.float(), total


def other_strides(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    wide = y.new_empty(*y.shape[:-1], 2 * y.shape[-1])[..., : y.shape[-1]]
    return wide.copy_(y), total


def too_few_results(x: Tensor, *rest: Any) -> Tensor:
    return reference(x, *rest)[0]


def too_much_memory(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    torch.empty(2**46, dtype=torch.uint8)
    return reference(x, *rest)


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


def writes_to_an_argument(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, residual, *rest)
    residual.copy_(total)
    return y, total.clone()


def yields_an_argument(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, residual, *rest)
    residual.copy_(total)
    return y, residual


def yields_one_twice(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, _ = reference(x, *rest)
    return y, y


def reads_beyond_the_end(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = reference(x, *rest)
    beyond = x.as_strided((x.numel() + 1,), (1,), x.storage_offset())[-1]
    return y + 0 * beyond, total


def writes_beyond_the_end(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    x.as_strided((x.numel() + 1,), (1,), x.storage_offset())[-1] = 0
    return reference(x, *rest)


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
    exits: r"the kernel calls sys.exit\(3\)",
    hangs: "the kernel did not end within 0.5 s",
    yields_nan: r"result 0: element \[0, 0\] is nan where \S+ is exact; 64 of 64 are wrong",
    another_shape: r"result 0 is bfloat16\[1, 63\] with strides .*, and the unfused ops yield bfloat16\[1, 64\]",
    another_dtype: r"result 0 is float32\[1, 64\] .*, and the unfused ops yield bfloat16\[1, 64\]",
    other_strides: r"result 0 is bfloat16\[\d+, 64\] with strides \(128, 1\), and its fake implementation yields",
    too_few_results: r"the kernel yields 1 values \(Tensor\) where the schema has 2 tensors",
    too_much_memory: "the kernel needs more memory than there is",
    reads_what_was_never_written: r"result 0: element \[0, 0\] is nan",
    forgets_the_last_rows: r"at 1 tokens: result 0: element \[0, 0\] is nan",
    wrong_above_4096: r"at 8192 tokens: result 0: element \[\d+, \d+\] is \S+ where \S+ is exact: off by",
    writes_to_an_argument: "the kernel writes to its argument residual, and its schema says that it doesn't",
    yields_an_argument: "result 1 of the kernel shares memory with an argument",
    yields_one_twice: "result 1 of the kernel shares memory with result 0",
    reads_beyond_the_end: "result 0: .* is nan",
    writes_beyond_the_end: "the kernel writes beyond the end of its argument x",
    drops_the_epsilon: "result 0: element",
    rounds_too_coarsely: "result 0: element .* off by",
    swaps_the_rows: "at 5 tokens: result 0: element",
}
