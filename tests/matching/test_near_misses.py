"""What is said of places at which a rule doesn't match, and of what looks like a dialect op and isn't one: the cause by
its name, on its line, and how to fix it; on small graphs. A hint is true: who follows it has the fusion, and the same
numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.providers import PROFILES
from fuseplan.record import NearMiss, Nearness, Reason
from tests.helpers import HIDDEN, all_reduce, built_in, gpt_oss, llama, post_grad, quantize, randn, vllm
from tests.matching.reported import R, W, X, near_misses


@torch.library.custom_op("near_misses::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x * 2


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("near_misses::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: float) -> None:
    x.mul_(factor)


BETWEEN_NORM_AND_PAD: dict[str, tuple[Callable[[Tensor], Tensor], Reason, str]] = {
    "cast": (lambda y: y.half(), Reason.DTYPE, "stands between rms_norm and pad: bfloat16 is cast to float16"),
    "in place": (lambda y: y.mul_(2), Reason.MUTATION, "mul_, an in-place op (aten.mul.Tensor) stands between"),
    "opaque": (opaque, Reason.OP, "near_misses.opaque.default stands between rms_norm and pad"),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN_NORM_AND_PAD)
def test_what_stands_between_norm_and_pad(name: str) -> None:
    change, reason, expected = BETWEEN_NORM_AND_PAD[name]
    (row,) = near_misses(lambda x, w: F.pad(change(llama(x, None, w)[0]), (0, 8)), X, W)
    assert (row.rule, row.nearness, row.reason) == ("act_padding", Nearness.OBSTRUCTED, reason)
    assert expected in row.detail
    assert row.expected == "rms_norm"
    assert row.line is not None
    assert row.line.startswith("test_near_misses.py:")
    assert row.code


def test_an_op_that_was_in_place_is_named_by_its_own_name() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        y = llama(x, None, w)[0]
        scale_(y, 2.0)
        return F.pad(y, (0, 8))

    (row,) = near_misses(model, X, W)
    assert (row.reason, row.found) == (Reason.MUTATION, "near_misses.scale_.default")
    assert row.detail == "near_misses.scale_.default stands between rms_norm and pad"


def test_sums_over_different_groups_that_are_added(one_rank: str) -> None:
    other = dist.new_group([0]).group_name

    def model(x: Tensor, z: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return llama(all_reduce(x, one_rank) + all_reduce(z, other), r, w)

    row = near_misses(model, X, randn(6, HIDDEN, seed=2), R, W, rule="allreduce_rms")[0]
    assert row.reason is Reason.GROUP
    assert f"over groups '{one_rank}' and '{other}'" in row.detail


COLLECTIVES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Reason, str]] = {
    "max": (
        lambda x, group: collectives.all_reduce(x, "max", group), Reason.ATTRIBUTE,
        "it reduces by 'max', and fused ops sum",
    ),
    "coalesced": (
        lambda x, group: collectives.all_reduce_coalesced([x, x.sin()], "sum", group)[0], Reason.OP,
        "no all_reduce, but _c10d_functional.all_reduce_coalesced.default",
    ),
    "scattered": (
        lambda x, group: collectives.reduce_scatter_tensor(x, "sum", 0, group), Reason.OP,
        "no all_reduce, but _c10d_functional.reduce_scatter_tensor.default",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLECTIVES)
def test_another_collective_before_a_norm_is_named(name: str, one_rank: str) -> None:
    reduce, reason, detail = COLLECTIVES[name]
    (row,) = near_misses(lambda x, r, w: llama(reduce(x, one_rank), r, w)[0], X, R, W)
    assert (row.rule, row.nearness, row.reason) == ("allreduce_rms", Nearness.UNRECOGNIZED, reason)
    assert detail in row.detail
    assert (row.fix is None) is (name != "coalesced")


def test_one_of_another_kind_right_before_the_core_of_what_is_obstructed(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        reduced: Tensor = collectives.all_reduce(x, "avg", one_rank)  # type: ignore[arg-type]
        y, total = llama(reduced, r, w)
        return F.pad(y.sigmoid(), (0, 8)), all_reduce(total, one_rank)

    details = [row.detail for row in near_misses(model, X, R, W)]
    assert any("aten.sigmoid.default stands between" in detail for detail in details), details


@pytest.mark.parametrize(("amounts", "value"), [((8, 0), 0.0), ((0, 8), 1.0), ((0, 8), -0.0), ((0, 8, 0, 1), 0.0)])
def test_a_pad_of_another_kind(amounts: tuple[int, ...], value: float) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(x, r, w)
        z = llama(y.sigmoid(), total, w)[0]
        return F.pad(y, amounts, value=value), F.pad(z, (0, 8))

    (row,) = near_misses(model, X, R, W)
    assert (row.rule, row.reason) == ("act_padding", Reason.ATTRIBUTE)
    assert row.detail.startswith(f"pad not recognised: it pads {list(amounts)} with {value}")


def test_a_pad_of_another_kind_far_from_norms_is_not_told() -> None:
    assert near_misses(lambda x, w: (F.pad(x, (8, 0)), llama(x, None, w)[0] @ w), X, W) == []


def test_a_norm_over_another_dimension(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        wide = (all_reduce(x, one_rank) + r).float()
        y = (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + 1e-6)).to(x.dtype) * w
        return llama(all_reduce(y.sigmoid(), one_rank), r, w)

    row = near_misses(model, X, R, W)[0]
    assert (row.rule, row.nearness, row.reason) == ("allreduce_rms", Nearness.UNRECOGNIZED, Reason.LAYOUT)
    assert "the mean is over dimensions [0]" in row.detail


@pytest.mark.parametrize("norm", [vllm, gpt_oss, llama])
def test_an_fp32_weight_is_refused_in_every_spelling(norm: Any, one_rank: str) -> None:
    """What is rounded to bfloat16 before a float32 weight is multiplied in is no float32 norm."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, total = norm(all_reduce(x, one_rank), r, w)
        return y.bfloat16(), total

    (row,) = near_misses(model, X, R, W.float(), rule="allreduce_rms")
    assert row.detail == "weight is float32 and x is bfloat16; the fused op takes one dtype"


