"""Unmodified Hugging Face models, compiled on the CPU with fuseplan beside plain `torch.compile`. Inductor makes code
of all of them at night; by day the graphs of two are interpreted, beside the models as they are, and
`test_static_cache` has code of one.

The models run on a gloo group of one rank, split by a tensor-parallel plan through hooks: their all-reduces are real,
so that there is something to fuse in a model that neither pads nor quantises. (transformers itself splits nothing over
one rank; `test_tensor_parallel` has it split over two.)
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

import fuseplan
from tests.interpreted import no_code
from tests.real_models.cases import CASES, LAYERS, ROUNDOFF, fused_calls, norms

STEPS = 3
BATCHES = dict.fromkeys(CASES, 1) | {"llama": 2, "mixtral": 2}
"""Each takes four compilations, so that each is tried on dense models and on ones with experts."""


SHARE_HEADS = {"gemma3", "llama", "mixtral", "phi3", "qwen3", "qwen3_moe"}
"""Models whose queries share heads of keys, and whose attention is torch's."""


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    world = dist.group.WORLD
    assert world is not None
    yield world
    dist.destroy_process_group()


def generate(forward: Callable[..., Any], model: Any, batch: int) -> list[Tensor]:
    """Logits of a prefill of 6 tokens and of two decode steps on a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = (torch.arange(batch * 8).reshape(batch, 8) * 7) % 128
    logits = []
    start = 0
    for step in ids.split([6, 1, 1], dim=1):
        positions = torch.arange(start, start + step.shape[1])
        mask = torch.ones(batch, start + step.shape[1], dtype=torch.long)
        everyone = positions[None].expand(batch, -1)
        out = forward(step, past_key_values=cache, position_ids=everyone, attention_mask=mask, use_cache=True)
        logits.append(out.logits.clone())
        start += step.shape[1]
    assert len(logits) == STEPS
    return logits


def without(model: Any, path: str, batch: int) -> list[Tensor]:
    """The same from a model that loses what one of its modules adds to the residual stream."""
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        return generate(model, model, batch)
    finally:
        hook.remove()


def distances(left: list[Tensor], right: list[Tensor]) -> list[float]:
    return [(a.float() - b.float()).abs().max().item() for a, b in zip(left, right, strict=True)]


BY_DAY = ("llama", "gpt_oss")
"""What others have, these have too, but for norms before the residual add, which `test_powers` has by day."""


def models() -> Iterator[Any]:
    """(name, whether code is made of it)."""
    for name in BY_DAY:
        yield pytest.param(name, False, id=name)
    for name in sorted(CASES):
        yield pytest.param(name, True, marks=pytest.mark.nightly, id=f"{name} coded")


@pytest.mark.parametrize(("name", "coded"), [*models()])
def test_fused_agrees_with_plain_compile(name: str, coded: bool, group: dist.ProcessGroup) -> None:
    case = CASES[name]
    model: Any = case.build(group)
    reports: list[fuseplan.Report] = []
    # Planned, but for the choice whether to fuse at all: the reference that runs here is slower than what it replaces.
    config = fuseplan.PassConfig(force=["allreduce_rms"])
    batch = BATCHES[name]
    with torch.inference_mode(), nullcontext() if coded else no_code():
        torch._dynamo.reset()
        expected = generate(torch.compile(model) if coded else model, model, batch)
        torch._dynamo.reset()
        fused = fuseplan.compile(model, config=config, on_report=reports.append)
        actual = generate(fused, model, batch)
        again, calls = fused_calls(lambda: generate(fused, model, batch))
        assert max(distances(again, actual)) == 0
        assert calls == {case.op: STEPS * 2 * LAYERS}

        assert len(reports) == 2, "prefill and decode are graphs of their own"
        for report in reports:
            assert report.policy == "planned"
            fusions = {"allreduce_rms": 2 * LAYERS} | ({"grouped_attention": LAYERS} if name in SHARE_HEADS else {})
            assert {rule: count for rule, count in report.fused.items() if count} == fusions
            assert norms(report.recognized) == case.norms

        # Inductor keeps in float32 what it computes in one kernel. A fused op rounds the reduced sum and the new
        # residual, which the plain graph may not: at most one rounding more at each of the 2 * LAYERS sites.
        bound = 2 * LAYERS * ROUNDOFF * max(logits.abs().max().item() for logits in expected)
        assert max(distances(actual, expected)) <= bound
        # That is tight enough to tell: what any one fused op adds to the residual stream moves every step by more.
        for layer in range(LAYERS):
            for path in ("self_attn.o_proj", case.last):
                lost = without(model, f"model.layers.{layer}.{path}", batch)
                assert min(distances(lost, actual)) > 2 * bound, f"{layer}.{path}"


IDS = (torch.arange(20).reshape(2, 10) * 7) % 128


def test_qk_norm_and_rotary_embedding_are_planned_once_a_layer() -> None:
    model = CASES["qwen3"].build(None).eval()
    report = fuseplan.explain(model, IDS, device="h200", use_cache=False)
    assert report.fused["qk_norm_rope"] == LAYERS
    fusions = [each for each in report.graphs[0].applied if each.rule == "qk_norm_rope"]
    assert [each.source for each in fusions] == [f"model.layers.{layer}.self_attn.q_norm" for layer in range(LAYERS)]
    assert {each.provider for each in fusions} == {"triton"}
    assert all(each.saving_ns and each.saving_ns > 0 for each in fusions)


def test_qk_norm_and_rotary_embedding_compute_what_the_model_does() -> None:
    model = CASES["qwen3"].build(None).eval()
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(policy="ordered(qk_norm_rope)")
    compiled = fuseplan.compile(model, config=config, on_report=reports.append)
    with torch.inference_mode(), no_code():
        expected = model(IDS, use_cache=False).logits
        compiled(IDS, use_cache=False)
        actual, calls = fused_calls(lambda: compiled(IDS, use_cache=False).logits)
    assert [report.fused for report in reports] == [{"qk_norm_rope": LAYERS}]
    assert not reports[0].warnings
    assert calls == {"qk_norm_rope": LAYERS}
    torch.testing.assert_close(actual, expected, rtol=0, atol=2**-7)
