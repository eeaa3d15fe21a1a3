"""Runs the kernels of linear layers in fp8 on the CPU by Triton's interpreter and prints what came of it, as one JSON
object.

A process of its own: whether a kernel is interpreted is settled when Triton is imported, by `TRITON_INTERPRET=1`.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fuseplan.dialect import ScaledLayers
from fuseplan.providers.triton import scaled_linear
from fuseplan.providers.triton.scaled_linear import Shares, launch
from fuseplan.rules.families.scaled_linear import SCALED_LINEAR_RULES
from fuseplan.rules.parts.scaled_linear import CODES, RESULT, scaled_linears_reference
from fuseplan.testing import check_rule
from tests.providers.run_interpreted import TRITON, Recorded, prepare, wide_products
from tests.providers.run_linear_interpreted import inside


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of some layers."""

    rows: tuple[int, ...] = (3,)
    width: int = 256
    features: tuple[int, ...] = (64, 32)
    biased: tuple[bool, ...] = (False, False, False)
    use_fast_accum: bool = True
    in_all: tuple[bool, ...] = (False, False, False)
    processors: int = 1
    shares: Shares | None = None

    def layers(self) -> ScaledLayers:
        """Codes that use most of fp8's range, and scales of each row that are unlike each other."""
        generator = torch.Generator().manual_seed(self.width)

        def codes(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * 64).clamp(-448, 448).to(CODES)

        def scales(*shape: int) -> torch.Tensor:
            return 2.0 ** torch.randint(-9, -5, shape, generator=generator) * (
                1 + torch.rand(shape, generator=generator)
            )

        return ScaledLayers(
            x=codes(*self.rows, self.width), x_scale=scales(*self.rows, 1),
            weights=[codes(count, self.width) for count in self.features],
            scales=[scales(1, 1 if one else count) for count, one in zip(self.features, self.in_all, strict=False)],
            biases=[
                torch.randn(count, generator=generator).to(RESULT) if biased else None
                for count, biased in zip(self.features, self.biased, strict=False)
            ],
            use_fast_accum=self.use_fast_accum,
        )  # fmt: skip


PARTS = Shares(columns=64, stages=2, splits=3)
SIZES: dict[str, Sizes] = {
    **{f"{rows} rows": Sizes(rows=(rows,)) for rows in (1, 2, 16, 17, 32)},
    "three dimensions": Sizes(rows=(2, 1, 5)),
    "one layer": Sizes(features=(96,)),
    "three layers": Sizes(features=(96, 32, 16)),
    "uneven features": Sizes(features=(33, 1, 70)),
    "uneven width": Sizes(width=208, shares=Shares(columns=64, stages=2, splits=1)),
    "narrow": Sizes(width=16),
    "precise sums": Sizes(use_fast_accum=False),
    "biases": Sizes(biased=(True, True), features=(40, 24)),
    "one bias": Sizes(biased=(False, True, False), features=(40, 24, 8)),
    "a scale of all": Sizes(in_all=(True, True), biased=(True, True)),
    "a scale of all, and of each": Sizes(in_all=(True, False, True), features=(40, 24, 8)),
    "in parts, a scale of all": Sizes(features=(96, 33), in_all=(True, True), shares=PARTS),
    "in parts": Sizes(features=(64,), processors=4, width=1024),
    "in parts, 32 rows": Sizes(features=(70,), processors=9, width=1024, rows=(2, 16)),
    "in parts, three layers": Sizes(features=(96, 300, 16), shares=PARTS, rows=(5,)),
    "in parts, biases": Sizes(features=(96, 64), biased=(True, False), shares=PARTS),
    "in parts, uneven": Sizes(features=(33, 257, 70), width=208, shares=PARTS, rows=(17,)),
}


