"""Rotation, alone, with norms and with writes into a static cache, against models' own; ops that write in place."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import define, implement, ops
from fuseplan.errors import RuleError
from tests.cached import arguments
from tests.helpers import randn
from tests.rotary import HEAD, KW, QW, batched, flat, heads_last, hugging_face, vllm, vllm_in_float32

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def check_equal(found: Any, wanted: Any) -> None:
    for got, each in zip(found, wanted, strict=True):
        assert torch.equal(got, each)


def moved(*tensors: Tensor) -> list[Tensor]:
    """Heads before tokens, or the other way round."""
    return [each.transpose(1, 2) for each in tensors]


@every_dtype
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("is_normed", [False, True])
def test_bit_for_bit_what_transformers_computes_and_caches(is_normed: bool, tokens: int, dtype: torch.dtype) -> None:
    from transformers.cache_utils import StaticLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q, k, v, k_cache, v_cache, cos, sin, positions = arguments(tokens, dtype)
    weights = QW.to(dtype), KW.to(dtype)
    layer: Any = StaticLayer(max_cache_len=k_cache.shape[2])
    layer.lazy_initialization(*moved(k, v))
    layer.keys.copy_(k_cache)
    layer.values.copy_(v_cache)
    layer.cumulative_length.fill_(int(positions[0]))
    with torch.no_grad():
        both = [q, k]
        if is_normed:
            norms = [Qwen3RMSNorm(HEAD, eps=1e-6).to(dtype) for _ in range(2)]
            for norm, weight in zip(norms, weights, strict=True):
                norm.load_state_dict({"weight": weight})
            both = [norm(each) for norm, each in zip(norms, both, strict=True)]
        rotated = apply_rotary_pos_emb(*moved(*both), cos, sin)
        layer.update(rotated[1], v.transpose(1, 2))
    wanted = rotated[0], layer.keys, layer.values
    given = *moved(q, k, v), k_cache, v_cache
    angles = cos[:, None], sin[:, None], positions
    if is_normed:
        check_equal(ops.qk_norm_rope_cache(*given, *weights, *angles, 1e-6, "llama", "products"), wanted)
        found = ops.qk_norm_rope(q, k, *weights, cos[:, :, None], sin[:, :, None], 1e-6, "llama", "products")
        check_equal(moved(*found), rotated)
    else:
        check_equal(ops.rope_cache(*given, *angles, "products"), wanted)
        check_equal(ops.rotary_embedding(*given[:2], *angles[:2], "products"), rotated)


@every_dtype
def test_bit_for_bit_what_vllm_writes(dtype: torch.dtype) -> None:
    q, k, cos, sin = flat(dtype)
    heads = [x.view(7, -1, HEAD) for x in (q, k)]
    given = *heads, QW.to(dtype), KW.to(dtype), cos.unsqueeze(1), sin.unsqueeze(1), 1e-6, "llama"
    for rounding, rotate in (("products", vllm), ("fp32", vllm_in_float32)):
        found = ops.qk_norm_rope(*given, rounding)
        check_equal([each.flatten(1) for each in found], heads_last(rotate)(q, k, cos, sin))


def test_roundings_differ_in_low_precision_and_not_in_float64() -> None:
    q, k, cos, sin = batched()
    given = *moved(q, k), cos[:, None], sin[:, None]
    assert not torch.equal(*(ops.rotary_embedding(*given, each)[0] for each in ("products", "fp32")))
    wide = [each.double() for each in given]
    results = [ops.rotary_embedding(*wide, each)[0] for each in ("products", "fp32")]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], hugging_face(wide[0], cos.double(), sin.double()))
    with pytest.raises(ValueError, match="'ours' is not a valid RotaryRounding"):
        ops.rotary_embedding(*given, "ours")


def test_angles_of_half_a_head_are_those_of_both_halves() -> None:
    q, k, weight = randn(3, 5, 2, HEAD), randn(3, 5, 1, HEAD, seed=1), randn(HEAD, seed=2)
    _, _, cos, sin = batched(rotated=HEAD // 2)
    narrow = cos.unsqueeze(2), sin.unsqueeze(2)
    whole = [torch.cat((each, each), dim=-1) for each in narrow]
    found, wanted = (
        ops.qk_norm_rope(q, k, weight, weight, *each, 1e-6, "gpt_oss", "products") for each in (narrow, whole)
    )
    check_equal(found, wanted)


def test_the_op_writes_to_nothing_and_its_kernel_to_the_caches() -> None:
    q, k, v, k_cache, v_cache, cos, sin, positions = arguments(3)
    given = *moved(q, k, v), k_cache, v_cache, cos[:, None], sin[:, None], positions
    before = k_cache.clone(), v_cache.clone()
    wanted = ops.rope_cache(*given, "products")
    check_equal((k_cache, v_cache), before)
    q_out = ops.rope_cache.implementation("torch")(*given, "products")
    check_equal((q_out, k_cache, v_cache), wanted)


@pytest.mark.parametrize("position", [12, -13])
def test_a_place_that_the_cache_does_not_have_is_an_index_error(position: int) -> None:
    q, k, v, *caches, cos, sin, _ = arguments()
    with pytest.raises(IndexError):
        ops.rope_cache(*moved(q, k, v), *caches, cos[:, None], sin[:, None], torch.tensor([position]), "products")


def add_into(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, total + x


def fake(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(total)


def test_an_op_of_ones_own_can_write() -> None:
    op = define(
        "test_add_into", "(Tensor x, Tensor total) -> (Tensor, Tensor)", reference=add_into, fake=fake, samples=(),
        fused=True, writes=("total",),
    )  # fmt: skip

    def kernel(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return x * 2

    implement(op, "ours", kernel)
    for provider in ("torch", "ours"):
        overload = op.implementation(provider)
        assert overload._schema.is_mutable
        x, total = torch.arange(3.0), torch.ones(3)
        assert torch.equal(overload(x, total), 2 * x)
        assert torch.equal(total, 1 + x)
        x, total = torch.arange(3.0), torch.ones(3)
        torch.library.opcheck(overload, (x, total), test_utils=("test_schema", "test_faketensor"))
    assert not op.overload._schema.is_mutable


WRONG: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no such argument": ("(Tensor x, Tensor y) -> (Tensor, Tensor)", ("z",), "can't write to z: no such tensor"),
    "no tensor": ("(Tensor x, float y) -> (Tensor, Tensor)", ("y",), "can't write to y: no such tensor"),
    "no other result": ("(Tensor x, Tensor y) -> Tensor", ("y",), "yields 1 and writes 1: it must yield one more"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_what_an_op_can_not_write_is_refused(name: str) -> None:
    schema, writes, says = WRONG[name]
    arguments: dict[str, Any] = {"reference": add_into, "fake": fake, "samples": ()}
    with pytest.raises(RuleError, match=says):
        define(f"test_wrong_{len(name)}", schema, writes=writes, **arguments)
