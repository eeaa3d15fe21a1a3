"""What is said of places at which a rule doesn't match, on small graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

from fuseplan.record import Nearness, Reason
from tests.helpers import HIDDEN, all_reduce, gpt_oss, llama, quantize, randn, vllm
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


def test_a_pad_of_the_residual_stream_is_not_a_pad_of_the_norm() -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(x, r, w)
        return y, F.pad(total * 1.5, (0, 8))

    assert [row.nearness for row in near_misses(model, X, R, W)] == [Nearness.ABSENT]


def test_an_obstacle_between_residual_add_and_norm(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = all_reduce(x, one_rank) + r
        return llama(total[1:], None, w)[0], total

    (row,) = near_misses(model, X, R, W, rule="allreduce_rms")
    assert row.detail.startswith("aten.slice.Tensor stands between all_reduce and rms_norm")


@pytest.mark.parametrize("same", [True, False])
def test_sums_that_are_added_after_they_are_reduced(same: bool, one_rank: str) -> None:
    other = one_rank if same else dist.new_group([0]).group_name

    def model(x: Tensor, z: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return llama(all_reduce(x, one_rank) + all_reduce(z, other), r, w)

    row = near_misses(model, X, randn(6, HIDDEN, seed=2), R, W, rule="allreduce_rms")[0]
    if same:
        assert "it adds two all_reduces" in row.detail
        assert row.mend == "add before the all_reduce, once, instead of after both"
    else:
        assert row.reason is Reason.GROUP
        assert f"over groups '{one_rank}' and '{other}'" in row.detail


def test_an_all_reduce_of_another_kind(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        reduced: Tensor = collectives.all_reduce(x, "max", one_rank)  # type: ignore[arg-type]
        return llama(reduced, r, w)[0]

    (row,) = near_misses(model, X, R, W)
    assert (row.rule, row.nearness, row.reason) == ("allreduce_rms", Nearness.UNRECOGNIZED, Reason.ATTRIBUTE)
    assert "it reduces by 'max', and fused ops sum" in row.detail
    assert row.mend is None


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


def test_a_quantisation_of_another_kind() -> None:
    def model(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return (llama(x, None, w)[0].float() / s).clamp(-240.0, 240.0).to(torch.float8_e4m3fn)

    (row,) = near_misses(model, X, W, torch.tensor([0.02]))
    assert row.detail == "fp8 quantisation not recognised: the value cast isn't clamped to +-448"


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

    def activated(gate: Tensor, up: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y = F.silu(gate) * up
        return quantize(y, s), y.relu()

    def reduced(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        sums = all_reduce(x, one_rank)
        return llama(sums, r, w)[0], sums.relu()

    assert not near_misses(normed, X, W, torch.tensor([0.02]))
    assert not near_misses(activated, X, X.flip(0), torch.tensor([0.02]))
    (row,) = near_misses(reduced, X, X.flip(0), W)
    assert (row.rule, row.nearness, row.reason) == ("allreduce_rms", Nearness.REFUSED, Reason.USERS)
    assert row.mend is None, "the model means relu to read it"
