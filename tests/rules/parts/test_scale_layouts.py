"""Scales of groups column by column, padded and packed, as DeepGEMM's helpers in plain torch leave them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.ops import ScaleLayout, in_rows, lay_out
from tests.helpers import llama, post_grad, quickly_traced, randn
from tests.rules.planning import compiled_and_eager

aten = torch.ops.aten
FP8, GROUP, WIDTH = torch.float8_e4m3fn, 64, 320
W = 1 + randn(WIDTH, seed=9) / 10
Layout = Callable[[Tensor], Tensor]


def height(rows: int) -> int:
    return (rows + 3) // 4 * 4


def columns(scale: Tensor) -> Tensor:
    return scale.transpose(-2, -1).contiguous().transpose(-1, -2)


def aligned(scale: Tensor) -> Tensor:
    """Memory for one more dimension, of which there is one matrix."""
    rows, groups = scale.shape
    moved = torch.empty((1, groups, height(rows)), dtype=scale.dtype).transpose(1, 2)
    moved[:, :rows, :] = scale.unsqueeze(0)
    return moved[:, :rows, :].squeeze(0)


def aligned_in_zeros(scale: Tensor) -> Tensor:
    rows, groups = scale.shape
    moved = torch.zeros((groups, height(rows)), dtype=scale.dtype).t()
    moved[:rows] = scale
    return moved[:rows]


def packed(scale: Tensor) -> Tensor:
    """Exponents as bytes in zeros, four of them an int32, column by column."""
    exponents = (scale.view(torch.int) >> 23).to(torch.uint8)
    rows, groups = scale.shape
    words = (groups + 3) // 4
    padded = torch.zeros((1, height(rows), 4 * words), dtype=torch.uint8)
    padded[:, :rows, :groups] = exponents
    integers = padded.view(-1).view(dtype=torch.int).view(1, height(rows), words)
    moved = torch.zeros((1, words, height(rows)), dtype=torch.int).mT
    moved[:, :, :] = integers
    return moved[:, :rows, :].squeeze(0)


def quantised(layout: Layout, x: Tensor, *, both: bool = False) -> tuple[Tensor, ...]:
    groups = x.view(-1, x.shape[-1] // GROUP, GROUP)
    scale = groups.abs().float().amax(-1).clamp(1e-4) / 448.0
    scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (groups * (1.0 / scale.unsqueeze(-1))).to(FP8).view(x.shape)
    return (codes, layout(scale), *([scale] if both else []))


LAYOUTS: dict[Layout, str] = {columns: "columns", aligned: "aligned", aligned_in_zeros: "aligned", packed: "packed"}
CODED = (2, 3)
"""The shape of rows that code is made of; other graphs are interpreted."""
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.__name__)


@pytest.mark.sampled
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows", [4, 7])
@every_layout
def test_a_layout_is_the_ops(layout: Layout, rows: int, dynamic: bool) -> None:
    graph = quickly_traced(lambda x: quantised(layout, x), randn(rows, WIDTH), dynamic=dynamic)
    raised = canonicalize(graph)
    (node,) = raised.calls(ops.per_token_group_fp8_quant.overload)
    assert node.args[-1] == LAYOUTS[layout]
    assert not list(raised.calls(aten.amax.default, aten.clone.default, aten.copy.default, aten.slice_scatter.default))
    if not dynamic:
        ours, theirs = fx.GraphModule({}, raised.graph), fx.GraphModule({}, graph)
        x = randn(rows, WIDTH, seed=2) * torch.tensor([1e-3, 1e3, 1.0, 0.0, 7.0, 1.0, 1.0])[:rows, None].bfloat16()
        for got, wanted in zip(ours(x), theirs(x), strict=True):
            assert (got.dtype, got.stride()) == (wanted.dtype, wanted.stride())
            assert torch.equal(got.float(), wanted.float())


@pytest.mark.sampled
@pytest.mark.parametrize("shape", [(7,), (7, 1), (2, 3)], ids=str)
@every_layout
def test_it_is_fused_with_the_norm(layout: Layout, shape: tuple[int, ...]) -> None:
    """Scales are a matrix, whatever dimensions the rows have."""
    report = check_fused(lambda x: quantised(layout, llama(x, None, W)[0]), shape)
    assert report.fused["norm_quant"] == 1


def check_fused(function: Callable[[Tensor], Any], shape: tuple[int, ...]) -> fuseplan.Report:
    """Results of rows of a shape are the same, bit for bit and in their layout."""
    report, pairs = compiled_and_eager(
        function, randn(*shape, WIDTH), policy="ordered(norm_quant)", coded=shape == CODED
    )
    for got, wanted in pairs:
        assert (got.dtype, got.stride()) == (wanted.dtype, wanted.stride())
        assert torch.equal(got.float(), wanted.float())
    return report


@torch.library.custom_op("scale_layout_tests::product", mutates_args=())
def product(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float().sum(-1) + scale.sum()


@product.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("scale_layout_tests::written", mutates_args=("codes",))
def written(codes: Tensor, scale: Tensor) -> Tensor:
    codes.copy_(-codes.float())
    return scale.sum()


@written.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(())


@pytest.mark.sampled
@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=str)
@every_layout
def test_layers_with_products_of_their_own_share_the_codes(layout: Layout, shape: tuple[int, ...]) -> None:
    """Each of them quantises what it reads."""

    def layers(x: Tensor) -> list[Tensor]:
        y = llama(x, None, W)[0]
        pairs = [quantised(layout, y) for _ in range(3)]
        return [product(codes.view(-1, WIDTH), scale) * number for number, (codes, scale) in enumerate(pairs, 1)]

    report = check_fused(layers, shape)
    assert report.fused["norm_quant"] == 1
    assert not report.graphs[0].refusals


def test_codes_that_one_layer_writes_to_are_its_own() -> None:
    def layers(x: Tensor) -> list[Tensor]:
        (first, scale), (second, other) = (quantised(columns, x) for _ in range(2))
        return [written(first, scale), product(second, other)]

    raised = canonicalize(post_grad(layers, randn(7, WIDTH)))
    assert len(raised.calls(ops.per_token_group_fp8_quant.overload)) == 2


def shorter(scale: Tensor) -> Tensor:
    moved = torch.empty((scale.shape[1], 16)).t()
    moved[: scale.shape[0]] = scale
    return moved[: scale.shape[0]]


def from_the_second(scale: Tensor) -> Tensor:
    moved = torch.zeros((scale.shape[1], height(scale.shape[0]))).t()
    moved[1 : scale.shape[0]] = scale[1:]
    return moved[: scale.shape[0]]


IN_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "shorter": lambda x: quantised(shorter, x),
    "from the second row": lambda x: quantised(from_the_second, x),
    "doubled": lambda x: quantised(lambda scale: columns(scale * 2), x),
    "read in rows, too": lambda x: quantised(aligned, x, both=True),
}


@pytest.mark.parametrize("case", IN_ROWS)
def test_what_is_no_layout_or_not_alone_lies_in_rows(case: str) -> None:
    raised = canonicalize(quickly_traced(IN_ROWS[case], randn(7, WIDTH)))
    (node,) = raised.calls(ops.per_token_group_fp8_quant.overload)
    assert node.args[-1] == "rows"


@pytest.mark.parametrize("layout", ScaleLayout)
def test_scales_come_back_from_every_layout(layout: ScaleLayout) -> None:
    exponents = torch.arange(1, 201, dtype=torch.int32).reshape(40, 5)
    scales = (exponents << 23).view(torch.float32)
    given = exponents.to(torch.uint8) if layout is ScaleLayout.SWIZZLED else scales
    wanted = exponents if layout in (ScaleLayout.SWIZZLED, ScaleLayout.PACKED) else scales
    assert torch.equal(in_rows(lay_out(given.reshape(2, 20, 5), layout), 40, 5, layout).to(wanted.dtype), wanted)
