"""What rotation and writes into a cache cost: three kernels, or one; and what a fusion of the norms alone leaves."""

from dataclasses import replace

import pytest

from fuseplan.dialect.raising import canonicalize
from fuseplan.matching import find_matches
from fuseplan.planner.costs import HARDWARE, CostModel, Region
from fuseplan.providers import REFERENCE
from fuseplan.rules import by_name
from fuseplan.rules.families import find_sites
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES, CachedRotaryShape
from fuseplan.rules.parts.cached_rotary.traffic import CachedRegion
from fuseplan.rules.parts.rotary import Rotation
from fuseplan.rules.parts.traffic import total_ns
from tests.cached import BATCH, LENGTH, arguments, layer, normed_layer
from tests.helpers import quickly_traced
from tests.planner.parts import NORM
from tests.rotary import HEAD, K_HEADS, Q_HEADS

SIZES = CachedRegion(
    tokens=8, q_heads=32, heads=8, width=128, value_width=128, angles=256, itemsize=2, cache_bytes=2**24
)
HEAD_BYTES, ANGLES = 8 * 128 * 2, 8 * 256 * 2


@pytest.mark.parametrize("device", sorted(HARDWARE))
def test_one_kernel_in_place_of_three(device: str) -> None:
    hardware = HARDWARE[device]
    model = CostModel(hardware)
    q, k, v = SIZES.unfused(model)
    for kernel, nbytes in ((q, 64 * HEAD_BYTES + ANGLES), (k, 16 * HEAD_BYTES + ANGLES), (v, 16 * HEAD_BYTES)):
        assert kernel.launch == pytest.approx(hardware.launch.value, abs=1)
        assert kernel.memory == pytest.approx(hardware.memory_ns(nbytes), abs=1)
    (fused,) = SIZES.fused(model, eager=False)
    assert fused.launch == q.launch
    assert fused.memory == pytest.approx(hardware.memory_ns(96 * HEAD_BYTES + ANGLES), abs=1)
    # The reference copies both caches, and back.
    assert total_ns(SIZES.fused(model, eager=True)) > 2 * hardware.memory_ns(2 * SIZES.cache_bytes)
    assert total_ns(SIZES.fused(model, eager=True)) > total_ns(SIZES.unfused(model))


@pytest.mark.parametrize("device", sorted(HARDWARE))
def test_behind_a_fusion_of_the_norms_the_writes_are_kernels_of_their_own(device: str) -> None:
    model = CostModel(HARDWARE[device])
    tail = Rotation(q_heads=32, k_heads=8, angles=256, values=8 * 128, cache_bytes=2**24)
    region = Region(core=NORM, tokens=8 * 32, width=128, tail=tail)
    v = model.unfused(region)[2]
    assert v.memory == pytest.approx(model.hardware.memory_ns(16 * HEAD_BYTES), abs=1)
    keys, values = tail.behind(model, region)
    assert (keys, values) == (v, v)
    taken = replace(region, tail=replace(tail, writes=True))
    assert len(model.fused(taken, "triton")) == 1
    assert len(model.fused(taken, "torch")) == 2 * NORM.eager_kernels + Rotation.eager_kernels + 2


def test_a_site_is_the_rotation_with_its_writes() -> None:
    canonical = canonicalize(quickly_traced(layer(), *arguments(3)))
    (site,) = find_sites(canonical)
    shape = site.shape(BATCH * Q_HEADS * 3)
    assert isinstance(shape, CachedRotaryShape)
    assert shape.signature == f"cached_rotary {Q_HEADS}+{K_HEADS} heads {HEAD} bfloat16 products"
    assert shape.sizes == CachedRegion(
        tokens=BATCH * 3, q_heads=Q_HEADS, heads=K_HEADS, width=HEAD, value_width=HEAD, angles=2 * HEAD, itemsize=2,
        cache_bytes=2 * 2 * BATCH * K_HEADS * LENGTH * HEAD,
    )  # fmt: skip
    assert site.taken([site.core, *site.core.users]) is not None
    assert site.taken([*site.core.users]) is None
    others = [node for node in canonical.graph.nodes if node.op == "call_function"]
    assert site.taken(others) is None


@pytest.mark.parametrize("tokens_first", [True, False])
def test_behind_norms_the_site_is_the_queries_norm(tokens_first: bool) -> None:
    canonical = canonicalize(quickly_traced(normed_layer(tokens_first=tokens_first), *arguments(3)))
    q = next(site for site in find_sites(canonical) if site.tails)
    (tail,) = q.shape(BATCH * 3 * Q_HEADS).tails
    assert tail == Rotation(
        q_heads=Q_HEADS, k_heads=K_HEADS, angles=2 * HEAD, values=K_HEADS * HEAD,
        cache_bytes=2 * 2 * BATCH * K_HEADS * LENGTH * HEAD,
    )  # fmt: skip
    assert tail.text(HEAD) == f"rotary {Q_HEADS}+{K_HEADS} heads cached"
    (match,) = find_matches(canonical, by_name(CACHED_ROTARY_RULES), [REFERENCE]).candidates
    calls = match.consumed
    taken = q.taken(calls)
    assert taken is not None
    assert taken.tail == replace(tail, writes=True)
