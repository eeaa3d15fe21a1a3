"""A fusion whose kernels really do less work than the ops that they stand for, or more: sorting what is sorted already
changes nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect import define, ops
from fuseplan.providers import provider_of
from fuseplan.rules import Rule
from tests.helpers import llama

SORTS = 32
WIDTH = 256
CALLS: list[str] = []


def sorted_often(y: Tensor, times: int) -> Tensor:
    for _ in range(times):
        y = torch.ops.aten.sort.default(y)[0]
    return y


def reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    return sorted_often(ops.rms_norm.reference(x, weight, eps, rounding), SORTS)


norm_sort = define(
    "norm_sort", "(Tensor x, Tensor weight, float eps, str rounding) -> Tensor",
    reference=reference, fake=lambda x, *rest: torch.empty_like(x), samples=ops.rms_norm.samples, fused=True,
)  # fmt: skip


class NormSort(Rule):
    """rms_norm -> sort, again and again  =>  one op.   y = sort(rms_norm(x) * weight)"""

    name, flags, op, core = "norm_sort", (), norm_sort, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return sorted_often(ops.rms_norm(x, weight, eps, rounding), SORTS)

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return norm_sort(x, weight, eps, rounding)


def kernel(name: str, times: int) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
        CALLS.append(name)
        return sorted_often(ops.rms_norm.reference(x, weight, eps, rounding), times)

    return run


def wrong(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    return reference(x, weight, eps, rounding).flip(-1)


def raises(*arguments: Any) -> Tensor:
    raise ZeroDivisionError("division\nby zero")


FAST = provider_of("fast_sorts", {norm_sort: kernel("fast_sorts", 1)})
SLOW = provider_of("slow_sorts", {norm_sort: kernel("slow_sorts", 3 * SORTS)})
WRONG = provider_of("wrong_sorts", {norm_sort: wrong})
RAISING = provider_of("raising_sorts", {norm_sort: raises})
SITE = f"rms_norm {WIDTH} bfloat16 llama"
W = torch.linspace(0.5, 1.5, WIDTH).bfloat16()


def model(x: Tensor) -> Tensor:
    return sorted_often(llama(x, None, W)[0], SORTS)
