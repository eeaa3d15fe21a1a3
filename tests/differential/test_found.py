"""What random programs have found, each reduced by hand to what matters."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fuseplan.config import PassConfig
from tests.differential.checking import Interpreted
from tests.differential.norms import NORMS, by, mean_square, of_sum
from tests.differential.recording import record
from tests.differential.settings import ONE_ROUNDING, Setting
from tests.differential.vocabulary import turned
from tests.helpers import HIDDEN, Norm, all_reduce, gemma, llama, quantize, quantize_rows, randn, vllm

X, R, W = randn(5, HIDDEN), randn(5, HIDDEN, seed=1), 1 + randn(HIDDEN, seed=2) / 5
SCALE = torch.tensor([0.02])
EVERYTHING = "ordered(allreduce_rms_padding, act_padding, allreduce_rms, norm_quant, act_quant)"
ALL = Setting(config=PassConfig(policy=EVERYTHING))


def fused(model: Callable[..., Any], *inputs: Tensor, setting: Setting = ALL) -> dict[str, int]:
    """What the passes fuse in a model's graph, which has to compute the same afterwards."""
    (recorded,) = record(model, [inputs])
    outcome = Interpreted(recorded).check(setting, random.Random(0))
    assert outcome.problems == []
    return dict(outcome.fused)


@pytest.mark.parametrize("bounds", [{"min": 0.0}, {"max": 30.0}, {"min": -2.0, "max": 500.0}], ids=str)
def test_a_clamp_inside_the_one_to_what_fp8_holds_is_kept(bounds: dict[str, float]) -> None:
    def model(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = llama(x, None, w)[0].float() / s
        return y.clamp(**bounds).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    assert fused(model, X, W, SCALE) == {}


PADDED: dict[str, tuple[Norm, dict[str, int] | None, dict[str, int] | None]] = {
    # Rounded, one plus a weight is the weight; a multiple of it is no convention.
    "one added": (NORMS["narrow_one_added"], {"act_padding": 1}, None),
    "a multiple added": (NORMS["scaled_one_added"], None, None),
    "epsilon": (of_sum(by(lambda wide: torch.rsqrt(torch.add(mean_square(wide), 0.25)))), {"act_padding": 1}, None),
    "twice epsilon": (NORMS["scaled_epsilon"], {}, None),
    "two epsilons": (NORMS["two_epsilons"], {}, None),
    "squared in bfloat16": (NORMS["narrow"], {}, {"act_padding": 1}),
    "squared in bfloat16, summed in float32": (NORMS["narrow_square"], {}, {"act_padding": 1}),
}  # fmt: skip
"""Norms, and what of each with a pad is fused in bfloat16 and in float32; None: whatever computes the same."""


@pytest.mark.parametrize("case", PADDED)
def test_norms_that_are_written_otherwise(case: str) -> None:
    norm, narrow, wide = PADDED[case]
    for dtype, expected in ((torch.bfloat16, narrow), (torch.float32, wide)):
        found = fused(lambda x, w: F.pad(norm(x, None, w)[0], (0, 8)), X.to(dtype), W.to(dtype))
        assert expected is None or found == expected


@pytest.mark.parametrize(
    "silu",
    [lambda gate: gate * torch.sigmoid(gate), lambda gate: gate / (1 + torch.exp(-gate))],
    ids=["by sigmoid", "by exp"],
)
def test_silu_that_is_computed_in_bfloat16_is_none_of_ours(silu: Callable[..., Tensor]) -> None:
    def model(gate: Tensor, up: Tensor, s: Tensor) -> Tensor:
        return quantize(silu(gate) * up, s)

    assert fused(model, X, R, SCALE) == {}
    assert fused(model, X.float(), R.float(), SCALE) == {"act_quant": 1}


@pytest.mark.parametrize(("norm", "count"), [(gemma, 0), (llama, 1), (vllm, 1)])
def test_another_formula_is_no_rounding_change(norm: Callable[..., Any], count: int, one_rank: str) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return F.pad(norm(x, r, w)[0], (0, 8))

    config = replace(ALL.config, allow_rounding_changes=True, forbid=("act_padding:torch",))
    assert fused(model, X, R, W, setting=Setting(config=config, providers=(ONE_ROUNDING,))) == (
        {"act_padding": 1} if count else {}
    )


@pytest.mark.parametrize("quantised", [llama, vllm])
def test_rows_of_which_no_number_is_known_are_quantised(quantised: Callable[..., Any]) -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(quantised(x, None, w)[0])

    x = randn(5, HIDDEN)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    assert fused(model, x, W) == {"norm_quant": 1}


def test_a_pad_is_moved_before_a_reshape_though_no_size_is_known() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        y, _ = llama(x.reshape(-1, x.shape[-1]), None, w)
        return F.pad(y.reshape(x.shape), (0, 8))

    x, w = randn(3, 5, HIDDEN), W.clone()
    for dim in range(3):
        torch._dynamo.mark_dynamic(x, dim)
    torch._dynamo.mark_dynamic(w, 0)
    assert fused(model, x, w) == {"act_padding": 1}


def test_results_that_may_not_lie_row_after_row_need_no_guard() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        y, total = llama(turned.sin(), turned, w)
        return F.pad(y, (0, 8)), total

    x = randn(5, 3, HIDDEN)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    assert fused(model, x, W) == {"act_padding": 1}


def test_what_reads_memory_by_strides_keeps_its_memory() -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, total = llama(turned(x), turned(r), w)
        return F.pad(y, (0, 8)), total.transpose(0, 1).as_strided((3,), (1,))

    def padded(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, _ = llama(x, None, w)
        return F.pad(y, (0, 8)), y.as_strided((3,), (HIDDEN,))

    assert fused(model, X, R, W) == {}
    assert fused(padded, X, W) == {}


def test_what_was_moved_before_an_all_reduce_is_no_wrong_reading_of_the_graph(one_rank: str) -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        reduced = all_reduce(x.sin().reshape(-1, HIDDEN), one_rank).reshape(x.shape)
        return llama(reduced, x, w)

    setting = Setting(config=replace(ALL.config, verify="always"))
    assert fused(model, randn(2, 3, HIDDEN), W, setting=setting) == {"allreduce_rms": 1}


def test_a_reduced_value_that_is_its_own_residual_is_not_reduced_twice(one_rank: str) -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        reduced = all_reduce(x, one_rank)
        return llama(reduced, reduced, w)

    setting = Setting(config=replace(ALL.config, verify="always"))
    assert fused(model, X, W, setting=setting) == {}


def test_strides_of_single_elements_mean_nothing(one_rank: str) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return llama(all_reduce(x.reshape(2, 1).transpose(0, 1), one_rank), None, w)[0]

    setting = Setting(config=replace(ALL.config, verify="always"))
    assert fused(model, randn(1, 2), randn(2), setting=setting) == {"allreduce_rms": 1}
