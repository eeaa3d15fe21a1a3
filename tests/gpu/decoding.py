"""Decode steps of small models in CUDA graphs, beside those of plain `torch.compile`."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import fuseplan

DEVICE = "cuda"
LAYERS, STEPS, PROMPT, LENGTH = 2, 40, 8, 64


def built(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=128, initializer_range=0.2, **settings,
    )  # fmt: skip
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config).eval().bfloat16()  # type: ignore[no-untyped-call]


def held(cache: Any) -> list[Tensor]:
    return [each for layer in cache.layers for each in vars(layer).values() if isinstance(each, Tensor)]


def decoded(model: Any, step_of: Any, mask: Tensor | None = None) -> list[Tensor]:
    """Logits of `STEPS` steps behind a prompt, and what the cache holds then, at the addresses that it had before."""
    ids = torch.arange(3 * PROMPT, device=DEVICE).reshape(3, PROMPT) % 128
    cache: Any = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(input_ids=ids, attention_mask=None if mask is None else mask[:, :PROMPT], past_key_values=cache)
    for each in held(cache):
        torch._dynamo.mark_static_address(each)
    pointers, logits = [each.data_ptr() for each in held(cache)], []
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        given: dict[str, Any] = {
            "input_ids": ids[:, step % PROMPT][:, None], "past_key_values": cache,
            "position_ids": torch.full((3, 1), PROMPT + step, device=DEVICE),
        }  # fmt: skip
        if mask is not None:
            shown = PROMPT + 1 + step
            given["attention_mask"] = torch.nn.functional.pad(mask[:, :shown], (0, LENGTH - shown))
        logits.append(step_of(**given).logits[:, -1].float().clone())
    assert [each.data_ptr() for each in held(cache)] == pointers
    return [torch.stack(logits), *(each.float().clone() for each in held(cache))]


def check_steps(model: Any, config: fuseplan.PassConfig, mask: Tensor | None = None) -> fuseplan.Report:
    """Logits and caches are as near to float32 as those of plain torch.compile, by one graph that isn't skipped."""
    reports: list[fuseplan.Report] = []
    runs = []
    with torch.inference_mode():
        wide = copy.deepcopy(model).float()
        exact = decoded(wide, wide, mask)
        compiled = torch.compile(model, mode="reduce-overhead")
        planned = fuseplan.compile(model, mode="reduce-overhead", config=config, on_report=reports.append)
        for each in (compiled, planned):
            torch._dynamo.reset()
            counters.clear()
            runs.append(decoded(model, each, mask))
    assert len(reports) == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    for true, plain, fused in zip(exact, *runs, strict=True):
        off, allowed = ((each - true).abs().mean().item() for each in (fused, plain))
        assert off <= 1.25 * allowed, f"{off} on average, and plain torch.compile {allowed}"
    return reports[0]
