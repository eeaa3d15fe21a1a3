"""Ops that the cost model doesn't know: declared, measured, forced, or left out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseplan
from fuseplan.dialect import define, ops
from fuseplan.errors import ConfigError
from fuseplan.matching import Match
from fuseplan.planner.declared import generated
from fuseplan.providers import KernelCost, provider_of
from fuseplan.record import Nearness, Reason, Report
from fuseplan.report import report_to_json
from fuseplan.rules import Rule
from fuseplan.rules.parts.base import OPAQUE
from fuseplan.rules.parts.traffic import Kernel
from tests.helpers import randn
from tests.interpreted import no_code
from tests.planner.posing import MODEL, TORCH, problem_of

aten = torch.ops.aten
WIDTH, FP8 = 64, torch.float8_e4m3fn
INPUTS = (randn(16, WIDTH), randn(16, WIDTH, seed=1), torch.ones(WIDTH, dtype=torch.bfloat16))


def reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    y: Tensor = ops.rms_norm.reference(x, weight, eps, rounding)
    return y * torch.sigmoid(gate)


gated_norm = define(
    "declared_gated_norm", "(Tensor x, Tensor gate, Tensor weight, float eps, str rounding) -> Tensor",
    reference=reference, fake=lambda x, *rest: x.new_empty(x.shape), samples=(), fused=True,
)  # fmt: skip


class GatedNorm(Rule):
    """rms_norm(x) * sigmoid(gate)  =>  one op"""

    name, flags, op, core = "gated_norm", (), gated_norm, ops.rms_norm

    def pattern(self, x: Any, gate: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return aten.mul.Tensor(ops.rms_norm(x, weight, eps, rounding), aten.sigmoid.default(gate))

    def replacement(self, x: Any, gate: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return gated_norm(x, gate, weight, eps, rounding)


def model(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-5) * gate.sigmoid()


_count = iter(range(1000))


def provider(cost: Any = None, **options: Any) -> Any:
    return provider_of(f"declared_{next(_count)}", {gated_norm: reference}, cost=cost, **options)


def explain(cost: Any = None, *, device: str = "h200", rules: Any = (), function: Any = model, **config: Any) -> Report:
    return fuseplan.explain(
        function, *INPUTS, config=fuseplan.PassConfig(**config), device=device, rules=rules or [GatedNorm()],
        providers=[provider(cost)],
    )  # fmt: skip


def test_what_nobody_priced_is_left_out_with_a_warning_and_its_places() -> None:
    report = explain()
    assert (report.matched["gated_norm"], report.fused["gated_norm"]) == (1, 0)
    (graph,) = report.graphs
    assert graph.plan is not None
    assert (graph.plan.objective_ns, graph.saved_ns, graph.lost) == (0, 0, ())
    assert [each.provenance for each in graph.plan.rejected] == ["assumed"]
    (warning,) = report.warnings
    assert warning.reason is Reason.UNPRICED
    assert "no price is known for declared_gated_norm by declared_" in warning.detail
    assert warning.fix is not None
    assert "fuseplan.measurement.tune" in warning.fix
    assert "cost=" in warning.fix
    (miss,) = [each for each in report.near_misses if each.reason is Reason.UNPRICED]
    assert (miss.rule, miss.nearness, miss.count) == ("gated_norm", Nearness.REFUSED, 1)


@pytest.mark.parametrize("config", [{"force": ["gated_norm"]}, {"policy": "ordered(gated_norm)"}])
def test_what_is_asked_for_is_applied_and_marked_in_every_report(config: dict[str, Any]) -> None:
    report = explain(**config)
    assert report.fused["gated_norm"] == 1
    (fusion,) = report.graphs[0].applied
    assert report_to_json(report)["graphs"][0]["applied"][0]["provenance"] == fusion.provenance == "assumed"
    assert report_to_json(report)["provenance"] == {"assumed": 1}
    assert [each for each in report.warnings if each.reason is Reason.UNPRICED] == []
    assert report.assumed == {("gated_norm", fusion.provider): [fusion]}


def test_a_declared_cost_is_held_against_what_inductor_makes_of_the_ops() -> None:
    """On H200: one generated kernel with a row reduction, and what was declared."""
    unfused = 1402 + 574 + graph_bytes_ns(3)
    for cost in (1.0, 1, lambda m: 1.0):
        (graph,) = explain(cost).graphs
        (fusion,) = graph.applied
        assert fusion.provenance == "declared"
        assert fusion.saving_ns == unfused - 1000
    (graph,) = explain(50.0).graphs
    assert graph.applied == ()
    assert (graph.lost[0].lost_ns, graph.lost[0].flips_at_ns) == (50_000 - unfused, unfused)


def graph_bytes_ns(tensors: int) -> int:
    """The time of so many activations and a weight, in H200's cache."""
    return round((tensors * 16 * WIDTH * 2 + WIDTH * 2) / 5868)


def test_a_described_kernel_is_priced_for_the_device() -> None:
    (graph,) = explain(KernelCost()).graphs
    assert graph.saved_ns == 574
    assert explain(KernelCost(), device="cpu").fused["gated_norm"] == 0
    (graph,) = explain(KernelCost(kernels=3)).graphs
    assert graph.applied == ()
    assert graph.lost[0].lost_ns == 2 * 1402 - 574
    assert explain(KernelCost(passes=2.0)).graphs[0].saved_ns == 574 - graph_bytes_ns(3)


