"""What looks like a dialect op and isn't one: the cause by its name, on its line, and how to fix it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

import fuseplan
from fuseplan.record import NearMiss, Nearness, Reason
from tests.helpers import HIDDEN, all_reduce, built_in, gpt_oss, llama, quantize, randn
from tests.matching.reported import R, W, X, near_misses


def spelled(under_root: Callable[[Tensor], Tensor], *, divides: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """An RMSNorm in a spelling of its own."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        mean = under_root(wide)
        return w * (wide / mean.sqrt() if divides else wide * torch.rsqrt(mean)).to(x.dtype)

    return norm


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


LOOKALIKES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str | None]] = {
    "root": (spelled(lambda x: mean_square(x) + 1e-6, divides=True), "it divides by the root", "torch.rsqrt"),
    "keepdim": (
        spelled(lambda x: x.pow(2).mean(-1).unsqueeze(-1) + 1e-6), "the mean loses its dimension", "keepdim=True",
    ),
    "minimum": (spelled(lambda x: mean_square(x).clamp(min=1e-6)), "has a minimum where epsilon is added", None),
    "sum": (spelled(lambda x: x.pow(2).sum(-1, keepdim=True) / HIDDEN + 1e-6), "a sum divided by the size", "mean()"),
    "scaled": (spelled(lambda x: mean_square(x) * 2 + 1e-6), "the mean square is scaled", None),
    "LayerNorm": (lambda x, w: F.layer_norm(x, (HIDDEN,), w), "it subtracts the mean of the row", None),
    "two things": (
        spelled(lambda x: x.pow(2).mean(-1).unsqueeze(-1) + 1e-6, divides=True), "by the root; the mean loses",
        "instead; take the mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_a_norm_says_why_it_is_none(name: str, one_rank: str) -> None:
    norm, expected, mend = LOOKALIKES[name]
    rows = near_misses(lambda x, w: F.pad(norm(all_reduce(x, one_rank), w), (0, 8)), X, W)
    assert {row.rule for row in rows} == {"allreduce_rms", "act_padding", "allreduce_rms_padding"}
    for row in rows:
        assert row.nearness is Nearness.UNRECOGNIZED
        assert row.detail.startswith("RMSNorm not recognised: ")
        assert expected in row.detail
        assert mend in str(row.mend) if mend else row.mend is None
        assert row.line is not None
        assert row.line.startswith("test_lookalikes.py:")


def test_what_has_a_root_and_is_no_norm_of_rows_is_not_told() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return F.normalize(x, dim=-1), x.std(), x.abs().sqrt(), F.batch_norm(x, w, w.abs()), x / x.norm()

    assert near_misses(model, X, W) == []


def test_a_norm_without_epsilon_is_one_with_zero(one_rank: str) -> None:
    norm = spelled(mean_square)
    assert near_misses(lambda x, w: norm(all_reduce(x, one_rank), w), X, W) == []


@pytest.mark.parametrize("returned", [True, False])
def test_who_else_reads_a_value_inside_a_norm_is_named(returned: bool) -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        wide = wide * torch.rsqrt(mean_square(wide) + 1e-6)
        return w * wide.to(x.dtype), wide if returned else wide.exp()

    (row,) = near_misses(model, X, W)
    assert (row.rule, row.reason) == (None, Reason.USERS)
    assert ("is returned from the graph, too" if returned else "is also read by aten.exp.default (exp)") in row.detail
    assert row.line is not None


def test_a_residual_in_float32_is_blamed_for_its_dtype() -> None:
    (row,) = near_misses(lambda x, r, w: gpt_oss(x.float() + r, None, w)[0].bfloat16(), X, R.float(), W)
    assert row.reason is Reason.DTYPE
    assert "a float32 sum of bfloat16 and float32" in row.detail
    assert row.mend is None, "in bfloat16 it would be rounded in each layer"


def silu_and_mul(change: Callable[[Tensor, Tensor], Any]) -> list[NearMiss]:
    """What is said of act_quant where a SiLU is not quite gated."""

    def model(gate: Tensor, up: Tensor, s: Tensor) -> tuple[Any, ...]:
        y, *more = change(gate, up)
        return quantize(y, s), *more

    return near_misses(model, X, R, torch.tensor([0.02]))


SILUS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Reason, str]] = {
    "read twice": (lambda g, u: ((a := F.silu(g)) * u, a.exp()), Reason.USERS, "also read by aten.exp.default"),
    "returned": (lambda g, u: ((a := F.silu(g)) * u, a), Reason.USERS, "SiLU's result is returned"),
    "float32": (lambda g, u: (F.silu(g) * u.float(),), Reason.DTYPE, "gate, up and result are bfloat16, float32"),
    "broadcast": (lambda g, u: (F.silu(g) * u[:1],), Reason.SIZE, "multiplied by another shape"),
    "quick GELU": (lambda g, u: (g * torch.sigmoid(1.702 * g) * u,), Reason.OP, "is scaled by 1.702"),
    "alone": (lambda g, u: (F.silu(g), u), Reason.OP, "SiLU's result isn't multiplied"),
}  # fmt: skip


