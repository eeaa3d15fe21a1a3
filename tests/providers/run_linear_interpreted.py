"""Runs the kernels of linear layers, in 16 bits and in fp8, on the CPU by Triton's interpreter and prints what came of
it, as one JSON object.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuseplan.dialect import Rounding, ScaledLayers
from fuseplan.providers.triton import linear, scaled_linear
from fuseplan.providers.triton.launching import Norm
from fuseplan.providers.triton.linear import Shares, launch, launch_normed
from fuseplan.rules.families.linear import LINEAR_RULES, gated_reference
from fuseplan.rules.families.linear_norm import LINEAR_NORM_RULES, linear_add_rms_norm_reference
from fuseplan.rules.families.scaled_linear import SCALED_LINEAR_RULES
from fuseplan.rules.parts.linear import draw_weight, linears_reference
from fuseplan.rules.parts.scaled_linear import CODES, RESULT, scaled_linears_reference
from fuseplan.testing import check_rule
from tests.providers.run_interpreted import TRITON, Recorded, apart, prepare, wide_products

Layers = tuple[Tensor, list[Tensor], list[Tensor | None]]
"""x, weights and biases."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of some layers."""

    rows: tuple[int, ...] = (3,)
    width: int = 256
    features: tuple[int, ...] = (64, 32)
    biased: tuple[bool, ...] = (False, False, False)
    dtype: torch.dtype = torch.bfloat16
    shares: Any = None
    rounding: str | None = None

    def biases(self, generator: torch.Generator) -> list[Tensor | None]:
        return [
            torch.randn(count, generator=generator).to(self.dtype) if biased else None
            for count, biased in zip(self.features, self.biased, strict=False)
        ]

    def tensors(self) -> Layers:
        generator, cpu = torch.Generator().manual_seed(self.width), torch.device("cpu")
        x = torch.randn(*self.rows, self.width, generator=generator).to(self.dtype)
        weights = [draw_weight((count, self.width), cpu, generator).to(self.dtype) for count in self.features]
        return x, weights, self.biases(generator)


@dataclass(frozen=True, kw_only=True)
class Scaled(Sizes):
    """Of layers in fp8."""

    use_fast_accum: bool = True
    in_all: tuple[bool, ...] = (False, False, False)
    processors: int = 1

    def layers(self) -> ScaledLayers:
        """Codes that use most of fp8's range, and scales of each row that are unlike each other."""
        generator = torch.Generator().manual_seed(self.width)

        def codes(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * 64).clamp(-448, 448).to(CODES)

        def scales(*shape: int) -> Tensor:
            powers = 2.0 ** torch.randint(-9, -5, shape, generator=generator)
            return powers * (1 + torch.rand(shape, generator=generator))

        return ScaledLayers(
            x=codes(*self.rows, self.width), x_scale=scales(*self.rows, 1),
            weights=[codes(count, self.width) for count in self.features],
            scales=[scales(1, 1 if one else count) for count, one in zip(self.features, self.in_all, strict=False)],
            biases=self.biases(generator), use_fast_accum=self.use_fast_accum,
        )  # fmt: skip


