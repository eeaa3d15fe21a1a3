"""Rotary embeddings of normed queries and keys, in the spellings that models have, and what only looks like one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.dialect import ops
from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import tensor_of
from fuseplan.record import Reason
from tests.helpers import quickly_canonical, randn
from tests.rotary import (
    HEAD,
    K_HEADS,
    KW,
    Q_HEADS,
    QW,
    batched,
    flat,
    heads_first,
    heads_last,
    hugging_face,
    hugging_face_in_float32,
    normed,
    rotate_pairs,
    vllm,
    vllm_in_float32,
)


def rotations(graph: CanonicalGraph) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=ops.rotary_embedding.overload))


def heads_of(rotary: fx.Node) -> list[set[int]]:
    shapes = [value.shape for arg in rotary.args[:2] if (value := tensor_of(arg)) is not None]
    return [{int(size) for size in shape} & {Q_HEADS, K_HEADS} for shape in shapes]


SPELLINGS: dict[str, tuple[Any, Callable[..., tuple[Tensor, ...]], str]] = {
    "hugging_face": (heads_first(), batched, "products"),
    "hugging_face_in_float32": (heads_first(hugging_face_in_float32), batched, "fp32"),
    "vllm": (heads_last(), flat, "products"),
    "vllm_in_float32": (heads_last(vllm_in_float32), flat, "fp32"),
}


@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False), (torch.float32, False)],
)
@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_queries_and_keys_are_raised_together(spelling: str, dtype: torch.dtype, dynamic: bool) -> None:
    function, inputs, rounding = SPELLINGS[spelling]
    graph = quickly_canonical(function, *inputs(dtype), dynamic=dynamic)
    assert graph.recognized() == {f"rms_norm[{HEAD}]": 2, f"rotary_embedding[{HEAD}]": 1}
    assert not graph.refusals
    (rotary,) = rotations(graph)
    # In float32 nothing is cast, so that the two conventions are one.
    assert rotary.args[4] == ("products" if dtype is torch.float32 else rounding)
    graph.graph.lint()


def test_angles_in_float32_promote_the_products() -> None:
    q, k, cos, sin = batched()

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.to(q.dtype) for each in heads_first()(q, k, cos, sin))

    (rotary,) = rotations(quickly_canonical(function, q, k, cos.float(), sin.float()))
    assert rotary.args[4] == "fp32"


@pytest.mark.parametrize("keys_first", [False, True])
def test_queries_have_more_heads_whichever_is_rotated_first(keys_first: bool) -> None:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        both = [(q, QW), (k, KW)][:: -1 if keys_first else 1]
        first, second = (hugging_face(normed(x, w).transpose(1, 2), cos, sin) for x, w in both)
        return first, second

    (rotary,) = rotations(quickly_canonical(function, *batched()))
    assert [heads & {Q_HEADS} for heads in heads_of(rotary)] == [{Q_HEADS}, set()]


def test_layers_with_the_same_angles_are_paired_each_by_itself() -> None:
    def layers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            rotated = heads_last()(q, k, cos, sin)
            mixed = rotated[0].sum(-1, keepdim=True) + rotated[1].sum(-1, keepdim=True)
            q, k = (each.sigmoid() * mixed for each in (q, k))
        return q, k

    graph = quickly_canonical(layers, *flat())
    found = rotations(graph)
    assert [heads_of(rotary) for rotary in found] == [heads_of(found[0])] * 3
    normed_inputs = [[ops.of(source.target) for source in rotary.all_input_nodes] for rotary in found]
    assert [each.count(ops.rms_norm) for each in normed_inputs] == [2] * 3
    graph.graph.lint()


def test_angles_may_be_the_halves_of_one_tensor_and_stand_first() -> None:
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        x = x.view(x.shape[0], -1, HEAD)
        cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((cos * x1 - sin * x2, sin * x1 + cos * x2), dim=-1)

    def function(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (normed(x.view(x.shape[0], -1, HEAD), w).view(x.shape) for x, w in ((q, QW), (k, KW)))
        return rotate(q, angles), rotate(k, angles)

    q, k, *_ = flat()
    (rotary,) = rotations(quickly_canonical(function, q, k, randn(7, HEAD)))
    assert [tensor_of(arg).shape[-1] for arg in rotary.args[:4]] == [HEAD, HEAD, HEAD // 2, HEAD // 2]  # type: ignore[union-attr]


def test_what_is_not_normed_stays_as_it_is() -> None:
    graph = quickly_canonical(heads_last(norm=lambda x, weight: x * weight.to(x.dtype)), *flat())
    assert graph.recognized() == {}
    assert not graph.refusals


def other_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.view(x.shape[0], -1, HEAD).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos.neg() + x1 * sin), dim=-1)


def subtracted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) - torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)


LOOKALIKES: dict[str, tuple[Any, tuple[Tensor, ...], Reason, str]] = {
    "partial, as in Hugging Face": (
        heads_first(partial(hugging_face, rotated=8)), batched(rotated=8), Reason.ATTRIBUTE,
        "it rotates 8 of a head's 16 dimensions (partial rotary), and the op rotates all",
    ),
    "partial, as in vLLM": (
        heads_last(partial(vllm, rotated=8)), flat(rotated=8), Reason.ATTRIBUTE,
        "it rotates 8 of a head's 16 dimensions (partial rotary), and the op rotates all",
    ),
    "interleaved, as in Hugging Face": (
        heads_first(partial(hugging_face, turn=rotate_pairs)), batched(), Reason.ATTRIBUTE,
        "it rotates neighbours against each other (interleaved, GPT-J), and the op rotates halves (GPT-NeoX)",
    ),
    "interleaved, as in vLLM": (
        heads_last(partial(vllm, neox=False)), flat(), Reason.ATTRIBUTE,
        "it rotates neighbours against each other (interleaved, GPT-J), and the op rotates halves (GPT-NeoX)",
    ),
    "other angles in each half": (
        heads_last(other_angles), flat(), Reason.OP, "the halves are rotated by different angles",
    ),
    "one angle a head": (
        heads_first(lambda x, cos, sin: hugging_face(x, cos[..., :1], sin[..., :1])), batched(), Reason.SIZE,
        "1 angles a head are given for its 16 dimensions",
    ),
    "a result in float32": (
        heads_first(lambda x, cos, sin: hugging_face(x, cos.float(), sin.float()).sigmoid()), batched(), Reason.DTYPE,
        "x is bfloat16, and the rotated value stays in float32",
    ),
    "turned the other way": (
        heads_first(subtracted), batched(), Reason.OP, "the rotated half isn't multiplied by sines and added",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LOOKALIKES))
def test_what_only_looks_like_one_is_refused_by_name(name: str) -> None:
    function, inputs, reason, detail = LOOKALIKES[name]
    graph = quickly_canonical(function, *inputs)
    assert not rotations(graph)
    assert {(refusal.op, refusal.reason, refusal.detail) for refusal in graph.refusals} == {
        ("rotary_embedding", reason, f"rotary embedding not recognised: {detail}")
    }


def test_one_tensor_alone_has_no_partner() -> None:
    graph = quickly_canonical(lambda q, k, cos, sin: (heads_last()(q, k, cos, sin)[0], k), *flat())
    assert not rotations(graph)
    (refusal,) = graph.refusals
    assert refusal.detail.endswith("no other tensor is rotated by the same angles, as queries and keys of a layer are")


def test_what_is_computed_from_the_other_is_no_partner() -> None:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = vllm(normed(q.view(7, -1, HEAD), QW).view(q.shape), cos, sin)
        keys = k * rotated.sum(-1, keepdim=True)
        return vllm(normed(keys.view(7, -1, HEAD), KW).view(k.shape), cos, sin)

    graph = quickly_canonical(function, *flat())
    assert not rotations(graph)
    assert len(graph.refusals) == 2
