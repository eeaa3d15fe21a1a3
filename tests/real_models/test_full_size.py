"""Models from their published configurations, at full width on fake tensors, split over two ranks by their own plans.

One layer of one of them in `make test`; two layers and all layers of all of them at night.
"""

import pytest
import transformers
from torch.torch_version import TorchVersion

import fuseplan
from fuseplan.integrations import transformers as huggingface
from fuseplan.workloads import catalog
from tests.real_models.cases import norms
from tests.real_models.full_size import FULL_SIZE, TP, config_path

RULES = ("act_padding", "act_quant", "allreduce_rms", "allreduce_rms_padding", "allreduce_rms_quant", "norm_quant",
         "qk_norm_rope")  # fmt: skip


def test_every_configuration_is_tried() -> None:
    assert {path.stem for path in config_path("").parent.glob("*.json")} == {*FULL_SIZE}
    for name, shape in FULL_SIZE.items():
        assert huggingface.load_config(config_path(name)).num_hidden_layers == shape.layers


def check(name: str, layers: int) -> None:
    shape = FULL_SIZE[name]
    if name.startswith("gpt-oss") and TorchVersion(transformers.__version__) < "5.23":
        pytest.skip("older transformers split GPT-OSS by another plan")
    config = fuseplan.PassConfig(compile_ranges=[fuseplan.CompileRange(start=1, end=64)])
    with catalog.build(str(config_path(name)), tp=TP, layers=layers) as built:
        report = fuseplan.explain(built.model, *built.inputs, config=config, device="h200")
    # Since 5.24 the plan of GPT-OSS names the embedding too, whose all-reduce goes into the first norm.
    embedding = name.startswith("gpt-oss") and TorchVersion(transformers.__version__) >= "5.24"
    found = "gpt_oss has a tp_plan for its embedding alone" if embedding else "gpt_oss has no tp_plan"
    assert [note.partition(",")[0] for note in built.notes] == [found] * name.startswith("gpt-oss")
    assert report.breaks == ()
    assert len(report.graphs) == 1

    # Every norm and every all-reduce is recognised, and every all-reduce goes into a norm.
    expected, sites = shape.norms(layers), shape.reduced * layers + embedding
    reduces = {op: count for op, count in report.recognized.items() if op.startswith("all_reduce")}
    assert norms(report.recognized) == expected
    assert reduces == {op: count + embedding for op, count in shape.all_reduces(layers).items()}
    fired = {"allreduce_rms": sites, "qk_norm_rope": shape.rotated * layers}
    assert {rule: report.matched.get(rule) for rule in RULES} == dict.fromkeys(RULES, 0) | fired
    assert {rule: report.fused[rule] for rule in fired} == fired
    unrotated = [miss.count for miss in report.near_misses if miss.rule == "qk_norm_rope"]
    assert unrotated == [layers] * (shape.heads is not None and not shape.rotated)

    # Every other norm says why not: what is in the place of an all-reduce.
    misses = [miss for miss in report.near_misses if miss.rule == "allreduce_rms" and miss.expected == "all_reduce"]
    assert sum(miss.count for miss in misses) == sum(expected.values()) - sites


BY_DAY = "gpt-oss-120b"
"""The norms of queries and keys that others have `test_qk_norm_rope` has by day, and gemma's `docs/huggingface.md`."""


def test_one_layer() -> None:
    check(BY_DAY, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_two_layers(name: str) -> None:
    check(name, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_all_layers(name: str) -> None:
    check(name, FULL_SIZE[name].layers)
