"""A hint is true: who follows it has the fusion, and the numbers that the model computed before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.providers import PROFILES
from fuseplan.record import Reason
from tests.helpers import HIDDEN, all_reduce, llama, post_grad, randn
from tests.matching.reported import R, W, X, near_misses

Reduce = Callable[[Tensor], Tensor]
Model = Callable[[Reduce, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(the all-reduce, what it reduces, the residual, the weight, something else) -> what the model computes."""

S = randn(6, HIDDEN, seed=3)
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
    analysis = PostGradPassManager(PassConfig(), device=PROFILES["h200"]).analyze(post_grad(model, X, R, W, S))
    return len({match.anchor for match in analysis.matches.candidates if match.rule.name == rule})


@pytest.mark.parametrize("name", ADVICE)
def test_who_follows_a_hint_has_the_fusion_and_the_same_numbers(name: str, one_rank: str) -> None:
    advice = ADVICE[name]

    def reducing(model: Model) -> Callable[..., Tensor]:
        return lambda x, r, w, s: model(lambda part: all_reduce(part, one_rank), x, r, w, s)

    row = near_misses(reducing(advice.model), X, R, W, S, rule=advice.rule)[0]
    assert row.mend == advice.hint
    assert matched(reducing(advice.model), advice.rule) == advice.fused_before
    assert matched(reducing(advice.followed), advice.rule) == 1
    inputs = [each.double() for each in (X, R, W, S)]
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
    rows = near_misses(lambda x, r, w, s: model(lambda p: all_reduce(p, one_rank), x, r, w, s), X, R, W, S)
    row = next(row for row in rows if row.rule == "allreduce_rms")
    assert (row.reason, row.mend) == (reason, None)


@pytest.mark.parametrize("between", [False, True])
def test_what_is_named_is_what_decides(between: bool, one_rank: str) -> None:
    """Of a reshape and an addition behind an all-reduce the reshape alone would be moved before it."""

    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Tensor:
        experts = all_reduce(x, one_rank) + s.sigmoid()
        return llama(
            experts.reshape(2, 3, HIDDEN) if between else experts, r.reshape(2, 3, HIDDEN) if between else r, w
        )[0]

    (row,) = near_misses(model, X, R, W, S, rule="allreduce_rms")
    assert row.detail == "aten.add.Tensor stands between all_reduce and fused_add_rms_norm"
    assert row.mend == "add it to the residual"


def test_an_addend_that_is_reduced_in_float32_is_blamed_for_its_dtype(one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        total = all_reduce(x.float(), one_rank) + r.float()
        return w * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()

    row = near_misses(model, X, R, W, rule="allreduce_rms")[0]
    assert (row.reason, row.mend) == (Reason.DTYPE, None)
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
