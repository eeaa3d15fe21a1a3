"""Decode steps of unmodified Hugging Face models on a static cache: rotation and cache writes are one kernel in every
layer, beside attention that repeats no heads, and what comes out and what is cached stay.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import Cache, DynamicCache, StaticCache

import fuseplan
from tests.interpreted import no_code
from tests.real_models import decoding
from tests.real_models.decoding import CACHE, IDS, LAYERS, PROMPT, check_generated
from tests.traced import Traced

WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "rope_cache"),
    "llama, as many heads": ("llama", {"num_key_value_heads": 8}, "rope_cache"),
    "qwen3": ("qwen3", {}, "qk_norm_rope_cache"),
    "gemma3": ("gemma3_text", WINDOWS, "qk_norm_rope_cache"),
}
JOINT = {"llama": "cached_attention", "qwen3": "qk_norm_cached_attention", "gemma3": "qk_norm_cached_attention"}
"""The rules that take attention over repeated heads along."""


def built(name: str) -> tuple[Any, str]:
    model_type, own, rule = MODELS[name]
    return decoding.built(model_type, **own), rule


def filled(model: Any) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    return cache


def step(cache: Cache, position: int = PROMPT, tokens: int = 1) -> dict[str, Any]:
    return {
        "input_ids": IDS[:, :tokens], "position_ids": (position + torch.arange(tokens)).repeat(3, 1),
        "past_key_values": cache, "use_cache": True,
    }  # fmt: skip


@functools.cache
def traced(name: str, dtype: torch.dtype) -> Traced:
    model = built(name)[0].to(dtype)
    return Traced(model, **step(filled(model)))


def held(cache: StaticCache) -> list[Tensor]:
    layers: list[Any] = cache.layers
    return [each for layer in layers for each in (layer.keys, layer.values, layer.cumulative_length)]


@pytest.mark.sampled
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["h100", "mi300x"])
@pytest.mark.parametrize("with_attention", [True, False])
def test_a_step_is_planned_once_a_layer(name: str, device: str, with_attention: bool) -> None:
    """With attention in one op, and without that beside it."""
    rule = MODELS[name][2]
    config = fuseplan.PassConfig(
        fuse_cached_attention=with_attention, fuse_merged_linear=False, fuse_skinny_linear=False
    )
    report = traced(name, torch.bfloat16).explain(device=device, config=config)
    fused = {rule: count for rule, count in report.fused.items() if count}
    joint = JOINT.get(name)
    grouped = {} if joint is None else {"grouped_attention": LAYERS}
    expected = {joint: LAYERS} if with_attention and joint is not None else {rule: LAYERS, **grouped}
    added = {"add_rms_norm": 2 * LAYERS} if device == "h100" else {}  # on by default where it was measured alone
    assert fused == {**expected, **added}
    applied = report.graphs[0].applied
    assert {each.provider for each in applied} == {"triton"}
    assert all(each.saving_ns and each.saving_ns > 0 for each in applied)
    other = {"rope_cache", "qk_norm_rope_cache", "qk_norm_rope", *JOINT.values()} - {rule, joint}
    if name != "gemma3":  # whose norms stand behind the transposition, which qk_norm_rope says
        assert not [miss for miss in report.near_misses if miss.rule in other]


@pytest.mark.parametrize(
    ("device", "flags", "rule"),
    [
        ("h200", {}, "cached_attention"),
        ("h200", {"fuse_grouped_attention": True}, "cached_attention"),
        ("h200", {"fuse_cached_attention": False}, "rope_cache"),
        ("a100", {}, "rope_cache"),
    ],
)
def test_attention_is_one_kernel_with_them_by_default_where_it_was_measured(
    device: str, flags: dict[str, Any], rule: str
) -> None:
    report = traced("llama", torch.bfloat16).explain(device=device, config=fuseplan.PassConfig(**flags))
    assert report.fused[rule] == LAYERS


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in MODELS),
        ("llama", torch.float32),
        *(pytest.param(name, torch.float32, marks=pytest.mark.nightly) for name in MODELS if name != "llama"),
    ],
)
def test_on_a_cpu_it_is_left_to_inductor(name: str, dtype: torch.dtype) -> None:
    rule = MODELS[name][2]
    config = fuseplan.PassConfig(fuse_cached_attention=True if name in JOINT else None)
    report = traced(name, dtype).explain(device="cpu", config=config)
    for each in {rule, JOINT.get(name, rule)}:
        assert report.fused[each] == 0
        assert report.matched[each] == LAYERS


RUN = [*((name, MODELS[name][2]) for name in MODELS), *JOINT.items()]
BY_DAY = {
    ("llama, as many heads", "rope_cache", 1), ("qwen3", "qk_norm_rope_cache", 1),
    ("gemma3", "qk_norm_cached_attention", 1),
}  # fmt: skip
"""Each rule once, beside other heads and windows; `cached_attention` is below, by code. How many tokens a step has is
tried at night.
"""


@pytest.mark.parametrize(
    ("name", "rule", "tokens"),
    [
        pytest.param(name, rule, tokens, marks=[pytest.mark.nightly] * ((name, rule, tokens) not in BY_DAY))
        for name, rule in RUN
        for tokens in (1, 3)
    ],
)
def test_what_comes_out_and_what_is_cached_stay(name: str, rule: str, tokens: int) -> None:
    """Of several steps, past the window of layers that have one, and by one graph where there is none."""
    model, _ = built(name)
    reports: list[fuseplan.Report] = []
    steps = [(PROMPT + index * tokens, tokens) for index in range(3)]
    with torch.no_grad(), no_code():
        expected, plain = [], filled(model)
        for position, count in steps:
            expected.append(model(**step(plain, position, count)).logits)
        torch._dynamo.reset()
        compiled = fuseplan.compile(
            model,
            fullgraph=True,
            config=fuseplan.PassConfig(force=(rule,), fuse_cached_attention=rule in JOINT.values() or None),
            on_report=reports.append,
        )
        cache = filled(model)
        pointers = [each.data_ptr() for each in held(cache)]
        actual = [compiled(**step(cache, *each)).logits for each in steps]
    assert reports[0].fused[rule] >= LAYERS - (name == "gemma3" and tokens > 1)
    assert not [each for each in reports[0].warnings if each.reason.value == "verification"]
    for got, wanted in zip((*actual, *held(cache)), (*expected, *held(plain)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert [each.data_ptr() for each in held(cache)] == pointers
    if name != "gemma3":
        assert len(reports) == 1


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.nightly)])
def test_the_code_of_a_step_copies_no_cache(name: str) -> None:
    """Of one graph for several steps, which hands the caches themselves to the fused op."""
    (model, _), rule = built(name), JOINT[name]
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(force=(rule,), fuse_cached_attention=True)
    with torch.no_grad(), fresh_cache():
        plain, cache = filled(model), filled(model)
        pointers = [each.data_ptr() for each in held(cache)]
        torch._dynamo.reset()
        compiled = fuseplan.compile(model, fullgraph=True, config=config, on_report=reports.append)
        logits, (code,) = run_and_get_code(lambda: [compiled(**step(cache, PROMPT + i)).logits for i in range(3)])
        expected = [model(**step(plain, PROMPT + i)).logits for i in range(3)]
    assert [report.fused[rule] for report in reports] == [LAYERS]
    assert not [each for each in reports[0].warnings if each.reason.value == "verification"]
    assert [each.data_ptr() for each in held(cache)] == pointers
    for got, wanted in zip((*logits, *held(cache)), (*expected, *held(plain)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    op = {"llama": "rope_cached_attention_", "qwen3": "qk_norm_rope_cached_attention_"}[name]
    assert code.count(f"torch.ops.fuseplan.{op}.default(") == LAYERS
    assert f"empty_strided_cpu((3, 2, {CACHE}, 16)" not in code


def test_a_window_that_rolls_is_a_near_miss_and_stays_right() -> None:
    model, rule = built("gemma3")
    with torch.no_grad():
        cache = filled(model)
        for position in (PROMPT, PROMPT + 1):  # the window is full then
            model(**step(cache, position))
        report = fuseplan.explain(model, device="h200", **step(cache, PROMPT + 2))
    assert report.fused[rule] == LAYERS - 1
    rolled = [miss for miss in report.near_misses if miss.rule == rule and "a window that rolls" in miss.detail]
    assert [miss.count for miss in rolled] == [1]


@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama", marks=pytest.mark.nightly)])
def test_a_dynamic_cache_is_a_near_miss(name: str) -> None:
    model, rule = built(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        report = fuseplan.explain(model, device="h200", **step(cache))
    assert report.fused[rule] == 0
    (miss,) = [each for each in report.near_misses if each.rule == rule]
    assert miss.count == LAYERS
    assert "a cache that grows" in miss.detail
    assert "StaticCache" in (miss.mend or "")


@pytest.mark.nightly  # by day `test_decode_numbers` has it
def test_generation_gives_equal_tokens() -> None:
    model, rule = built("llama")
    with no_code():
        reports = check_generated(model, IDS, config=fuseplan.PassConfig(policy=f"ordered({rule})"))
    assert any(report.fused[rule] == LAYERS for report in reports)
