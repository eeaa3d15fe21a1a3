"""Rotary embedding + writes into a static cache, alone and with the attention of a decode step behind them, with QK
norm and without: it fires, it is right, it writes in place, it refuses by name, and off it isn't there.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

import fuseplan
from fuseplan.explanation.capture import no_caches
from fuseplan.record import Nearness, Report
from fuseplan.rules import Bindings
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES
from tests.cached import (
    LENGTH,
    Layer,
    arguments,
    assigned,
    attending,
    index_copy,
    layer,
    normed_layer,
    on_copies,
    visible,
)
from tests.helpers import gemma, gpt_oss
from tests.interpreted import no_code
from tests.matching.reported import near_misses
from tests.rotary import HEAD, K_HEADS, Q_HEADS, broadcast, hugging_face_in_float32

ROPE, NORMED_ROPE, ATTENTION, NORMED_ATTENTION = RULES = (
    "rope_cache", "qk_norm_rope_cache", "cached_attention", "qk_norm_cached_attention",
)  # fmt: skip
OPS = dict(zip(RULES, (ROPE, NORMED_ROPE, "rope_cached_attention", "qk_norm_rope_cached_attention"), strict=True))
FLAGS = {
    **dict.fromkeys((ROPE, NORMED_ROPE), ("fuse_rope_cache",)),
    **dict.fromkeys(
        (ATTENTION, NORMED_ATTENTION), ("fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
    ),
}
APART: dict[str, tuple[str, ...]] = {
    ROPE: (), NORMED_ROPE: ("qk_norm_rope",), ATTENTION: (ROPE, "grouped_attention"),
    NORMED_ATTENTION: (NORMED_ROPE, "grouped_attention"),
}  # fmt: skip
"""What is fused where the rule is forbidden."""
every_rule = pytest.mark.parametrize("rule", RULES)


def attended(inner: Callable[..., Layer] = layer, write: Any = index_copy, mix: Any = None, **how: Any) -> Layer:
    changes = {} if mix is None else {"mix": mix}
    return attending(inner(write, read=lambda cache: cache, **how), **changes)


def masked(*given: Any, first: int = 5, dtype: torch.dtype = torch.bfloat16, tokens: int = 1) -> list[Tensor]:
    return [*arguments(tokens, dtype, first=first), visible(first, tokens, dtype=dtype)]


def of_tokens_alone(tokens: int) -> list[Tensor]:
    """Arguments whose cosines and sines are [S, D]."""
    *given, cos, sin, positions = arguments(tokens)
    return [*given, cos[0], sin[0], positions]


MAKE: dict[str, Callable[..., Layer]] = {
    ROPE: layer, NORMED_ROPE: normed_layer, ATTENTION: attended, NORMED_ATTENTION: partial(attended, normed_layer),
}  # fmt: skip
GIVEN: dict[str, Callable[..., list[Tensor]]] = {
    ROPE: arguments, NORMED_ROPE: arguments, ATTENTION: masked, NORMED_ATTENTION: masked,
}  # fmt: skip
LAYERS: dict[str, tuple[str, Layer, list[Tensor]]] = {
    "index_copy": (ROPE, layer(), arguments()),
    "assigned, many tokens": (ROPE, layer(assigned), arguments(3)),
    "in float32, narrow values": (
        ROPE, layer(rotate=hugging_face_in_float32), arguments(2, torch.float16, value_width=8),
    ),
    "as many heads, the last place": (ROPE, layer(), arguments(k_heads=Q_HEADS, first=LENGTH - 1)),
    "counted from the end": (ROPE, layer(assigned), arguments(2, first=-2)),
    "all of the cache": (ROPE, layer(), arguments(LENGTH, first=0)),
    "normed": (NORMED_ROPE, normed_layer(), arguments()),
    "angles of tokens alone": (ROPE, layer(rotate=broadcast), of_tokens_alone(3)),
    "normed behind the transposition": (NORMED_ROPE, normed_layer(tokens_first=False), arguments(3)),
    "normed, weights in float32": (
        NORMED_ROPE, layer(norm=lambda x, weight: gpt_oss(x, None, weight.to(x.dtype))[0]), arguments(2, torch.float16),
    ),
    "normed, 1 + weight": (
        NORMED_ROPE, layer(norm=lambda x, weight: gemma(x, None, weight.to(x.dtype))[0]), arguments(),
    ),
    "attention, masked": (ATTENTION, attended(), masked()),
    "attention, no mask": (ATTENTION, attended(), arguments()),
    "attention, many tokens": (ATTENTION, attended(), masked(tokens=3)),
    "attention in float32": (ATTENTION, attended(rotate=hugging_face_in_float32), masked(dtype=torch.float32)),
    "attention, the first place": (ATTENTION, attended(), masked(first=0)),
    "attention, the last place": (ATTENTION, attended(), masked(first=LENGTH - 1)),
    "attention, counted from the end": (ATTENTION, attended(write=assigned), masked(first=-2)),
    "normed attention": (NORMED_ATTENTION, attended(normed_layer), masked()),
    "normed attention behind the transposition": (
        NORMED_ATTENTION, attended(normed_layer, tokens_first=False), masked(),
    ),
}  # fmt: skip


def explain(function: Any, *inputs: Tensor, device: str = "h200", **config: Any) -> Report:
    asked: dict[str, Any] = {"fuse_cached_attention": True, **config}
    return fuseplan.explain(function, *inputs, config=fuseplan.PassConfig(**asked), device=device)


def fused(report: Report) -> dict[str, int]:
    return {rule: count for rule, count in report.fused.items() if count}


def compiled(function: Layer, rule: str, reports: list[Report]) -> Callable[..., Any]:
    torch._dynamo.reset()
    config = fuseplan.PassConfig(policy=f"ordered({rule})")
    return fuseplan.compile(function, config=config, on_report=reports.append)


def check_close(found: Any, expected: Any, tolerance: float = 2**-7) -> None:
    for got, wanted in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_it_computes_and_caches_what_the_model_does(name: str) -> None:
    rule, function, given = LAYERS[name]
    reports: list[Report] = []
    expected = on_copies(function, given)
    with no_code():
        actual = on_copies(compiled(function, rule, reports), given)
    assert reports[0].fused == {rule: 1}
    assert not reports[0].warnings
    check_close(actual, expected, 2**-8 if rule in (ROPE, NORMED_ROPE) else 2**-7)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[pytest.mark.nightly] * (rule in (NORMED_ROPE, ATTENTION))) for rule in RULES]
)
def test_the_code_writes_to_the_caches_themselves(rule: str) -> None:
    """No copy of a cache is made, and whoever reads one afterwards reads what was written."""
    given, reports, function = GIVEN[rule](), list[Report](), MAKE[rule]()
    expected = on_copies(function, given)
    own = [each.clone() for each in given]
    pointers = [each.data_ptr() for each in own]
    with torch.inference_mode(), no_caches():
        actual, (code,) = run_and_get_code(compiled(function, rule, reports), *own)
    assert reports[0].fused == {rule: 1}
    check_close((actual, own), expected)
    assert [each.data_ptr() for each in own] == pointers
    lines = code.splitlines()
    (call,) = [line for line in lines if re.search(rf"torch\.ops\.fuseplan\.{OPS[rule]}_\.default\(", line)]
    assert len(re.findall(r"\barg\d+_1\b", call)) >= 3, call  # both caches, and the positions
    made = [line for line in lines if f"empty_strided_cpu(({2}, {K_HEADS}, {LENGTH}, {HEAD})" in line]
    # What stands for attention yields two tensors of a cache's size, and nothing else does.
    assert len(made) == (2 if rule in (ROPE, NORMED_ROPE) else 0)


@every_rule
def test_it_fires_once_a_layer(rule: str) -> None:
    one, n_layers = MAKE[rule](), 3

    def layers(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *rest: Tensor) -> Any:
        caches, mask = rest[: 2 * n_layers], rest[2 * n_layers :]
        for index in range(n_layers):
            found = one(q, k, v, *caches[2 * index : 2 * index + 2], cos, sin, positions, *mask)
            q, *read = (2 * found,) if isinstance(found, Tensor) else (found[0].transpose(1, 2), *found[1:])
            q = sum((each.mean() for each in read), q)
        return q

    q, k, v, *caches, cos, sin, positions = GIVEN[rule]()[:8]
    own = [each.clone() for _ in range(n_layers) for each in caches]
    given = (q, k, v, cos, sin, positions, *own, *GIVEN[rule]()[8:])
    report = explain(layers, *given)
    assert fused(report) == {rule: n_layers}
    assert {fusion.provider for fusion in report.graphs[0].applied} == {"triton"}
    for flag in FLAGS[rule]:
        switched_off: dict[str, Any] = {flag: False}
        off = explain(layers, *given, **switched_off)
        assert not off.fused.get(rule)
        disabled = [(miss.rule, miss.count) for miss in off.near_misses if miss.reason == "disabled"]
        assert (rule, n_layers) in disabled
        # With its own flag off nothing is missed but what it switches off.
        assert disabled == [(rule, n_layers)] or len(FLAGS[rule]) > 1
    assert fused(explain(layers, *given, forbid=[rule])) == dict.fromkeys(APART[rule], n_layers)


def test_what_is_returned_is_the_cache_itself() -> None:
    def function(*given: Tensor) -> tuple[Tensor, ...]:
        return layer()(*given)[0], given[3], given[4][:, :, 1:]

    own, reports = arguments(), list[Report]()
    with torch.inference_mode():
        _, cache, _ = compiled(function, ROPE, reports)(*own)
    assert reports[0].fused == {ROPE: 1}
    assert cache.data_ptr() == own[3].data_ptr()


@every_rule
@pytest.mark.parametrize("position", [LENGTH, -LENGTH - 1])
def test_a_cache_too_short_for_the_position_is_an_index_error(rule: str, position: int) -> None:
    own = arguments(first=position) if rule in (ROPE, NORMED_ROPE) else [*arguments(first=position), visible()]
    before = [each.clone() for each in own[3:5]]
    reports: list[Report] = []
    with no_code(), torch.inference_mode(), pytest.raises(IndexError, match=r"out of (range|bounds)"):
        compiled(MAKE[rule](write=assigned), rule, reports)(*own)
    assert reports[0].fused == {rule: 1}
    assert all(torch.equal(a, b) for a, b in zip(own[3:5], before, strict=True))


# What the rules refuse.


(WRITES, NORMED_WRITES, *_), (ATTENDS, *_) = CACHED_ROTARY_RULES, CACHED_ATTENTION_RULES


def bound(rule: Any, **changed: Any) -> Bindings:
    q, k, v, k_cache, v_cache, cos, sin, positions = arguments(1 if rule is ATTENDS else 3)
    given: dict[str, Any] = {
        **dict(zip("qkv", (each.transpose(1, 2) for each in (q, k, v)), strict=True)),
        "k_cache": k_cache, "v_cache": v_cache, "cos": cos[:, None], "sin": sin[:, None], "positions": positions,
        "rotary_rounding": "products",
    }  # fmt: skip
    if rule is ATTENDS:
        given |= {"mask": visible(), "scale": 0.25, "is_causal": False, "kernel": "cudnn"}
    return Bindings(rule.name, {**given, **changed})


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


REFUSED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "q": (WRITES, {"q": empty(2, 4, 3, 16, dtype=torch.float64)}, "dtype", "q is float64; supported"),
    "v": (WRITES, {"v": empty(2, 2, 3, 16, dtype=torch.float32)}, "dtype", "v is float32 and q is bfloat16; the"),
    "a cache": (
        WRITES, {"k_cache": empty(2, 2, 12, 16, dtype=torch.float16)}, "dtype", "k_cache is float16 and q is bf",
    ),
    "a weight": (
        NORMED_WRITES, {"q_weight": empty(16), "k_weight": empty(16, dtype=torch.float32)}, "dtype",
        "k_weight is float32 and q is bfloat16",
    ),
    "no batch": (WRITES, {"q": empty(4, 3, 16)}, "size", "numbers of tokens that are known when it is compiled"),
    "tokens": (WRITES, {"k": empty(2, 2, 4, 16)}, "size", "k is [2, 2, 4, 16], where q is [2, 4, 3, 16]"),
    "heads of values": (WRITES, {"v": empty(2, 3, 3, 16)}, "size", "the fused op takes [2, 2, 3, 16]"),
    "a short cache": (
        WRITES, {"k_cache": empty(2, 2, 2, 16), "v_cache": empty(2, 2, 2, 16)}, "size",
        "3 tokens are written into a cache of 2",
    ),
    "a cache of another length": (WRITES, {"v_cache": empty(2, 2, 11, 16)}, "size", "takes [2, 2, 12, 16]"),
    "places": (WRITES, {"positions": torch.arange(2)}, "size", "positions is [2]"),
    "gaps": (WRITES, {"v_cache": empty(2, 2, 12, 32)[..., :16]}, "layout", "v_cache has gaps or overlaps"),
    "an expanded cache": (
        WRITES, {"k_cache": empty(1, 2, 12, 16).expand(2, -1, -1, -1)}, "layout", "k_cache has gaps",
    ),
    "angles of each head": (WRITES, {"cos": empty(2, 4, 3, 16)}, "size", "the same for all of its heads"),
    "angles of other rows": (WRITES, {"cos": empty(3, 1, 3, 16)}, "size", "cos is [3, 1, 3, 16]"),
    "dtype of values": (
        ATTENDS, {"v": empty(2, 2, 1, 16, dtype=torch.float32)}, "dtype",
        "v is float32 and q is bfloat16; the fused op takes one dtype",
    ),
    "heads of attended values": (ATTENDS, {"v": empty(2, 3, 1, 16)}, "size", "the fused op takes [2, 2, 1, 16]"),
    "a mask": (ATTENDS, {"mask": empty(2, 1, 1, 11)}, "size", "attention reads 12 keys and a mask of 11"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    rule, changes, reason, detail = REFUSED[name]
    refusal = rule.check(bound(rule, **changes))
    assert refusal is not None
    assert refusal.reason.value == reason
    assert detail in refusal.detail


@pytest.mark.parametrize(("rule", "changes"), [(WRITES, {}), (ATTENDS, {}), (ATTENDS, {"mask": empty(2, 1, 1, 1)})])
def test_what_the_op_computes_is_not(rule: Any, changes: dict[str, Any]) -> None:
    assert rule.check(bound(rule, **changes)) is None


def q_read_too(*given: Tensor) -> Any:
    q, keys, values = layer(read=lambda cache: cache)(*given[:8])
    return attending(lambda *_: (q, keys, values))(*given), q * 2


MISSES: dict[str, tuple[Layer, str]] = {
    "the queries are read, too": (q_read_too, "is also read by aten.mul.Tensor"),
    "a mask of the keys": (
        attended(mix=lambda q, keys, values, mask: (q, keys, values, mask + keys[:, :1, :1, :1] * 0)), "also read by"
    ),
    "a part of the caches": (
        attended(mix=lambda q, keys, values, mask: (q, keys[:, :, :8], values[:, :, :8], mask[..., :8])),
        "aten.slice.Tensor",
    ),
    "queries are scaled": (attended(mix=lambda q, *rest: (q * 2, *rest)), "aten.mul.Tensor"),
    "keys for values": (attended(mix=lambda q, keys, values, mask: (q, values, keys, mask)), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MISSES))
def test_near_misses_of_attention_name_what_stands_in_the_way(name: str) -> None:
    function, detail = MISSES[name]
    report = explain(function, *masked())
    assert report.fused[ROPE] == 1
    assert not report.fused[ATTENTION]
    (row,) = [each for each in report.near_misses if each.rule in (ATTENTION, NORMED_ATTENTION)]
    assert row.rule == ATTENTION
    assert detail in row.detail, row.detail


def test_many_tokens_are_for_kernels_apart() -> None:
    report = explain(attended(), *masked(tokens=3))
    assert (report.fused[ROPE], report.fused["grouped_attention"], report.fused[ATTENTION]) == (1, 1, 0)
    (row,) = [each for each in report.near_misses if each.rule == ATTENTION]
    assert row.nearness is Nearness.DECLINED
    assert "the kernel takes one query token; q has 3" in row.detail


@pytest.mark.parametrize(
    ("function", "given", "silent"),
    [
        (layer(), arguments(), {NORMED_ROPE, "qk_norm_rope"}),
        (normed_layer(), arguments(), {ROPE}),
        *(
            (attended(inner), masked(), {*RULES, "grouped_attention"})
            for inner in (layer, normed_layer, partial(layer, rotate=hugging_face_in_float32))
        ),
    ],
    ids=["rope", "normed rope", "attention", "normed attention", "attention in float32"],
)
def test_what_is_there_or_is_not_there_has_nothing_to_say(
    function: Layer, given: list[Tensor], silent: set[str]
) -> None:
    assert not [row for row in near_misses(function, *given) if row.rule in silent]
