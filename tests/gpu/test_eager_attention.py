"""Attention that models spell out, with soft-caps and sinks, by fuseplan's kernel on a GPU. Skipped without one."""

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, StaticCache

import fuseplan
from tests.eager_attention import exact
from tests.helpers import randn

launch = pytest.importorskip("fuseplan.providers.triton.attention").launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS, CACHE, WINDOW = 2, 64, 16
COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "initializer_range": 0.1, "sliding_window": WINDOW,
    "attn_implementation": "eager",
}  # fmt: skip
MODELS: dict[str, Any] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, query_pre_attn_scalar=64)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("softcap", "around"), [(None, 0.0), (2.0, None), (50.0, 1.0), (None, 12.0)])
@pytest.mark.parametrize(
    ("batch", "heads", "shared", "queries", "keys", "width"),
    [(1, 64, 8, 1, 4096, 64), (3, 8, 4, 1, 1000, 256), (64, 64, 8, 1, 300, 64), (2, 16, 4, 16, 777, 128)],
)
def test_caps_and_sinks_are_close_to_float64(
    batch: int, heads: int, shared: int, queries: int, keys: int, width: int, softcap: float | None,
    around: float | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    q, k, v = (
        randn(batch, count, length, width, dtype=dtype, seed=seed).cuda()
        for seed, (count, length) in enumerate([(heads, queries), (shared, keys), (shared, keys)])
    )
    sinks = None if around is None else (randn(heads, dtype=torch.float32, seed=4) + around).to(dtype).cuda()
    hidden = torch.arange(keys, device="cuda") >= keys // 2 + torch.arange(batch, device="cuda")[:, None, None, None]
    mask = torch.zeros((), dtype=dtype, device="cuda").where(~hidden, torch.finfo(dtype).min)
    true = exact(q, k, v, mask, sinks, 0.1, softcap)
    result = launch(q, k, v, mask, 0.1, None, sinks=sinks, softcap=softcap)
    assert result.is_contiguous()
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), true, rtol=2 * epsilon, atol=epsilon)


def _decoded(model: Any, step_of: Any) -> torch.Tensor:
    """Logits of steps behind a prompt of eight tokens, past the window."""
    ids = torch.arange(24, device="cuda").reshape(3, 8) % 128
    cache: Any = StaticCache(config=model.config, max_cache_len=CACHE)
    mask = torch.ones(3, CACHE, dtype=torch.long, device="cuda")
    model(input_ids=ids, attention_mask=mask[:, :8], past_key_values=cache)
    logits = []
    for step in range(24):
        position = torch.full((3, 1), 8 + step, device="cuda")
        shown = mask[:, : 9 + step]
        out = step_of(
            input_ids=ids[:, step % 8][:, None], attention_mask=shown, position_ids=position, past_key_values=cache
        )
        logits.append(out.logits[:, -1].float().clone())
    return torch.stack(logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled")
def test_steps_are_as_near_to_float32_as_those_of_plain_torch_compile(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval().bfloat16().cuda()
    reports: list[fuseplan.Report] = []
    # Forced: attention to 64 keys isn't sure to be faster.
    config = fuseplan.PassConfig(allow_rounding_changes=True, force=["eager_attention"])
    runs = []
    with torch.inference_mode():
        wide = copy.deepcopy(model).float()
        true = _decoded(wide, wide)
        for each in (torch.compile(model), fuseplan.compile(model, config=config, on_report=reports.append)):
            torch._dynamo.reset()
            runs.append(_decoded(model, each))
    assert {report.fused["eager_attention"] for report in reports} == {LAYERS}, reports[-1].warnings
    plain, fused = ((each - true).abs().mean().item() for each in runs)
    assert fused <= 1.25 * plain
