"""How plans are read: whichever version of transformers wrote them, nothing in them is dropped without a word."""

from collections import Counter
from collections.abc import Callable
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


def split(count: int = 2, **fields: Any) -> tuple[Any, Counter[str]]:
    """A model over so many ranks, and what these exchange."""
    with ranks(count) as group:
        return run(read(**fields), group)


Plan = Callable[[str, dict[str, str] | None], dict[str, Any]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """`planned(name, plan)`: the configuration of a model that brings another plan."""

    def change(name: str, plan: dict[str, str] | None) -> dict[str, Any]:
        monkeypatch.setattr(type(read(**CONFIGS[name])), "base_model_tp_plan", plan)
        return CONFIGS[name]

    return change


def test_a_prefix_that_names_no_module_loses_no_key() -> None:
    """`Llama4ForCausalLM.base_model_prefix` is `language_model`, and its modules are under `model`."""
    for layers in ([], [1]):
        model, exchanged = split(**{**LLAMA4, "moe_layers": layers})
        # Behind o_proj and behind the MLP; experts have a shared one, which is summed apart since 5.1.
        apart = len(layers) * ("layers.*.feed_forward" not in model.config.base_model_tp_plan)
        assert exchanged["all_reduce"] == 2 * 2 + apart
        assert splitting.unmatched_note(model) is None


EMBEDDING = {"embed_tokens": "embedding_rowwise"}
OF_EXPERTS = "is split by its ep_plan: experts alone, attention whole on every rank"


@pytest.mark.parametrize(
    ("name", "plan", "reduced", "note"),
    [
        ("gpt_oss", None, 2, f"gpt_oss has no tp_plan, and {OF_EXPERTS}"),
        # As GPT-OSS, and Falcon H1 and Bamba, have it since transformers 5.24.
        ("gpt_oss", EMBEDDING, 3, f"gpt_oss has a tp_plan for its embedding alone, and {OF_EXPERTS}"),
        ("llama", EMBEDDING, 1, "llama has a tp_plan for its embedding alone: its layers are whole on every rank"),
    ],
)
def test_what_a_plan_leaves_whole_is_told(
    name: str, plan: dict[str, str] | None, reduced: int, note: str, planned: Plan
) -> None:
    if name == "gpt_oss" and not is_split_by_expert():
        pytest.skip("this transformers splits GPT-OSS by another plan")
    fields = planned(name, plan)
    assert split(**fields)[1]["all_reduce"] == reduced
    assert splitting.plan_note(read(**fields)) == note


def test_a_plan_that_names_nothing_of_the_model_is_refused(planned: Plan) -> None:
    fields = planned("llama", {"blocks.*.q": "colwise", "blocks.*.o": "rowwise"})
    with pytest.raises(WorkloadError, match=r"doesn't have: model.blocks.\*.o, model.blocks.\*.q"):
        split(**fields)


def test_a_key_of_a_users_plan_that_names_nothing_is_refused() -> None:
    with ranks(2) as group:
        model, _ = run(read(**CONFIGS["llama"]), None)
        plan = {"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.mlp.dwon_proj": "rowwise"}
        with pytest.raises(WorkloadError, match=r"doesn't have: model.layers.\*.mlp.dwon_proj; use --tp 1"):
            splitting.shard(model, group, "it", plan)
        with pytest.raises(WorkloadError, match="has the style 'diagonal'; supported are all_reduce, "):
            splitting.shard(model, group, "it", {"lm_head": "diagonal"})


def test_a_part_that_no_layer_has_is_named(planned: Plan) -> None:
    """But not what other kinds of layers have in its place: an MLP beside experts."""
    assert splitting.unmatched_note(split(**CONFIGS["qwen3_moe"])[0]) is None
    plan = {**read(**CONFIGS["llama"]).base_model_tp_plan, "layers.*.cross_attn.o_proj": "rowwise"}
    assert splitting.unmatched_note(split(**planned("llama", plan))[0]) == (
        "LlamaForCausalLM has no module or parameter named model.layers.*.cross_attn.o_proj: its plan doesn't "
        "split them"
    )


def test_heads_that_are_gathered_may_be_any_number() -> None:
    """Phi 3 gathers queries, keys and values: each rank has all heads."""
    assert split(8, **{**CONFIGS["phi3"], **SIZES})[1]["all_reduce"] == 4


def test_a_vocabulary_that_ranks_do_not_divide_is_padded() -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    model, exchanged = split(3, **{**CONFIGS["llama"], **sizes, "vocab_size": 97})
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
