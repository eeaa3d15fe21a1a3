"""Every type of model that transformers has a plan for, split over two ranks on fake tensors."""

from collections.abc import Mapping
from typing import Any

import pytest
import transformers
from torch.torch_version import TorchVersion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fuseplan.errors import WorkloadError
from fuseplan.integrations import splitting
from fuseplan.integrations import transformers as huggingface
from fuseplan.integrations.splitting import BasePlan
from tests.integrations.planned import ranks, run

pytestmark = pytest.mark.nightly

LAYERS = 6
"""Of which every kind that a model has is among."""

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"intermediate_size": 512, "moe_intermediate_size": 512, "num_experts_per_tok": 2},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "nemotron_h": {"moe_intermediate_size": 2048, "moe_shared_expert_intermediate_size": 2048},
}
"""Where the defaults of a configuration make no model that can be built, or sizes that two ranks don't divide."""

REFUSED: Mapping[str, str] = {"doge": "its tp_plan splits the heads and leaves `A`, which has an entry for each, whole"}
"""What transformers itself can't split by its own plan."""

if TorchVersion(transformers.__version__) < "5.1":
    REFUSED = {
        **REFUSED,
        "deepseek_v2": "it splits what a norm of the whole row reads",
        "glm4_moe_lite": "it splits the output projection of heads that are whole",
        "minimax": "it gathers what the router yields, a tuple",
        "minimax_m2": "it splits what a norm of the whole row reads",
    }


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_it_is_split_by_its_plan(model_type: str) -> None:
    def config() -> Any:
        fields = {"model_type": model_type, **FIELDS.get(model_type, {})}
        return huggingface.with_layers(huggingface.config_from_dict(fields, model_type), LAYERS, model_type)

    try:
        base = BasePlan.of(config())
    except (WorkloadError, NotImplementedError) as error:
        pytest.skip(f"transformers makes no configuration of its defaults: {error}")
    if not base.tensors and not base.experts:
        pytest.skip("it has no plan")
    try:
        run(config(), None)
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"its defaults make no model that runs whole: {error}")
    with ranks(2) as group:
        if model_type in REFUSED:
            with pytest.raises((RuntimeError, AttributeError)):
                run(config(), group)
            return
        model, exchanged = run(config(), group)
    assert exchanged["all_reduce"] >= 1, splitting.unmatched_note(model)
