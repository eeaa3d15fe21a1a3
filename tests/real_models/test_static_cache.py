"""Decode steps of unmodified Hugging Face models on a static cache: rotation and cache writes are one kernel in every
layer, beside attention that repeats no heads, and what comes out and what is cached stay.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import Cache, DynamicCache, StaticCache

import fuseplan
from tests.interpreted import no_code
from tests.real_models import decoding
from tests.real_models.decoding import CACHE, IDS, LAYERS, PROMPT, ROWS, assert_all_close, held
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
        model(input_ids=IDS[:, :PROMPT], past_key_values=cache)
    return cache


def step(cache: Cache, position: int = PROMPT, tokens: int = 1) -> dict[str, Any]:
    return {
        "input_ids": IDS[:, :tokens], "position_ids": (position + torch.arange(tokens)).repeat(ROWS, 1),
        "past_key_values": cache, "use_cache": True,
    }  # fmt: skip


@functools.cache
def traced(name: str, dtype: torch.dtype) -> Traced:
    model = built(name)[0].to(dtype)
    return Traced(model, **step(filled(model)))


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
    """By one graph for all steps where there is no window."""
    with no_code():
        fused = check_steps(name, rule, tokens, lambda run: run())
    assert fused[0] >= LAYERS - (name == "gemma3" and tokens > 1)
    if name != "gemma3":
        assert len(fused) == 1


def check_steps(name: str, rule: str, tokens: int, run: Callable[[Callable[[], Any]], Any]) -> list[int]:
    """How often a rule is applied in each graph of several steps, past the window of layers that have one, whose logits
    and caches are held to the model's own.
    """
    model, _ = built(name)
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(force=(rule,), fuse_cached_attention=rule in JOINT.values() or None)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = fuseplan.compile(model, fullgraph=True, config=config, on_report=reports.append)
        plain, cache = filled(model), filled(model)
        pointers = [each.data_ptr() for each in all_held(cache)]
        places = [PROMPT + index * tokens for index in range(3)]
        actual = run(lambda: [compiled(**step(cache, place, tokens)).logits for place in places])
        expected = [model(**step(plain, place, tokens)).logits for place in places]
    assert not [each for each in reports[0].warnings if each.reason.value == "verification"]
    assert [each.data_ptr() for each in all_held(cache)] == pointers
    assert_all_close([*actual, *all_held(cache)], [*expected, *all_held(plain)])
    return [report.fused[rule] for report in reports]


def all_held(cache: StaticCache) -> list[Tensor]:
    layers: list[Any] = cache.layers
    return [*held(cache), *(layer.cumulative_length for layer in layers)]


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.nightly)])
def test_the_code_of_a_step_copies_no_cache(name: str) -> None:
    """Of one graph for several steps, which hands the caches themselves to the fused op."""
    codes: list[str] = []

    def run(steps: Callable[[], Any]) -> Any:
        logits, (code,) = run_and_get_code(steps)
        codes.append(code)
        return logits

    with fresh_cache():
        assert check_steps(name, JOINT[name], 1, run) == [LAYERS]
    op = {"llama": "rope_cached_attention_", "qwen3": "qk_norm_rope_cached_attention_"}[name]
    assert codes[0].count(f"torch.ops.fuseplan.{op}.default(") == LAYERS
    assert f"empty_strided_cpu(({ROWS}, 2, {CACHE}, 16)" not in codes[0]


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
        model(input_ids=IDS[:, :PROMPT], past_key_values=cache)
        report = fuseplan.explain(model, device="h200", **step(cache))
    assert report.fused[rule] == 0
    (miss,) = [each for each in report.near_misses if each.rule == rule]
    assert miss.count == LAYERS
    assert "a cache that grows" in miss.detail
    assert "StaticCache" in (miss.fix or "")
