"""Gemma 3n and Gemma 4, whose norms have a power of -0.5 for a root and, on values, no weight: each is recognised."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fuseplan
from fuseplan.integrations import transformers as huggingface
from tests.integrations.planned import ranks
from tests.real_models.cases import COMMON, HEAD, HIDDEN, LAYERS, norms

SPAN = fuseplan.PassConfig(compile_ranges=[fuseplan.CompileRange(start=1, end=64)])
PER_LAYER = {"hidden_size_per_layer_input": HEAD, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    # The router's norm is asked twice a layer.
    "gemma3n_text": ({"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * LAYERS}, 8),
    "gemma4_text": ({"global_head_dim": HEAD}, 5),
}
"""What else is in a configuration, and norms a layer of the width of the residual stream."""


@pytest.mark.parametrize(
    ("name", "layers"),
    [("gemma4_text", 1), *(pytest.param(name, LAYERS, marks=pytest.mark.nightly) for name in MODELS)],
)
def test_every_norm_is_recognised(name: str, layers: int) -> None:
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this transformers doesn't know it")
    fields, wide = MODELS[name]
    config = huggingface.config_from_dict(
        {"model_type": name, **COMMON, **PER_LAYER, **fields, "num_hidden_layers": layers}, name
    )
    config.use_cache = False
    with ranks(2) as group, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        model = huggingface.build(config, group, name)
        report = fuseplan.explain(model, torch.randint(128, (1, 16)), config=SPAN, device="h200")
    found: Counter[int] = Counter()
    for op, count in norms(report.recognized).items():
        found[int(op.partition("[")[2].rstrip("]"))] += count
    # Queries, keys and, without a weight, values; and one on what layers get beside the residual stream.
    assert found == {HEAD: 3 * layers + 1, HIDDEN: wide * layers + 1}
    assert not any("power" in miss.detail for miss in report.near_misses)
    # Both all-reduces of a layer go into norms before the residual add.
    assert report.fused["allreduce_rms"] == report.recognized[f"all_reduce[{HIDDEN}]"] == 2 * layers
