"""Linear layers of few rows in fp8 with scales of rows: which are read as one, where rules fire, what they compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.quantised import Rows
from fuseplan.config import CompileRange
from fuseplan.dialect import ops
from fuseplan.planner.costs import HARDWARE
from fuseplan.record import Reason
from fuseplan.rules.parts.linear import LinearRegion
from fuseplan.rules.parts.scaled_linear import PART, library_kernels, skinny_kernel
from tests.helpers import post_grad, quantize_rows, quickly_traced, randn
from tests.rules.planning import fused
from tests.rules.test_linear import check_computed, check_refused, planned, recognized

WIDTH = 64
CODES = torch.float8_e4m3fn
ON: dict[str, Any] = {"fuse_scaled_linear": True}


def weight(features: int, width: int = WIDTH, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Codes [features, width], and scales [features, 1]."""
    return quantize_rows(randn(features, width, seed=seed) / 8)


def weights(*features: int) -> list[Tensor]:
    return [each for index, count in enumerate(features) for each in weight(count, seed=index + 1)]


def product(
    x: Tensor, scale: Tensor, codes: Tensor, own: Tensor, bias: Tensor | None = None, **given: Any
) -> Tensor:  # fmt: skip
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True, **given}
    return torch._scaled_mm(x, codes.t(), scale, own.t(), bias, **options)


