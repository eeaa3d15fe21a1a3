"""How vLLM's own kernels are called, held against the schemas of their sources by ops that compute what they do.

Nothing of this has been run on a GPU.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Contest
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.dialect import ops
from fuseplan.integrations.vllm.passes import manager_for
from fuseplan.planner.costs import HARDWARE, Region
from fuseplan.providers import BUILT_IN_PROVIDERS, ENGINE_PROVIDERS, PROFILES, vllm_c
from fuseplan.providers.vllm_c import gates, halves
from fuseplan.record import Report
from tests.helpers import post_grad, randn
from tests.planner.parts import NORM
from tests.providers.stand_ins import (
    FN,
    MIN_SCALE,
    arguments_of,
    as_tuple,
    bits,
    check_declined,
    fp8,
    installed,
    snapshot,
)
from tests.providers.stand_ins import check_bits as check_bits_of

(PROVIDER,) = ENGINE_PROVIDERS
RESULTS = Path(__file__).parents[2] / "benchmarks/results"
BF16, FP16 = torch.bfloat16, torch.float16


class VllmC:
    """The kernels as stand-ins, and what they were given.

    Args:
        rounds_first: whether norms with a given scale round before they multiply by the weight, as in vLLM 0.23.
    """

    def __init__(self, *, rounds_first: bool = False) -> None:
        self.rounds_first = rounds_first
        self.inputs: list[Tensor] = []

    def _input(self, x: Tensor, weight: Tensor | None, *written: Tensor | None) -> Tensor:
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.data_ptr() % 16 == 0
        assert weight is None or (weight.is_contiguous() and weight.dtype is x.dtype and weight.data_ptr() % 16 == 0)
        assert all(each is None or (each.is_contiguous() and each.shape[0] == x.shape[0]) for each in written)
        self.inputs.append(x)
        return x.float()

    def rms_norm_static_fp8_quant(
        self, result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float
    ) -> None:
        self._static(result, self._input(input, weight, result), weight, scale, epsilon)

    def fused_add_rms_norm_static_fp8_quant(
        self, result: Tensor, input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, epsilon: float
    ) -> None:
        residual.copy_(self._input(input, weight, result, residual) + residual.float())
        self._static(result, residual.float(), weight, scale, epsilon)

    def _static(self, result: Tensor, x: Tensor, weight: Tensor, scale: Tensor, epsilon: float) -> None:
        assert scale.dtype is torch.float32
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        y = normed.to(weight.dtype) * weight if self.rounds_first else (normed * weight.float()).to(weight.dtype)
        result.copy_(fp8(y, 1 / scale))

    def rms_norm_dynamic_per_token_quant(
        self, result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float, scale_ub: Tensor | None,
        residual: Tensor | None,
    ) -> None:  # fmt: skip
        y = self._normed(result, input, weight, epsilon, residual)
        scale.copy_(self._scale(y, scale_ub))
        result.copy_((y / scale).clamp(-448, 448).to(FN))

    def rms_norm_per_block_quant(
        self, result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float, scale_ub: Tensor | None,
        residual: Tensor | None, group_size: int, is_scale_transposed: bool,
    ) -> None:  # fmt: skip
        assert group_size in (64, 128)
        assert scale.stride(1) == 1 or is_scale_transposed
        y = self._normed(result, input, weight, epsilon, residual).unflatten(-1, (-1, group_size))
        scales = self._scale(y, scale_ub)
        outer, rows, groups = scale.stride(1), *scale.shape
        if is_scale_transposed:  # where the kernel stores it, whatever the strides say
            height = -(-rows // outer) * outer
            scale = scale.as_strided((rows, groups), (1, height))
        scale.copy_(scales.squeeze(-1))
        result.copy_((y / scales).clamp(-448, 448).flatten(1).to(FN))

    def _normed(self, result: Tensor, input: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> Tensor:
        x = self._input(input, weight, result, residual)
        if residual is not None:
            x = x + residual.float()
            residual.copy_(x)
        normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(weight.dtype)
        return (normed * weight).float()

    def _scale(self, y: Tensor, scale_ub: Tensor | None) -> Tensor:
        largest = y.abs().amax(-1, keepdim=True)
        if scale_ub is not None:
            assert scale_ub.dtype is torch.float32
            largest = torch.minimum(largest, scale_ub)
        return (largest / 448).clamp(min=MIN_SCALE)

    def silu_and_mul_quant(self, result: Tensor, input: Tensor, scale: Tensor) -> None:
        gate, up = self._input(input, None, result).chunk(2, -1)
        y = (gate / (1 + torch.exp(-gate))).to(input.dtype) * up.to(input.dtype)
        result.copy_(fp8(y, 1 / scale))

    def silu_and_mul_per_block_quant(
        self, out: Tensor, input: Tensor, scales: Tensor, group_size: int, scale_ub: Tensor | None = None,
        is_scale_transposed: bool = False,
    ) -> None:  # fmt: skip
        assert scale_ub is None
        assert not is_scale_transposed
        gate, up = self._input(input, None, out, scales).chunk(2, -1)
        y = (gate * (1 / (1 + torch.exp(-gate))) * up).unflatten(-1, (-1, group_size))
        scale = self._scale(y, None)
        scales.copy_(scale.squeeze(-1))
        out.copy_((y / scale).clamp(-448, 448).flatten(1).to(FN))


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[VllmC]:
    """Its parameter is whether norms round first."""
    stand_in = VllmC(rounds_first=getattr(request, "param", False))
    schemas = snapshot("vllm_c-0.33.0")["schemas"]
    assert schemas.keys() == set(vllm_c.KERNELS)
    with torch.library._scoped_library("_C", "FRAGMENT") as fragment:
        for name, schema in schemas.items():
            fragment.define(schema)
            fragment.impl(name, getattr(stand_in, name), "CompositeExplicitAutograd")
        yield stand_in
    for name in schemas:
        vars(torch.ops._C).pop(name, None)


def norm_arguments(name: str, dtype: torch.dtype, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return arguments_of(name, dtype, shape, **{"rounding": rounding_of(name), **more})


def rounding_of(name: str) -> str:
    roundings = vllm_c.PROVIDER.implements[name].roundings
    assert roundings is not None
    (rounding,) = roundings
    return rounding


def check_bits(name: str, dtype: torch.dtype, shape: tuple[int, ...], **more: Any) -> None:
    check_bits_of("vllm_c", name, norm_arguments(name, dtype, shape, **more))


EXACT = [name for name, offer in vllm_c.PROVIDER.implements.items() if offer.leaves_out is None]
NORMS = [name for name in EXACT if "norm" in name]


@pytest.mark.parametrize(
    ("dtype", "shape"), [(BF16, (7, 64)), (FP16, (2, 3, 320)), (BF16, (1, 2880)), (BF16, (33, 256)), (BF16, (0, 64))]
)
@pytest.mark.parametrize("name", EXACT)
def test_kernels_give_the_references_bits(
    library: VllmC, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    check_bits(name, dtype, shape)
    assert len(library.inputs) == (shape[0] > 0)


@pytest.mark.parametrize("library", [True], indirect=True)
@pytest.mark.parametrize("name", ["rms_norm_static_fp8_quant", "fused_add_rms_norm_static_fp8_quant"])
def test_one_release_rounds_before_the_weight(library: VllmC, name: str) -> None:
    given = norm_arguments(name, BF16, (33, 320), rounding="llama")
    check_bits_of("vllm_c", name, given)
    other = ops[name].reference(*{**given, "rounding": "gpt_oss"}.values())
    assert not torch.equal(*(bits(as_tuple(each)[0]) for each in (ops[name].kernel("vllm_c")(*given.values()), other)))


@pytest.mark.parametrize(
    ("version", "rounding"),
    [("0.22.0", "gpt_oss"), ("0.22.1", "gpt_oss"), ("0.23.0", "llama"), ("0.24.0", "gpt_oss"), ("0.33.0", "gpt_oss"),
     (None, "gpt_oss")],
)  # fmt: skip
def test_norms_round_by_release(version: str | None, rounding: str) -> None:
    assert vllm_c.static_roundings(version) == {rounding}


@pytest.mark.parametrize("name", [name for name in NORMS if "dynamic" in name or "group" in name])
def test_a_bound_on_the_largest_element(library: VllmC, name: str) -> None:
    check_bits(name, BF16, (7, 320), scale_ub=torch.tensor([0.9]))


@pytest.mark.parametrize("layout", ["rows", "columns", "aligned"])
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("name", [name for name in NORMS if "group" in name])
def test_scales_of_groups_lie_as_asked(library: VllmC, name: str, rows: int, layout: str) -> None:
    check_bits(name, BF16, (rows, 384), layout=layout, group_size=128)


def test_rows_that_lie_anyhow_are_made_to_fit(library: VllmC) -> None:
    whole = randn(4 * 64 + 1).bfloat16()
    for x in (whole[1:].view(4, 64), randn(64, 4, seed=3).bfloat16().t()):
        check_bits("rms_norm_dynamic_fp8_quant", BF16, (4, 64), x=x)


def test_halves_of_rows_are_read_where_they_lie(library: VllmC) -> None:
    name = "silu_and_mul_static_fp8_quant"
    both = randn(5, 128).bfloat16()
    gate, up = both.chunk(2, -1)
    check_bits(name, BF16, (5, 64), gate=gate, up=up)
    check_bits(name, BF16, (5, 64), gate=up, up=gate)
    check_bits(name, BF16, (5, 64), gate=gate.clone(), up=up)
    assert [each.data_ptr() == both.data_ptr() for each in library.inputs] == [True, False, False]
    assert not halves.are_halves(gate[:, :32], up[:, :32])


def test_groups_of_an_activation_are_rounded_nowhere_before(library: VllmC) -> None:
    name = "silu_and_mul_group_fp8_quant"
    given = norm_arguments(name, BF16, (2, 33, 320))
    q, scale = ops[name].kernel("vllm_c")(*given.values())
    y = (torch.nn.functional.silu(given["gate"].float()) * given["up"].float()).unflatten(-1, (-1, 64))
    expected = (y.abs().amax(-1, keepdim=True) / 448).clamp(min=MIN_SCALE)
    torch.testing.assert_close(scale, expected.squeeze(-1))
    assert (q.float() - (y / expected).flatten(-2).to(FN).float()).abs().max() <= 32  # one code of 448
    assert not torch.equal(scale, ops[name].reference(*given.values())[1])


GROUPED = {"quant_rounding": "divide", "min_scale": MIN_SCALE, "group_size": 128, "layout": "rows", "ue8m0": False}


@pytest.mark.parametrize(
    ("gate", "more", "detail"),
    [
        (gates.STATIC, {"x": torch.empty(8, 64)}, "takes activations in bfloat16 or float16, not in float32"),
        (gates.STATIC, {"quant_rounding": "divide"}, "the kernel multiplies by the reciprocal of the scale"),
        (gates.STATIC, {"weight": torch.ones(64)}, "takes the weight in bfloat16, not in float32"),
        (gates.STATIC, {"scale": torch.ones(1).bfloat16()}, "takes the scale in float32, not in bfloat16"),
        (gates.DYNAMIC, {"quant_rounding": "multiply"}, "the kernel divides by the scale; the graph multiplies"),
        (gates.DYNAMIC, {"min_scale": 1e-12}, "the least scale of vLLM's norm with a scale a row is 4.35965e-06"),
        (gates.DYNAMIC, {"scale_ub": torch.ones(1).bfloat16()}, "takes the scale_ub in float32, not in bfloat16"),
        (gates.DYNAMIC, {"scale_ub": torch.ones(1)}, None),
        (gates.DYNAMIC, {"max_scale": 1.0}, "has no max_scale, and the graph's scales do"),
        (gates.DYNAMIC, {"residual": torch.ones(8, 64)}, "takes the residual in bfloat16, not in float32"),
        (gates.GROUP, {**GROUPED, "group_size": 32}, "takes groups of 64 or 128, not groups of 32"),
        (gates.GROUP, {**GROUPED, "ue8m0": True}, "takes scales that aren't powers of two, not powers of two"),
        (gates.GROUP, {**GROUPED, "layout": "packed"}, "in aligned, columns or rows, not scales in packed"),
        (gates.GROUP, {**GROUPED, "x": torch.empty(8, 257 * 128).bfloat16()}, "up to 256 groups, not 257 groups"),
        (gates.GROUP, {**GROUPED, "x": torch.empty(8, 256 * 128).bfloat16()}, None),
        (gates.GROUP, {**GROUPED, "layout": "aligned"}, None),
        (gates.ACTIVATION_STATIC, {"gate": torch.empty(8, 64).bfloat16()}, "the strides of gate are (64, 1)"),
        (gates.ACTIVATION_STATIC, {"gate": torch.empty(8, 128).bfloat16()[:, 64:]}, None),
        (gates.ACTIVATION_STATIC, {"gate": torch.empty(2, 3, 128).half()[..., :64]}, None),
        (gates.ACTIVATION_GROUP, {**GROUPED, "layout": "columns"}, "takes scales in rows, not scales in columns"),
    ],
)  # fmt: skip
def test_what_is_declined(gate: Any, more: dict[str, Any], detail: str | None) -> None:
    if isinstance(gate, gates.ActivationGate):
        values: dict[str, Any] = {"gate": torch.empty(8, 256).bfloat16()[:, :128]}
    else:
        values = {
            "x": torch.empty(8, 64).bfloat16(),
            "dtype": FN,
            **({"min_scale": MIN_SCALE} if gate.min_scale else {}),
        }
    check_declined(gate, detail, **{**values, "quant_rounding": gate.quant_rounding.value, **more})


@pytest.mark.parametrize(
    ("version", "why"),
    [("0.21.0", "of vLLM 0.21.0 round hasn't been read: those from 0.22 to before 0.34 have"), ("0.22.0", None),
     ("0.33.0", None), ("0.34.0", "where kernels of vLLM 0.34.0 round hasn't been read"),
     (None, "the vLLM that is installed isn't its build for NVIDIA's GPUs")],
)  # fmt: skip
def test_why_a_process_has_not_the_kernels(
    library: VllmC, version: str | None, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "vllm", version)
    refusal = PROVIDER.unavailable()
    assert refusal is None if why is None else refusal is not None and why in refusal.detail
    if version is not None and why is None:
        monkeypatch.setattr(vllm_c, "KERNELS", (*vllm_c.KERNELS, "one_more"))
        assert vllm_c.unready() == "torch.ops._C has no one_more, which vLLM registers on NVIDIA GPUs"


def grouped(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    """As vLLM 0.33 writes a norm and quantisation by groups of 128."""
    total = x.float() + residual.float()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    y = normed.to(x.dtype) * weight
    groups = y.view(y.shape[0], -1, 128)
    scale = (groups.abs().amax(-1, keepdim=True).float() / 448).clamp(min=MIN_SCALE)
    codes = (groups.float() / scale).clamp(-448, 448).to(FN)
    return codes.view(y.shape), scale.squeeze(-1), total.to(x.dtype)


def planned(function: Callable[..., Any]) -> list[tuple[str, str]]:
    """The candidates of a graph, by op and provider."""
    manager = PostGradPassManager(
        PassConfig(), providers=[*BUILT_IN_PROVIDERS, PROVIDER], device=PROFILES["h200"],
        compile_range=CompileRange(start=1, end=64),
    )  # fmt: skip
    inputs = randn(16, 256), randn(16, 256), torch.ones(256, dtype=BF16)
    matches = manager.analyze(post_grad(function, *inputs, dynamic=True)).matches
    return [(each.rule.op.name, each.provider) for each in matches.candidates]


def test_it_is_a_candidate_where_it_computes_what_the_graph_does() -> None:
    op = "fused_add_rms_norm_group_fp8_quant"
    assert (op, "vllm_c") in planned(grouped)

    def by_reciprocal(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        y = ops.fused_add_rms_norm.reference(x, residual, weight, 1e-5, "vllm")[0]
        scale = (y.abs().amax(-1, keepdim=True).float() / 448).clamp(min=MIN_SCALE)
        return (y.float() * scale.reciprocal()).clamp(-448, 448).to(FN), scale

    assert {provider for _, provider in planned(by_reciprocal)} == {"torch", "triton"}


def test_engines_have_it_among_their_candidates() -> None:
    reports: list[Report] = []
    manager = manager_for(PassConfig(), CompileRange(start=1, end=64), reports.append)
    assert manager.providers == (*BUILT_IN_PROVIDERS, PROVIDER)


def test_the_price_is_the_median_of_what_was_measured() -> None:
    rows = json.loads((RESULTS / "kernels_h200.json").read_text())["rows"]
    ratios = sorted(row["vllm"][0] / row["fused"][0] for row in rows if "vllm" in row)
    assert len(ratios) == 48
    assert round(statistics.median(ratios), 2) == vllm_c.TIMES
    assert (round(ratios[0], 2), round(ratios[-1], 1)) == (1.08, 11.4)


def test_own_kernels_come_before_those_of_vllm() -> None:
    assert PROVIDER.timing is not None
    model = Contest(HARDWARE["h200"], timings={PROVIDER.name: PROVIDER.timing})
    for tokens in (1, 8192):
        shape = Region(core=NORM, tokens=tokens, width=4096)
        assert model.fused_ns(shape, "triton") < model.fused_ns(shape, "vllm_c")
