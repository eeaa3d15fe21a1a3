"""Cache writes + attention of a decode step in one op, with QK norm and without: it fires, it is right, it writes in
place, it refuses by name, and off it isn't there.
"""

import re
from collections.abc import Callable
from functools import partial
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
from fuseplan.rules import Bindings, Rule
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.testing import check_rule
from tests.cached import LENGTH, WRITES, Layer, arguments, attending, layer, normed_layer, on_copies, visible
from tests.interpreted import no_code
from tests.matching.reported import near_misses
from tests.rotary import HEAD, K_HEADS, hugging_face_in_float32
from tests.rules.test_rules import arguments_of, rule_id

PLAIN, NORMED = "cached_attention", "qk_norm_cached_attention"
APART = {PLAIN: "rope_cache", NORMED: "qk_norm_rope_cache"}
FLAGS = ("fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")


def identity(x: Tensor) -> Tensor:
    return x


def attended(inner: Callable[..., Layer] = layer, write: str = "index_copy", mix: Any = None, **how: Any) -> Layer:
    changes = {} if mix is None else {"mix": mix}
    return attending(inner(WRITES[write], read=identity, **how), **changes)


def masked(*given: Any, first: int = 5, dtype: torch.dtype = torch.bfloat16, tokens: int = 1) -> list[Tensor]:
    return [*arguments(tokens, dtype, first=first), visible(first, tokens, dtype=dtype)]


LAYERS: dict[str, tuple[str, Layer, list[Tensor]]] = {
    "masked": (PLAIN, attended(), masked()),
    "no mask": (PLAIN, attended(), arguments()),
    "many tokens": (PLAIN, attended(), masked(tokens=3)),
    "in float32, narrow": (PLAIN, attended(rotate=hugging_face_in_float32), masked(dtype=torch.float16)),
    "float32": (PLAIN, attended(), masked(dtype=torch.float32)),
    "the first place": (PLAIN, attended(), masked(first=0)),
    "the last place": (PLAIN, attended(), masked(first=LENGTH - 1)),
    "counted from the end": (PLAIN, attended(write="assigned"), masked(first=-2)),
    "normed": (NORMED, attended(normed_layer), masked()),
    "normed, no mask": (NORMED, attended(normed_layer), arguments()),
    "normed behind the transposition": (NORMED, attended(normed_layer, tokens_first=False), masked()),
}


def explain(function: Any, *inputs: Tensor, **config: Any) -> Report:
    asked: dict[str, Any] = {"fuse_cached_attention": True, **config}
    return fuseplan.explain(function, *inputs, config=fuseplan.PassConfig(**asked), device="h200")


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
    for got, wanted in zip((actual, *written), (expected, *caches), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("rule", "inner"), [pytest.param(PLAIN, layer, marks=pytest.mark.nightly), (NORMED, normed_layer)]
)
def test_the_code_writes_to_the_caches_themselves(rule: str, inner: Callable[..., Layer]) -> None:
    """No copy of a cache is made, and whoever reads one afterwards reads what was written."""
    given, reports, function = masked(), list[Report](), attended(inner)
    expected, caches = on_copies(function, given)
    own = [each.clone() for each in given]
    pointers = [each.data_ptr() for each in own]
    with torch.inference_mode(), no_caches():
        actual, (code,) = run_and_get_code(compiled(function, rule, reports), *own)
    assert reports[0].fused == {rule: 1}
    for got, wanted in zip((actual, *own), (expected, *caches), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)
    assert [each.data_ptr() for each in own] == pointers
    op = "rope_cached_attention" if rule == PLAIN else "qk_norm_rope_cached_attention"
    (call,) = [line for line in code.splitlines() if re.search(rf"torch\.ops\.fuseplan\.{op}_\.default\(", line)]
    assert len(re.findall(r"\barg\d+_1\b", call)) >= 3, call  # both caches, and the positions
    assert f"empty_strided_cpu(({2}, {K_HEADS}, {LENGTH}, {HEAD})" not in code


