"""Decode steps of unmodified Hugging Face models that spell attention out: it is one op in every layer, and what comes
out stays.
"""

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fuseplan
from fuseplan.record import Report
from tests.interpreted import no_code
from tests.real_models import decoding
from tests.real_models.decoding import IDS, LAYERS, PROMPT, ROWS, assert_all_close, held, step
from tests.traced import Traced

GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
}
OWN = ("gemma2", "gpt_oss")
"""Whose attention torch's kernels don't compute: soft-caps and sinks."""
EITHER = ("eager_attention", "cached_eager_attention")
"""Attention alone, or with rotation and cache writes before it, where there are no norms between these."""


def built(name: str, dtype: torch.dtype = torch.float32, **further: Any) -> Any:
    model_type, own = MODELS[name]
    return decoding.built(model_type, attn_implementation="eager", **own, **further).to(dtype)


@functools.cache
def traced(name: str, dtype: torch.dtype = torch.float32, **further: Any) -> Traced:
    model = built(name, dtype)
    return Traced(model, **step(model, **further))


def providers(report: Report) -> list[str]:
    return [each.provider for each in report.graphs[0].applied if each.rule in EITHER]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in OWN)) for name in MODELS]
)
def test_a_gpus_kernel_is_planned_once_a_layer_where_rounding_may_change(name: str) -> None:
    model = traced(name, torch.float16 if name == "qwen3" else torch.bfloat16, padded=2)
    config = fuseplan.PassConfig(allow_rounding_changes=True, fuse_cached_attention=True)
    report = model.explain(device="h100", config=config)
    assert providers(report) == ["triton"] * LAYERS
    fusions = [each for each in report.graphs[0].applied if each.rule in EITHER]
    joint = 0 if name in ("gemma3", "qwen3") else LAYERS
    assert (report.fused["cached_eager_attention"], report.fused["rope_cache"]) == (joint, 0)
    assert [each.source for each in fusions] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]

    report = model.explain(device="h100")
    assert providers(report) == []
    (miss,) = [each for each in report.near_misses if each.rule == "eager_attention" and each.provider == "triton"]
    assert (miss.count, miss.reason, miss.fix) == (LAYERS, "rounding", "set allow_rounding_changes")


KINDS = [("gemma2", 1, 3, PROMPT), ("gemma2", 1, 1, 11), ("llama", 1, 1, PROMPT), ("gemma2", 3, 3, PROMPT),
         ("gpt_oss", 1, 3, 9)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "batch", "queries", "prompt"),
    [("gpt_oss", ROWS, 1, 11), *(pytest.param(*each, marks=pytest.mark.nightly) for each in KINDS)],
)
def test_steps_of_any_kind_are_recognised(name: str, batch: int, queries: int, prompt: int) -> None:
    """One sequence, a chunk of several tokens, and sliding windows that are full. At such sizes nothing is sure to be
    gained, so it is forced.
    """
    config = fuseplan.PassConfig(allow_rounding_changes=True, force=("eager_attention:triton",))
    model = traced(name, torch.bfloat16, queries=queries, batch=batch, prompt=prompt)
    report = model.explain(device="h200", config=config)
    assert providers(report) == ["triton"] * LAYERS


def check_computed(name: str, provider: str, how: dict[str, Any], *, coded: bool = False, **config: Any) -> Report:
    """What a model computes in a step of three queries, by a provider's kernel in each layer, without warnings."""
    model = built(name)
    reports: list[Report] = []
    passes = fuseplan.PassConfig(**config)
    compiled = fuseplan.compile(model, fullgraph=True, config=passes, on_report=reports.append)
    with torch.no_grad(), nullcontext() if coded else no_code():
        plain, fused = step(model, 3, **how), step(model, 3, **how)
        expected, actual = model(**plain).logits, compiled(**fused).logits
    assert providers(reports[-1]) == [provider] * LAYERS, reports[-1].warnings
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    return reports[-1]


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["interpreted", "coded"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name != "llama")) for name in sorted(MODELS.keys() - OWN)],
)
def test_in_float32_a_cpus_kernel_is_planned_and_computes_what_the_model_does(name: str, coded: bool) -> None:
    report = check_computed(name, "sdpa", {"padded": 2}, coded=coded)
    assert not report.warnings
    assert all(each.passed for graph in report.graphs for each in graph.verified)


@pytest.mark.parametrize("name", OWN)
def test_soft_caps_and_sinks_are_left_alone_on_a_cpu(name: str) -> None:
    model = built(name)
    report = fuseplan.explain(model, device="cpu", **step(model))
    assert providers(report) == []
    assert report.graphs[0].recognized["eager_attention[16]"] == LAYERS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name != "gpt_oss")) for name in MODELS]
)
def test_the_reference_in_a_models_graph_computes_what_the_model_does(name: str) -> None:
    """What a kernel is held to is the model's own attention: soft-caps, sinks and windows included."""
    check_computed(name, "torch", {"prompt": 9, "padded": 3}, force=("eager_attention:torch",), verify="always")


def check_steps(name: str, steps: int, padded: int, *, coded: bool, **config: Any) -> list[Report]:
    """What a model computes and caches in steps behind a prompt of four tokens, and the reports of its graphs."""
    model = built(name)
    reports: list[Report] = []
    compiled = fuseplan.compile(model, config=fuseplan.PassConfig(**config), on_report=reports.append)
    runs = []
    with torch.no_grad(), nullcontext() if coded else no_code():
        for each in (model, compiled):
            given = step(model, prompt=4, padded=padded)
            logits = []
            for at in range(steps):
                mask = torch.cat((given["attention_mask"], torch.ones(ROWS, at, dtype=torch.long)), 1)
                now = {"position_ids": given["position_ids"] + at, "attention_mask": mask}
                logits.append(each(**{**given, **now, "input_ids": IDS[:, at : at + 1]}).logits)
            runs.append([*logits, *held(given["past_key_values"])])
    assert_all_close(runs[1], runs[0])
    return reports


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["interpreted", "coded"])
@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gpt_oss", "llama"))]
)
def test_steps_that_write_their_tokens_first_compute_and_cache_what_the_model_does(name: str, coded: bool) -> None:
    config: dict[str, Any] = {"force": ("cached_eager_attention",), "fuse_cached_attention": True, "verify": "always"}
    reports = check_steps(name, 3, 2, coded=coded, **config)
    assert {report.fused["cached_eager_attention"] for report in reports} == {LAYERS}
    assert providers(reports[-1]) == ["torch"] * LAYERS, reports[-1].warnings


@pytest.mark.nightly
def test_steps_through_a_windows_edge_compute_what_the_model_does() -> None:
    reports = check_steps("gpt_oss", 8, 0, coded=True, force=("eager_attention:torch",))
    assert {report.fused["eager_attention"] for report in reports} == {LAYERS}