@pytest.mark.parametrize("name", SILUS)
def test_what_looks_like_a_gated_silu_says_why_it_is_none(name: str) -> None:
    change, reason, expected = SILUS[name]
    (row,) = silu_and_mul(change)
    assert (row.rule, row.nearness, row.reason) == ("act_quant", Nearness.UNRECOGNIZED, reason)
    assert expected in row.detail


def test_another_activation_is_no_silu_and_a_silu_far_from_a_quantisation_is_none_of_ours() -> None:
    rows = silu_and_mul(lambda g, u: (F.gelu(g) * u,))
    assert {(row.nearness, row.found) for row in rows} == {(Nearness.ABSENT, "aten.mul.Tensor")}
    assert near_misses(lambda g, w: F.silu(g) @ w, X, randn(HIDDEN, HIDDEN)) == []


S, S_OF_ONE_ROW = torch.tensor([0.02]), torch.tensor([[0.02]])


def dynamic(scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: (y.float() / scale(y)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def amax(y: Tensor) -> Tensor:
    return y.abs().amax(-1, keepdim=True).float()


QUANTISATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Reason, str, str | None]] = {
    "scale in bf16": (lambda y: quantize(y, S.bfloat16()), Reason.DTYPE, "the scale is bfloat16", None),
    "constant": (lambda y: quantize(y, 0.5), Reason.ATTRIBUTE, "the scale is a constant, 0.5", "tensor"),  # type: ignore[arg-type]
    "[1, 1]": (lambda y: quantize(y, S_OF_ONE_ROW), Reason.SIZE, "has the shape [1, 1]", "scale.reshape(1)"),
    "arithmetic": (
        lambda y: (y * S.bfloat16().reciprocal()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), Reason.DTYPE,
        "the scale is bfloat16, and the op takes float32", None,
    ),
    "factor": (
        lambda y: (y.float() * S).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), Reason.OP,
        "isn't multiplied by 1 / scale", None,
    ),
    "another limit": (dynamic(lambda y: (amax(y) / 240.0).clamp(min=1e-9)), Reason.OP, "isn't divided by 448", None),
    "whole tensor": (
        dynamic(lambda y: (y.abs().max().float() / 448.0).clamp(min=1e-9)), Reason.OP, "from all rows at once", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_what_looks_like_a_quantisation_says_why_it_is_none(name: str) -> None:
    change, reason, expected, mend = QUANTISATIONS[name]
    (row,) = near_misses(lambda x, w: change(llama(x, None, w)[0]), X, W)
    assert row.nearness is Nearness.UNRECOGNIZED
    assert row.reason is reason
    assert expected in row.detail
    assert mend in str(row.mend) if mend else row.mend is None


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "max by its values": dynamic(lambda y: (y.abs().max(-1, keepdim=True)[0].float() / 448.0).clamp(min=1e-9)),
    "no minimum": dynamic(lambda y: amax(y) / 448.0),
    "minimum first": dynamic(lambda y: amax(y).clamp(min=1e-9) / 448.0),
    "rows that are cut evenly, which are groups": lambda y: dynamic(lambda z: amax(z) / 448.0)(y.reshape(12, 32)),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_rows_are_recognised(name: str) -> None:
    assert near_misses(lambda x, w: SCALES[name](llama(x, None, w)[0]), X, W) == []


def test_rows_that_are_cut_are_other_rows() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        pieces = llama(x, None, w)[0].reshape(8, 48)
        return dynamic(lambda y: (amax(y) / 448.0).clamp(min=1e-9))(pieces)

    (row,) = near_misses(model, X, W)
    assert "aten.reshape.default stands between" in row.detail
    assert "rows of 64 become rows of 48" in row.detail
    assert row.mend is None


ADDITIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Reason, str, str | None]] = {
    "alpha": (
        lambda y, r: torch.add(r, y, alpha=0.5), Reason.ATTRIBUTE, "it adds 0.5 times one of the two",
        "scale before all_reduce",
    ),
    "scaled residual": (
        lambda y, r: torch.add(y, r, alpha=0.5), Reason.ATTRIBUTE, "it adds 0.5 times one of the two",
        "scale the residual in an op of its own",
    ),
    "float32": (lambda y, r: y + r, Reason.DTYPE, "it adds bfloat16 and float32", None),
    "broadcast": (
        lambda y, r: y + r[:1], Reason.SIZE, "it adds [6, 64] and [1, 64]", "expand the residual first",
    ),
    "bias": (
        lambda y, r: y + r[0], Reason.OP, "it adds a bias", "add the bias before all_reduce, on one rank alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_that_is_no_residual_add_says_why(name: str, one_rank: str) -> None:
    change, reason, expected, hint = ADDITIONS[name]
    r, w = (R.float(), W.float()) if name == "float32" else (R, W)
    (row,) = near_misses(lambda x, r, w: built_in(change(all_reduce(x, one_rank), r), None, w)[0], X, r, w)
    assert (row.rule, row.nearness, row.reason) == ("allreduce_rms", Nearness.OBSTRUCTED, reason)
    assert expected in row.detail
    assert row.mend == hint


@pytest.mark.parametrize("left", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32])
def test_a_sum_in_float32_that_is_rounded_is_the_sum(left: torch.dtype, right: torch.dtype, one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return llama((all_reduce(x, one_rank).to(left) + r.to(right)).bfloat16(), None, w)

    assert near_misses(model, X, R, W) == []


COLLECTIVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "all_reduce_coalesced": lambda x, group: collectives.all_reduce_coalesced([x, x.sin()], "sum", group)[0],
    "reduce_scatter_tensor": lambda x, group: collectives.reduce_scatter_tensor(x, "sum", 0, group),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_another_collective_before_a_norm_is_named(name: str, one_rank: str) -> None:
    (row,) = near_misses(lambda x, r, w: llama(COLLECTIVES[name](x, one_rank), r, w)[0], X, R, W)
    assert (row.rule, row.nearness) == ("allreduce_rms", Nearness.UNRECOGNIZED)
    assert row.detail == f"no all_reduce, but _c10d_functional.{name}.default"


def test_obstacles_on_different_lines_are_different_causes(one_rank: str) -> None:
    def model(x: Tensor, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = llama(all_reduce(x, one_rank) * 2, None, w)[0]
        second = llama((all_reduce(first.sin(), one_rank) * 2).tanh(), None, w)[0]
        third = llama(all_reduce(second.sin(), one_rank) * 2, None, w)[0]
        return first, second, third

    rows = near_misses(model, X, W, R)
    assert len({row.line for row in rows}) == len(rows) == 3
    assert sum("so does aten.tanh.default" in row.detail for row in rows) == 1


def test_a_layer_that_spells_its_norm_otherwise_is_not_dead(one_rank: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self, spelling: str) -> None:
            super().__init__()
            self.norm, self.spelling = torch.nn.RMSNorm(HIDDEN, eps=1e-6, dtype=torch.bfloat16), spelling

        def forward(self, x: Tensor) -> Tensor:
            x = all_reduce(x, one_rank)
            if self.spelling == "module":
                return self.norm(x).sin()  # type: ignore[no-any-return]
            if self.spelling == "function":
                return F.rms_norm(x, (HIDDEN,), self.norm.weight, 1e-6).sin()
            return F.layer_norm(x, (HIDDEN,), self.norm.weight).sin()

    class Model(torch.nn.Module):
        def __init__(self, other: str) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer(other if index == 2 else "module") for index in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert near_misses(Model("function"), X) == []
    (row,) = near_misses(Model("LayerNorm"), X)
    assert (row.nearness, row.sites) == (Nearness.UNRECOGNIZED, ("layers.2",))


def without_epsilon(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return spelled(mean_square)(total, w), total


def cast_twice(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return w * (total.float() * torch.rsqrt(mean_square(total.float()) + 1e-6)).to(x.dtype), total


def added_wide(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return llama((x.float() + r).bfloat16(), None, w)


@pytest.mark.parametrize("norm", [without_epsilon, cast_twice, added_wide])
def test_spellings_that_come_to_the_same_are_fused_and_agree(norm: Callable[..., tuple[Tensor, Tensor]]) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, total = norm(x, r, w)
        return F.pad(y, (0, 8)), total

    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(policy="ordered(act_padding)")
    with torch.inference_mode():
        fused = fuseplan.compile(model, config=config, on_report=reports.append)(X, R, W)
        plain = torch.compile(model)(X, R, W)
    assert reports[0].recognized == {f"fused_add_rms_norm[{HIDDEN}]": 1, f"pad[{HIDDEN}]": 1}
    assert reports[0].fused["act_padding"] == 1
    torch.testing.assert_close(fused, plain, rtol=2**-7, atol=0)
    assert torch.equal(fused[1], plain[1])
