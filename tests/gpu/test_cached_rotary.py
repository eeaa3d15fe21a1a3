"""Rotation and writes into a static cache in one Triton kernel on a GPU, and in CUDA graphs. Skipped without a GPU."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

import fuseplan
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES, CachedRule
from fuseplan.testing import check_rule
from tests.rules.test_rules import arguments_of

pytest.importorskip("fuseplan.providers.triton.cached_rotary")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TRITON = [each for each in BUILT_IN_PROVIDERS if each.name == "triton"]
LAYERS, STEPS, PROMPT, LENGTH = 2, 40, 8, 64
MODELS: dict[str, tuple[type[Any], type[Any], str, str]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, "rope_cache", "cached_attention"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qk_norm_rope_cache", "qk_norm_cached_attention"),
}


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
ops.rope_cache.kernel("triton")(q, k, v, *caches, angles, angles, torch.tensor([16], device="cuda"), "products")
torch.cuda.synchronize()
"""


def test_a_cache_too_short_for_the_position_is_a_device_assertion() -> None:
    done = subprocess.run([sys.executable, "-c", BEYOND], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "index out of bounds: the cache has no such position" in done.stderr
    assert "device-side assert" in done.stderr


def _decoded(model: Any, step_of: Any) -> list[Tensor]:
    """Logits of `STEPS` steps behind a prompt, and what the cache holds then, at the addresses that it had before."""
    ids = torch.arange(3 * PROMPT, device="cuda").reshape(3, PROMPT) % 128
    cache: Any = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(input_ids=ids, past_key_values=cache)
    held = [each for layer in cache.layers for each in (layer.keys, layer.values, layer.cumulative_length)]
    for each in held:
        torch._dynamo.mark_static_address(each)
    pointers, logits = [each.data_ptr() for each in held], []
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        position = torch.full((3, 1), PROMPT + step, device="cuda")
        out = step_of(input_ids=ids[:, step % PROMPT][:, None], position_ids=position, past_key_values=cache)
        logits.append(out.logits[:, -1].float().clone())
    now = [each for layer in cache.layers for each in (layer.keys, layer.values, layer.cumulative_length)]
    assert [each.data_ptr() for each in now] == pointers
    return [torch.stack(logits), *(each.float().clone() for each in now)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty", "ignore:TensorFloat32 tensor cores")
def test_a_step_in_cuda_graphs_writes_growing_caches(name: str, with_attention: bool) -> None:
    """Logits and caches are as near to float32 as those of plain torch.compile, and no graph is skipped."""
    config, model_of, rule, joint = MODELS[name]
    passes = fuseplan.PassConfig(
        fuse_cached_attention=with_attention, fuse_merged_linear=False, fuse_skinny_linear=False
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = model_of(
            config(
                hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
                num_key_value_heads=2, head_dim=32, vocab_size=128, initializer_range=0.2,
            )
        ).eval().bfloat16()  # fmt: skip
    reports: list[fuseplan.Report] = []
    runs = []
    with torch.inference_mode():
        wide = copy.deepcopy(model).float()
        exact = _decoded(wide, wide)
        compiled = torch.compile(model, mode="reduce-overhead")
        planned = fuseplan.compile(model, mode="reduce-overhead", config=passes, on_report=reports.append)
        for each in (compiled, planned):
            torch._dynamo.reset()
            counters.clear()
            runs.append(_decoded(model, each))
    expected = {joint: LAYERS} if with_attention else {rule: LAYERS, "grouped_attention": LAYERS}
    expected["add_rms_norm"] = 2 * LAYERS
    assert {each: count for each, count in reports[-1].fused.items() if count} == expected
    assert not reports[-1].warnings
    assert len(reports) == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    for true, plain, fused in zip(exact, *runs, strict=True):
        off, allowed = ((each - true).abs().mean().item() for each in (fused, plain))
        assert off <= 1.25 * allowed, f"{off} on average, and plain torch.compile {allowed}"