def test_a_function_of_the_arguments_sees_their_sizes_at_each_size() -> None:
    seen: list[tuple[Any, ...]] = []

    def cost(m: Any) -> float:
        seen.append((tuple(m.x.shape), m.gate.dtype, m.eps, m.rounding, all(type(size) is int for size in m.x.shape)))
        return 1.0

    ranges = [fuseplan.CompileRange(start=4, end=64)]
    explain(cost, compile_ranges=ranges)
    assert [shape for shape, *_ in seen] == [(4, WIDTH), (16, WIDTH), (64, WIDTH)]
    assert {tuple(rest) for _, *rest in seen} == {(torch.bfloat16, seen[0][2], "gpt_oss", True)}
    assert seen[0][2] == pytest.approx(1e-5)


def test_of_the_ops_an_engines_own_is_a_kernel_by_itself() -> None:
    def quantised(x: Any, r: Any, w: Any) -> Any:
        normed = ops.rms_norm(x, w, 1e-5, "llama")
        codes, scales = ops.dynamic_per_token_scaled_fp8_quant(normed, FP8, 1e-6, 0.0, 0.0, None, "divide")
        return codes, scales

    (candidate,) = problem_of(quantised, providers=TORCH).candidates
    match = candidate.match
    assert isinstance(match, Match)
    norm = Kernel(name="rms_norm", launch=1100, memory=32)  # reads 2200 bytes, writes 1040
    assert generated(match, MODEL, lambda value: value) == (norm,)
    match.consumed[1].meta[OPAQUE] = True
    own = Kernel(name="dynamic_fp8_quant", launch=1000, memory=30)  # reads 2000 bytes, writes 1040
    assert generated(match, MODEL, lambda value: value) == (own, norm)


def test_what_it_replaces_has_to_be_known_too() -> None:
    class SummedNorm(GatedNorm):
        """rms_norm(x) * cumsum(gate)  =>  one op, by a sum of which the model knows nothing"""

        def pattern(self, x: Any, gate: Any, weight: Any, eps: Any, rounding: Any) -> Any:
            return aten.mul.Tensor(ops.rms_norm(x, weight, eps, rounding), aten.cumsum.default(gate, -1))

    def function(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-5) * gate.cumsum(-1)

    report = explain(0.0, rules=[SummedNorm()], function=function)
    assert (report.matched["gated_norm"], report.fused["gated_norm"]) == (1, 0)
    assert "is declared, that of the unfused ops isn't known" in report.warnings[0].detail


def test_somebodys_kernel_of_a_built_in_op_is_not_taken_for_fuseplans() -> None:
    def function(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-5), (0, 64))

    for cost, fused in ((None, 0), (0.5, 1)):
        mine = provider_of(f"declared_{next(_count)}", {ops.rms_norm_pad: ops.rms_norm_pad.reference}, cost=cost)
        report = fuseplan.explain(function, *INPUTS, device="cpu", providers=[mine])
        assert report.fused["act_padding"] == fused
        theirs = fuseplan.explain(function, *INPUTS, device="h200", providers=[mine])
        assert theirs.graphs[0].applied[0].provider == ("triton" if cost is None else mine.name)


@pytest.mark.parametrize("device", ["h200", "mi355x", "cpu"])
def test_no_fusion_of_ours_is_assumed(device: str) -> None:
    def padded(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.nn.functional.rms_norm(x + r, (WIDTH,), w, 1e-5), (0, 64))

    (graph,) = fuseplan.explain(padded, *INPUTS, device=device).graphs
    assert graph.plan is not None
    assert graph.plan.prices == ("modelled",)


def test_compiling_applies_it_only_where_it_was_priced() -> None:
    torch._dynamo.reset()
    reports: list[Report] = []
    compiled = fuseplan.compile(model, rules=[GatedNorm()], providers=[provider()], on_report=reports.append)
    with no_code(), torch.inference_mode(), pytest.warns(fuseplan.errors.FuseplanWarning, match="no price is known"):
        compiled(*INPUTS)
    assert reports[0].fused["gated_norm"] == 0
    assert not reports[0].graphs[0].rewritten


ALLOWED = "allowed are a KernelCost, microseconds from 0 to 3600000000, and a function"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: provider(-1.0), f"cost=-1.0: {ALLOWED}"), (lambda: provider(math.nan), f"cost=nan: {ALLOWED}"),
        (lambda: provider("1 us"), f"cost='1 us': {ALLOWED}"), (lambda: provider(KernelCost), ALLOWED),
        (lambda: provider(True), f"cost=True: {ALLOWED}"),
        (lambda: KernelCost(kernels=0), "kernels=0: allowed are integers of at least 1"),
        (lambda: KernelCost(passes=0), "passes=0: allowed are numbers, more than 0 and finite"),
        (lambda: KernelCost(passes=math.inf), "passes=inf: allowed"),
    ],
)  # fmt: skip
def test_what_is_no_cost_is_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (lambda m: m.nothing, r"of x\[16, 64\] .* can't be computed: AttributeError: .*'nothing'"),
        (lambda m: -3, r"is -3: allowed are microseconds from 0 to 3600000000"),
    ],
)
def test_a_function_that_returns_no_time_is_an_error_of_one_line(cost: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        explain(cost)
    assert "\n" not in str(caught.value)


def test_a_force_brings_what_it_needs_though_nobody_priced_it() -> None:
    class Needy(GatedNorm):
        together = True

    def twice(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, gate, weight), model(gate, x, weight)

    report = explain(rules=[Needy()], function=twice, force=["gated_norm#0"])
    assert report.fused["gated_norm"] == 2
