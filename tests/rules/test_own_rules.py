"""A fusion that a user writes: an op, a rule, a provider, handed to the doors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.dialect import define, ops
from fuseplan.errors import RuleError
from fuseplan.providers import provider_of
from fuseplan.record import Nearness
from fuseplan.rules import Rule
from tests.helpers import HIDDEN, llama, randn
from tests.rules.planning import compiled_and_eager

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


def reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    return torch.relu(ops.rms_norm.reference(x, weight, eps, rounding))


rms_norm_relu = define(
    "rms_norm_relu", "(Tensor x, Tensor weight, float eps, str rounding) -> Tensor",
    reference=reference, fake=lambda x, *rest: torch.empty_like(x), samples=ops.rms_norm.samples, fused=True,
)  # fmt: skip


class NormRelu(Rule):
    """rms_norm -> relu  =>  one op.   y = relu(rms_norm(x) * weight)"""

    name, flags, op, core = "norm_relu", (), rms_norm_relu, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return torch.ops.aten.relu.default(ops.rms_norm(x, weight, eps, rounding))

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return rms_norm_relu(x, weight, eps, rounding)


CALLS: list[int] = []


def kernel(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    CALLS.append(x.shape[0])
    return reference(x, weight, eps, rounding)


MINE = provider_of("mine", {rms_norm_relu: kernel}, cost=0.0)


def model(x: Tensor, w: Tensor) -> Tensor:
    return llama(x, None, w)[0].relu()


def obstructed(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return llama(x, None, w)[0].sin().relu(), llama(x.sin(), None, w)[0].relu()


def test_it_is_planned_applied_and_run() -> None:
    report, pairs = compiled_and_eager(
        model, randn(5, HIDDEN), W, policy="planned", rules=[NormRelu()], providers=[MINE]
    )
    torch.testing.assert_close(*pairs[0], rtol=2**-7, atol=2**-7)
    assert report.fused["norm_relu"] == 1
    assert report.graphs[0].applied[0].provider == "mine"
    assert CALLS[-1] == 5


def test_explain_knows_it_and_its_near_misses() -> None:
    report = fuseplan.explain(obstructed, randn(5, HIDDEN), W, device="h200", rules=[NormRelu()], providers=[MINE])
    assert report.fused["norm_relu"] == 1
    (miss,) = [row for row in report.near_misses if row.rule == "norm_relu"]
    assert miss.nearness is Nearness.OBSTRUCTED
    assert miss.detail.startswith("aten.sin.default stands between rms_norm and aten.relu.default")


def test_it_contends_with_others_and_is_forbidden_like_them() -> None:
    def contested(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = llama(x, None, w)[0]
        return F.pad(y, (0, 8)), y.relu()

    for forbid, expected in (((), {"act_padding": 1}), (("act_padding",), {})):
        report = fuseplan.explain(
            contested, randn(5, HIDDEN), W, device="h200", config=fuseplan.PassConfig(forbid=forbid),
            rules=[NormRelu()], providers=[MINE],
        )  # fmt: skip
        assert {rule: count for rule, count in report.fused.items() if count} == expected
    (miss,) = [row for row in report.near_misses if row.rule == "norm_relu"]
    assert "is also read by pad" in miss.detail


def doubled_reference(x: Tensor, weight: Tensor, residual: Tensor, eps: float, rounding: str) -> Tensor:
    normed: Tensor = ops.rms_norm.reference(x, weight, eps, rounding)
    return residual + 2 * normed.float()


norm_doubled = define(
    "norm_doubled", "(Tensor x, Tensor weight, Tensor residual, float eps, str rounding) -> Tensor",
    reference=doubled_reference, fake=lambda x, *rest: x.new_empty(x.shape, dtype=torch.float32), samples=(),
    fused=True,
)  # fmt: skip
DOUBLES = provider_of("doubles", {norm_doubled: doubled_reference}, cost=0.0)


class NormDoubled(Rule):
    """rms_norm -> residual + 2 *  =>  one op, whose result is cast; both sides have arguments by name."""

    name, flags, op, core = "norm_doubled", (), norm_doubled, ops.rms_norm

    def pattern(self, x: Any, weight: Any, residual: Any, eps: Any, rounding: Any) -> Any:
        return torch.ops.aten.add.Tensor(residual, ops.rms_norm(x, weight, eps, rounding), alpha=2)

    def replacement(self, x: Any, weight: Any, residual: Any, eps: Any, rounding: Any) -> Any:
        return torch.ops.aten._to_copy.default(norm_doubled(x, weight, residual, eps, rounding), dtype=torch.bfloat16)


def added(x: Tensor, w: Tensor, residual: Tensor, alpha: int) -> Tensor:
    return torch.add(residual, llama(x, None, w)[0], alpha=alpha)


@pytest.mark.parametrize(("alpha", "why"), [(2, []), (3, ["takes 3, and the rule has 2 there"])])
def test_arguments_by_name_are_part_of_both_sides(alpha: int, why: list[str]) -> None:
    report, ((actual, expected),) = compiled_and_eager(
        added, randn(5, HIDDEN), W, randn(5, HIDDEN, seed=2), alpha, policy="planned", coded=False,
        rules=[NormDoubled()], providers=[DOUBLES],
    )  # fmt: skip
    assert (actual.dtype, report.fused["norm_doubled"]) == (expected.dtype, alpha == 2)
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)
    misses = [miss.detail for miss in report.near_misses if miss.rule == "norm_doubled"]
    assert [each.split("aten.add.Tensor ")[-1] for each in misses] == why


def test_an_op_is_defined_once() -> None:
    with pytest.raises(RuleError, match=r"fuseplan::rms_norm_relu\(.* can't be defined"):
        define("rms_norm_relu", "(Tensor x) -> Tensor", reference=torch.relu, fake=torch.empty_like, samples=())
    with pytest.raises(RuleError, match=r"fuseplan::rms_norm_relu.mine\(.* can't be defined"):
        provider_of("mine", {rms_norm_relu: kernel})


class ByName(Rule):
    """The same, whose fused op takes the pattern's variables by their names."""

    name, flags, op, core = "norm_relu", (), rms_norm_relu, ops.rms_norm

    def pattern(self, **bound: Any) -> Any:
        return torch.ops.aten.relu.default(ops.rms_norm(*bound.values()))


class Misnamed(ByName):
    """The same with another name for the weight."""

    def pattern(self, x: Any, scale: Any, eps: Any, rounding: Any) -> Any:  # type: ignore[override]
        return torch.ops.aten.relu.default(ops.rms_norm(x, scale, eps, rounding))


def test_a_replacement_follows_from_names() -> None:
    rule = ByName()
    rule.validate()
    assert rule.variables == ("x", "weight", "eps", "rounding")
    assert rule.describe() == NormRelu().describe()
    replaced = rule.trace_replacement(dict(rule.traced_pattern.inputs))
    (call,) = (node for node in replaced.graph.nodes if node.op == "call_function")
    assert call.target is rms_norm_relu.overload
    assert [each.name for each in call.args] == ["x", "weight", "eps", "rounding"]
    with pytest.raises(RuleError, match="its pattern has no variable 'weight', which rms_norm_relu takes; write a"):
        Misnamed().validate()
