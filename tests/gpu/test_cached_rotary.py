"""Rotation and writes into a static cache in one Triton kernel on a GPU, and in CUDA graphs. Skipped without a GPU."""

import subprocess
import sys

import pytest
import torch

import fuseplan
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES, CachedRule
from fuseplan.testing import check_rule
from tests.gpu.decoding import LAYERS, built, check_steps
from tests.rules.test_rules import arguments_of

pytest.importorskip("fuseplan.providers.triton.cached_rotary")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TRITON = [each for each in BUILT_IN_PROVIDERS if each.name == "triton"]
MODELS = {
    "llama": ("rope_cache", "cached_attention"), "qwen3": ("qk_norm_rope_cache", "qk_norm_cached_attention")
}  # fmt: skip


@pytest.mark.parametrize("rule", CACHED_ROTARY_RULES, ids=lambda rule: f"{rule.name} {getattr(rule, 'transposes', '')}")
def test_rules_hold(rule: CachedRule) -> None:
    samples = arguments_of(rule, torch.device("cpu"))
    assert check_rule(rule, providers=TRITON, samples=samples, device="cuda").cases["triton"] >= len(samples) + 8


BEYOND = """
import torch
import fuseplan.providers.triton
from fuseplan.dialect import ops

q, k, v = (torch.zeros(1, heads, 1, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
caches = [torch.zeros(1, 2, 16, 64, device="cuda").bfloat16() for _ in range(2)]
angles = torch.zeros(1, 1, 1, 64, device="cuda").bfloat16()
given = q, k, v, *caches, angles, angles, torch.tensor([16], device="cuda"), "products"
"""
CALLS = {
    "rope_cache": 'ops.rope_cache.kernel("triton")(*given)',
    "rope_cached_attention": 'ops.rope_cached_attention.kernel("triton")(*given, None, 0.125, False, "cudnn")',
}


@pytest.mark.parametrize("op", CALLS)
def test_a_cache_too_short_for_the_position_is_a_device_assertion(op: str) -> None:
    script = f"{BEYOND}{CALLS[op]}\ntorch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "index out of bounds: the cache has no such position" in done.stderr
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty", "ignore:TensorFloat32 tensor cores")
def test_a_step_in_cuda_graphs_writes_growing_caches(name: str, with_attention: bool) -> None:
    rule, joint = MODELS[name]
    config = fuseplan.PassConfig(
        fuse_cached_attention=with_attention, fuse_merged_linear=False, fuse_skinny_linear=False
    )
    report = check_steps(built(name, head_dim=32), config)
    expected = {joint: LAYERS} if with_attention else {rule: LAYERS, "grouped_attention": LAYERS}
    expected["add_rms_norm"] = 2 * LAYERS
    assert {each: count for each, count in report.fused.items() if count} == expected
    assert not report.warnings
