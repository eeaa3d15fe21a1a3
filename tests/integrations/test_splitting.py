"""How plans are read: whichever version of transformers wrote them, nothing in them is dropped without a word."""

from pathlib import Path
from typing import Any

import pytest

import fuseplan
from fuseplan.errors import WorkloadError
from fuseplan.integrations import splitting
from fuseplan.integrations import transformers as huggingface
from fuseplan.integrations.splitting import BasePlan
from fuseplan.workloads import catalog
from tests.integrations.planned import ranks, run
from tests.integrations.test_transformers import CONFIGS, SIZES, is_split_by_expert, save

SPAN = fuseplan.PassConfig(compile_ranges=[fuseplan.CompileRange(start=1, end=64)])
LLAMA4 = {**CONFIGS["llama4"], "moe_layers": []}


def read(**fields: Any) -> Any:
    return huggingface.config_from_dict(fields, "it")


def test_a_prefix_that_names_no_module_loses_no_key() -> None:
    """`Llama4ForCausalLM.base_model_prefix` is `language_model`, and its modules are under `model`."""
    with ranks(2) as group:
        for layers in ([], [1]):
            model, exchanged = run(read(**{**LLAMA4, "moe_layers": layers}), group)
            # Behind o_proj and behind the MLP; experts have a shared one, which is summed apart since 5.1.
            apart = len(layers) * ("layers.*.feed_forward" not in model.config.base_model_tp_plan)
            assert exchanged["all_reduce"] == 2 * 2 + apart
            assert splitting.unmatched_note(model) is None


def test_a_plan_of_the_embedding_alone_leaves_layers_to_the_plan_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPT-OSS has it since transformers 5.24."""
    if not is_split_by_expert():
        pytest.skip("this transformers splits GPT-OSS by another plan")
    whole = read(**CONFIGS["gpt_oss"])
    for plan, added in ((None, 0), ({"embed_tokens": "embedding_rowwise"}, 1)):
        monkeypatch.setattr(type(whole), "base_model_tp_plan", plan)
        config = read(**CONFIGS["gpt_oss"])
        with ranks(2) as group:
            _, exchanged = run(config, group)
        assert exchanged["all_reduce"] == config.num_hidden_layers + added
        note = splitting.plan_note(config)
        assert note is not None
        found = "a tp_plan for its embedding alone" if plan else "no tp_plan"
        assert note == f"gpt_oss has {found}, and is split by its ep_plan: experts alone, attention whole on every rank"


def test_a_plan_of_the_embedding_alone_says_that_layers_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Falcon H1 and Bamba have it since transformers 5.24."""
    monkeypatch.setattr(type(read(**CONFIGS["llama"])), "base_model_tp_plan", {"embed_tokens": "embedding_rowwise"})
    config = read(**CONFIGS["llama"])
    with ranks(2) as group:
        _, exchanged = run(config, group)
    assert exchanged["all_reduce"] == 1
    assert splitting.plan_note(config) == (
        "llama has a tp_plan for its embedding alone: its layers are whole on every rank"
    )


def test_a_plan_that_names_nothing_of_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(**CONFIGS["llama"])
    plan = {"blocks.*.q": "colwise", "blocks.*.o": "rowwise"}
    monkeypatch.setattr(type(config), "base_model_tp_plan", plan)
    with ranks(2) as group, pytest.raises(WorkloadError, match=r"doesn't have: model.blocks.\*.o, model.blocks.\*.q"):
        run(read(**CONFIGS["llama"]), group)


def test_a_key_of_a_users_plan_that_names_nothing_is_refused() -> None:
    with ranks(2) as group:
        model, _ = run(read(**CONFIGS["llama"]), None)
        plan = {"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.mlp.dwon_proj": "rowwise"}
        with pytest.raises(WorkloadError, match=r"doesn't have: model.layers.\*.mlp.dwon_proj; use --tp 1"):
            splitting.shard(model, group, "it", plan)
        with pytest.raises(WorkloadError, match="has the style 'diagonal'; supported are all_reduce, "):
            splitting.shard(model, group, "it", {"lm_head": "diagonal"})


def test_a_part_that_no_layer_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what other kinds of layers have in its place: an MLP beside experts."""
    with ranks(2) as group:
        model, _ = run(read(**CONFIGS["qwen3_moe"]), group)
        assert splitting.unmatched_note(model) is None
        config = read(**CONFIGS["llama"])
        plan = {**config.base_model_tp_plan, "layers.*.cross_attn.o_proj": "rowwise"}
        monkeypatch.setattr(type(config), "base_model_tp_plan", plan)
        model, _ = run(read(**CONFIGS["llama"]), group)
        assert splitting.unmatched_note(model) == (
            "LlamaForCausalLM has no module or parameter named model.layers.*.cross_attn.o_proj: its plan doesn't "
            "split them"
        )


def test_heads_that_are_gathered_may_be_any_number() -> None:
    """Phi 3 gathers queries, keys and values: each rank has all heads."""
    with ranks(8) as group:
        _, exchanged = run(read(**{**CONFIGS["phi3"], **SIZES}), group)
    assert exchanged["all_reduce"] == 4


def test_a_vocabulary_that_ranks_do_not_divide_is_padded() -> None:
    with ranks(3) as group:
        config = read(**{**CONFIGS["llama"], "hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 3})
        config.num_key_value_heads, config.vocab_size = 3, 97
        model, exchanged = run(config, group)
        assert model.lm_head.weight.shape[0] == 33
        assert exchanged["all_gather_into_tensor"] == 1


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gemma3", "gpt_oss"))]
)
def test_every_all_reduce_of_a_family_goes_into_a_norm(name: str, tmp_path: Path) -> None:
    if name == "gpt_oss" and not is_split_by_expert():
        pytest.skip("this transformers splits GPT-OSS by another plan, and its experts break the graph")
    path = save(tmp_path, **CONFIGS[name])
    with catalog.build(str(path), tp=2) as built:
        report = fuseplan.explain(built.model, *built.inputs, config=SPAN, device="h200")
    embedding = name == "gpt_oss" and bool(BasePlan.of(read(**CONFIGS[name])).tensors)
    reduced = (1 if name == "gpt_oss" else 2) * 2 + embedding
    assert {op: count for op, count in report.recognized.items() if "all_reduce" in op} == {"all_reduce[64]": reduced}
    assert report.fused["allreduce_rms"] == reduced
    assert report.breaks == ()