@pytest.mark.parametrize(("rule", "inner"), [(PLAIN, layer), (NORMED, normed_layer)])
@pytest.mark.parametrize("n_layers", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_it_fires_once_a_layer(n_layers: int, rule: str, inner: Callable[..., Layer]) -> None:
    one = attended(inner)

    def layers(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *rest: Tensor) -> Any:
        *caches, mask = rest
        for index in range(n_layers):
            q = 2 * one(q, k, v, *caches[2 * index : 2 * index + 2], cos, sin, positions, mask)
        return q

    q, k, v, *caches, cos, sin, positions, mask = masked()
    own = [each.clone() for _ in range(n_layers) for each in caches]
    given = (q, k, v, cos, sin, positions, *own, mask)
    report = explain(layers, *given)
    assert {name: count for name, count in report.fused.items() if count} == {rule: n_layers}
    assert {fusion.provider for fusion in report.graphs[0].applied} == {"triton"}
    for flag in FLAGS:
        off = explain(layers, *given, **{flag: False})
        assert not off.fused.get(rule)
        assert (rule, n_layers) in [(m.rule, m.count) for m in off.near_misses if m.reason == "disabled"]
    apart = explain(layers, *given, forbid=[rule])
    assert {name: count for name, count in apart.fused.items() if count} == {
        APART[rule]: n_layers, "grouped_attention": n_layers
    }  # fmt: skip


def test_off_is_identity() -> None:
    given = masked()
    with no_code():
        expected, caches = on_copies(torch.compile(attended()), given)
        torch._dynamo.reset()
        off: dict[str, Any] = dict.fromkeys(FLAGS, False)
        plain = fuseplan.compile(attended(), config=fuseplan.PassConfig(**off))
        actual, written = on_copies(plain, given)
    for got, wanted in zip((actual, *written), (expected, *caches), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("rule", "inner"), [(PLAIN, layer), (NORMED, normed_layer)])
def test_it_saves_a_launch_beside_what_both_fusions_save(rule: str, inner: Callable[..., Layer]) -> None:
    joint, apart = (explain(attended(inner), *masked(), forbid=forbid) for forbid in ([], [rule]))
    (one,) = joint.graphs[0].applied
    both = apart.graphs[0].applied
    assert {each.rule for each in both} == {APART[rule], "grouped_attention"}
    assert one.saving_ns is not None
    more = one.saving_ns - sum(each.saving_ns or 0 for each in both)
    assert more == pytest.approx(HARDWARE["h200"].launch.value, rel=0.1)


@pytest.mark.parametrize("inner", [layer, normed_layer])
def test_without_a_gpu_it_is_left_apart(inner: Callable[..., Layer]) -> None:
    config = fuseplan.PassConfig(fuse_cached_attention=True)
    report = fuseplan.explain(attended(inner), *masked(), config=config, device="cpu")
    assert not report.fused[PLAIN]
    assert not report.fused[NORMED]


# Whoever reads a cache sees what they saw.


def reads_after(*given: Tensor) -> Any:
    return attended()(*given), given[3][:, :, 2:4] * 2, given[4].sum(), given[3] + given[4]


def returned(*given: Tensor) -> Any:
    return attended()(*given), given[3], given[4][:, :, 1:]


def writes_more_elsewhere(*given: Tensor) -> Any:
    y = attended()(*given)
    given[0].mul_(2)
    return y, given[0] + 1, given[3] + 1


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("function", [reads_after, returned, writes_more_elsewhere])
def test_readers_of_the_cache_see_what_they_saw(function: Layer, coded: bool) -> None:
    given, reports = masked(), list[Report]()
    expected, caches = on_copies(function, given)
    with no_caches() if coded else no_code():
        actual, written = on_copies(compiled(function, PLAIN, reports), given)
    assert reports[0].fused == {PLAIN: 1}
    for got, wanted in zip((*actual, *written), (*expected, *caches), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(("rule", "inner"), [(PLAIN, layer), (NORMED, normed_layer)])
@pytest.mark.parametrize("position", [LENGTH, -LENGTH - 1])
def test_a_cache_too_short_for_the_position_is_an_index_error(
    rule: str, inner: Callable[..., Layer], position: int
) -> None:
    own = [each.clone() for each in (*arguments(first=position), visible())]
    before = [each.clone() for each in own[3:5]]
    reports: list[Report] = []
    with no_code(), torch.inference_mode(), pytest.raises(IndexError, match=r"out of (range|bounds)"):
        compiled(attended(inner, "assigned"), rule, reports)(*own)
    assert reports[0].fused == {rule: 1}
    assert all(torch.equal(a, b) for a, b in zip(own[3:5], before, strict=True))


# What the rules refuse.


@pytest.mark.parametrize("rule", CACHED_ATTENTION_RULES, ids=rule_id)
def test_the_reference_holds_on_odd_sizes_and_layouts(rule: Rule) -> None:
    torch_alone = [each for each in BUILT_IN_PROVIDERS if each.name == "torch"]
    samples = arguments_of(rule, torch.device("cpu"))
    assert check_rule(rule, providers=torch_alone, samples=samples).cases["torch"] >= len(samples) + 3


def bound(**changed: Any) -> Bindings:
    q, k, v, k_cache, v_cache, cos, sin, positions, mask = masked()
    given = {
        **dict(zip("qkv", (each.transpose(1, 2) for each in (q, k, v)), strict=True)), "k_cache": k_cache,
        "v_cache": v_cache, "cos": cos[:, None], "sin": sin[:, None], "positions": positions,
        "rotary_rounding": "products", "mask": mask, "scale": 0.25, "is_causal": False, "kernel": "cudnn",
    }  # fmt: skip
    return Bindings(PLAIN, {**given, **changed})


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "dtype": ({"v": torch.empty(2, 2, 1, 16)}, "dtype", "v is float32 and q is bfloat16; the fused op takes one dtype"),
    "heads": ({"v": torch.empty(2, 3, 1, 16).bfloat16()}, "size", "the fused op takes [2, 2, 1, 16]"),
    "a mask": ({"mask": torch.zeros(2, 1, 1, 11)}, "size", "attention reads 12 keys and a mask of 11"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_op_does_not_compute_is_refused(name: str) -> None:
    rule, (changes, reason, detail) = CACHED_ATTENTION_RULES[0], REFUSED[name]
    assert rule.check(bound()) is None
    assert rule.check(bound(mask=torch.zeros(2, 1, 1, 1))) is None
    refusal = rule.check(bound(**changes))
    assert refusal is not None
    assert refusal.reason.value == reason
    assert detail in refusal.detail


def q_read_too(*given: Tensor) -> Any:
    q, keys, values = layer(read=identity)(*given[:8])
    return attending(lambda *_: (q, keys, values))(*given), q * 2


def repeated_read_too(*given: Tensor) -> Any:
    found: list[Tensor] = []

    def mix(q: Tensor, keys: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        found.append(keys * 2)
        return q, keys, *rest

    return attended(mix=mix)(*given), *found


def mask_of_keys(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Any, ...]:
    return q, keys, values, mask + keys[:, :1, :1, :1] * 0


def part(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Any, ...]:
    return q, keys[:, :, :8], values[:, :, :8], mask[..., :8]


def scaled(q: Tensor, *rest: Tensor) -> tuple[Any, ...]:
    return q * 2, *rest


def swapped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Any, ...]:
    return q, values, keys, mask


MISSES: dict[str, tuple[Layer, str]] = {
    "the queries are read, too": (q_read_too, "is also read by aten.mul.Tensor"),
    "repeated keys are read, too": (repeated_read_too, "is also read by aten.mul.Tensor"),
    "a mask of the keys": (attended(mix=mask_of_keys), "also read by"),
    "a part of the caches": (attended(mix=part), "aten.slice.Tensor"),
    "queries are scaled": (attended(mix=scaled), "aten.mul.Tensor"),
    "keys for values": (attended(mix=swapped), ""),
}


@pytest.mark.parametrize("name", sorted(MISSES))
def test_near_misses_name_what_stands_in_the_way(name: str) -> None:
    function, detail = MISSES[name]
    report = explain(function, *masked())
    assert report.fused["rope_cache"] == 1
    assert not report.fused[PLAIN]
    (row,) = [each for each in report.near_misses if each.rule in (PLAIN, NORMED)]
    assert row.rule == PLAIN
    assert detail in row.detail, row.detail


def test_many_tokens_are_for_kernels_apart() -> None:
    report = explain(attended(), *masked(tokens=3))
    assert (report.fused["rope_cache"], report.fused["grouped_attention"], report.fused[PLAIN]) == (1, 1, 0)
    (row,) = [each for each in report.near_misses if each.rule == PLAIN]
    assert row.nearness is Nearness.DECLINED
    assert "the kernel takes one query token; q has 3" in row.detail


@pytest.mark.parametrize("inner", [layer, normed_layer, partial(layer, rotate=hugging_face_in_float32)])
def test_what_is_there_or_is_not_there_has_nothing_to_say(inner: Callable[..., Layer]) -> None:
    silent = {"rope_cache", "qk_norm_rope_cache", "grouped_attention", PLAIN, NORMED}
    assert not [row for row in near_misses(attended(inner), *masked()) if row.rule in silent]
