"""Sites of a graph, and the kernels around them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.planner.costs import CostModel, Kernel
from fuseplan.rules.families import find_sites
from fuseplan.rules.families.linear import Activation, LinearShape
from fuseplan.rules.families.sites import Shape, Site, Taken
from fuseplan.rules.parts.linear import PART as LINEAR
from fuseplan.rules.parts.linear import LinearRegion
from fuseplan.rules.parts.traffic import Tail
from tests.helpers import randn, written
from tests.planner.parts import DYNAMIC, NORM, SILU, STATIC, Padding
from tests.planner.round_device import DEVICE

aten = torch.ops.aten
FP8 = torch.float8_e4m3fn
MODEL = CostModel(DEVICE)
PAD = Padding(padded=128)


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group `g` has four; no other is known."""
    monkeypatch.setattr("fuseplan.rules.families.sites.group_size", {"g": 4}.get)


def everything(x: Any, r: Any, w: Any, scale: Any) -> Any:
    """Three cores: the last has no epilogue, and what the first reads is reduced."""
    y, total = ops.fused_add_rms_norm(ops.all_reduce(x, "g"), r, w, 1e-5, "llama")
    quantised = ops.static_scaled_fp8_quant(y, scale, FP8, "divide")
    wide = ops.pad(y, 28)
    z = ops.rms_norm(total, w, 1e-5, "gpt_oss")
    codes, scales = ops.dynamic_per_token_scaled_fp8_quant(z, FP8, 1e-6, 0.0, 0.0, None, "divide")
    return wide, quantised, codes, scales, ops.silu_and_mul(y, total, "llama")


def sites_of(function: Any = everything, dtype: torch.dtype = torch.bfloat16) -> tuple[Site, ...]:
    x, r, w = randn(10, 100, dtype=dtype), randn(10, 100, dtype=dtype), randn(100, dtype=dtype)
    return find_sites(canonicalize(written(function, {"x": x, "r": r, "w": w, "scale": torch.tensor([0.5])})))


def test_every_core_is_a_site_with_what_stands_around_it() -> None:
    first, second, third = sites_of()
    assert [site.ordinal for site in (first, second, third)] == [0, 1, 2]
    assert [ops.of(site.core.target) for site in (first, second, third)] == [
        ops.fused_add_rms_norm, ops.rms_norm, ops.silu_and_mul,
    ]  # fmt: skip
    assert first.reduce is first.core.args[0]
    assert second.reduce is None
    assert [ops.of(tail.target) for tail in first.tails] == [ops.static_scaled_fp8_quant, ops.pad]
    assert [ops.of(tail.target) for tail in second.tails] == [ops.dynamic_per_token_scaled_fp8_quant]
    assert third.tails == ()
    assert (first.ranks, second.ranks) == (4, 1)


@pytest.mark.parametrize(
    ("tail", "fused", "rest"), [(Activation(), ["silu_and_mul"], []), (None, [], ["silu_and_mul"])]
)
def test_an_activation_that_is_not_fused_is_left(tail: Tail | None, fused: list[str], rest: list[str]) -> None:
    shape = LinearShape(
        core=LINEAR.traffic, rows=10, width=100, itemsize=2, tails=(Activation(),), convention="bfloat16",
        sizes=LinearRegion(rows=10, width=100, features=(50, 50), itemsize=2),
    )  # fmt: skip
    kernels = shape.fused(MODEL, "torch", reduce=False, tail=tail)
    assert [kernel.name for kernel in kernels[2:]] == [*fused, "opaque op"]
    left = shape.rest(MODEL, reduce=False, tail=tail)
    assert [kernel.name for kernel in left] == rest
    assert {*kernels[:-1], *left} == {*shape.unfused(MODEL)}


def test_a_sum_that_is_padded_is_no_tail_and_an_unknown_group_is_one_rank() -> None:
    def model(x: Any, r: Any, w: Any, scale: Any) -> Any:
        _, total = ops.fused_add_rms_norm(ops.all_reduce(x, "h"), r, w, 1e-5, "llama")
        return ops.pad(total, 28)

    (site,) = sites_of(model)
    assert site.tails == ()
    assert site.reduce is not None
    assert site.ranks == 1


def test_shapes_hold_all_that_prices_depend_on_and_signatures_all_but_the_rows() -> None:
    first, second, third = sites_of()
    found = [first.shape(7), second.shape(3), third.shape(1)]
    common: dict[str, Any] = {"width": 100, "itemsize": 2}
    assert found == [
        Shape(
            core=NORM, residual=True, ranks=4, rows=7, tails=(STATIC, PAD), convention="bfloat16 llama", kept=True,
            **common,
        ),
        Shape(core=NORM, residual=False, ranks=1, rows=3, tails=(DYNAMIC,), convention="bfloat16 gpt_oss", **common),
        Shape(core=SILU, residual=False, ranks=1, rows=1, tails=(), convention="bfloat16 llama", **common),
    ]  # fmt: skip
    assert [each.signature for each in found] == [
        "all_reduce[4] -> add -> rms_norm -> static_fp8_quant -> pad 100:128 100 bfloat16 llama kept",
        "rms_norm -> dynamic_fp8_quant 100 bfloat16 gpt_oss",
        "silu_and_mul 100 bfloat16 llama",
    ]
    assert sites_of(dtype=torch.float32)[1].shape(3).itemsize == 4


