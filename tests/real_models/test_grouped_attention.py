"""Decode steps of unmodified Hugging Face models on a static cache: attention stops repeating heads in every layer, and
what comes out stays.
"""

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion
from transformers import StaticCache

import fuseplan
from fuseplan.providers.attention import EFFICIENT_SHARES
from tests.interpreted import no_code
from tests.real_models import decoding
from tests.real_models.decoding import CACHE, IDS, LAYERS, PROMPT, check_generated
from tests.traced import Traced

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "qwen3": ("qwen3", {}), "sliding window": ("mistral", {"sliding_window": 5})
}  # fmt: skip


def built(name: str) -> Any:
    model_type, own = MODELS[name]
    return decoding.built(model_type, **own)


def step(model: Any, padded: int = 0) -> dict[str, Any]:
    """The arguments of one step behind a prompt whose second row is padded at the left."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    mask = torch.ones(3, PROMPT + 1, dtype=torch.long)
    mask[1, :padded] = 0
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=mask[:, :PROMPT], past_key_values=cache)
    return {
        "input_ids": IDS[:, :1], "position_ids": torch.full((3, 1), PROMPT), "attention_mask": mask,
        "past_key_values": cache, "use_cache": True,
    }  # fmt: skip


@functools.cache
def traced(name: str, dtype: torch.dtype) -> Traced:
    model = built(name).to(dtype)
    return Traced(model, **step(model, padded=2))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name == "qwen3")) for name in MODELS]
)  # which is compiled below
def test_it_is_planned_once_a_layer(name: str) -> None:
    report = traced(name, torch.float32).explain(device="cpu")
    assert report.fused["grouped_attention"] == LAYERS
    fusions = [each for each in report.graphs[0].applied if each.rule == "grouped_attention"]
    assert [each.source for each in fusions] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    assert {each.provider for each in fusions} == {"sdpa_packed"}


@pytest.mark.parametrize(
    ("device", "dtype", "provider"),
    [
        ("h100", torch.bfloat16, "triton"),
        # Where torch has it, efficient attention takes unequal heads.
        ("h100", torch.float32, "sdpa" if TorchVersion(torch.__version__) >= EFFICIENT_SHARES else "sdpa_packed"),
        ("mi300x", torch.bfloat16, "triton"),
        ("mi300x", torch.float32, "sdpa_packed"),
    ],
)
def test_a_gpu_is_planned_for_by_the_kernel_that_is_priced_best_there(
    device: str, dtype: torch.dtype, provider: str
) -> None:
    apart = fuseplan.PassConfig(fuse_cached_attention=False)
    report = traced("llama", dtype).explain(device=device, config=apart)
    assert report.fused["grouped_attention"] == LAYERS
    assert {f.provider for f in report.graphs[0].applied if f.rule == "grouped_attention"} == {provider}


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["interpreted", "coded"])
def test_a_padded_step_computes_and_caches_what_the_model_does(coded: bool) -> None:
    model = built("qwen3")
    reports: list[fuseplan.Report] = []
    compiled = fuseplan.compile(model, fullgraph=True, on_report=reports.append)
    with torch.no_grad(), nullcontext() if coded else no_code():
        plain, fused = step(model, padded=2), step(model, padded=2)
        expected, actual = model(**plain).logits, compiled(**fused).logits
    assert reports[-1].fused["grouped_attention"] == LAYERS
    assert not reports[-1].warnings
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for left, right in zip(fused["past_key_values"].layers, plain["past_key_values"].layers, strict=True):
        torch.testing.assert_close(left.keys, right.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.values, right.values, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_generation_gives_equal_tokens() -> None:
    with no_code():
        reports = check_generated(built("llama"), IDS)
    assert any(report.fused["grouped_attention"] == LAYERS for report in reports)
