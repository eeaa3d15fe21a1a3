"""Attention that writes its token into the caches first, in one Triton kernel on a GPU, and in a CUDA graph. Skipped
without a GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.rules.parts.attention.op import exact_attention
from tests.helpers import randn

pytest.importorskip("fuseplan.providers.triton.cached_attention")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def drawn(
    batch: int, heads: int, shared: int, width: int, length: int, position: int, dtype: torch.dtype, *, norm: bool
) -> dict[str, Any]:
    """Arguments of the fused op, of which the mask shows all keys up to the position."""

    def random(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, seed=seed).cuda()

    q, k, v = (random(batch, 1, count, width, seed=count + i).transpose(1, 2) for i, count in enumerate(
        (heads, shared, shared)))  # fmt: skip
    caches = [random(batch, shared, length, width, seed=seed) for seed in (7, 8)]
    cos, sin = (random(1, 1, 1, width, seed=seed) for seed in (9, 10))
    weights = {f"{name}_weight": 1 + random(width, seed=11) / 8 for name in "qk"}
    seen = torch.arange(length, device="cuda") <= position
    mask = torch.where(seen, 0.0, -torch.inf).to(dtype).expand(batch, 1, 1, length)
    return {
        "q": q, "k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1], **(weights if norm else {}), "cos": cos,
        "sin": sin, "positions": torch.tensor([position], device="cuda"),
        **({"eps": 1e-6, "rounding": "llama"} if norm else {}), "rotary_rounding": "products", "mask": mask,
        "scale": width**-0.5, "is_causal": False, "kernel": "efficient",
    }  # fmt: skip


def exact(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(float64 attention over the caches, these) as the op that writes them leaves them."""
    op = ops.qk_norm_rope_cache if "eps" in given else ops.rope_cache
    q, *caches = op.reference(*(given[name] for name in op.arguments))
    k, v = caches
    y = exact_attention(q.double(), k.double(), v.double(), given["mask"].double(), given["scale"])
    return y, k, v


def run(given: dict[str, Any]) -> Tensor:
    op = ops.qk_norm_rope_cached_attention if "eps" in given else ops.rope_cached_attention
    result: Tensor = op.kernel("triton")(*(given[name] for name in op.arguments))
    return result


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "shared", "width"), [(32, 8, 128), (64, 8, 64), (8, 4, 256), (12, 4, 80), (70, 1, 96)]
)
@pytest.mark.parametrize(
    ("batch", "length", "position"), [(1, 1280, 1000), (8, 1280, 70), (32, 513, 512), (1, 8192, 2047), (64, 64, 0)]
)
def test_it_is_close_to_float64_and_caches_are_the_references(
    batch: int, length: int, position: int, heads: int, shared: int, width: int, dtype: torch.dtype, norm: bool
) -> None:
    """In one part and in several; what the caches held at the position, and hidden tiles, are read by nobody."""
    given = drawn(batch, heads, shared, width, length, position, dtype, norm=norm)
    wanted, *caches = exact(given)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        given[name][:, :, position] = torch.nan
        given[name][:, :, -(-(position + 1) // 128) * 128 :] = torch.nan
        cache[:, :, -(-(position + 1) // 128) * 128 :] = torch.nan
    again = {name: each.clone() if name.endswith("_cache") else each for name, each in given.items()}
    result = run(given)
    torch.testing.assert_close(result.double(), wanted, rtol=2**-7, atol=2**-8)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        # Sums of squares are added up in another order than the reference's.
        torch.testing.assert_close(given[name], cache, rtol=2**-7 * norm, atol=2**-7 * norm, equal_nan=True)
    assert torch.equal(run(again), result)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("batch", [1, 64])
def test_one_captured_graph_serves_growing_positions(batch: int, norm: bool) -> None:
    given = drawn(batch, 32, 8, 128, 1024, 0, torch.float16, norm=norm)
    given["mask"] = given["mask"].contiguous()
    first = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    run({**given, **first})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(given)
    for position in (0, 1, 62, 63, 64, 500, 1022, 1023):
        given["positions"].fill_(position)
        given["mask"][..., : position + 1] = 0.0
        given["k"].add_(0.125)
        wanted, *caches = exact(given)
        graph.replay()
        torch.testing.assert_close(result.double(), wanted, rtol=2**-8, atol=2**-9)
        for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
            torch.testing.assert_close(given[name], cache, rtol=2**-9 * norm, atol=2**-9 * norm)
