from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fuseplan.workloads.models import GptOss, KVCache, Workload, shard_, workload
from tests.forks import Forks, Request
from tests.ranks import leave
from tests.workloads.models.conftest import FakeGroup

TINY = workload("gpt-oss-120b-tiny")


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
    size, whole = 4, TINY.build()
    split = [TINY.build(fake_group(size, rank)) for rank in range(size)]

    def total(name: str) -> torch.Tensor:
        return torch.stack([dict(model.named_parameters())[name].double().sum() for model in split]).sum()

    divided = {"embed.inner.weight": "embed.weight", "lm_head.inner.weight": "lm_head.weight"}
    for i in range(TINY.config.layers):
        for name in (
            "attention.qkv.weight",
            "attention.sinks",
            "experts.w13",
            "experts.b13",
            "experts.w2",
            "experts.b2",
        ):
            divided[f"layers.{i}.{name}"] = f"layers.{i}.{name}"
        for name in ("weight", "bias"):
            divided[f"layers.{i}.attention.o_proj.inner.{name}"] = f"layers.{i}.attention.o_proj.{name}"
    for name, source in divided.items():
        torch.testing.assert_close(total(name), dict(whole.named_parameters())[source].double().sum())


def test_meta_weights_can_be_split(fake_group: FakeGroup) -> None:
    with torch.device("meta"):
        model = TINY.build(fake_group(4))
    assert {weight.device.type for weight in model.state_dict().values()} == {"meta"}
    assert model.blocks[0].attention.kv_heads == 1


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


if __name__ == "__main__":
    compare_with_whole(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
