"""QK norm + rotary embedding: it fires, it is right, it refuses by name, and off it isn't there."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseplan
from fuseplan.record import Nearness, Report
from fuseplan.rules import Bindings
from fuseplan.rules.families.rotary import QkNormRope
from tests.helpers import gemma, gpt_oss
from tests.matching.reported import near_misses
from tests.rotary import (
    HEAD,
    KW,
    Q_HEADS,
    QW,
    angles,
    batched,
    broadcast,
    flat,
    heads_first,
    heads_last,
    hugging_face,
    hugging_face_in_float32,
    normed,
    vllm,
)
from tests.rules.planning import compiled_and_eager

RULE = "qk_norm_rope"

LAYOUTS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "heads first, angles without a batch": (heads_first(broadcast), (*batched()[:2], *angles(5, HEAD))),
    "heads first, angles with a batch": (heads_first(broadcast), (*batched()[:2], *angles(1, 5, HEAD))),
    "heads first, one token's angles": (heads_first(broadcast), (*batched()[:2], *angles(HEAD))),
    "heads first": (heads_first(), batched()),
    "heads first, in float32": (heads_first(hugging_face_in_float32), batched(torch.float16)),
    "heads last": (heads_last(), flat()),
    "heads last, weights in float32": (
        heads_last(norm=lambda x, weight: gpt_oss(x, None, weight.to(x.dtype))[0]), flat(torch.float16),
    ),
    "heads last, 1 + weight": (heads_last(norm=lambda x, weight: gemma(x, None, weight.to(x.dtype))[0]), flat()),
}  # fmt: skip


CODED = ("heads first", "heads last")
"""What code is made of; graphs of others are interpreted."""


def explain(function: Any, *inputs: Tensor, **config: Any) -> Report:
    return fuseplan.explain(function, *inputs, config=fuseplan.PassConfig(**config), device="h200")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_it_computes_what_the_model_does(layout: str) -> None:
    function, inputs = LAYOUTS[layout]
    report, pairs = compiled_and_eager(function, *inputs, policy=f"ordered({RULE})", coded=layout in CODED)
    assert report.fused == {RULE: 1}
    assert not report.warnings
    for got, wanted in pairs:
        assert got.stride() == wanted.stride()
        # Inductor and eager PyTorch are fed the same fused op, which rounds where eager PyTorch does.
        torch.testing.assert_close(got, wanted, rtol=2**-8, atol=2**-8)


def test_it_fires_once_a_layer() -> None:
    def layers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            rotated = heads_last()(q, k, cos, sin)
            mixed = rotated[0].sum(-1, keepdim=True) + rotated[1].sum(-1, keepdim=True)
            q, k = (each.sigmoid() * mixed for each in (q, k))
        return q, k

    report = explain(layers, *flat())
    assert report.fused[RULE] == 3
    assert {fusion.provider for fusion in report.graphs[0].applied} == {"triton"}
    off = explain(layers, *flat(), enable_qk_norm_rope_fusion=False)
    assert RULE not in off.fused
    assert [(miss.rule, miss.count) for miss in off.near_misses if miss.reason == "disabled"] == [(RULE, 3)]
    assert explain(layers, *flat(), forbid=[RULE]).fused[RULE] == 0


def narrow(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


REFUSED: dict[str, tuple[bool, dict[str, Any], str, str]] = {
    "q": (False, {"q": narrow(3, 4, 8, dtype=torch.float64)}, "q is float64; supported", "dtype"),
    "k": (False, {"k": torch.empty(3, 2, 8)}, "k is float32 and q is bfloat16; the fused op takes one dtype", "dtype"),
    "a weight": (False, {"k_weight": torch.empty(8)}, "k_weight is float32 and q is bfloat16", "dtype"),
    "other rows": (False, {"k": narrow(4, 2, 8)}, "may only differ in the number of heads", "size"),
    "heads before tokens": (
        False, {"q": narrow(4, 3, 8), "k": narrow(2, 3, 8)},
        "q is [4, 3, 8] and k is [2, 3, 8], heads before tokens; the fused op takes tokens before heads", "size",
    ),
    "angles of each head": (False, {"cos": torch.empty(3, 4, 8)}, "the same for all of its heads", "size"),
    "angles of rows": (False, {"cos": torch.empty(1, 8)}, "cos is [1, 8]; the fused op takes angles of", "size"),
    "heads in another place": (True, {"cos": torch.empty(3, 5, 1, 8)}, "cos is [3, 5, 1, 8]", "size"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    transposes, changes, detail, reason = REFUSED[name]
    leading = (3, 5) if transposes else (3,)
    cos = torch.empty(*leading, 1, 8)
    given = {"q": narrow(*leading, 4, 8), "k": narrow(*leading, 2, 8), "q_weight": narrow(8), "k_weight": narrow(8)}
    given["cos"] = cos.transpose(1, 2) if transposes else cos
    rule = QkNormRope(transposes=transposes)
    assert rule.check(Bindings(RULE, given)) is None
    refusal = rule.check(Bindings(RULE, {**given, **changes}))
    assert refusal is not None
    assert refusal.reason.value == reason
    assert detail in refusal.detail


def other_norm(x: Tensor, weight: Tensor) -> Tensor:
    return normed(x, weight) if x.shape[-2] == Q_HEADS else gpt_oss(x, None, weight.to(x.dtype))[0]


def moved_elsewhere(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (normed(x, weight).permute(2, 0, 1, 3) for x, weight in ((q, QW), (k, KW)))
    return hugging_face(q, cos, sin), hugging_face(k, cos, sin)


MISSES: dict[str, tuple[Any, tuple[Tensor, ...], Nearness, str]] = {
    "partial": (
        heads_first(partial(hugging_face, rotated=8)), batched(rotated=8), Nearness.UNRECOGNIZED,
        "rotary embedding not recognised: it rotates 8 of a head's 16 dimensions (partial rotary)",
    ),
    "an op between": (
        heads_last(norm=lambda x, weight: normed(x, weight).tanh()), flat(), Nearness.OBSTRUCTED,
        "aten.tanh.default stands between rms_norm and rotary_embedding",
    ),
    "keys that are not normed": (
        heads_last(norm=lambda x, weight: normed(x, weight) if x.shape[-2] == Q_HEADS else x), flat(), Nearness.ABSENT,
        "expected rms_norm before rotary_embedding, found an input of the graph",
    ),
    "norms of two conventions": (
        heads_last(norm=other_norm), flat(), Nearness.REFUSED,
        "eps is 1e-06 in one place and 1e-05 in another, and qk_norm_rope takes one",
    ),
    "heads moved elsewhere": (
        moved_elsewhere, batched(), Nearness.REFUSED,
        "aten.permute.default takes [2, 0, 1, 3], and the rule has [0, 2, 1, 3] there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MISSES))
def test_near_misses_name_what_stands_in_the_way(name: str) -> None:
    function, inputs, nearness, detail = MISSES[name]
    rows = near_misses(function, *inputs, rule=RULE)
    assert {row.nearness for row in rows} == {nearness}
    assert all(row.detail.startswith(detail) for row in rows), [row.detail for row in rows]


def test_one_tensor_may_be_queries_and_keys() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        both = [normed(x.view(7, -1, HEAD), weight).flatten(1) for weight in (QW, KW)]
        return vllm(both[0], cos, sin), vllm(both[1], cos, sin)

    x, _, cos, sin = flat()
    assert explain(function, x, cos, sin).fused[RULE] == 1
