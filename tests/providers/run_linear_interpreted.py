"""Runs the kernel of linear layers on the CPU by Triton's interpreter and prints what came of it, as one JSON object.

A process of its own: whether a kernel is interpreted is settled when Triton is imported, by `TRITON_INTERPRET=1`.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuseplan.dialect import Rounding
from fuseplan.providers.triton import linear
from fuseplan.providers.triton.launching import Norm
from fuseplan.providers.triton.linear import Shares, launch, launch_normed
from fuseplan.rules.families.linear import LINEAR_RULES, gated_reference
from fuseplan.rules.families.linear_norm import LINEAR_NORM_RULES, linear_add_rms_norm_reference
from fuseplan.rules.parts.linear import draw_weight, linears_reference
from fuseplan.testing import check_rule
from tests.providers.run_interpreted import TRITON, Recorded, prepare, wide_products


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of some layers."""

    rows: tuple[int, ...] = (3,)
    width: int = 256
    features: tuple[int, ...] = (64, 32)
    biased: tuple[bool, ...] = (False, False, False)
    dtype: torch.dtype = torch.bfloat16
    rounding: str | None = None
    shares: Shares | None = None

    def tensors(self) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """x, weights and biases."""
        generator = torch.Generator().manual_seed(self.width)
        cpu = torch.device("cpu")
        x = torch.randn(*self.rows, self.width, generator=generator).to(self.dtype)
        weights = [draw_weight((count, self.width), cpu, generator).to(self.dtype) for count in self.features]
        biases = [
            torch.randn(count, generator=generator).to(self.dtype) if biased else None
            for count, biased in zip(self.features, self.biased, strict=False)
        ]
        return x, weights, biases


FEW = Shares(features=32, columns=64, warps=4, stages=2)
SIZES: dict[str, Sizes] = {
    **{f"{rows} rows": Sizes(rows=(rows,)) for rows in (1, 2, 16, 17, 32)},
    "three dimensions": Sizes(rows=(2, 1, 5)),
    "one layer": Sizes(features=(96,)),
    "three layers": Sizes(features=(96, 32, 16)),
    "uneven features": Sizes(features=(33, 1, 70), shares=FEW),
    "uneven width": Sizes(width=200, shares=FEW),
    "narrow": Sizes(width=8),
    "float16": Sizes(dtype=torch.float16, features=(40, 24)),
    "biases": Sizes(biased=(True, True), features=(40, 24), shares=FEW),
    "one bias": Sizes(biased=(False, True, False), features=(40, 24, 8), shares=FEW),
    "small tiles": Sizes(features=(96, 64, 32), shares=FEW),
    "gated": Sizes(features=(64, 64), rounding="llama"),
    "gated in float32": Sizes(features=(64, 64), rounding="fp32"),
    "gated, uneven": Sizes(features=(37, 37), rounding="llama", rows=(2, 9), width=72, shares=FEW),
    "gated with biases": Sizes(features=(48, 48), biased=(True, True), rounding="llama", shares=FEW),
    "gated with one bias": Sizes(features=(48, 48), biased=(True, False), rounding="llama", shares=FEW),
    "gated, float16": Sizes(features=(48, 48), rounding="llama", dtype=torch.float16),
}