def off(sizes: Sizes, layers: ScaledLayers) -> list[float]:
    """The largest differences to float64 of the kernel and of the reference, as shares of the largest in a row, in
    units in the last place.
    """
    arguments = (*layers.weights, *layers.scales, *layers.biases, layers.use_fast_accum)

    def computed(x_scale: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        found = scaled_linears_reference(layers.x, x_scale, *rest)
        return found if isinstance(found, tuple) else (found,)

    wide = [each.double() if isinstance(each, torch.Tensor) and each.dtype is not CODES else each for each in arguments]
    exact = computed(layers.x_scale.double(), *wide)

    def apart(found: tuple[torch.Tensor, ...]) -> float:
        shares = [
            ((got.double() - want).abs() / want.abs().amax(-1, keepdim=True)).max()
            for got, want in zip(found, exact, strict=True)
        ]
        return float(max(shares)) / torch.finfo(RESULT).eps

    with mock.patch.object(scaled_linear, "multiprocessors", return_value=sizes.processors):
        got = launch(layers, sizes.shares)
        again = launch(layers, sizes.shares)
    assert [(each.shape, each.dtype, each.is_contiguous()) for each in got] == [
        (each.shape, RESULT, True) for each in exact
    ]
    assert all(map(torch.equal, got, again))
    return [apart(got), apart(computed(layers.x_scale, *arguments))]


def layouts() -> dict[str, list[float]]:
    """Other layouts."""
    sizes = Sizes(rows=(5,), features=(40, 24), width=96)
    layers = sizes.layers()

    with_weights = [inside(each) for each in layers.weights]
    columns = [each.t().contiguous().t() for each in layers.scales]
    found = {
        "rows of a larger tensor": dataclasses.replace(layers, x=inside(layers.x)),
        "weights of larger ones": dataclasses.replace(layers, weights=with_weights),
        "scales of a larger tensor": dataclasses.replace(layers, x_scale=inside(layers.x_scale)[:, :1]),
        "scales in columns": dataclasses.replace(layers, scales=columns),
        "one row expanded": dataclasses.replace(layers, x=layers.x[:1].expand(5, -1)),
    }
    return {name: off(sizes, each) for name, each in found.items()}


def special_values() -> list[bool]:
    """Whether infinite and NaN scales stay in their rows, and zero rows and features yield nothing. Of codes the
    interpreter knows no NaN.
    """
    layers = Sizes(rows=(4,), features=(40, 24)).layers()
    layers.x_scale[1], layers.x_scale[2], layers.scales[1][0, 3] = torch.inf, torch.nan, torch.nan
    arguments = (layers.x, layers.x_scale, *layers.weights, *layers.scales, *layers.biases, True)
    same = [
        torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        for got, want in zip(launch(layers), scaled_linears_reference(*arguments), strict=True)
    ]
    empty = launch(dataclasses.replace(layers, x=layers.x[:0], x_scale=layers.x_scale[:0]))
    return [*same, [each.shape for each in empty] == [(0, 40), (0, 24)]]


def shared() -> list[list[int]]:
    """[parts, stages, bytes of shared memory that a program takes] by the features of an H200's layers, where a program
    can have 227 KiB, and 64.
    """
    found = []
    for size, features, width in (
        (232448, 4096, 4096),
        (232448, 6144, 4096),
        (232448, 28672, 4096),
        (65536, 4096, 200),
    ):
        shares = Shares.of(-(-features // 64), width, 32, 132, size)
        found.append([shares.splits, shares.stages, shares.stages * (64 + 32) * shares.columns])
    return found


def variants() -> int:
    """How many sets of constants the kernel is compiled for, of 1 to 32 rows."""
    recorded, layers = Recorded(), Sizes().layers()
    with mock.patch.object(scaled_linear, "_scaled_linears", recorded):
        for rows in range(1, 33):
            launch(dataclasses.replace(layers, x=torch.zeros(rows, 256).to(CODES), x_scale=torch.ones(rows, 1)))
    return recorded.unlike


def main() -> None:
    prepare()
    wide_products()
    checked = [check_rule(rule, providers=[TRITON]) for rule in SCALED_LINEAR_RULES]
    result = {
        "sizes": {name: off(sizes, sizes.layers()) for name, sizes in SIZES.items()}, "layouts": layouts(),
        "special values": special_values(), "shared": shared(), "variants": variants(),
        "cases": [each.cases["triton"] for each in checked],
        "refused": [line for each in checked for line in each.refused],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
