"""The model split over ranks, and the graph that post-grad passes see of it: full width, symbolic tokens, one rank."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore

from fuseplan.workloads.models import GptOss, KVCache, Workload, shard_, workload
from tests.forks import Forks, Request
from tests.ranks import leave

ALL_REDUCE = "_c10d_functional.all_reduce.default"
WAIT = "_c10d_functional.wait_tensor.default"
PAD = "aten.constant_pad_nd.default"
FakeGroup = Callable[..., ProcessGroup]
TINY = workload("gpt-oss-120b-tiny")


@pytest.fixture
def fake_group() -> Iterator[FakeGroup]:
    """`fake_group(size, rank=0)`: a process group of which only this rank exists."""

    def start(size: int, rank: int = 0) -> ProcessGroup:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        world = dist.group.WORLD
        assert world is not None
        return world

    torch._dynamo.reset()
    yield start
    torch._dynamo.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("outer_reduce", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_building_split_equals_splitting_afterwards(fake_group: FakeGroup, rank: int, outer_reduce: bool) -> None:
    group = fake_group(2, rank)
    work = Workload(config=TINY.config, outer_reduce=outer_reduce)
    built, split = work.build(group), shard_(work.build(), group, outer_reduce=outer_reduce)
    assert str(built) == str(split)
    for (name, weight), (other, expected) in zip(built.state_dict().items(), split.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(weight, expected)
        assert weight.untyped_storage().nbytes() == weight.nbytes  # the whole is free to go


def test_all_ranks_together_hold_every_weight_once(fake_group: FakeGroup) -> None:
    size, whole = 4, dict(TINY.build().named_parameters())
    split = [dict(TINY.build(fake_group(size, rank)).named_parameters()) for rank in range(size)]
    names = "attention.qkv.weight", "attention.sinks", "experts.w13", "experts.b13", "experts.w2", "experts.b2"
    divided = {"embed.inner.weight": "embed.weight", "lm_head.inner.weight": "lm_head.weight"}
    for i in range(TINY.config.layers):
        divided |= {f"layers.{i}.{name}": f"layers.{i}.{name}" for name in names}
        for name in ("weight", "bias"):
            divided[f"layers.{i}.attention.o_proj.inner.{name}"] = f"layers.{i}.attention.o_proj.{name}"
    for name, source in divided.items():
        total = torch.stack([each[name].double().sum() for each in split]).sum()
        torch.testing.assert_close(total, whole[source].double().sum())


def test_a_group_of_one_changes_nothing(fake_group: FakeGroup) -> None:
    group = fake_group(1)
    assert str(shard_(TINY.build(), group)) == str(TINY.build(group)) == str(TINY.build())


def test_refusals(fake_group: FakeGroup) -> None:
    group = fake_group(2)
    with pytest.raises(ValueError, match="gpt-oss-120b-tiny is already split over a process group; build it anew"):
        shard_(TINY.build(group), group)
    with pytest.raises(ValueError, match="tp=3 does not divide 8 query heads of gpt-oss-120b-tiny; use one of 1, 2, 4"):
        TINY.build(fake_group(3))


def decode(model: GptOss, input_ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the prompt, and the tokens that greedy decoding adds."""
    prompt = input_ids.shape[1]
    cache = KVCache.empty(model, input_ids.shape[0], prompt + steps)
    logits = model(input_ids, cache=cache)
    tokens = [logits[:, -1:].argmax(-1)]
    for position in range(prompt, prompt + steps - 1):
        positions = torch.full((1, 1), position)
        tokens.append(model(tokens[-1], positions, cache).argmax(-1)[:, -1:])
    return logits, torch.cat(tokens, 1)


def compare_with_whole(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with torch.no_grad():
        (input_ids,) = TINY.example_inputs(sequence=12, batch=2)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
            expected, expected_tokens = decode(TINY.build(dtype=dtype), input_ids, steps=3)
            for name in (TINY.name, TINY.name + ":outer-reduce"):
                model = workload(name).build(dist.group.WORLD, dtype=dtype)
                logits, tokens = decode(model, input_ids, steps=3)
                torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
                assert torch.equal(tokens, expected_tokens)
    leave()


@pytest.mark.distributed
def test_two_ranks_compute_what_one_does(tmp_path: Path, forks: Forks) -> None:
    processes = [((str(rank), "2", str(tmp_path / "store")), dict[str, str]()) for rank in range(2)]
    outcomes = forks.outcomes(forks.start(Request(path=__file__, processes=processes)))
    assert [each.status for each in outcomes] == [0, 0], "\n".join(each.output[-4000:] for each in outcomes)


def trace(work: Workload, group: Any = None, tokens: int = 16) -> fx.Graph:
    """The functional graph at the custom post-grad hook, with a symbolic sequence length."""
    graphs: list[fx.Graph] = []

    def compile_nothing(gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        compile_fx._recursive_post_grad_passes(gm, is_inference=True)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(gm, inputs, inner_compile=compile_nothing)

    def hook(graph: fx.Graph) -> None:
        graphs.append(fx.Graph())
        graphs[-1].output(graphs[-1].graph_copy(graph, {}))

    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        model = work.build(group)
        (input_ids,) = work.example_inputs(tokens)
        torch._dynamo.mark_dynamic(input_ids, 1)  # an error if anything pins it
        with inductor_config.patch(post_grad_custom_post_pass=hook):
            logits: Tensor = torch.compile(model, backend=backend, fullgraph=True)(input_ids)
    assert logits.shape == (1, tokens, work.config.vocab)
    (graph,) = graphs
    return graph


def count(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("tp", [1, 8, *(pytest.param(tp, marks=pytest.mark.nightly) for tp in (2, 4))])
def test_gpt_oss_120b_traces_whole_at_full_width(fake_group: FakeGroup, tp: int) -> None:
    layers = 2
    found = count(trace(workload("gpt-oss-120b").with_layers(layers), fake_group(tp)))
    parallel = tp > 1
    assert found[ALL_REDUCE] == (layers + 1) * parallel  # behind o_proj, and behind the embedding
    assert found[WAIT] == (layers + 2) * parallel  # and behind the gathered logits
    assert found[PAD] == found["gpt_oss.experts.default"] == found["gpt_oss.attention.default"] == layers
    assert found["aten.rsqrt.default"] == 2 * layers + 1


def test_ranks_have_equal_graphs(fake_group: FakeGroup) -> None:
    """They differ in the rank, a constant, that the embedding compares with."""
    lines = [
        str(trace(workload("gpt-oss-20b-tiny").with_layers(1), fake_group(2, rank))).splitlines() for rank in (0, 1)
    ]
    assert len(lines[0]) == len(lines[1])
    differing = [(a, b) for a, b in zip(*lines, strict=True) if a != b]
    assert all("aten.ne.Scalar" in line for pair in differing for line in pair)
    assert len(differing) == 1


if __name__ == "__main__":
    compare_with_whole(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
