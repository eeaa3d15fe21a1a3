"""The rotary embedding and the fused op against what models write."""

import pytest
import torch

from fuseplan.dialect import ops
from tests.helpers import randn
from tests.rotary import HEAD, KW, QW, batched, flat, heads_first, heads_last, hugging_face, vllm, vllm_in_float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bit_for_bit_what_transformers_computes(dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q, k, cos, sin = batched(dtype)
    norms = [Qwen3RMSNorm(HEAD, eps=1e-6).to(dtype) for _ in range(2)]
    for norm, weight in zip(norms, (QW, KW), strict=True):
        norm.load_state_dict({"weight": weight})
    with torch.no_grad():
        expected = apply_rotary_pos_emb(*(n(x).transpose(1, 2) for n, x in zip(norms, (q, k), strict=True)), cos, sin)
    turned = cos.unsqueeze(2), sin.unsqueeze(2)
    weights = QW.to(dtype), KW.to(dtype)
    for got, wanted in zip(ops.qk_norm_rope(q, k, *weights, *turned, 1e-6, "llama", "products"), expected, strict=True):
        assert torch.equal(got.transpose(1, 2), wanted)
    normed = [x.transpose(1, 2) for x in (q, k)]
    plain = apply_rotary_pos_emb(*normed, cos, sin)
    for got, wanted in zip(ops.rotary_embedding(*normed, cos[:, None], sin[:, None], "products"), plain, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bit_for_bit_what_vllm_writes(dtype: torch.dtype) -> None:
    q, k, cos, sin = flat(dtype)
    heads = [x.view(7, -1, HEAD) for x in (q, k)]
    turned = cos.unsqueeze(1), sin.unsqueeze(1)
    for rounding, rotate in (("products", vllm), ("fp32", vllm_in_float32)):
        expected = heads_last(rotate)(q, k, cos, sin)
        weights = QW.to(dtype), KW.to(dtype)
        found = ops.qk_norm_rope(*heads, *weights, *turned, 1e-6, "llama", rounding)
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got.flatten(1), wanted)


def test_roundings_differ_in_low_precision_and_not_in_float64() -> None:
    q, k, cos, sin = batched()
    arguments = q.transpose(1, 2), k.transpose(1, 2), cos[:, None], sin[:, None]
    assert not torch.equal(*(ops.rotary_embedding(*arguments, each)[0] for each in ("products", "fp32")))
    wide = [each.double() for each in arguments]
    results = [ops.rotary_embedding(*wide, each)[0] for each in ("products", "fp32")]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], hugging_face(wide[0], cos.double(), sin.double()))
    with pytest.raises(ValueError, match="'ours' is not a valid RotaryRounding"):
        ops.rotary_embedding(*arguments, "ours")


def test_angles_of_half_a_head_are_those_of_both_halves() -> None:
    q, k, weight = randn(3, 5, 2, HEAD), randn(3, 5, 1, HEAD, seed=1), randn(HEAD, seed=2)
    _, _, cos, sin = batched(rotated=HEAD // 2)
    narrow = cos.unsqueeze(2), sin.unsqueeze(2)
    whole = [torch.cat((each, each), dim=-1) for each in narrow]
    rest = 1e-6, "gpt_oss", "products"
    for got, wanted in zip(
        ops.qk_norm_rope(q, k, weight, weight, *narrow, *rest),
        ops.qk_norm_rope(q, k, weight, weight, *whole, *rest),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_hugging_faces_layout_is_the_other_one_transposed() -> None:
    q, k, cos, sin = batched()
    expected = heads_first()(q, k, cos, sin)
    turned = cos.unsqueeze(2), sin.unsqueeze(2)
    weights = QW.bfloat16(), KW.bfloat16()
    for got, wanted in zip(ops.qk_norm_rope(q, k, *weights, *turned, 1e-6, "llama", "products"), expected, strict=True):
        assert torch.equal(got.transpose(1, 2), wanted)
