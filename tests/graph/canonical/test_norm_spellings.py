"""Roots that are powers, and norms without a weight, as Gemma 3n and Gemma 4 have them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fuseplan.dialect import ops
from fuseplan.graph.facts import fill_of, tensor_of
from fuseplan.record import Reason
from tests.helpers import HIDDEN, quickly_canonical, randn
from tests.matching.reported import near_misses

EPS = 1e-6
W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()

ROOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsqrt": lambda mean: torch.rsqrt(mean + EPS),
    "torch.pow": lambda mean: torch.pow(mean + EPS, -0.5),
    "method": lambda mean: (mean + EPS).pow(-0.5),
    "operator": lambda mean: (mean + EPS) ** -0.5,
    "epsilon first": lambda mean: torch.pow(EPS + mean, -0.5),
}


def normed(x: Tensor, root: str = "torch.pow") -> Tensor:
    wide = x.float()
    return wide * ROOTS[root](wide.pow(2).mean(-1, keepdim=True))


def unweighted(x: Tensor, root: str = "torch.pow") -> Tensor:
    return normed(x, root).type_as(x)


def norms(model: Callable[..., object], *inputs: Tensor) -> list[fx.Node]:
    raised = quickly_canonical(model, *inputs)
    assert not raised.refusals
    raised.graph.lint()
    return raised.calls(ops.rms_norm.overload, ops.fused_add_rms_norm.overload)  # type: ignore[return-value]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_power_of_minus_one_half_is_a_root(root: str, dtype: torch.dtype) -> None:
    def weighted(x: Tensor, w: Tensor) -> Tensor:
        return (normed(x, root) * w.float()).type_as(x)

    (norm,) = norms(weighted, randn(5, HIDDEN, dtype=dtype), W.to(dtype))
    assert norm.args[2:] == (EPS, "llama" if dtype is torch.float32 else "gpt_oss")
    assert norm.args[1].op == "placeholder"  # type: ignore[union-attr]


@pytest.mark.parametrize("root", [*ROOTS, "built in"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_without_a_weight_has_one_of_ones(root: str, dtype: torch.dtype) -> None:
    def model(x: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), eps=EPS) if root == "built in" else unweighted(x, root).relu()

    (norm,) = norms(model, randn(2, 5, HIDDEN, dtype=dtype))
    weight = tensor_of(norm.args[1])
    assert weight is not None
    assert (fill_of(norm.args[1]), weight.shape, weight.dtype) == (1, (HIDDEN,), dtype)
    assert norm.args[2] == pytest.approx(EPS)


@pytest.mark.parametrize("wide", [False, True])
def test_it_takes_the_residual_add_before_it(wide: bool) -> None:
    def model(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x.float() + residual.float() if wide else x + residual
        return unweighted(total).to(x.dtype), total.to(x.dtype)

    (norm,) = norms(model, randn(5, HIDDEN), randn(5, HIDDEN, seed=1))
    assert norm.target is ops.fused_add_rms_norm.overload
    assert fill_of(norm.args[2]) == 1
    assert norm.args[4] == ("fp32" if wide else "gpt_oss")


def test_all_norms_of_one_width_share_their_ones() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        halves = unweighted(x.view(5, 2, HIDDEN // 2))
        return unweighted(x), unweighted(x.relu()), halves, unweighted(halves.sigmoid())

    raised = quickly_canonical(model, randn(5, HIDDEN))
    ones = raised.calls(torch.ops.aten.full.default)
    assert sorted(tensor_of(node).shape[0] for node in ones) == [HIDDEN // 2, HIDDEN]  # type: ignore[union-attr]
    assert not raised.original.find_nodes(op="call_function", target=torch.ops.aten.full.default)


def test_none_are_made_for_a_width_that_varies() -> None:
    raised = quickly_canonical(lambda x: unweighted(x.t()), randn(HIDDEN, 5), dynamic=True)
    assert raised.recognized() == {}
    (refusal,) = raised.refusals
    assert (refusal.reason, refusal.fix) == (Reason.SIZE, "leave the width out of mark_dynamic")
    assert "no weight" in refusal.detail


@pytest.mark.parametrize(
    "reader",
    [lambda y: y * y.tanh(), lambda y: y.view(5, 2, HIDDEN // 2) * 2, lambda y: y.relu() + y.exp()],
    ids=["a gate", "another width", "several"],
)
def test_what_else_it_is_multiplied_by_stays_outside(reader: Callable[[Tensor], Tensor]) -> None:
    (norm,) = norms(lambda x: reader(unweighted(x)), randn(5, HIDDEN))
    assert fill_of(norm.args[1]) == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda x, w: ((y := unweighted(x)) * w, y.exp()), Reason.USERS),  # what also reads the first is reported
        (lambda x, w: normed(x).relu(), Reason.OP),
    ],
    ids=["its weight stands behind another reader", "it stays in float32"],
)
def test_what_is_no_norm_of_the_dialect_is_refused(model: Callable[..., object], reason: Reason) -> None:
    raised = quickly_canonical(model, randn(5, HIDDEN), W)
    assert raised.recognized() == {}
    assert [refusal.reason for refusal in raised.refusals] == [reason]


def test_other_powers_are_no_roots() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        wide = x.float()
        mean = wide.pow(2).mean(-1, keepdim=True) + EPS
        return tuple(F.pad((wide * mean.pow(power)).type_as(x), (0, 8)) for power in (-1, 0.5, -0.25))

    assert quickly_canonical(model, randn(5, HIDDEN)).recognized() == {f"pad[{HIDDEN}]": 3}
    assert all("RMSNorm not recognised" not in row.detail for row in near_misses(model, randn(5, HIDDEN)))
