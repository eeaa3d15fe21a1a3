"""Codes in float8_e5m2, by each scale that there is for fp8: a digit less, for a range like float16's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fuseplan
from fuseplan.dialect import NORM_FAMILY, ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.record import Reason
from fuseplan.rules import Bindings
from tests.helpers import post_grad, randn
from tests.rules.parts.microscaling import CONFIG, E5M2, RULES, WIDTH, cores
from tests.rules.parts.test_fp8_spellings import inputs

MOST, GROUP = 57344.0, 64
SCALE = torch.tensor([0.02])
Quantise = Callable[[Tensor], tuple[Tensor, ...]]


def by_one(x: Tensor) -> tuple[Tensor, ...]:
    return ((x.float() * SCALE.reciprocal()).clamp(-MOST, MOST).to(E5M2),)


def by_rows(x: Tensor) -> tuple[Tensor, ...]:
    scale = (x.abs().amax(-1, keepdim=True).float() / MOST).clamp(min=1e-12)
    return (x.float() / scale).clamp(-MOST, MOST).to(E5M2), scale


def unclamped(x: Tensor) -> tuple[Tensor, ...]:
    """No quotient is beyond what codes hold."""
    scale = (x.abs().amax(-1, keepdim=True).float() / MOST).clamp(min=1e-12)
    return (x.float() / scale).to(E5M2), scale


def by_groups(x: Tensor) -> tuple[Tensor, ...]:
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / MOST
    return (groups / scale.unsqueeze(-1)).clamp(-MOST, MOST).to(E5M2).flatten(-2), scale


KINDS: dict[Quantise, str] = {
    by_one: "static_scaled_fp8_quant",
    by_rows: "dynamic_per_token_scaled_fp8_quant",
    unclamped: "dynamic_per_token_scaled_fp8_quant",
    by_groups: "per_token_group_fp8_quant",
}
every_kind = pytest.mark.parametrize("quantise", KINDS, ids=lambda each: each.__name__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_kind
def test_an_op_computes_what_the_graph_does(quantise: Quantise, dtype: torch.dtype) -> None:
    """Bit for bit, of zeros, of infinity and of what is beyond the largest code, too."""
    graph = post_grad(quantise, randn(6, WIDTH).to(dtype))
    raised = canonicalize(graph)
    (node,) = raised.calls(ops[KINDS[quantise]].overload)
    assert E5M2 in node.args
    for name, value in inputs(dtype).items():
        x = value[:, :WIDTH]
        given = [x, SCALE][: len(graph.find_nodes(op="placeholder"))]
        ours, theirs = (fx.GraphModule({}, each)(*given) for each in (raised.graph, graph))
        for got, wanted in zip(ours, theirs, strict=True):
            same = (got.float() == wanted.float()) | (got.float().isnan() & wanted.float().isnan())
            assert bool(same.all()), name


@pytest.mark.sampled
@pytest.mark.parametrize("core", RULES)
@every_kind
def test_it_is_fused_with_every_core(quantise: Quantise, core: str, one_rank: str) -> None:
    reports, given = list[fuseplan.Report](), (randn(7, WIDTH), randn(7, WIDTH, seed=1), one_rank)
    function = cores(lambda x, scaling: quantise(x))[core]
    config = replace(CONFIG, verify="always")
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled: Any = fuseplan.compile(function, config=config, on_report=reports.append)
        pairs = list(zip(compiled(*given), function(*given), strict=True))
    assert {name: count for name, count in reports[0].fused.items() if count} == {RULES[core]: 1}
    assert not [each for each in reports[0].graphs[0].refusals if each.reason in (Reason.FAULT, Reason.VERIFICATION)]
    for got, wanted in pairs:
        assert got.dtype is wanted.dtype
        if got.dtype is E5M2:
            assert (got.view(torch.uint8).int() - wanted.view(torch.uint8).int()).abs().max() <= 1
        else:
            torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01)


@every_kind
def test_a_plan_takes_tritons_kernel(quantise: Quantise) -> None:
    add_norm = cores(lambda x, scaling: quantise(x))["add_norm"]
    report = fuseplan.explain(add_norm, randn(7, WIDTH), randn(7, WIDTH), "", device="h200")
    assert [(each.rule, each.provider) for each in report.graphs[0].applied] == [("norm_quant", "triton")]


def test_kernels_that_have_the_largest_of_e4m3_built_in_refuse_it() -> None:
    """Each provider that serves the op but ours."""
    op = NORM_FAMILY[True, True, "static_fp8_quant"]
    x, weight = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    values = {"x": x, "residual": x, "weight": weight, "eps": 1e-5, "rounding": "gpt_oss", "scale": torch.ones(1),
              "quant_rounding": "multiply", "group_name": "0"}  # fmt: skip
    asked = 0
    for provider in BUILT_IN_PROVIDERS:
        offer = provider.offers().get(op.name)
        if offer is None or provider.name in ("triton", "torch"):
            continue
        refused = offer.accepts(Bindings("r", {**values, "dtype": E5M2}))
        assert refused is not None, provider.name
        assert "float8_e5m2" in refused.detail, provider.name
        asked += 1
    assert asked
