"""Quantisations that differ from those of an op in one thing, on which their numbers depend: each is left as it is, or
its op computes the same codes and scales bit by bit.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect.raising import canonicalize
from tests.helpers import quickly_traced, randn

FP8, MOST, ROWS, WIDTH, GROUP = torch.float8_e4m3fn, 448.0, 6, 256, 64
Function = Callable[..., tuple[Tensor, ...]]
JUST_ABOVE = torch.nextafter(torch.tensor(MOST * 2**-9), torch.tensor(math.inf)).item()
"""Whose quotient by 448 log2 takes for a power of two."""


def of_rows(bound: Callable[..., Tensor]) -> Function:
    def function(x: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        scale = bound(x.abs().amax(-1, keepdim=True).float(), *bounds) / MOST
        return (x.float() / scale).clamp(-MOST, MOST).to(FP8), scale

    return function


def of_powers(bound: Callable[..., Tensor]) -> Function:
    def function(x: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        groups = x.view(-1, WIDTH // GROUP, GROUP)
        largest = bound(groups.abs().amax(-1, keepdim=True).float(), *bounds)
        scale = torch.exp2(torch.ceil(torch.log2(largest / MOST)))
        return (groups / scale).clamp(-MOST, MOST).to(FP8).view(x.shape), scale.squeeze(-1)

    return function


def microscaled(spread: Callable[[Tensor], Tensor] = lambda scale: scale, alpha: int = 1) -> Function:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        groups = x.reshape(-1, x.shape[-1] // 32, 32)
        largest = groups.abs().amax(-1).unsqueeze(-1).float()
        power = torch.sub((torch.bitwise_right_shift(largest.view(torch.int32), 23) & 255) - 127, 8, alpha=alpha)
        exponent = torch.where(largest.isnan(), 255, (power.clamp(-127, 128) + 127).to(torch.uint8))
        scale = torch.bitwise_left_shift(exponent.to(torch.int32), 23).view(torch.float32)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (groups.float() / spread(scale)).to(FP8), exponent.squeeze(-1)

    return function


def every_second(x: Tensor) -> tuple[Tensor, ...]:
    groups = x.view(-1, WIDTH // GROUP, GROUP)
    scale = groups.abs().float().amax(-1).clamp(1e-4) / MOST
    codes = (groups / scale.unsqueeze(-1)).clamp(-MOST, MOST).to(FP8).view(x.shape)
    rows, count = scale.shape
    laid_out = torch.zeros((2 * count, rows)).t()
    laid_out[:, ::2] = scale
    return codes, laid_out[:, :count]


def one(value: float) -> Tensor:
    return torch.tensor([value])


def both(largest: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.minimum(torch.minimum(largest, first), second)


CASES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "two tensors as bounds": (of_rows(both), (randn(ROWS, WIDTH), one(0.5), one(2.0))),
    "a tensor below 0 as bound": (of_rows(torch.minimum), (randn(ROWS, WIDTH), one(-1.0))),
    "a bound of 0": (of_rows(lambda largest: largest.clamp(max=0.0)), (randn(ROWS, WIDTH),)),
    "a bound whose quotient is 0": (of_rows(lambda largest: largest.clamp(max=1e-43)), (randn(ROWS, WIDTH),)),
    "powers up to a number": (of_powers(lambda largest: largest.clamp(max=JUST_ABOVE)), (randn(ROWS, WIDTH),)),
    "powers up to a tensor": (of_powers(torch.minimum), (randn(ROWS, WIDTH), one(JUST_ABOVE))),
    "scales of another axis": (
        microscaled(lambda scale: scale.view(scale.shape[0], 1, scale.shape[1])), (_uneven := randn(ROWS, 1024),)
    ),
    "scales with a dimension more": (microscaled(lambda scale: scale.view(3, 1, 8, 1)), (randn(3, WIDTH),)),
    "exponents less 2 * 8": (microscaled(alpha=2), (randn(ROWS, WIDTH),)),
    "every second column": (every_second, (randn(4, WIDTH),)),
}  # fmt: skip
_uneven *= torch.exp2(
    torch.randint(-6, 6, _uneven.shape, generator=torch.Generator().manual_seed(0)).float()
).bfloat16()


@pytest.mark.parametrize("case", sorted(CASES))
def test_codes_and_scales_stay(case: str) -> None:
    function, inputs = CASES[case]
    graph = quickly_traced(function, *inputs)
    constants: dict[str, Any] = {}
    ours, theirs = fx.GraphModule(constants, canonicalize(graph).graph), fx.GraphModule(constants, graph)
    for got, wanted in zip(ours(*inputs), theirs(*inputs), strict=True):
        assert torch.equal(got.float().nan_to_num(nan=1e9), wanted.float().nan_to_num(nan=1e9))
