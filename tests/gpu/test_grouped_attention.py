"""Attention over shared heads by each of torch's kernels, and a decode step in CUDA graphs. Skipped without a GPU."""

import contextlib

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel

import fuseplan
from fuseplan.rules.parts.attention.op import attention_reference
from fuseplan.verification.layout import significant_strides
from tests.attention import SPELLINGS, attend, hugging_face, inputs
from tests.gpu.decoding import LAYERS, built, check_steps
from tests.helpers import randn

launch = pytest.importorskip("fuseplan.providers.triton.attention").launch
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["sdpa", "sdpa_packed", "triton"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("keys", [32, 41])
def test_each_form_of_each_kernel_computes_what_repeated_heads_do(
    keys: int, kernel: str, form: str, dtype: torch.dtype
) -> None:
    if dtype is torch.float32 and (kernel != "efficient" or form == "triton"):
        pytest.skip("takes no float32")
    q, k, v, *mask = (each.cuda() for each in inputs(dtype=dtype, masked=kernel != "flash", keys=keys))
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(force=(f"grouped_attention:{form}",))
    refused = form == "sdpa" and kernel == "efficient" and torch.__version__ < "2.14"
    warns = pytest.warns(fuseplan.FuseplanWarning, match="selects no match") if refused else contextlib.nullcontext()
    # Which of torch's kernels is asked for isn't part of the key of torch's cache of graphs.
    with torch.inference_mode(), sdpa_kernel(KERNELS[kernel]), fresh_cache(), warns:
        torch._dynamo.reset()
        plain = torch.compile(attend(hugging_face))(q, k, v, *mask)
        torch._dynamo.reset()
        fused = fuseplan.compile(attend(hugging_face), config=config, on_report=reports.append)(q, k, v, *mask)
    wide = (each.double().cpu() for each in (q, k, v))
    exact = attend(hugging_face)(*wide, *(each.cpu() for each in mask))
    if refused:
        assert "sdpa" not in {f.provider for graph in reports[-1].graphs for f in graph.applied}
        return
    assert reports[-1].fused["grouped_attention"] == 1, reports[-1].warnings
    assert all(each.passed for graph in reports[-1].graphs for each in graph.verified)
    off, allowed = ((each.double().cpu() - exact).abs().max() for each in (fused, plain))
    assert off <= 2 * allowed + torch.finfo(dtype).eps
    assert significant_strides(fused) == significant_strides(plain)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("queries", [1, 5])
def test_every_spelling_is_planned_and_computes_the_same(spelling: str, queries: int) -> None:
    arguments = [each.cuda() for each in inputs(queries)]
    reports: list[fuseplan.Report] = []
    with torch.inference_mode(), fresh_cache():
        torch._dynamo.reset()
        plain = torch.compile(attend(SPELLINGS[spelling]))(*arguments)
        torch._dynamo.reset()
        fused = fuseplan.compile(attend(SPELLINGS[spelling]), on_report=reports.append)(*arguments)
    assert reports[-1].fused["grouped_attention"] == 1
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2)


HIDDEN = -torch.inf


@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize(
    ("heads", "shared", "width"), [(32, 8, 128), (64, 8, 64), (8, 4, 256), (12, 4, 80), (16, 1, 24)]
)
@pytest.mark.parametrize(("batch", "keys", "valid"), [(1, 1280, 1000), (8, 1280, 70), (32, 513, 512), (1, 8192, 2000)])
def test_split_keys_are_close_to_float64_and_what_is_masked_is_not_read(
    batch: int, keys: int, valid: int, heads: int, shared: int, width: int, queries: int
) -> None:
    q, k, v = (
        randn(batch, count, length, width, dtype=torch.bfloat16, seed=seed).cuda()
        for seed, (count, length) in enumerate([(heads, queries), (shared, keys), (shared, keys)])
    )
    last = torch.arange(valid - queries, valid, device="cuda")[:, None]
    seen = (torch.arange(keys, device="cuda") <= last)[None, None]
    mask = torch.where(seen, 0.0, HIDDEN).bfloat16().expand(batch, 1, queries, keys)
    exact = attention_reference(q.double(), k.double(), v.double(), mask.double(), 0.1, False, "efficient")
    whole_tiles = -(-valid // 128) * 128
    for each in (k, v):
        each[:, :, whole_tiles:] = torch.nan
    result = launch(q, k, v, mask, 0.1, "efficient")
    torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=2**-8)
    assert torch.equal(launch(q, k, v, mask, 0.1, "efficient"), result)


def test_one_captured_graph_of_split_keys_serves_all_lengths() -> None:
    q, k, v = (
        randn(4, *shape, 128, dtype=torch.float16, seed=seed).cuda()
        for seed, shape in enumerate([(32, 1), (8, 1024), (8, 1024)])
    )
    mask = torch.full((4, 1, 1, 1024), HIDDEN, dtype=torch.float16, device="cuda")
    mask[..., 0] = 0.0
    launch(q, k, v, mask, 0.1, "cudnn")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch(q, k, v, mask, 0.1, "cudnn")
    for valid in (1, 2, 63, 64, 65, 500, 1023, 1024):
        mask[..., :valid] = 0.0
        graph.replay()
        exact = attention_reference(q.double(), k.double(), v.double(), mask.double(), 0.1, False, "cudnn")
        torch.testing.assert_close(result.double(), exact, rtol=2**-9, atol=2**-10)


@pytest.mark.parametrize("rule", ["grouped_attention", "cached_attention"])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty", "ignore:TensorFloat32 tensor cores")
def test_a_step_in_cuda_graphs_follows_growing_caches_with_padding_at_the_left(rule: str) -> None:
    mask = torch.ones(3, 64, dtype=torch.long, device="cuda")
    mask[1, :3] = 0
    config = fuseplan.PassConfig(fuse_cached_attention=rule == "cached_attention")
    assert check_steps(built("llama"), config, mask).fused[rule] == LAYERS