COMMON: dict[str, dict[str, Any]] = {
    **{f"{rows} rows": {"rows": (rows,)} for rows in (1, 2, 16, 17, 32)},
    "three dimensions": {"rows": (2, 1, 5)},
    "one layer": {"features": (96,)},
    "three layers": {"features": (96, 32, 16)},
    "uneven features": {"features": (33, 1, 70)},
    "biases": {"biased": (True, True), "features": (40, 24)},
    "one bias": {"biased": (False, True, False), "features": (40, 24, 8)},
}
FEW = Shares(features=32, columns=64, warps=4, stages=2)
SIZES: dict[str, Sizes] = {
    **{
        name: Sizes(**given, shares=FEW if "uneven" in name or "bias" in name else None)
        for name, given in COMMON.items()
    },
    "uneven width": Sizes(width=200, shares=FEW),
    "narrow": Sizes(width=8),
    "float16": Sizes(dtype=torch.float16, features=(40, 24)),
    "small tiles": Sizes(features=(96, 64, 32), shares=FEW),
    "gated": Sizes(features=(64, 64), rounding="llama"),
    "gated in float32": Sizes(features=(64, 64), rounding="fp32"),
    "gated, uneven": Sizes(features=(37, 37), rounding="llama", rows=(2, 9), width=72, shares=FEW),
    "gated with biases": Sizes(features=(48, 48), biased=(True, True), rounding="llama", shares=FEW),
    "gated with one bias": Sizes(features=(48, 48), biased=(True, False), rounding="llama", shares=FEW),
    "gated, float16": Sizes(features=(48, 48), rounding="llama", dtype=torch.float16),
}
PARTS = scaled_linear.Shares(columns=64, stages=2, splits=3)
SCALED: dict[str, Scaled] = {
    **{name: Scaled(**given) for name, given in COMMON.items()},
    "uneven width": Scaled(width=208, shares=scaled_linear.Shares(columns=64, stages=2, splits=1)),
    "narrow": Scaled(width=16),
    "precise sums": Scaled(use_fast_accum=False),
    "a scale of all": Scaled(in_all=(True, True), biased=(True, True)),
    "a scale of all, and of each": Scaled(in_all=(True, False, True), features=(40, 24, 8)),
    "in parts, a scale of all": Scaled(features=(96, 33), in_all=(True, True), shares=PARTS),
    "in parts": Scaled(features=(64,), processors=4, width=1024),
    "in parts, 32 rows": Scaled(features=(70,), processors=9, width=1024, rows=(2, 16)),
    "in parts, three layers": Scaled(features=(96, 300, 16), shares=PARTS, rows=(5,)),
    "in parts, biases": Scaled(features=(96, 64), biased=(True, False), shares=PARTS),
    "in parts, uneven": Scaled(features=(33, 257, 70), width=208, shares=PARTS, rows=(17,)),
}


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def widened(*values: Any) -> list[Any]:
    """In float64, but for codes."""
    return [each.double() if isinstance(each, Tensor) and each.dtype is not CODES else each for each in values]


def check_alike(got: Any, wanted: Any, dtype: torch.dtype) -> None:
    for each, want in zip(got, wanted, strict=True):
        assert (each.shape, each.dtype, each.is_contiguous()) == (want.shape, dtype, True)


