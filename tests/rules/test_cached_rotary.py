"""Rotary embedding + writes into a static cache, with QK norm and without: it fires, it is right, it writes in place,
it refuses by name, and off it isn't there.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fuseplan
from fuseplan.explanation.capture import no_caches
from fuseplan.planner.costs import HARDWARE
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.record import Nearness, Report
from fuseplan.rules import Bindings
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES, CachedRule
from fuseplan.testing import check_rule
from tests.cached import LENGTH, WRITES, Layer, arguments, layer, normed_layer, on_copies
from tests.helpers import gemma, gpt_oss
from tests.interpreted import no_code
from tests.matching.reported import near_misses
from tests.rotary import HEAD, K_HEADS, Q_HEADS, broadcast, hugging_face_in_float32, normed
from tests.rules.test_rules import arguments_of

PLAIN, NORMED = "rope_cache", "qk_norm_rope_cache"


def of_tokens_alone(tokens: int) -> list[Tensor]:
    """Arguments whose cosines and sines are [S, D]."""
    *given, cos, sin, positions = arguments(tokens)
    return [*given, cos[0], sin[0], positions]


LAYERS: dict[str, tuple[str, Layer, list[Tensor]]] = {
    "index_copy": (PLAIN, layer(), arguments()),
    "assigned, many tokens": (PLAIN, layer(WRITES["assigned"]), arguments(3)),
    "in float32, narrow values": (
        PLAIN, layer(rotate=hugging_face_in_float32), arguments(2, torch.float16, value_width=8),
    ),
    "as many heads": (PLAIN, layer(), arguments(k_heads=Q_HEADS)),
    "the last place": (PLAIN, layer(), arguments(first=LENGTH - 1)),
    "counted from the end": (PLAIN, layer(WRITES["assigned"]), arguments(2, first=-2)),
    "all of the cache": (PLAIN, layer(), arguments(LENGTH, first=0)),
    "normed": (NORMED, normed_layer(), arguments()),
    "angles of tokens alone": (PLAIN, layer(rotate=broadcast), of_tokens_alone(3)),
    "normed, angles of tokens alone": (NORMED, normed_layer(rotate=broadcast), of_tokens_alone(3)),
    "normed, many tokens": (NORMED, normed_layer(), arguments(3)),
    "normed behind the transposition": (NORMED, normed_layer(tokens_first=False), arguments(3)),
    "normed, weights in float32": (
        NORMED, layer(norm=lambda x, weight: gpt_oss(x, None, weight.to(x.dtype))[0]), arguments(2, torch.float16),
    ),
    "normed, 1 + weight": (NORMED, layer(norm=lambda x, weight: gemma(x, None, weight.to(x.dtype))[0]), arguments()),
}  # fmt: skip


def explain(function: Any, *inputs: Tensor, **config: Any) -> Report:
    return fuseplan.explain(function, *inputs, config=fuseplan.PassConfig(**config), device="h200")


def compiled(function: Layer, rule: str, reports: list[Report]) -> Callable[..., Any]:
    torch._dynamo.reset()
    config = fuseplan.PassConfig(policy=f"ordered({rule})")
    return fuseplan.compile(function, config=config, on_report=reports.append)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_it_computes_and_caches_what_the_model_does(name: str) -> None:
    rule, function, given = LAYERS[name]
    reports: list[Report] = []
    expected, caches = on_copies(function, given)
    with no_code():
        actual, written = on_copies(compiled(function, rule, reports), given)
    assert reports[0].fused == {rule: 1}
    assert not reports[0].warnings
    for got, wanted in zip((*actual, *written), (*expected, *caches), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("rule", "function"), [(PLAIN, layer()), pytest.param(NORMED, normed_layer(), marks=pytest.mark.nightly)]
)
def test_the_code_writes_to_the_caches_themselves(rule: str, function: Layer) -> None:
    """No copy of a cache is made, and whoever reads one afterwards reads what was written."""
    given, reports = arguments(), list[Report]()
    expected, caches = on_copies(function, given)
    own = [each.clone() for each in given]
    pointers = [each.data_ptr() for each in own]
    with torch.inference_mode(), no_caches():
        actual, (code,) = run_and_get_code(compiled(function, rule, reports), *own)
    assert reports[0].fused == {rule: 1}
    for got, wanted in zip((*actual, *own), (*expected, *caches), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)
    assert [each.data_ptr() for each in own] == pointers
    (call,) = [line for line in code.splitlines() if re.search(rf"torch\.ops\.fuseplan\.{rule}_\.default\(", line)]
    assert len(re.findall(r"\barg\d+_1\b", call)) >= 3, call  # both caches, and the positions
    shape = f"({2}, {K_HEADS}, {LENGTH}, {HEAD})"
    made = [line.split(" = ")[0].strip() for line in code.splitlines() if f"empty_strided_cpu({shape}" in line]
    assert len(made) == 2, "what stands for attention yields two tensors of a cache's size, and nothing else does"


@pytest.mark.parametrize(("rule", "make"), [(PLAIN, layer), (NORMED, normed_layer)])
@pytest.mark.parametrize("n_layers", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_it_fires_once_a_layer(n_layers: int, rule: str, make: Callable[..., Layer]) -> None:
    one = make()

    def layers(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *caches: Tensor) -> Any:
        for index in range(n_layers):
            q, keys, values = one(q, k, v, *caches[2 * index : 2 * index + 2], cos, sin, positions)
            q = q.transpose(1, 2) + keys.mean() + values.mean()
        return q

    q, k, v, *caches, cos, sin, positions = arguments()
    own = [each.clone() for _ in range(n_layers) for each in caches]
    given = (q, k, v, cos, sin, positions, *own)
    report = explain(layers, *given)
    assert report.fused[rule] == n_layers
    assert {fusion.provider for fusion in report.graphs[0].applied} == {"triton"}
    off = explain(layers, *given, fuse_rope_cache=False)
    assert {PLAIN, NORMED}.isdisjoint(off.fused)
    # With the flag off nothing is missed but what it switches off.
    disabled = [(miss.rule, miss.count) for miss in off.near_misses if miss.reason == "disabled"]
    assert disabled == [(rule, n_layers)]
    assert explain(layers, *given, forbid=[rule]).fused[rule] == 0


def test_off_is_identity() -> None:
    given = arguments()
    with no_code():
        expected, caches = on_copies(torch.compile(layer()), given)
        torch._dynamo.reset()
        plain = fuseplan.compile(layer(), config=fuseplan.PassConfig(fuse_rope_cache=False))
        actual, written = on_copies(plain, given)
    for got, wanted in zip((*actual, *written), (*expected, *caches), strict=True):
        assert torch.equal(got, wanted)


def test_norms_contend_and_the_joint_plan_takes_the_writes_along() -> None:
    report = explain(normed_layer(), *arguments())
    assert (report.fused[NORMED], report.fused["qk_norm_rope"]) == (1, 0)
    apart = explain(normed_layer(), *arguments(), forbid=[NORMED])
    assert apart.fused["qk_norm_rope"] == 1
    # Behind it the writes are two kernels of their own, so it is worth two launches less.
    joint, alone = (each.graphs[0].applied[0].saving_ns for each in (report, apart))
    assert joint is not None
    assert alone is not None
    assert joint - alone == pytest.approx(2 * HARDWARE["h200"].launch.value, rel=0.1)


@pytest.mark.parametrize("function", [layer(), normed_layer()])
def test_without_a_gpu_nothing_is_fused(function: Layer) -> None:
    report = fuseplan.explain(function, *arguments(), device="cpu")
    assert not any(report.fused.values())


# Whoever reads a cache sees what they saw.


def reads_after(*given: Tensor) -> Any:
    q, *_ = layer()(*given)
    return q, given[3][:, :, 2:4] * 2, given[4].sum(), given[3] + given[4]


def returned(*given: Tensor) -> Any:
    q, *_ = layer()(*given)
    return q, given[3], given[4][:, :, 1:]


def views_after(*given: Tensor) -> Any:
    q, *_ = layer()(*given)
    view = given[3].view(-1)
    return q, view[3:7], given[4].transpose(1, 2).reshape(-1)


def writes_more_elsewhere(*given: Tensor) -> Any:
    q, *_ = layer()(*given)
    given[0].mul_(2)
    return q, given[0] + 1, given[3] + 1


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("function", [reads_after, returned, views_after, writes_more_elsewhere])
def test_readers_of_the_cache_see_what_they_saw(function: Layer, coded: bool) -> None:
    given, reports = arguments(2), list[Report]()
    expected, caches = on_copies(function, given)
    with no_caches() if coded else no_code():
        actual, written = on_copies(compiled(function, PLAIN, reports), given)
    assert reports[0].fused == {PLAIN: 1}
    for got, wanted in zip((*actual, *written), (*expected, *caches), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)


def test_what_is_returned_is_the_cache_itself() -> None:
    given, reports = arguments(), list[Report]()
    own = [each.clone() for each in given]
    with torch.inference_mode():
        _, cache, _ = compiled(returned, PLAIN, reports)(*own)
    assert reports[0].fused == {PLAIN: 1}
    assert cache.data_ptr() == own[3].data_ptr()


@pytest.mark.parametrize("rule", [PLAIN, NORMED])
@pytest.mark.parametrize("position", [LENGTH, -LENGTH - 1])
def test_a_cache_too_short_for_the_position_is_an_index_error(rule: str, position: int) -> None:
    function = layer(WRITES["assigned"]) if rule == PLAIN else normed_layer(WRITES["assigned"])
    own = [each.clone() for each in arguments(first=position)]
    before = [each.clone() for each in own[3:5]]
    reports: list[Report] = []
    with no_code(), torch.inference_mode(), pytest.raises(IndexError, match=r"out of (range|bounds)"):
        compiled(function, rule, reports)(*own)
    assert reports[0].fused == {rule: 1}
    assert all(torch.equal(a, b) for a, b in zip(own[3:5], before, strict=True))


# What the rules refuse.


@pytest.mark.parametrize("rule", CACHED_ROTARY_RULES, ids=lambda rule: f"{rule.name} {getattr(rule, 'transposes', '')}")
def test_the_reference_holds_in_float16_on_odd_sizes_and_layouts(rule: CachedRule) -> None:
    torch_alone = [each for each in BUILT_IN_PROVIDERS if each.name == "torch"]
    samples = [_in(torch.float16, each) for each in arguments_of(rule, torch.device("cpu"))]
    assert check_rule(rule, providers=torch_alone, samples=samples).cases["torch"] >= len(samples) + 8


def _in(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def bound(**changed: Any) -> Bindings:
    q, k, v, k_cache, v_cache, cos, sin, positions = arguments(3)
    given = {
        **dict(zip("qkv", (each.transpose(1, 2) for each in (q, k, v)), strict=True)),
        "k_cache": k_cache, "v_cache": v_cache, "cos": cos[:, None], "sin": sin[:, None], "positions": positions,
        "rotary_rounding": "products",
    }  # fmt: skip
    return Bindings(PLAIN, {**given, **changed})


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "q": ({"q": empty(2, 4, 3, 16, dtype=torch.float64)}, "dtype", "q is float64; supported"),
    "v": ({"v": empty(2, 2, 3, 16, dtype=torch.float32)}, "dtype", "v is float32 and q is bfloat16; the fused op"),
    "a cache": ({"k_cache": empty(2, 2, 12, 16, dtype=torch.float16)}, "dtype", "k_cache is float16 and q is bf"),
    "no batch": ({"q": empty(4, 3, 16)}, "size", "numbers of tokens that are known when it is compiled"),
    "tokens": ({"k": empty(2, 2, 4, 16)}, "size", "k is [2, 2, 4, 16], where q is [2, 4, 3, 16]"),
    "heads of values": ({"v": empty(2, 3, 3, 16)}, "size", "the fused op takes [2, 2, 3, 16]"),
    "a short cache": (
        {"k_cache": empty(2, 2, 2, 16), "v_cache": empty(2, 2, 2, 16)}, "size",
        "3 tokens are written into a cache of 2",
    ),
    "a cache of another length": ({"v_cache": empty(2, 2, 11, 16)}, "size", "takes [2, 2, 12, 16]"),
    "places": ({"positions": torch.arange(2)}, "size", "positions is [2]"),
    "gaps": ({"v_cache": empty(2, 2, 12, 32)[..., :16]}, "layout", "v_cache has gaps or overlaps"),
    "an expanded cache": ({"k_cache": empty(1, 2, 12, 16).expand(2, -1, -1, -1)}, "layout", "k_cache has gaps or"),
    "angles of each head": ({"cos": empty(2, 4, 3, 16)}, "size", "the same for all of its heads"),
    "angles of other rows": ({"cos": empty(3, 1, 3, 16)}, "size", "cos is [3, 1, 3, 16]"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    rule, (changes, reason, detail) = CACHED_ROTARY_RULES[0], REFUSED[name]
    assert rule.check(bound()) is None
    refusal = rule.check(bound(**changes))
    assert refusal is not None
    assert refusal.reason.value == reason
    assert detail in refusal.detail


def test_weights_of_another_dtype_are_refused() -> None:
    weights = {"q_weight": empty(16), "k_weight": empty(16, dtype=torch.float32)}
    refusal = CACHED_ROTARY_RULES[1].check(bound(**weights))
    assert refusal is not None
    assert "k_weight is float32 and q is bfloat16" in refusal.detail


def test_a_number_of_tokens_that_is_not_known_is_refused() -> None:
    given = arguments(5)
    for index in (0, 1, 2, 5, 6):
        torch._dynamo.mark_dynamic(given[index], 1)
    torch._dynamo.mark_dynamic(given[7], 0)
    (row,) = near_misses(layer(), *given, rule=PLAIN)
    assert (row.nearness, row.reason) == (Nearness.REFUSED, "size")
    assert "known when it is compiled" in row.detail


def grows(*given: Tensor) -> Any:
    def append(cache: Tensor, positions: Tensor, x: Tensor) -> None:
        grown.append(torch.cat((cache, x), dim=-2))

    grown: list[Tensor] = []
    return layer(append)(*given)[0], *grown


def read_before(*given: Tensor) -> Any:
    return given[3] * 2, *layer()(*given)


def normed_and_read_before(*given: Tensor) -> Any:
    return given[3] * 2, *normed_layer()(*given)


def keys_alone_normed(*given: Tensor) -> Any:
    return layer(norm=lambda x, weight: normed(x, weight) if x.shape[2] == K_HEADS else x)(*given)


MISSES: dict[str, tuple[str, Layer, str]] = {
    "a cache that grows": (PLAIN, grows, "keys are appended to a cache that grows"),
    "read before": (PLAIN, read_before, "write into a cache not recognised: the cache as it is before is also read"),
    "normed and read before": (NORMED, normed_and_read_before, "write into a cache not recognised: the cache as it"),
}


@pytest.mark.parametrize("name", sorted(MISSES))
def test_near_misses_name_what_stands_in_the_way(name: str) -> None:
    rule, function, detail = MISSES[name]
    rows = [row for row in near_misses(function, *arguments()) if row.rule in (PLAIN, NORMED)]
    assert [row.rule for row in rows] == [rule]
    assert rows[0].detail.startswith(detail) or detail in rows[0].detail


@pytest.mark.parametrize(("function", "silent"), [(layer(), {NORMED, "qk_norm_rope"}), (normed_layer(), {PLAIN})])
def test_what_is_not_there_has_nothing_to_say(function: Layer, silent: set[str]) -> None:
    assert not [row for row in near_misses(function, *arguments()) if row.rule in silent]
