"""Qwen3 as transformers has it: QK norm and rotary embedding fuse once a layer, and the logits stay."""

import pytest
import torch

import fuseplan
from fuseplan.record import Report
from tests.interpreted import no_code
from tests.real_models.cases import CASES, LAYERS, fused_calls

IDS = (torch.arange(20).reshape(2, 10) * 7) % 128


def test_it_is_planned_once_a_layer() -> None:
    model = CASES["qwen3"].build(None).eval()
    report = fuseplan.explain(model, IDS, device="h200", use_cache=False)
    assert report.fused["qk_norm_rope"] == LAYERS
    fusions = [each for each in report.graphs[0].applied if each.rule == "qk_norm_rope"]
    assert [each.source for each in fusions] == [f"model.layers.{layer}.self_attn.q_norm" for layer in range(LAYERS)]
    assert {each.provider for each in fusions} == {"triton"}
    assert all(each.saving_ns and each.saving_ns > 0 for each in fusions)


@pytest.mark.nightly  # by day `test_static_cache` has it, of llama
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_without_qk_norms_there_is_nothing_to_say(name: str) -> None:
    report = fuseplan.explain(CASES[name].build(None).eval(), IDS, device="h200", use_cache=False)
    assert report.fused["qk_norm_rope"] == 0
    assert not [miss for miss in report.near_misses if miss.rule == "qk_norm_rope"]


def test_the_compiled_model_computes_what_the_model_does() -> None:
    model = CASES["qwen3"].build(None).eval()
    reports: list[Report] = []
    config = fuseplan.PassConfig(policy="ordered(qk_norm_rope)")
    compiled = fuseplan.compile(model, config=config, on_report=reports.append)
    with torch.inference_mode(), no_code():
        expected = model(IDS, use_cache=False).logits
        compiled(IDS, use_cache=False)
        actual, calls = fused_calls(lambda: compiled(IDS, use_cache=False).logits)
    assert [report.fused for report in reports] == [{"qk_norm_rope": LAYERS}]
    assert not reports[0].warnings
    assert calls == {"qk_norm_rope": LAYERS}
    torch.testing.assert_close(actual, expected, rtol=0, atol=2**-7)