def off(sizes: Sizes, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[float]:
    """The largest differences to float64 of the kernel and of the reference, in units in the last place at 1."""

    def computed(*tensors: Any) -> Any:
        return linears_reference(*tensors) if sizes.rounding is None else gated_reference(*tensors, sizes.rounding)

    def apart(found: Any) -> float:
        pairs = zip(found if isinstance(found, tuple) else (found,), exact, strict=True)
        return max(float((each.double() - want).abs().max()) for each, want in pairs) / torch.finfo(sizes.dtype).eps

    wide = computed(*(None if each is None else each.double() for each in (x, *weights, *biases)))
    exact = wide if isinstance(wide, tuple) else (wide,)
    got = launch(x, weights, biases, sizes.rounding, sizes.shares)
    assert [(each.shape, each.dtype, each.is_contiguous()) for each in got] == [
        (each.shape, sizes.dtype, True) for each in exact
    ]
    return [apart(got), apart(computed(x, *weights, *biases))]


NORMED = {
    "as one": (1, (5,), 1024), "two parts": (4, (1,), 1024), "two parts, 32 rows": (4, (2, 16), 1024),
    "three parts": (6, (17,), 1152), "four parts": (100, (3,), 1024), "width that can't be split": (100, (3,), 200),
}  # fmt: skip
"""(processors, leading dimensions, width) by name."""


def normed() -> Iterator[tuple[str, list[Any]]]:
    """(name, [programs that share the width, the largest differences to float64 of the kernels and of the reference])
    of 128 features with a norm behind them.
    """
    generator = torch.Generator().manual_seed(0)
    for (name, (processors, rows, width)), biased, rounding in itertools.product(
        NORMED.items(), (False, True), (Rounding.LLAMA, Rounding.GPT_OSS, Rounding.VLLM_FP32_RESIDUAL)
    ):
        x, (weight,), (bias,) = Sizes(rows=rows, width=width, features=(128,), biased=(biased,)).tensors()
        residual = torch.randn(*rows, 128, generator=generator)
        residual = residual.to(torch.bfloat16 if rounding.rounds_residual else torch.float32)
        norm_weight = (1 + torch.randn(128, generator=generator) / 8).bfloat16()
        own = (residual, norm_weight, 1e-5, rounding.value)
        with mock.patch.object(linear, "multiprocessors", lambda device, count=processors: count):
            splits = Shares.shared(128, width, 32, processors).splits
            got = launch_normed(x, weight, bias, residual, Norm(weight=norm_weight, eps=1e-5, rounding=rounding))
        wanted = linear_add_rms_norm_reference(x, weight, bias, *own)
        wide: list[Any] = [None if each is None else each.double() for each in (x, weight, bias, residual, norm_weight)]
        wide += [1e-5, rounding.value]
        exact = linear_add_rms_norm_reference(*wide)
        assert [(each.shape, each.dtype, each.stride()) for each in got] == [
            (each.shape, each.dtype, each.stride()) for each in wanted
        ]
        off = [
            max(float((each.double() - want).abs().max()) for each, want in zip(found, exact, strict=True)) * 128
            for found in (got, wanted)
        ]
        yield f"{name}{' biased' * biased} {rounding}", [splits, *off]


def inside(value: Tensor) -> Tensor:
    """The same as a part of a larger tensor, in which what belongs to nobody is NaN."""
    whole = torch.full((value.shape[0] + 2, value.shape[1] + 32), torch.nan).to(value.dtype)
    return whole[1:-1, 16:-16].copy_(value)


def layouts() -> Iterator[tuple[str, Sizes, tuple[Any, Any, Any]]]:
    """(name, sizes, arguments) of other layouts."""
    sizes = Sizes(rows=(5,), features=(40, 24), width=96)
    x, weights, biases = sizes.tensors()

    yield "rows of a larger tensor", sizes, (inside(x), weights, biases)
    yield "weights of larger ones", sizes, (x, [inside(each) for each in weights], biases)
    yield "weights of one tensor", sizes, (x, list(torch.cat(weights).split(sizes.features)), biases)
    yield "columns apart", sizes, (x.T.contiguous().T, weights, biases)
    yield "one row expanded", sizes, (x[:1].expand(5, -1), weights, biases)
    yield "one weight twice", Sizes(features=(40, 40)), (x, [weights[0], weights[0]], biases)


def on_amd() -> list[bool]:
    """Whether gate and up that are read one after the other, as on AMD's GPUs, yield the same bits."""
    found = []
    for sizes in (each for each in SIZES.values() if each.rounding is not None):
        arguments = (*sizes.tensors(), sizes.rounding, sizes.shares)
        (wanted,) = launch(*arguments)
        with mock.patch.object(linear, "is_amd", return_value=True):
            found.append(torch.equal(launch(*arguments)[0], wanted))
    return found


def special_values() -> list[bool]:
    """Whether infinities and NaN stay in their rows, and zero rows and features yield nothing."""
    sizes = Sizes(rows=(4,), features=(40, 24))
    x, weights, biases = sizes.tensors()
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    found = launch(x, weights, biases)
    wanted = linears_reference(x, *weights, *biases)
    same = [torch.equal(got.isnan(), want.isnan()) for got, want in zip(found, wanted, strict=True)]
    empty = launch(x[:0], weights, biases)
    return [*same, [each.shape for each in empty] == [(0, 40), (0, 24)]]


def fitting() -> list[int]:
    """Bytes of shared memory that a program takes where it can have 64 KiB, by shares and rows."""
    found = []
    for features in (4096, 6144, 28672):
        for rows in (16, 32):
            shares = Shares.of(features, rows, 132).fitting(65536, rows, 2)
            found.append(shares.stages * (shares.features + rows) * shares.columns * 2)
    return found


def variants() -> int:
    """How many sets of constants the kernel is compiled for, of 1 to 32 rows."""
    recorded, sizes = Recorded(), Sizes()
    _, weights, biases = sizes.tensors()
    with mock.patch.object(linear, "_linears", recorded):
        for rows in range(1, 33):
            launch(torch.zeros(rows, sizes.width, dtype=sizes.dtype), weights, biases)
    return recorded.unlike


def main() -> None:
    prepare()
    wide_products()
    checked = [check_rule(rule, providers=[TRITON]) for rule in (*LINEAR_RULES, *LINEAR_NORM_RULES)]
    result = {
        "sizes": {name: off(sizes, *sizes.tensors()) for name, sizes in SIZES.items()},
        "normed": dict(normed()),
        "layouts": {name: off(sizes, *arguments) for name, sizes, arguments in layouts()},
        "on AMD": on_amd(), "special values": special_values(), "fitting": fitting(), "variants": variants(),
        "cases": [each.cases["triton"] for each in checked],
        "refused": [line for each in checked for line in each.refused],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
