"""Models split by their own `tp_plan` compute what the whole model computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fuseplan.errors import WorkloadError
from fuseplan.integrations import splitting
from fuseplan.integrations import transformers as huggingface
from fuseplan.integrations.splitting import BasePlan
from fuseplan.record.report import MOST_LAYERS
from tests.forks import Forks, Request
from tests.integrations.planned import ranks
from tests.ranks import leave

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 96}  # fmt: skip


def config_of(model_type: str, layers: int = 2, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_hidden_layers": layers, **SIZES, **fields}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": config_of("llama"),
    "qwen3": config_of("qwen3", head_dim=16),
    "mixtral": config_of("mixtral", num_local_experts=4),
    "phi3": config_of("phi3", pad_token_id=0),
    "qwen3_moe": config_of("qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "gpt_oss": config_of("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": {
        "model_type": "gemma3", "text_config": config_of("gemma3_text", head_dim=16), "vision_config": {},
    },
}  # fmt: skip
ENDS = {**SIZES, "vocab_size": 97, "tie_word_embeddings": True}
PLANS: dict[str, dict[str, str]] = {
    "rows of the embedding": {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"},
    "columns of the embedding": {"model.embed_tokens": "embedding_colwise", "lm_head": "colwise_rep"},
    "slices": {
        "model.layers.*.self_attn.q_proj": "colwise_gather_output",
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
        "model.layers.*.mlp.down_proj": "rowwise_rep",
        "model.layers.0.mlp.gate_proj": "colwise_rep",
        "model.layers.*.input_layernorm": "replicate",
    },
    "names of transformers 5.0": {
        "model.layers.*.self_attn.q_proj": "local_colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "local_rowwise",
        "model.layers.*.self_attn": "gather",
        "model.layers.*.mlp.gate": "ep_router",
        "model.layers.*.mlp.experts.gate_up_proj": "local_rowwise",
        "model.layers.*.mlp.experts.down_proj": "local_rowwise",
        "model.layers.*.mlp.experts": "gather",
    },
    "by expert": {
        "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
        "model.layers.*.mlp.experts": "moe_tp_experts",
    },
}
"""Of models that are split by another plan than their own."""

CONFIGS |= {
    "rows of the embedding": config_of("llama", 1, pad_token_id=96, **ENDS),
    "columns of the embedding": config_of("llama", 1, **ENDS),
    "slices": config_of("llama", attention_bias=True),
    "names of transformers 5.0": CONFIGS["mixtral"],
    "by expert": CONFIGS["mixtral"],
    "llama4": config_of(
        "llama4_text", head_dim=16, num_local_experts=2, num_experts_per_tok=1, moe_layers=[1],
        intermediate_size_mlp=128,
    ),
}  # fmt: skip


def _logits(name: str, group: dist.ProcessGroup | None) -> torch.Tensor:
    torch.manual_seed(0)
    config = huggingface.config_from_dict(CONFIGS[name], name)
    config.use_cache = False
    model = huggingface.build(config, None if name in PLANS else group, name, dtype=torch.float32)
    if name in PLANS and group is not None:
        splitting.shard(model, group, name, PLANS[name])
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


RANK = """
import sys
from tests.integrations.test_transformers import _rank
_rank(int(sys.argv[1]), *sys.argv[2:])
"""


def _rank(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    logits = {name: _logits(name, group) for name in CONFIGS}
    if rank == 0:
        torch.save(logits, results)
    leave()


@pytest.mark.distributed
def test_two_ranks_agree_with_one(forks: Forks, tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK, encoding="utf-8")
    arguments = [str(tmp_path / "store"), str(tmp_path / "logits.pt")]
    processes = [([str(rank), *arguments], dict[str, str]()) for rank in range(2)]
    outcomes = forks.outcomes(forks.start(Request(path=str(program), processes=processes)))
    assert [each.status for each in outcomes] == [0, 0], outcomes
    split = torch.load(tmp_path / "logits.pt")
    for name in CONFIGS:
        torch.testing.assert_close(split[name], _logits(name, None), rtol=1e-4, atol=1e-5)


def test_of_models_that_see_the_language_model_alone_is_built() -> None:
    config = huggingface.config_from_dict(CONFIGS["gemma3"], "gemma3")
    assert (config.model_type, config.num_hidden_layers) == ("gemma3_text", 2)


def is_split_by_expert() -> bool:
    """Whether this transformers splits GPT-OSS by expert, as it does since 5.4."""
    return bool(BasePlan.of(huggingface.config_from_dict(CONFIGS["gpt_oss"], "")).experts)


def test_a_model_without_a_tp_plan_is_split_by_its_ep_plan_and_says_so() -> None:
    if not is_split_by_expert():
        pytest.skip("this transformers splits GPT-OSS by another plan")
    assert splitting.plan_note(huggingface.config_from_dict(CONFIGS["qwen3_moe"], "")) is None
    note = splitting.plan_note(huggingface.config_from_dict(CONFIGS["gpt_oss"], ""))
    assert note is not None
    found, _, rest = note.partition(", and ")
    # Since 5.24 there is one for the embedding.
    assert found in ("gpt_oss has no tp_plan", "gpt_oss has a tp_plan for its embedding alone")
    assert rest == "is split by its ep_plan: experts alone, attention whole on every rank"


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


GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}


@pytest.mark.parametrize(
    ("config", "tp", "says"),
    [
        (CONFIGS["llama"], 3, "tp=3 does not divide the 4 num_attention_heads of it; use one of 1, 2, 4"),
        (CONFIGS["gpt_oss"], 3, r"tp=3 does not divide dimension 0 of gate_up_proj, \(4, 64, 256\)"),
        (GPT2, 2, "has no tp_plan; use --tp 1"),
    ],
    ids=["heads", "experts", "no plan"],
)
def test_what_can_not_be_split_is_refused(config: dict[str, Any], tp: int, says: str) -> None:
    if config is CONFIGS["gpt_oss"] and not is_split_by_expert():
        pytest.skip("this transformers splits GPT-OSS by another plan")
    with ranks(tp) as group, pytest.raises(WorkloadError, match=says):
        huggingface.build(huggingface.config_from_dict(config, "it"), group, "it")


def save(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("limit", [{"__float__": "Infinity"}, float("inf")])
@pytest.mark.parametrize("model_type", ["mamba2", "nemotron_h", "granitemoehybrid"])
def test_infinite_limits_are_read_as_transformers_writes_them(model_type: str, limit: object, tmp_path: Path) -> None:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this transformers doesn't know it")
    config = huggingface.load_config(save(tmp_path, model_type=model_type, time_step_limit=[0.0, limit]))
    assert list(config.time_step_limit) == [0.0, float("inf")]


LIMITS: dict[str, tuple[str, Callable[[int], dict[str, Any]], int]] = {
    "layers": ("gemma3_text", lambda count: {"num_hidden_layers": count}, MOST_LAYERS),
    "layers by another name": ("gpt_neo", lambda count: {"num_layers": count}, MOST_LAYERS),
    "layers of the language model": (
        "gemma3", lambda count: {"text_config": {"num_hidden_layers": count}}, MOST_LAYERS,
    ),
    "layers that predict": ("deepseek_v3", lambda count: {"num_nextn_predict_layers": count}, MOST_LAYERS),
    "layers as a float": ("llama", lambda count: {"num_hidden_layers": float(count)}, MOST_LAYERS),
    "depths": ("llama", lambda count: {"depths": [2, count]}, MOST_LAYERS),
    "labels": ("llama", lambda count: {"num_labels": count}, huggingface.MOST_COUNTED),
    "repetitions": (
        "gpt_neo", lambda count: {"attention_types": [[["global", "local"], count]]}, huggingface.MOST_COUNTED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_numbers_are_refused_before_transformers_counts_to_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, fields, most = LIMITS[name]
    asked: list[object] = []

    def read(kind: object, found: object) -> None:
        asked.append(found)
        raise WorkloadError("asked")

    monkeypatch.setattr(huggingface, "_read", read)
    with pytest.raises(WorkloadError, match="asked"):
        huggingface.load_config(save(tmp_path, model_type=model_type, **fields(most)))
    assert len(asked) == 1
    with pytest.raises(WorkloadError, match=rf"{most + 1}.*; allowed are at most {most}"):
        huggingface.load_config(save(tmp_path, model_type=model_type, **fields(most + 1)))
    assert len(asked) == 1


def test_sizes_may_be_larger_than_any_count(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 2**21,
        "max_position_embeddings": 10 * 2**20,
        "rope_theta": 80_000_000,
        "pad_token_id": 2**21,
    }
    assert huggingface.load_config(save(tmp_path, model_type="llama", **sizes)).vocab_size == 2**21


def test_the_most_layers_are_read_in_no_time(tmp_path: Path) -> None:
    config = huggingface.load_config(save(tmp_path, model_type="gemma3_text", num_hidden_layers=MOST_LAYERS))
    assert len(config.layer_types) == MOST_LAYERS
