from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fuseplan.workloads.models import GPT_OSS_120B, WORKLOADS, GptOss, KVCache, check_size, workload
from fuseplan.workloads.models.experts import Experts
from fuseplan.workloads.models.gpt_oss import fused_add_rms_norm, rms_norm

TINY = workload("gpt-oss-120b-tiny")


@pytest.fixture(scope="module")
def model() -> GptOss:
    return TINY.build(dtype=torch.float32)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_weights_depend_on_the_seed_alone(model: GptOss) -> None:
    before = torch.get_rng_state()
    again, other = TINY.build(dtype=torch.float32), TINY.build(dtype=torch.float32, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
        assert not weight.requires_grad


def test_greedy_tokens_have_a_margin_that_bf16_keeps() -> None:
    (input_ids,) = TINY.example_inputs(sequence=32, batch=4)
    coarse = TINY.build(dtype=torch.bfloat16)
    fine = GptOss(TINY.config)
    fine.load_state_dict(coarse.state_dict())
    logits, expected = coarse(input_ids).float(), fine(input_ids)
    best, second = expected.topk(2).values.unbind(-1)
    assert logits.shape == (4, 32, TINY.config.vocab)
    assert (best - second).min() > 10 * (logits - expected).abs().max()


def test_norms_round_where_they_say() -> None:
    x, residual, weight = (torch.randn(3, 320, dtype=torch.bfloat16) for _ in range(3))
    y, total = fused_add_rms_norm(x, residual, weight[0], 1e-5)
    exact = x.double() + residual.double()
    assert torch.equal(total, (x.float() + residual.float()).bfloat16())
    normed = exact / exact.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(y.double(), normed * weight[0].double(), atol=0, rtol=2**-7)
    # The unrounded sum is normed: norming the rounded one is another result.
    assert not torch.equal(y, rms_norm(total, weight[0], 1e-5))


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_with_a_cache_equals_one_forward(model: GptOss, batch: int) -> None:
    (input_ids,) = TINY.example_inputs(sequence=20, batch=batch)
    expected = model(input_ids)
    cache = KVCache.empty(model, batch, max_len=32)
    steps = [model(input_ids[:, :14], cache=cache)]  # prefill, longer than the window
    for position in range(14, 20):
        positions = torch.full((batch, 1), position)
        steps.append(model(input_ids[:, position : position + 1], positions, cache))
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
    assert cache.k[0][:, 20:].count_nonzero() == 0
    with pytest.raises(ValueError, match=r"input_ids has 1 dimensions; give \[batch, sequence\]"):
        model(torch.zeros(3, dtype=torch.int64))


def test_rows_of_a_batch_decode_at_their_own_positions(model: GptOss) -> None:
    (input_ids,) = TINY.example_inputs(sequence=12, batch=2)
    expected = model(input_ids)
    cache = KVCache.empty(model, 2, max_len=16)
    model(input_ids, cache=cache)
    positions = torch.tensor([[11], [5]])
    logits = model(input_ids.gather(1, positions), positions, cache)
    torch.testing.assert_close(logits[:, 0], expected[[0, 1], [11, 5]], atol=1e-4, rtol=1e-4)


def test_ops_are_sound() -> None:
    """Schema, fakes (static and symbolic) and functionalization of both ops."""
    config = TINY.config
    experts = Experts(config).requires_grad_(False)
    weights = experts.w13, experts.b13, experts.w2, experts.b2
    padded, logits = torch.randn(5, config.padded_hidden), torch.randn(5, config.experts)
    torch.library.opcheck(
        torch.ops.gpt_oss.experts.default, (padded, logits, *weights, 4, 1.702, 7.0, config.hidden, "")
    )
    q, kv, sinks, positions = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(4), torch.arange(6)[None]
    torch.library.opcheck(torch.ops.gpt_oss.attention.default, (q, kv, kv, sinks, positions, positions, 4))


def hugging_face_twin(model: GptOss) -> nn.Module:
    transformers, c = pytest.importorskip("transformers"), model.config
    config = transformers.GptOssConfig(
        num_hidden_layers=c.layers, num_local_experts=c.experts, num_experts_per_tok=c.experts_per_token,
        vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.intermediate,
        num_attention_heads=c.query_heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        sliding_window=c.sliding_window, attn_implementation="eager",
    )  # fmt: skip
    twin: nn.Module = transformers.GptOssForCausalLM(config).eval()
    copy_weights(model, twin)
    return twin


def copy_weights(model: GptOss, twin: nn.Module) -> None:
    c = model.config
    source, copied = dict(model.named_parameters()), {}
    sections = [heads * c.head_dim for heads in (c.query_heads, c.kv_heads, c.kv_heads)]
    for i in range(c.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", source[f"{ours}attention.qkv.{kind}"].split(sections), strict=True):
                copied[f"{theirs}self_attn.{name}_proj.{kind}"] = part
            copied[f"{theirs}self_attn.o_proj.{kind}"] = source[f"{ours}attention.o_proj.{kind}"]
            copied[f"{theirs}mlp.router.{kind}"] = source[f"{ours}router.{kind}"]
        copied[theirs + "self_attn.sinks"] = source[ours + "attention.sinks"]
        copied[theirs + "input_layernorm.weight"] = source[ours + "input_norm.weight"]
        copied[theirs + "post_attention_layernorm.weight"] = source[ours + "post_attention_norm.weight"]
        copied[theirs + "mlp.experts.gate_up_proj"] = source[ours + "experts.w13"][..., : c.hidden].mT
        copied[theirs + "mlp.experts.gate_up_proj_bias"] = source[ours + "experts.b13"]
        copied[theirs + "mlp.experts.down_proj"] = source[ours + "experts.w2"][:, : c.hidden].mT
        copied[theirs + "mlp.experts.down_proj_bias"] = source[ours + "experts.b2"][:, : c.hidden]
    copied["model.embed_tokens.weight"] = source["embed.weight"]
    copied["model.norm.weight"] = source["norm.weight"]
    copied["lm_head.weight"] = source["lm_head.weight"]
    targets = dict(twin.named_parameters())
    assert copied.keys() == targets.keys()
    for name, target in targets.items():
        target.copy_(copied[name])


def test_logits_agree_with_hugging_face(model: GptOss) -> None:
    """Both compute from the same weights."""
    (input_ids,) = TINY.example_inputs(sequence=40, batch=2)  # well past the sliding window of 8
    logits = model(input_ids)
    expected = hugging_face_twin(model)(input_ids).logits
    assert expected.std() > 0.5  # logits of a size at which the tolerance says something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0 of gpt-oss-120b is not positive; give 1 or more"),
        ({"query_heads": 60}, "query_heads=60 of gpt-oss-120b is not a multiple of kv_heads=8; give e.g. 64"),
        ({"head_dim": 63}, "head_dim=63 of gpt-oss-120b is odd, and RoPE rotates pairs; give 64"),
        ({"experts": 2}, "experts_per_token=4 of gpt-oss-120b exceeds experts=2; give at most 2"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(GPT_OSS_120B, **change)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "tp=3 does not divide 64 query heads of gpt-oss-120b; use one of 1, 2, 4, 8"),
        (16, "tp=16 does not divide 8 kv heads of gpt-oss-120b; use one of 1, 2, 4, 8"),
        (0, "tp=0 is not a number of ranks; use one of 1, 2, 4, 8 for gpt-oss-120b"),
    ],
)
def test_group_sizes_that_do_not_divide(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_size(GPT_OSS_120B, size)


def test_workloads_by_name() -> None:
    assert {workload(name).name for name in WORKLOADS} == set(WORKLOADS)
    assert len(WORKLOADS) == 8
    assert workload("gpt-oss-20b:outer-reduce").outer_reduce
    assert workload("gpt-oss-120b").with_layers(2).config.layers == 2
    with pytest.raises(ValueError, match="'gpt-os-120b'; did you mean gpt-oss-120b"):
        workload("gpt-os-120b")
