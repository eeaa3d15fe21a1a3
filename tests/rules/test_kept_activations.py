"""Activations that are quantised and read as they are, too."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.dialect import ACTIVATION_FAMILY, KEPT_ACTIVATION_FAMILY
from fuseplan.providers import provider_of
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.check import check
from fuseplan.verification.specs import Case, TensorSpec
from fuseplan.verification.steps import Stepped
from tests.helpers import HIDDEN, quantize_rows, quickly_traced, randn
from tests.rules.parts.test_group_fp8 import quantize_groups
from tests.rules.test_kept_norms import FORMATS, OWN, WIDE, applied, never_written, other_numbers, sound
from tests.rules.test_rules import ALONE, compare

LAYERS = 2


@pytest.mark.sampled
@pytest.mark.parametrize("reads", ["product", "pointwise", "itself"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_others_read_is_yielded_beside_the_codes(suffix: str, reads: str) -> None:
    def model(gate: Tensor, up: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(gate) * up
        read = {"product": F.linear(y, matrix), "pointwise": y.abs() + 1, "itself": y}
        return *FORMATS[suffix](y), read[reads]

    inputs = randn(7, HIDDEN), randn(7, HIDDEN, seed=1), randn(8, HIDDEN, seed=2)
    report = compare(model, *inputs, rule="act_quant", ulps=8, coded=reads == "product")
    assert applied(report) == [f"silu_and_mul_{suffix}_and_activation"]
    assert not report.near_misses


def test_where_nobody_reads_it_it_is_not_yielded() -> None:
    """Nor is the op that yields it among the candidates."""
    graph = quickly_traced(
        lambda gate, up: quantize_rows(F.silu(gate) * up), randn(7, HIDDEN), randn(7, HIDDEN, seed=1)
    )  # fmt: skip
    matches = PostGradPassManager(ALONE["act_quant"]).analyze(graph).matches
    assert {match.rule.op.name for match in matches.candidates} == {"silu_and_mul_dynamic_fp8_quant"}


def test_of_two_quantisations_one_is_fused_and_the_other_one_reads_the_activation() -> None:
    def model(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(gate) * up
        return *quantize_rows(y), *quantize_groups(y, group=32)

    report = compare(model, randn(7, HIDDEN), randn(7, HIDDEN, seed=1), rule="act_quant", coded=False)
    (op,) = applied(report)
    assert op in ("silu_and_mul_dynamic_fp8_quant_and_activation", "silu_and_mul_group_fp8_quant_and_activation")


class Mlps(torch.nn.Module):
    """Layers that yield their activations beside what their codes stand for, as taps for distillation do."""

    def forward(self, x: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        taps = []
        for _ in range(LAYERS):
            gate, up = F.linear(x, matrix).chunk(2, -1)
            y = F.silu(gate) * up
            codes, scale = quantize_groups(y, group=128)
            groups = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
            taps.append(y)
            x = groups.flatten(-2).bfloat16()
        return x, *taps


def test_every_layer_whose_activation_is_read_is_planned() -> None:
    planned = fuseplan.explain(Mlps(), randn(64, WIDE), randn(2 * WIDE, WIDE) / 16, device="h200")
    chosen = [(fusion.op, fusion.provider) for fusion in planned.graphs[0].applied if fusion.rule == "act_quant"]
    assert chosen == [("silu_and_mul_group_fp8_quant_and_activation", "triton")] * LAYERS
    assert not planned.near_misses


@pytest.mark.parametrize("suffix", OWN)
def test_verification_holds_it_against_the_graphs(suffix: str) -> None:
    op = KEPT_ACTIVATION_FAMILY[suffix]
    rule = next(each for each in BUILT_IN_RULES if each.op is op)

    def wrong(spoil: Any) -> str | None:
        def kernel(*arguments: Any) -> Any:
            results = list(op.reference(*arguments))
            spoil(results)
            return tuple(results)

        name = f"kept_activation_{suffix}_{spoil.__name__}"
        provider_of(name, {op: kernel}, cost=0.0, uuid=name)
        x = TensorSpec(
            dtype=torch.bfloat16, shape=(33, WIDE), stride=(WIDE, 1), misalignment=0, device=torch.device("cpu")
        )
        given = {"gate": x, "up": x, "rounding": "llama", **OWN[suffix]}
        return check(rule, name, Case(tokens=33, arguments=given), seed=3).wrong

    assert wrong(sound) is None
    for spoil in (other_numbers, never_written):
        assert "result 2" in str(wrong(spoil)), spoil.__name__


def test_codes_and_scales_have_the_places_that_they_have_without_it() -> None:
    assert set(KEPT_ACTIVATION_FAMILY) == set(ACTIVATION_FAMILY)
    for suffix, op in KEPT_ACTIVATION_FAMILY.items():
        plain, kept = (
            next(rule for rule in BUILT_IN_RULES if rule.op is each) for each in (ACTIVATION_FAMILY[suffix], op)
        )
        places = [found.places if (found := Stepped.of(rule)) else None for rule in (plain, kept)]
        assert places[0] == places[1]
        assert (op.packed, op.arguments) == (ACTIVATION_FAMILY[suffix].packed, ACTIVATION_FAMILY[suffix].arguments)