def off(sizes: Sizes, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[float]:
    """The largest differences to float64 of the kernel and of the reference, in units in the last place at 1."""

    def computed(*tensors: Any) -> Any:
        plain = sizes.rounding is None
        return as_tuple(linears_reference(*tensors) if plain else gated_reference(*tensors, sizes.rounding))

    exact = computed(*widened(x, *weights, *biases))
    got = launch(x, weights, biases, sizes.rounding, sizes.shares)
    check_alike(got, exact, sizes.dtype)
    return [
        max(apart(each, want, sizes.dtype) for each, want in zip(found, exact, strict=True))
        for found in (got, computed(x, *weights, *biases))
    ]


def off_scaled(sizes: Scaled, layers: ScaledLayers) -> list[float]:
    """The same as shares of the largest in a row."""
    arguments = (layers.x_scale, *layers.weights, *layers.scales, *layers.biases, layers.use_fast_accum)
    exact = as_tuple(scaled_linears_reference(layers.x, *widened(*arguments)))
    with mock.patch.object(scaled_linear, "multiprocessors", return_value=sizes.processors):
        got, again = (scaled_linear.launch(layers, sizes.shares) for _ in range(2))
    check_alike(got, exact, RESULT)
    assert all(map(torch.equal, got, again))
    most = [want.abs().amax(-1, keepdim=True) for want in exact]
    return [
        max(apart(each / top, want / top, RESULT) for each, want, top in zip(found, exact, most, strict=True))
        for found in (got, as_tuple(scaled_linears_reference(layers.x, *arguments)))
    ]


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
        exact = linear_add_rms_norm_reference(*widened(x, weight, bias, *own))
        assert [(each.shape, each.dtype, each.stride()) for each in got] == [
            (each.shape, each.dtype, each.stride()) for each in wanted
        ]
        off = [
            max(apart(each, want, torch.bfloat16) for each, want in zip(found, exact, strict=True))
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


def scaled_layouts() -> dict[str, ScaledLayers]:
    layers = Scaled(rows=(5,), features=(40, 24), width=96).layers()
    changed: dict[str, dict[str, Any]] = {
        "rows of a larger tensor": {"x": inside(layers.x)},
        "weights of larger ones": {"weights": [inside(each) for each in layers.weights]},
        "scales of a larger tensor": {"x_scale": inside(layers.x_scale)[:, :1]},
        "scales in columns": {"scales": [each.t().contiguous().t() for each in layers.scales]},
        "one row expanded": {"x": layers.x[:1].expand(5, -1)},
    }
    return {name: dataclasses.replace(layers, **each) for name, each in changed.items()}


def special_values() -> list[bool]:
    """Whether infinities and NaN stay in their rows, and zero rows and features yield nothing. Of codes the interpreter
    knows no NaN.
    """
    sizes = {"rows": (4,), "features": (40, 24)}
    x, weights, biases = Sizes(**sizes).tensors()  # type: ignore[arg-type]
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    pairs = [*zip(launch(x, weights, biases), linears_reference(x, *weights, *biases), strict=True)]
    layers = Scaled(**sizes).layers()  # type: ignore[arg-type]
    layers.x_scale[1], layers.x_scale[2], layers.scales[1][0, 3] = torch.inf, torch.nan, torch.nan
    wanted = scaled_linears_reference(layers.x, layers.x_scale, *layers.weights, *layers.scales, *layers.biases, True)
    scaled = [*zip(scaled_linear.launch(layers), wanted, strict=True)]
    none = dataclasses.replace(layers, x=layers.x[:0], x_scale=layers.x_scale[:0])
    return [
        *(torch.equal(got.isnan(), want.isnan()) for got, want in (*pairs, *scaled)),
        *(torch.equal(got.isinf(), want.isinf()) for got, want in scaled),
        *([each.shape for each in empty] == [(0, 40), (0, 24)]
          for empty in (launch(x[:0], weights, biases), scaled_linear.launch(none))),
    ]  # fmt: skip


def fitting() -> list[int]:
    """Bytes of shared memory that a program takes where it can have 64 KiB, by shares and rows."""
    found = []
    for features, rows in itertools.product((4096, 6144, 28672), (16, 32)):
        shares = Shares.of(features, rows, 132).fitting(65536, rows, 2)
        found.append(shares.stages * (shares.features + rows) * shares.columns * 2)
    return found


def shared() -> list[list[int]]:
    """[parts, stages, bytes of shared memory that a program takes] by the features of an H200's layers, where a program
    can have 227 KiB, and 64.
    """
    found = []
    for size, features, width in (
        (232448, 4096, 4096), (232448, 6144, 4096), (232448, 28672, 4096), (65536, 4096, 200),
    ):  # fmt: skip
        shares = scaled_linear.Shares.of(-(-features // 64), width, 32, 132, size)
        found.append([shares.splits, shares.stages, shares.stages * (64 + 32) * shares.columns])
    return found


def variants() -> list[int]:
    """How many sets of constants each kernel is compiled for, of 1 to 32 rows."""
    plain, scaled = Recorded(), Recorded()
    (_, weights, biases), layers = Sizes().tensors(), Scaled().layers()
    with (
        mock.patch.object(linear, "_linears", plain), mock.patch.object(scaled_linear, "_scaled_linears", scaled),
    ):  # fmt: skip
        for rows in range(1, 33):
            x = torch.zeros(rows, 256)
            launch(x.bfloat16(), weights, biases)
            scaled_linear.launch(dataclasses.replace(layers, x=x.to(CODES), x_scale=torch.ones(rows, 1)))
    return [plain.unlike, scaled.unlike]


def main() -> None:
    prepare()
    wide_products()
    plain, scaled = (
        [check_rule(rule, providers=[TRITON]) for rule in rules]
        for rules in ((*LINEAR_RULES, *LINEAR_NORM_RULES), SCALED_LINEAR_RULES)
    )
    result = {
        "sizes": {name: off(sizes, *sizes.tensors()) for name, sizes in SIZES.items()},
        "scaled": {name: off_scaled(sizes, sizes.layers()) for name, sizes in SCALED.items()},
        "normed": dict(normed()),
        "layouts": {name: off(sizes, *arguments) for name, sizes, arguments in layouts()},
        "scaled layouts": {name: off_scaled(Scaled(), layers) for name, layers in scaled_layouts().items()},
        "on AMD": on_amd(), "special values": special_values(), "fitting": fitting(), "shared": shared(),
        "variants": variants(),
        "cases": [each.cases["triton"] for each in (*plain, *scaled)],
        "refused": [line for each in plain for line in each.refused],
        "refused in fp8": [line for each in scaled for line in each.refused],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