@pytest.mark.parametrize(
    ("quantises", "pads", "more", "kept"),
    [(1, 1, 0, False), (1, 0, 1, True), (1, 1, 1, True), (0, 1, 1, False), (0, 0, 1, False)],
)
def test_a_norm_is_kept_where_others_read_it_and_no_epilogue_yields_it(
    quantises: int, pads: int, more: int, kept: bool
) -> None:
    def model(x: Any, r: Any, w: Any, scale: Any) -> Any:
        y = ops.rms_norm(x, w, 1e-5, "llama")
        codes = [ops.static_scaled_fp8_quant(y, scale, FP8, "divide") for _ in range(quantises)]
        return *codes, *[ops.pad(y, 28) for _ in range(pads)], *[aten.relu.default(y) for _ in range(more)]

    (site,) = sites_of(model)
    assert site.shape(7).kept is kept


def shape(*tails: Tail, ranks: int = 1, residual: bool = False, kept: bool = False) -> Shape:
    return Shape(
        core=NORM, residual=residual, ranks=ranks, rows=10, width=100, itemsize=2, tails=tails, convention="", kept=kept
    )


RING = Kernel(name="all_reduce (LL)", launch=3200, wire=375)
NORMED = Kernel(name="rms_norm", launch=1100, memory=42)
STATIC_NORM = Kernel(name="rms_norm+static_fp8_quant", launch=1100, memory=32)
STATIC_NORM_KEPT = Kernel(name="rms_norm+static_fp8_quant", launch=1100, memory=52)
"""2000 bytes more, which others read."""
ALONE = {
    PAD: Kernel(name="pad", launch=1000, memory=46),
    STATIC: Kernel(name="static_fp8_quant", launch=1000, memory=30),
    DYNAMIC: Kernel(name="dynamic_fp8_quant", launch=1100, memory=31),
}


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (shape(), (NORMED,)),
        (shape(residual=True), (Kernel(name="rms_norm", launch=1100, memory=82),)),
        (shape(PAD), (NORMED, ALONE[PAD])),
        (shape(STATIC), (STATIC_NORM,)),
        (shape(STATIC, kept=True), (STATIC_NORM_KEPT,)),
        (shape(PAD, STATIC), (STATIC_NORM_KEPT, ALONE[PAD])),
        # 1000 bytes and 1040 more that the same kernel writes
        (shape(STATIC, STATIC, DYNAMIC), (STATIC_NORM, Kernel(name="further results", memory=20))),
        (shape(PAD, ranks=4), (RING, NORMED, ALONE[PAD])),
    ],
)
def test_inductor_quantises_in_the_cores_kernel_and_pads_in_another(site: Shape, expected: Sequence[Kernel]) -> None:
    assert site.unfused(MODEL) == tuple(expected)


@pytest.mark.parametrize(
    ("site", "reduce", "tail", "left"),
    [
        (shape(), False, None, ()),
        (shape(PAD), False, None, (ALONE[PAD],)),
        (shape(PAD, DYNAMIC, PAD), False, PAD, (ALONE[DYNAMIC], ALONE[PAD])),
        (shape(PAD, ranks=4), False, PAD, (RING,)),
        (shape(PAD, ranks=4), True, None, (ALONE[PAD],)),
        (shape(STATIC, ranks=4), False, None, (RING, ALONE[STATIC])),
    ],
)
def test_what_a_fused_op_leaves(site: Shape, reduce: bool, tail: Tail | None, left: Sequence[Kernel]) -> None:
    assert site.rest(MODEL, reduce=reduce, tail=tail) == tuple(left)


def test_a_fused_op_takes_its_parts_of_the_site() -> None:
    site = shape(PAD, STATIC, ranks=4, residual=True)
    region = site.region(reduce=True, tail=PAD)
    assert (region.reduce, region.ranks, region.residual, region.tail) == (True, 4, True, PAD)
    assert (region.tokens, region.width, region.itemsize, region.core) == (10, 100, 2, NORM)
    assert site.region(reduce=False, tail=None).ranks == 1
    assert not shape(ranks=1).region(reduce=True, tail=None).reduce
    assert site.region(reduce=True, tail=STATIC).keeps_core, "the pad reads it"
    assert not shape(STATIC).region(reduce=False, tail=STATIC).keeps_core
    assert shape(STATIC, kept=True).region(reduce=False, tail=STATIC).keeps_core
    fused = site.fused(MODEL, "flashinfer", reduce=True, tail=STATIC)
    assert fused == MODEL.fused(site.region(reduce=True, tail=STATIC), "flashinfer")


def test_what_a_match_takes_of_a_site() -> None:
    first, second, _ = sites_of()
    quantised, wide = first.tails
    item = next(iter(first.core.users))
    reduce = first.reduce
    assert reduce is not None
    assert first.taken([first.core]) == Taken(reduce=False, tail=None)
    assert first.taken([first.core, item, wide]) == Taken(reduce=False, tail=PAD)
    assert first.taken([reduce, first.core, item, quantised]) == Taken(reduce=True, tail=STATIC)
    assert first.taken([wide]) is None
    assert first.taken([first.core, wide, quantised]) is None
    assert first.taken([first.core, second.core]) is None
