"""Models from their published configurations, at full width on fake tensors, split over two ranks by their own plans.

One layer of one of them in `make test`; all layers of all of them at night.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from torch.torch_version import TorchVersion

import fuseplan
from fuseplan.integrations import transformers as huggingface
from fuseplan.workloads import catalog
from tests.real_models.cases import norms

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """What a model has, by its architecture.

    Attributes:
        layers: how many.
        hidden: the width of the residual stream.
        plain: norms of that width a layer, beside two on a sum with the residual stream.
        heads: whether each layer has two norms on queries and keys, of heads of 128.
        reduced: all-reduces a layer, each of which goes into a norm, after a residual add or without one.
        rotated: sites of `qk_norm_rope` a layer; where there are none, whatever norms heads is a near miss of it.
    """

    layers: int
    hidden: int
    plain: int = 0
    heads: bool = False
    reduced: int = 2
    rotated: int = 0


FULL_SIZE = {
    # Norms behind attention and MLP, before the residual add: its all-reduces go into those. Its heads are normed
    # after they change places with tokens.
    "gemma-3-27b": FullSize(layers=62, hidden=5376, plain=2, heads=True),
    # Its plan splits experts alone: attention, whole on every rank, needs no all-reduce.
    "gpt-oss-120b": FullSize(layers=36, hidden=2880, reduced=1),
    "gpt-oss-20b": FullSize(layers=24, hidden=2880, reduced=1),
    "llama-3.1-70b": FullSize(layers=80, hidden=8192),
    "llama-3.1-8b": FullSize(layers=32, hidden=4096),
    "mixtral-8x7b": FullSize(layers=32, hidden=4096),
    "phi-4": FullSize(layers=40, hidden=5120),
    "qwen3-30b-a3b": FullSize(layers=48, hidden=2048, heads=True, rotated=1),
    "qwen3-8b": FullSize(layers=36, hidden=4096, heads=True, rotated=1),
}


RULES = ("act_padding", "act_quant", "allreduce_rms", "allreduce_rms_padding", "allreduce_rms_quant", "norm_quant",
         "qk_norm_rope")  # fmt: skip


def test_every_configuration_is_tried() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*FULL_SIZE}
    for name, shape in FULL_SIZE.items():
        assert huggingface.load_config(CONFIGS / f"{name}.json").num_hidden_layers == shape.layers


BY_DAY = pytest.param("gpt-oss-120b", 1)
"""The norms of queries and keys that others have `test_huggingface` has by day, and gemma's `docs/huggingface.md`."""


@pytest.mark.parametrize(
    ("name", "layers"),
    [BY_DAY, *(pytest.param(name, each.layers, marks=pytest.mark.nightly) for name, each in sorted(FULL_SIZE.items()))],
)
def test_every_norm_and_all_reduce_is_recognised(name: str, layers: int) -> None:
    shape = FULL_SIZE[name]
    if name.startswith("gpt-oss") and TorchVersion(transformers.__version__) < "5.23":
        pytest.skip("older transformers split GPT-OSS by another plan")
    config = fuseplan.PassConfig(compile_ranges=[fuseplan.CompileRange(start=1, end=64)])
    with catalog.build(str(CONFIGS / f"{name}.json"), tp=2, layers=layers) as built:
        report = fuseplan.explain(built.model, *built.inputs, config=config, device="h200")
    # Since 5.24 the plan of GPT-OSS names the embedding too, whose all-reduce goes into the first norm.
    embedding = name.startswith("gpt-oss") and TorchVersion(transformers.__version__) >= "5.24"
    found = "gpt_oss has a tp_plan for its embedding alone" if embedding else "gpt_oss has no tp_plan"
    assert [note.partition(",")[0] for note in built.notes] == [found] * name.startswith("gpt-oss")
    assert report.breaks == ()
    assert len(report.graphs) == 1

    # Every norm and every all-reduce is recognised, and every all-reduce goes into a norm.
    sites = shape.reduced * layers + embedding
    expected = {"rms_norm[128]": 2 * layers} if shape.heads else {}
    expected[f"fused_add_rms_norm[{shape.hidden}]"] = 2 * layers
    expected[f"rms_norm[{shape.hidden}]"] = shape.plain * layers + 1  # the model's first one has no sum
    reduces = {op: count for op, count in report.recognized.items() if op.startswith("all_reduce")}
    assert norms(report.recognized) == expected
    assert reduces == {f"all_reduce[{shape.hidden}]": sites}
    fired = {"allreduce_rms": sites, "qk_norm_rope": shape.rotated * layers}
    assert {rule: report.matched.get(rule) for rule in RULES} == dict.fromkeys(RULES, 0) | fired
    assert {rule: report.fused[rule] for rule in fired} == fired
    unrotated = [miss.count for miss in report.near_misses if miss.rule == "qk_norm_rope"]
    assert unrotated == [layers] * (shape.heads and not shape.rotated)

    # Every other norm says why not: what is in the place of an all-reduce.
    misses = [miss for miss in report.near_misses if miss.rule == "allreduce_rms" and miss.expected == "all_reduce"]
    assert sum(miss.count for miss in misses) == sum(expected.values()) - sites
