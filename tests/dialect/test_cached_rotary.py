"""Rotation and writes into a static cache against what transformers computes and caches; ops that write in place."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import define, implement, ops
from fuseplan.errors import RuleError
from tests.cached import arguments
from tests.rotary import HEAD, KW, QW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_bit_for_bit_what_transformers_computes_and_caches(tokens: int, dtype: torch.dtype) -> None:
    from transformers.cache_utils import StaticLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q, k, v, k_cache, v_cache, cos, sin, positions = arguments(tokens, dtype)
    norms = [Qwen3RMSNorm(HEAD, eps=1e-6).to(dtype) for _ in range(2)]
    for norm, weight in zip(norms, (QW, KW), strict=True):
        norm.load_state_dict({"weight": weight})
    for normed in (False, True):
        layer: Any = StaticLayer(max_cache_len=k_cache.shape[2])
        layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        layer.keys.copy_(k_cache)
        layer.values.copy_(v_cache)
        layer.cumulative_length.fill_(int(positions[0]))
        with torch.no_grad():
            both = [norms[index](each) if normed else each for index, each in enumerate((q, k))]
            rotated = apply_rotary_pos_emb(*(each.transpose(1, 2) for each in both), cos, sin)
            layer.update(rotated[1], v.transpose(1, 2))
        given = (*(each.transpose(1, 2) for each in (q, k, v)), k_cache, v_cache)
        angles = cos[:, None], sin[:, None], positions
        if normed:
            found = ops.qk_norm_rope_cache(*given, QW.to(dtype), KW.to(dtype), *angles, 1e-6, "llama", "products")
        else:
            found = ops.rope_cache(*given, *angles, "products")
        for got, wanted in zip(found, (rotated[0], layer.keys, layer.values), strict=True):
            assert torch.equal(got, wanted)


def test_the_op_writes_to_nothing_and_its_kernel_to_the_caches() -> None:
    q, k, v, k_cache, v_cache, cos, sin, positions = arguments(3)
    given = (*(each.transpose(1, 2) for each in (q, k, v)), k_cache, v_cache, cos[:, None], sin[:, None], positions)
    before = k_cache.clone(), v_cache.clone()
    wanted = ops.rope_cache(*given, "products")
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])
    q_out = ops.rope_cache.implementation("torch")(*given, "products")
    for got, each in zip((q_out, k_cache, v_cache), wanted, strict=True):
        assert torch.equal(got, each)


@pytest.mark.parametrize("position", [12, -13])
def test_a_place_that_the_cache_does_not_have_is_an_index_error(position: int) -> None:
    q, k, v, *caches, cos, sin, _ = arguments()
    moved = [each.transpose(1, 2) for each in (q, k, v)]
    with pytest.raises(IndexError):
        ops.rope_cache(*moved, *caches, cos[:, None], sin[:, None], torch.tensor([position]), "products")


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