def pairs(own: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of each layer."""
    return list(zip(own[::2], own[1::2], strict=True))


def several(x: Tensor, scale: Tensor, *own: Tensor) -> list[Tensor]:
    return [product(x, scale, *each) for each in pairs(own)]


def views_of_their_own(x: Tensor, scale: Tensor, *own: Tensor) -> list[Tensor]:
    deep, deep_scale = x[:, None], scale[:, None]
    return [product(deep.reshape(-1, WIDTH), deep_scale.unsqueeze(-1).reshape(-1, 1), *each) for each in pairs(own)]


def quantised_apart(x: Tensor, scale: Tensor, *own: Tensor) -> list[Tensor]:
    """As torchao's layers have it."""
    wide = x.bfloat16() * scale.bfloat16()
    return [product(*quantize_rows(wide), *each) for each in pairs(own)]


def one_behind_the_other(x: Tensor, scale: Tensor, *own: Tensor) -> list[Tensor]:
    y = product(x, scale, *own[:2])
    return [product(*quantize_rows(y), *each) for each in pairs(own[2:])]


def mutated_between(x: Tensor, scale: Tensor, *own: Tensor) -> list[Tensor]:
    y = product(x, scale, *own[:2])
    own[3].add_(1)
    return [y, product(x, scale, *own[2:])]


READ: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, int]]] = {
    "one": (several, (32,), {"scaled_linear": 1}),
    "two": (several, (32, 16), {"scaled_linear_pair": 1}),
    "three": (several, (32, 16, 16), {"scaled_linear_triple": 1}),
    "five": (several, (32, 16, 16, 16, 16), {"scaled_linear_triple": 1, "scaled_linear_pair": 1}),
    "views of their own": (views_of_their_own, (32, 16), {"scaled_linear_pair": 1}),
    "quantised apart": (quantised_apart, (32, 16), {"scaled_linear_pair": 1}),
    "other scales": (
        lambda x, scale, *own: [product(x, scale * number, *each) for number, each in enumerate(pairs(own), 1)],
        (32, 16), {"scaled_linear": 2},
    ),
    "other sums": (
        lambda x, scale, *own: [
            product(x, scale, *each, use_fast_accum=bool(index)) for index, each in enumerate(pairs(own))
        ],
        (32, 16), {"scaled_linear": 2},
    ),
    "one behind the other": (one_behind_the_other, (WIDTH, 16, 16), {"scaled_linear": 1, "scaled_linear_pair": 1}),
    "mutated between": (mutated_between, (32, 16), {"scaled_linear": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("rows", [1, 3])
def test_layers_that_read_the_same_codes_are_one_op(case: str, rows: int) -> None:
    function, features, found = READ[case]
    assert recognized(function, *quantize_rows(randn(rows, WIDTH)), *weights(*features), part=PART) == found


def test_codes_in_rows_of_another_width_are_others() -> None:
    """The same codes as rows of half a width."""

    def function(x: Tensor, scale: Tensor, *own: Tensor) -> list[Tensor]:
        halves = product(x.reshape(-1, WIDTH // 2), scale.repeat_interleave(2, 0), own[2], own[3])
        return [product(x, scale, *own[:2]), halves]

    inputs = *quantize_rows(randn(3, WIDTH)), *weight(32), *weight(16, WIDTH // 2)
    assert recognized(function, *inputs, part=PART) == {"scaled_linear": 2}


def test_biases_are_inputs_of_the_op() -> None:
    inputs = *quantize_rows(randn(3, WIDTH)), *weight(32)
    assert recognized(product, *inputs, randn(32), part=PART) == {"scaled_linear": 1}


OTHERS: dict[str, Callable[..., Any]] = {
    "in float32": lambda x, scale, codes, own: product(x, scale, codes, own, out_dtype=torch.float32),
    "one scale": lambda x, scale, codes, own: product(x, scale[:1], codes, own[:1]),
    "a computed weight": lambda x, scale, codes, own: product(x, scale, (codes.bfloat16() * 2).to(CODES), own),
    "a computed scale": lambda x, scale, codes, own: product(x, scale, codes, own * 2),
    "codes in e5m2": lambda x, scale, codes, own: product(x.bfloat16().to(torch.float8_e5m2), scale, codes, own),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_products_are_left(case: str) -> None:
    assert recognized(OTHERS[case], *quantize_rows(randn(3, WIDTH)), *weight(32), part=PART) == {}


def test_layers_whose_every_size_is_a_symbol_are_refused_by_name() -> None:
    """As weights that are handed over have them where `dynamic=True`: such a size has no hash."""
    inputs = *quantize_rows(randn(3, WIDTH)), *weights(32, 16)
    for each in inputs:
        torch._dynamo.maybe_mark_dynamic(each, 1)
    report = planned(post_grad(several, *inputs, dynamic=True), **ON)
    details = [
        each.detail for each in report.refusals if (each.rule, each.provider) == ("merged_scaled_linear", "triton")
    ]
    assert details == ["the size of weight0 isn't known when the graph is compiled"]


# Where rules fire.


class Block(nn.Module):
    """A norm, q, k and v of its result, and a layer alone."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.Parameter(randn(hidden, seed=2) / 8 + 1)
        self.q, self.k, self.v, self.o = (
            Rows(nn.Linear(hidden, features, bias=False).bfloat16()) for features in (hidden, 32, 32, hidden)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = torch.nn.functional.rms_norm(x, self.norm.shape, self.norm, 1e-5)
        return self.k(normed), self.v(normed), self.o(self.q(normed).sigmoid())


def block(*shape: int) -> fx.Graph:
    with torch.no_grad():
        return quickly_traced(Block(shape[-1]), randn(*shape))


ALL = {"merged_scaled_linear_triple": 1, "rms_norm_dynamic_fp8_quant": 1, "skinny_scaled_linear": 1}
QUANTISED = {"rms_norm_dynamic_fp8_quant": 1}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"policy": "ordered(norm_quant, merged_scaled_linear, skinny_scaled_linear)"}, ALL),
        ({"policy": "ordered(merged_scaled_linear)"}, {"merged_scaled_linear_triple": 1}),
        ({"fuse_scaled_linear": False}, QUANTISED),
        ({"force": ("merged_scaled_linear", "skinny_scaled_linear")}, ALL),
        (
            {"force": ("skinny_scaled_linear",), "forbid": ("merged_scaled_linear",)},
            {**QUANTISED, "skinny_scaled_linear": 1},
        ),
    ],
)  # fmt: skip
def test_flags_and_policies_choose(config: dict[str, Any], found: dict[str, int]) -> None:
    assert fused(planned(block(2, 1, 256), **config)) == found


@pytest.mark.parametrize(
    ("rows", "device", "compile_range", "found"),
    [
        (32, "h200", None, ALL),
        (8, "h100", None, ALL),
        (33, "h200", None, QUANTISED),
        (3, "mi300x", None, {}),
        (3, "h200", CompileRange(start=1, end=32), ALL),
        (3, "h200", CompileRange(start=1, end=33), QUANTISED),
    ],
)
def test_by_default_graphs_of_few_rows_get_it_where_it_was_measured(
    rows: int, device: str, compile_range: CompileRange | None, found: dict[str, int]
) -> None:
    """Rows of products count, since no input is of tokens."""
    assert fused(planned(block(rows, 4096), device=device, compile_range=compile_range)) == found


@pytest.mark.parametrize(("last", "found"), [(32, ALL), (33, QUANTISED)])
def test_any_number_of_rows_that_is_limited(last: int, found: dict[str, int]) -> None:
    with torch.inference_mode():
        graph = quickly_traced(Block(4096), randn(3, 4096), dynamic=True)
    assert fused(planned(graph, compile_range=CompileRange(start=1, end=last))) == found


def test_codes_are_quantised_once_and_read_by_one_op() -> None:
    graph = block(2, 1, 4096)
    planned(graph)
    (merged,) = graph.find_nodes(op="call_function", target=ops.merged_scaled_linear_triple.implementation("triton"))
    target = ops.rms_norm_dynamic_fp8_quant.implementation("triton")
    assert len(graph.find_nodes(op="call_function", target=target)) == 1
    sources = set[Any]()
    for node in merged.args[:2]:
        while len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        sources.add(node.target)
    assert sources == {target}


@pytest.mark.parametrize(
    ("inputs", "reason", "says"),
    [
        ((*quantize_rows(randn(33, WIDTH)), *weights(32, 16)), Reason.SIZE, "32 rows"),
        (
            (*quantize_rows(randn(3, 72)), *weight(32, 72), *weight(16, 72)), Reason.SIZE,
            "widths that are multiples of 16, as tensor cores do; x has 72",
        ),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take_is_refused_by_name(
    inputs: tuple[Tensor, ...], reason: Reason, says: str
) -> None:
    check_refused(planned(quickly_traced(several, *inputs), **ON), "merged_scaled_linear", reason, says)


@pytest.mark.parametrize("rule", ["merged_scaled_linear", "skinny_scaled_linear"])
def test_it_computes_what_the_model_does(rule: str) -> None:
    check_computed(rule, Block(), randn(3, 256))


def test_the_reference_is_torchs_product() -> None:
    x, scale, codes, own, bias = *quantize_rows(randn(5, WIDTH)), *weight(32), randn(32)
    wanted = product(x, scale, codes, own, bias)
    got = ops.scaled_linear(x, scale, codes, own.t(), bias, True)
    assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    torch.testing.assert_close(got, wanted, atol=0.01, rtol=0.01)
    exact = (x.double() * scale) @ (codes.double() * own).t() + bias
    assert (got.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    wide = ops.scaled_linear(x, scale.double(), codes, own.t().double(), bias.double(), True)
    torch.testing.assert_close(wide, exact, atol=1e-12, rtol=1e-12)


# What it costs.


def region(rows: int, width: int, *features: int) -> LinearRegion:
    return LinearRegion(rows=rows, width=width, features=features, itemsize=1)


@pytest.mark.parametrize(
    ("sizes", "measured", "own"),
    [
        (region(8, 4096, 4096), 13.57, 7.10),
        (region(32, 4096, 4096), 13.72, 7.65),
        (region(8, 4096, 4096, 1024, 1024), 39.84, 8.64),
        (region(32, 4096, 4096, 1024, 1024), 40.12, 9.08),
        (region(8, 4096, 14336, 14336), 40.10, 30.48),
        (region(32, 14336, 4096), 36.91, 18.35),
    ],
)
def test_prices_are_near_what_an_h200_took(sizes: LinearRegion, measured: float, own: float) -> None:
    """In microseconds; torch's product of a layer that memory bounds takes longer than this says."""
    hardware = HARDWARE["h200"]
    assert sum(each.ns for each in library_kernels(hardware, sizes)) / 1e3 == pytest.approx(measured, rel=0.15)
    assert skinny_kernel(hardware, sizes).ns / 1e3 == pytest.approx(own, rel=0.1)
