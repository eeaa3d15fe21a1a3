"""Models split by their own `tp_plan` compute what the whole model computes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fuseplan.errors import WorkloadError
from fuseplan.integrations import transformers as huggingface
from tests.ranks import leave

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 2, **SIZES},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16, **SIZES},
    "mixtral": {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, **SIZES},
    "phi3": {"model_type": "phi3", "num_hidden_layers": 2, "pad_token_id": 0, **SIZES},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        **SIZES,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **SIZES,
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2, "head_dim": 16, **SIZES},
        "vision_config": {},
    },
}


def _logits(name: str, group: dist.ProcessGroup | None) -> torch.Tensor:
    torch.manual_seed(0)
    config = huggingface.config_from_dict(CONFIGS[name], name)
    config.use_cache = False
    model = huggingface.build(config, group, name, dtype=torch.float32)
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def _rank(rank: int, store: str, results: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    logits = {name: _logits(name, group) for name in CONFIGS}
    if rank == 0:
        torch.save(logits, results)
    leave()


@pytest.mark.distributed
def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"), str(tmp_path / "logits.pt"))
    mp.spawn(_rank, args=arguments, nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    split = torch.load(tmp_path / "logits.pt")
    for name in CONFIGS:
        torch.testing.assert_close(split[name], _logits(name, None), rtol=1e-4, atol=1e-5)


def test_heads_must_divide() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        with pytest.raises(
            WorkloadError, match="tp=3 does not divide the 4 num_attention_heads of llama; use one of 1, 2, 4"
        ):
            huggingface.build(huggingface.config_from_dict(CONFIGS["llama"], "llama"), dist.group.WORLD, "llama")
    finally:
        dist.destroy_process_group()


def test_of_models_that_see_the_language_model_alone_is_built() -> None:
    config = huggingface.config_from_dict(CONFIGS["gemma3"], "gemma3")
    assert (config.model_type, config.num_hidden_layers) == ("gemma3_text", 2)


def test_a_model_without_a_tp_plan_is_split_by_its_ep_plan_and_says_so() -> None:
    assert huggingface.plan_note(huggingface.config_from_dict(CONFIGS["qwen3_moe"], "")) is None
    note = huggingface.plan_note(huggingface.config_from_dict(CONFIGS["gpt_oss"], ""))
    assert note == "gpt_oss has no tp_plan, and is split by its ep_plan: experts alone, attention whole on every rank"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba"])
def test_layers_are_cut_and_grown(model_type: str) -> None:
    """Gemma 3 has kinds of layers, and Mamba works its kind out from how many there are."""
    for layers in (1, 40):
        config = huggingface.config_from_dict({"model_type": model_type, **SIZES}, "")
        kinds = getattr(config, "layer_types", None)
        huggingface.with_layers(config, layers, "")
        assert config.num_hidden_layers == layers
        if kinds is not None:
            shared = min(layers, len(kinds))
            assert len(config.layer_types) == layers
            assert config.layer_types[:shared] == kinds[:shared]


def test_experts_must_divide() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        with pytest.raises(WorkloadError, match=r"tp=3 does not divide dimension 0 of gate_up_proj, \(4, 64, 256\)"):
            huggingface.build(huggingface.config_from_dict(CONFIGS["gpt_oss"], ""), dist.group.WORLD, "gpt_oss")
    finally:
        dist.destroy_process_group()


def test_models_without_a_plan_are_refused_by_name() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = huggingface.config_from_dict({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}, "gpt2")
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(WorkloadError, match="has no tp_plan; use --tp 1"):
            huggingface.build(config, dist.group.WORLD, "gpt2")
    finally:
        dist.destroy_process_group()
