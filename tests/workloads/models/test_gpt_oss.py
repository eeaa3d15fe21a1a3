from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuseplan.workloads.models import GptOss, KVCache, workload
from fuseplan.workloads.models.attention import attention
from fuseplan.workloads.models.experts import Experts, clamped_swiglu
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


def test_rows_of_a_batch_decode_at_their_own_positions(model: GptOss) -> None:
    (input_ids,) = TINY.example_inputs(sequence=12, batch=2)
    expected = model(input_ids)
    cache = KVCache.empty(model, 2, max_len=16)
    model(input_ids, cache=cache)
    positions = torch.tensor([[11], [5]])
    logits = model(input_ids.gather(1, positions), positions, cache)
    torch.testing.assert_close(logits[:, 0], expected[[0, 1], [11, 5]], atol=1e-4, rtol=1e-4)


def test_input_without_a_batch_is_refused(model: GptOss) -> None:
    with pytest.raises(ValueError, match=r"input_ids has 1 dimensions; give \[batch, sequence\]"):
        model(torch.zeros(3, dtype=torch.int64))


def naive_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int) -> Tensor:
    """One query and one head at a time."""
    out = torch.zeros_like(q)
    for b, s, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        first = max(0, s - window + 1) if window else 0
        kv = h // (q.shape[2] // k.shape[2])
        scores = k[b, first : s + 1, kv] @ q[b, s, h] / q.shape[3] ** 0.5
        weights = torch.cat((scores, sinks[h : h + 1])).softmax(0)[:-1]
        out[b, s, h] = weights @ v[b, first : s + 1, kv]
    return out


@pytest.mark.parametrize("window", [0, 1, 4])
def test_attention_has_windows_sinks_and_groups(window: int) -> None:
    q, k, v, sinks = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8), torch.randn(4)
    positions = torch.arange(6)[None]
    out = attention(q, k, v, sinks, positions, positions, window)
    torch.testing.assert_close(out, naive_attention(q, k, v, sinks, window))


def test_windows_and_sinks_matter_to_the_model(model: GptOss) -> None:
    (input_ids,) = TINY.example_inputs(sequence=TINY.config.sliding_window + 1)
    changed = TINY.build(dtype=torch.float32)
    changed.blocks[0].attention.window = 0
    before, after = model(input_ids), changed(input_ids)
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-2)
    changed.blocks[1].attention.sinks.fill_(-torch.inf)
    assert not torch.allclose(changed(input_ids)[:, 0], before[:, 0], atol=1e-2)


def test_swiglu_is_interleaved_and_clamped() -> None:
    gate_up = torch.tensor([1.0, 2.0, 9.0, -9.0])
    gate, up = torch.tensor([1.0, 7.0]), torch.tensor([2.0, -7.0])
    expected = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    torch.testing.assert_close(clamped_swiglu(gate_up, 1.702, 7.0), expected)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_padded_experts_equal_unpadded_ones(tokens: int) -> None:
    config = TINY.config
    experts, H = Experts(config), config.hidden
    x, logits = torch.randn(tokens, H), torch.randn(tokens, config.experts)
    padded = F.pad(x, (0, config.padded_hidden - H))

    expected = torch.zeros(tokens, H)
    for t in range(tokens):
        chosen = logits[t].topk(config.experts_per_token)
        for weight, e in zip(chosen.values.softmax(0), chosen.indices.tolist(), strict=True):
            hidden = clamped_swiglu(experts.w13[e, :, :H] @ x[t] + experts.b13[e], 1.702, 7.0)
            expected[t] += weight * (experts.w2[e, :H] @ hidden + experts.b2[e, :H])

    torch.testing.assert_close(experts(padded, logits), expected, atol=1e-5, rtol=1e-5)


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