def test_values_read_by_others_stay_refusals_where_no_op_keeps_them(one_rank: str) -> None:
    def normed(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y = llama(x, None, w)[0]
        return quantize(y, s), y.relu()

    def reduced(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        sums = all_reduce(x, one_rank)
        return llama(sums, r, w)[0], sums.relu()

    assert not near_misses(normed, X, W, torch.tensor([0.02]))
    (row,) = near_misses(reduced, X, X.flip(0), W)
    assert (row.rule, row.nearness, row.reason) == ("allreduce_rms", Nearness.REFUSED, Reason.USERS)
    assert row.fix is None, "the model means relu to read it"


# What looks like a dialect op.


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
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_a_norm_says_why_it_is_none(name: str, one_rank: str) -> None:
    norm, expected, fix = LOOKALIKES[name]
    rows = near_misses(lambda x, w: F.pad(norm(all_reduce(x, one_rank), w), (0, 8)), X, W)
    assert {row.rule for row in rows} == {"allreduce_rms", "act_padding", "allreduce_rms_padding"}
    for row in rows:
        assert row.nearness is Nearness.UNRECOGNIZED
        assert row.detail.startswith("RMSNorm not recognised: ")
        assert expected in row.detail
        assert fix in str(row.fix) if fix else row.fix is None
        assert row.line is not None
        assert row.line.startswith("test_near_misses.py:")


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
    assert row.fix is None, "in bfloat16 it would be rounded in each layer"


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
    "factor": (
        lambda y: (y.float() * S).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), Reason.OP,
        "isn't multiplied by 1 / scale", None,
    ),
    "another limit of codes": (
        lambda y: (y.float() / S).clamp(-240.0, 240.0).to(torch.float8_e4m3fn), Reason.OP,
        "fp8 quantisation not recognised: the value cast isn't clamped to +-448", None,
    ),
    "another limit": (dynamic(lambda y: (amax(y) / 240.0).clamp(min=1e-9)), Reason.OP, "isn't divided by 448", None),
    "whole tensor": (
        dynamic(lambda y: (y.abs().max().float() / 448.0).clamp(min=1e-9)), Reason.OP, "from all rows at once", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_what_looks_like_a_quantisation_says_why_it_is_none(name: str) -> None:
    change, reason, expected, fix = QUANTISATIONS[name]
    (row,) = near_misses(lambda x, w: change(llama(x, None, w)[0]), X, W)
    assert row.nearness is Nearness.UNRECOGNIZED
    assert row.reason is reason
    assert expected in row.detail
    assert fix in str(row.fix) if fix else row.fix is None


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
    assert row.fix is None


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
    assert row.fix == hint


@pytest.mark.parametrize("left", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32])
def test_a_sum_in_float32_that_is_rounded_is_the_sum(left: torch.dtype, right: torch.dtype, one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return llama((all_reduce(x, one_rank).to(left) + r.to(right)).bfloat16(), None, w)

    assert near_misses(model, X, R, W) == []


def test_obstacles_on_different_lines_are_different_causes(one_rank: str) -> None:
    def model(x: Tensor, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = llama(all_reduce(x, one_rank) * 2, None, w)[0]
        second = llama((all_reduce(first.sin(), one_rank) * 2).tanh(), None, w)[0]
        third = llama(all_reduce(second.sin(), one_rank) * 2, None, w)[0]
        return first, second, third

    rows = near_misses(model, X, W, R)
    assert len({row.line for row in rows}) == len(rows) == 3
    assert sum("so does aten.tanh.default" in row.detail for row in rows) == 1


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


# Hints.


Reduce = Callable[[Tensor], Tensor]
Model = Callable[[Reduce, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(the all-reduce, what it reduces, the residual, the weight, something else) -> what the model computes."""

Z = randn(6, HIDDEN, seed=3)
RANKS = 2


@dataclass(frozen=True)
class Advice:
    """A model, the hint that it is given, and the model that follows it."""

    model: Model
    hint: str
    followed: Model
    rule: str = "allreduce_rms"
    fused_before: int = 0


ADVICE = {
    "scaled": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) * 0.5, r, w)[0], "scale before all_reduce",
        lambda reduce, x, r, w, s: llama(reduce(x * 0.5), r, w)[0],
    ),
    "divided": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) / 3.0, r, w)[0], "scale before all_reduce",
        lambda reduce, x, r, w, s: llama(reduce(x / 3.0), r, w)[0],
    ),
    "gated": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) * s, r, w)[0],
        "scale before all_reduce, if all ranks have the same factor",
        lambda reduce, x, r, w, s: llama(reduce(x * s), r, w)[0],
    ),
    "negated": Advice(
        lambda reduce, x, r, w, s: llama(-reduce(x), r, w)[0], "negate before all_reduce",
        lambda reduce, x, r, w, s: llama(reduce(-x), r, w)[0],
    ),
    "shared expert": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) + s.sigmoid(), r, w)[0], "add it to the residual",
        lambda reduce, x, r, w, s: llama(reduce(x), r + s.sigmoid(), w)[0],
    ),
    "in place": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x).add_(1.0), r, w)[0], "add it to the residual",
        lambda reduce, x, r, w, s: llama(reduce(x), r + 1.0, w)[0],
    ),
    "bias": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) + s[0], None, w)[0],
        "add the bias before all_reduce, on one rank alone",
        lambda reduce, x, r, w, s: llama(reduce(x + s[0] / RANKS), None, w)[0],  # ranks are alike here
    ),
    "two sums": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) + reduce(s), r, w)[0],
        "add before the all_reduce, once, instead of after both",
        lambda reduce, x, r, w, s: llama(reduce(x + s), r, w)[0],
    ),
    "reduced twice": Advice(
        lambda reduce, x, r, w, s: llama(reduce(reduce(x)), r, w)[0],
        "reduce once, and multiply by the number of ranks before",
        lambda reduce, x, r, w, s: llama(reduce(x * RANKS), r, w)[0],
        fused_before=1,  # the second one
    ),
    "a part": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x.reshape(2, 3, HIDDEN))[1], r[:3], w)[0], "do it before all_reduce",
        lambda reduce, x, r, w, s: llama(reduce(x.reshape(2, 3, HIDDEN)[1]), r[:3], w)[0],
    ),
    "broadcast": Advice(
        lambda reduce, x, r, w, s: llama(reduce(x) + r[:1], None, w)[0], "expand the residual first",
        lambda reduce, x, r, w, s: llama(reduce(x) + r[:1].expand(6, HIDDEN), None, w)[0],
    ),
    "before a pad": Advice(
        lambda reduce, x, r, w, s: F.pad(llama(x, r, w)[0].relu(), (0, 8)), "do it after pad",
        lambda reduce, x, r, w, s: F.pad(llama(x, r, w)[0], (0, 8)).relu(), "act_padding",
    ),
    "cast before a pad": Advice(
        lambda reduce, x, r, w, s: F.pad(llama(x, r, w)[0].float(), (0, 8)), "do it after pad",
        lambda reduce, x, r, w, s: F.pad(llama(x, r, w)[0], (0, 8)).float(), "act_padding",
    ),
}  # fmt: skip


def matched(model: Callable[..., Any], rule: str) -> int:
    analysis = PostGradPassManager(PassConfig(), device=PROFILES["h200"]).analyze(post_grad(model, X, R, W, Z))
    return len({match.anchor for match in analysis.matches.candidates if match.rule.name == rule})


@pytest.mark.parametrize("name", ADVICE)
def test_who_follows_a_hint_has_the_fusion_and_the_same_numbers(name: str, one_rank: str) -> None:
    advice = ADVICE[name]

    def reducing(model: Model) -> Callable[..., Tensor]:
        return lambda x, r, w, s: model(lambda part: all_reduce(part, one_rank), x, r, w, s)

    row = near_misses(reducing(advice.model), X, R, W, Z, rule=advice.rule)[0]
    assert row.fix == advice.hint
    assert matched(reducing(advice.model), advice.rule) == advice.fused_before
    assert matched(reducing(advice.followed), advice.rule) == 1
    inputs = [each.double() for each in (X, R, W, Z)]
    before, after = (model(lambda part: part * RANKS, *inputs) for model in (advice.model, advice.followed))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


NO_ADVICE: dict[str, tuple[Model, Reason]] = {
    "activation": (lambda reduce, x, r, w, s: llama(reduce(x).tanh(), r, w)[0], Reason.OP),
    "cast": (lambda reduce, x, r, w, s: llama(reduce(x.float()).bfloat16(), r, w)[0], Reason.DTYPE),
    "read elsewhere": (lambda reduce, x, r, w, s: llama((a := reduce(x)) * 2, r + a.relu(), w)[0], Reason.OP),
    "divided by a sum": (lambda reduce, x, r, w, s: llama(s / reduce(x), r, w)[0], Reason.OP),
}


@pytest.mark.parametrize("name", NO_ADVICE)
def test_no_hint_is_given_that_would_change_the_numbers_or_not_help(name: str, one_rank: str) -> None:
    model, reason = NO_ADVICE[name]
    rows = near_misses(lambda x, r, w, s: model(lambda p: all_reduce(p, one_rank), x, r, w, s), X, R, W, Z)
    row = next(row for row in rows if row.rule == "allreduce_rms")
    assert (row.reason, row.fix) == (reason, None)


def test_an_addend_that_is_reduced_in_float32_is_blamed_for_its_dtype(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        total = all_reduce(x.float(), one_rank) + r.float()
        return w * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()

    row = near_misses(model, X, R, W, rule="allreduce_rms")[0]
    assert (row.reason, row.fix) == (Reason.DTYPE, None)
    assert "float32" in row.detail
    assert "reduced, too" not in row.detail


@pytest.mark.parametrize("depth", [0, 1, 6])
@pytest.mark.parametrize("swapped", [False, True])
def test_which_addend_is_the_all_reduce_is_no_question_of_depth(depth: int, swapped: bool, one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Tensor:
        for _ in range(depth):
            r = r.tanh()
        reduced = all_reduce(x, one_rank)
        return F.rms_norm(r + reduced if swapped else reduced + r, (HIDDEN,), w, 1e-5)

    assert matched(model, "allreduce_rms") == 1


def test_of_two_all_reduces_the_one_that_is_read_for_the_sum_alone_is_fused(one_rank: str) -> None:
    """The residual is an all-reduce itself, as in a block whose embedding is split over ranks."""

    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        stream = all_reduce(r, one_rank)
        return F.rms_norm(stream + all_reduce(x, one_rank), (HIDDEN,), w, 1e-5), stream.tanh().tanh()

    assert matched(model, "allreduce_rms") == 1
