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
from tests.differential.norms import EPSILON, root
from tests.differential.recording import record
from tests.differential.settings import ONE_ROUNDING, Setting
from tests.differential.vocabulary import turned
from tests.helpers import HIDDEN, gemma, llama, quantize, quantize_rows, randn, vllm

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


def test_one_plus_a_weight_that_is_rounded_is_the_weight() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        return F.pad((wide * root(wide) * (1.0 + w)).to(x.dtype), (0, 8))

    assert fused(model, X, W) == {"act_padding": 1}


def test_one_plus_a_multiple_of_the_weight_is_no_convention() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        return F.pad((wide * root(wide) * torch.add(w.float(), 1, alpha=2)).to(x.dtype), (0, 8))

    fused(model, X, W)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_multiple_of_epsilon_is_not_epsilon(scale: int) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        mean = torch.add(wide.pow(2).mean(-1, keepdim=True), 0.25, alpha=scale)
        return F.pad(w * (wide * torch.rsqrt(mean)).to(x.dtype), (0, 8))

    assert fused(model, X, W) == ({"act_padding": 1} if scale == 1 else {})


def test_of_two_epsilons_none_is_dropped() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        mean = wide.pow(2).mean(-1, keepdim=True) + 0.25
        return F.pad(w * (wide * torch.rsqrt(mean + 0.5)).to(x.dtype), (0, 8))

    assert fused(model, X, W) == {}


def narrow(x: Tensor, w: Tensor) -> Tensor:
    return x * root(x) * w


def narrow_square(x: Tensor, w: Tensor) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True, dtype=torch.float32)
    return (x * torch.rsqrt(mean + EPSILON)).to(x.dtype) * w


@pytest.mark.parametrize("norm", [narrow, narrow_square])
def test_a_norm_that_squares_in_bfloat16_is_none_of_ours(norm: Callable[..., Tensor]) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.pad(norm(x, w), (0, 8))

    assert fused(model, X, W) == {}
    assert fused(model, X.float(), W.float()) == {"act_padding": 1}


def silu_by_sigmoid(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate)


def silu_by_exp(gate: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate))


@pytest.mark.parametrize("silu", [silu_by_sigmoid, silu_by_exp])
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
