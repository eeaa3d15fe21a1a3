"""Patterns of the installed vLLM, verified. Its build for CPUs has none of the kernels that they are about, so that
stand-ins compute what those do; patterns and replacements are vLLM's own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.pattern_matcher as pm
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.compilation.passes.vllm_inductor_pass import VllmFusionPatternMatcherPass
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.matching import ExternalPass
from fuseplan.record import GraphReport, Reason, Report
from tests.helpers import randn
from tests.integrations.vllm import missing_ops

HIDDEN = 256
MISSING = missing_ops.define()
LIBRARY = torch.library.Library("_C", "FRAGMENT")


def group_quant(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, fp8_min: float, fp8_max: float,
    scale_ue8m0: bool, dummy_is_scale_transposed: bool, dummy_is_tma_aligned: bool,
) -> None:  # fmt: skip
    """As `csrc/quantization/w8a8/fp8/per_token_group_quant.cu` computes it."""
    groups = input.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    if scale_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    output_s.copy_(scale)
    output_q.copy_((groups / scale.unsqueeze(-1)).clamp(fp8_min, fp8_max).flatten(-2))


def silu_group_quant(
    out: Tensor, input: Tensor, scales: Tensor, group_size: int, scale_ub: Tensor | None, is_scale_transposed: bool
) -> None:
    """As `silu_and_mul_per_block_quant` of vLLM's computes it: it knows of no powers of two."""
    gate, up = input.float().chunk(2, -1)
    product = (torch.nn.functional.silu(gate) * up).to(input.dtype)
    group_quant(product, out, scales, group_size, 1e-10, -448.0, 448.0, False, is_scale_transposed, False)


def define(name: str, schema: str, kernel: Callable[..., None]) -> Any:
    """The op, unless this build has it after all."""
    if not hasattr(torch.ops._C, name):
        LIBRARY.define(f"{name}{schema} -> ()")
        LIBRARY.impl(name, kernel, "CPU")
        LIBRARY.impl(name, lambda *args, **kwargs: None, "Meta")
    return getattr(torch.ops._C, name).default


QUANT = define(
    "per_token_group_fp8_quant",
    "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, "
    "bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned)",
    group_quant,
)
FUSED = define(
    "silu_and_mul_per_block_quant",
    "(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub, bool is_scale_transposed)",
    silu_group_quant,
)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM as it is where these kernels are."""
    from vllm.compilation.passes.fusion import act_quant_fusion, matcher_utils

    monkeypatch.setitem(matcher_utils.QUANT_OPS, kFp8Dynamic128Sym, QUANT)
    monkeypatch.setitem(act_quant_fusion.FUSED_OPS, kFp8Dynamic128Sym, FUSED)
    compilation = CompilationConfig(custom_ops=["none"])  # SiLU-and-mul takes other names on the CPU
    with set_current_vllm_config(VllmConfig(compilation_config=compilation)), torch.no_grad():
        yield


def planned(is_e8m0: bool) -> tuple[ExternalPass, fx.Graph]:
    """vLLM's pattern as a pass, and the graph of that pattern on a model's tensors."""
    from vllm.compilation.passes.fusion.act_quant_fusion import SiluMulBlockQuantPattern

    pattern = SiluMulBlockQuantPattern(kFp8Dynamic128Sym, is_e8m0=is_e8m0)
    matcher = PatternMatcherPass(pass_name="activation_quant_fusion_pass")
    with FakeTensorMode():
        trace = VllmFusionPatternMatcherPass._trace_fn
        pm.register_replacement(pattern.pattern, pattern.replacement, pattern.get_inputs(), trace, matcher)
    x, scale = randn(6, 2 * HIDDEN, dtype=torch.float32), torch.empty(6, HIDDEN // 128)
    with FakeTensorMode() as mode:
        traced = pm.fwd_only(pattern.pattern, [mode.from_tensor(x), mode.from_tensor(scale)])
    return ExternalPass(matcher=matcher), traced.graph


def report_of(external: ExternalPass, graph: fx.Graph) -> GraphReport:
    reports: list[Report] = []
    PostGradPassManager(PassConfig(), rules=[], passes=[external], on_report=reports.append)(graph)
    return reports[0].graphs[0]


def test_case_51477_the_scale_format_that_vllm_drops_is_named() -> None:
    report = report_of(*planned(is_e8m0=True))
    assert not report.applied
    (whole,) = [each for each in report.refusals if each.reason is Reason.VERIFICATION and each.nearness is None]
    assert "activation_quant_fusion_pass is not applied" in whole.detail
    assert "scale_ue8m0=True of _C.per_token_group_fp8_quant" in whole.detail
    assert "_C.silu_and_mul_per_block_quant(" in whole.detail
    assert "(act_quant_fusion.py:" in whole.detail


def test_the_same_pattern_without_the_format_is_applied() -> None:
    report = report_of(*planned(is_e8m0=False))
    assert [each.passed for each in report.verified] == [True]
    assert report.count(["activation_quant_fusion_pass"]) == {"activation_quant_fusion_pass": 1}
