"""`benchmarks/decode_one_gpu.py`: its models, the one that is written by hand, and a run in which a peer fails."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StaticCache

import fuseplan
from benchmarks import decode_one_gpu as benchmark
from benchmarks.hand_written import KNOWN, HandWritten
from benchmarks.published_shapes import SHAPES, SMALL, VOCABULARY, model_of
from benchmarks.quantised import ATTENTION, BLOCK, DTYPE, FORMATS, LEFT, quantised, restored, stored_bytes, with_rows

CPU = torch.device("cpu")
BY_HAND = [name for name, (config, _, _) in SHAPES.items() if config.model_type in KNOWN]
WORK = benchmark.Workload(batch=2, position=8, cache=16)


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `main` measures; models are smaller still."""
    gc.freeze()  # a run collects garbage again and again; what other tests left isn't looked through each time
    smaller = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    monkeypatch.setattr("benchmarks.published_shapes.SMALL", {**SMALL, **smaller})
    monkeypatch.setattr(benchmark, "STEPS", 2)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_written_by_hand_computes_and_caches_what_the_model_does(name: str) -> None:
    model: Any = model_of(name, 7, CPU, torch.float32)
    if name == "gemma-3-12b":
        model.config.sliding_window = 6
    caches: list[Any] = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    ids, start = torch.arange(22).reshape(2, 11) * 37 % VOCABULARY, 0
    for part in ids.split([4, 1, 3, 1, 1, 1], dim=1):
        positions = torch.arange(start, start + part.shape[1]).expand(part.shape)
        logits = [
            call(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True).logits
            for call, cache in zip((model, HandWritten(model)), caches, strict=True)
        ]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        start += part.shape[1]
    for left, right in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(left.keys, right.keys, rtol=1e-4, atol=1e-4)


def test_what_there_is_not_is_named() -> None:
    model = model_of("gpt-oss-20b", 1, CPU, torch.float32)
    with pytest.raises(ValueError, match="nobody wrote a gpt_oss by hand; allowed: llama"):
        HandWritten(model)
    with pytest.raises(ValueError, match="attention of gpt_oss is eager, not sdpa"):
        benchmark.compiled(benchmark.BY_HAND, model, [])
    with pytest.raises(ValueError, match="'fp4' is no format of this benchmark; allowed: fp8_rows, fp8_blocks"):
        quantised(model, "fp4")


def eager(name: str, model: Any, reports: list[fuseplan.Report], *, captured: bool) -> Callable[..., Any]:
    """The sides of a run without compiling."""
    if name == benchmark.FLEX:
        raise RuntimeError("one\n  of its\nerrors")
    if name == benchmark.FUSED:
        arguments: dict[str, Any] = benchmark.Step(model, WORK, model).arguments
        reports.append(fuseplan.explain(model, device="cpu", **arguments))
    return HandWritten(model) if name == benchmark.WRITTEN else benchmark.with_own_code(model)


def measured(
    monkeypatch: pytest.MonkeyPatch, name: str, compiled: Callable[..., Any], *peers: str, **changes: Any
) -> dict[str, Any]:
    monkeypatch.setattr(benchmark, "compiled", compiled)
    model: Any = model_of(name, 2, CPU, torch.float32)
    model.config.update(changes)
    return benchmark.measure(model, WORK, peers=[*peers], leave_one_out=True, precise=True, repeats=2, bytes_s=1e9)


def test_a_row_has_all_sides_their_limit_and_what_each_fusion_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(monkeypatch, "qwen3-8b", eager, *benchmark.PEERS)
    left_out = {"without fuse_grouped_attention"}
    assert row["fused"] == {"grouped_attention": 2}
    assert row["failed"] == {benchmark.FLEX: "RuntimeError: one of its errors"}
    timed = ({benchmark.PLAIN, *benchmark.PEERS} - {benchmark.FLEX}) | left_out
    assert set(row["times_limit"]) == set(row["compile_s"]) == timed
    assert set(row["times_faster"]) == set(row["logits_apart_from_plain"]) == timed - {benchmark.PLAIN}
    assert set(row["gave_us"]) == {"fuse_grouped_attention"}
    assert max(row["logits_apart_from_float64"].values()) < 1e-5
    # Layers, last norm and head; behind them 9 keys and values of 2 heads of 16 in each of 2 layers for 2 rows.
    weights = 2 * (64 * 128 * 2 + 64 * 32 * 2 + 3 * 64 * 64 + 2 * 64 + 2 * 16) + 64 + 64 * VOCABULARY
    assert row["bytes_limit_us"] == round(4 * (weights + 2 * 2 * 2 * 9 * 32) / 1e9 * 1e6, 1)


@pytest.mark.parametrize("name", ["gemma-3-12b", "gpt-oss-20b"])
def test_float64_begins_where_windows_of_the_others_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(monkeypatch, name, eager, sliding_window=4)
    assert set(row["logits_apart_from_float64"]) == {benchmark.PLAIN}
    assert row["logits_apart_from_float64"][benchmark.PLAIN] < 1e-5


def test_a_run_in_which_all_fail_ends_with_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, *further: Any, captured: bool) -> Any:
        raise RuntimeError(name)

    row = measured(monkeypatch, "llama-3.1-8b", fails, benchmark.FUSED)
    assert row["failed"] == {name: f"RuntimeError: {name}" for name in (benchmark.PLAIN, benchmark.FUSED)}


def test_sides_share_weights_and_no_code_that_dynamo_may_give_up_on() -> None:
    model: Any = model_of("llama-3.1-8b", 1, CPU, torch.float32)
    calls: list[Any] = [benchmark.with_own_code(model) for _ in range(2)]
    assert calls[0].__code__ is not calls[1].__code__
    other = benchmark.with_attention(model, "eager")
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")
    assert all(left is right for left, right in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that blocks divide."""
    monkeypatch.setattr("benchmarks.published_shapes.SMALL", {**SMALL, "hidden_size": 256, "intermediate_size": 256})


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("how", FORMATS)
def test_all_that_norms_and_activations_quantise_is_fused(how: str) -> None:
    layers = 2
    model: Any = model_of("qwen3-8b", layers, CPU, torch.bfloat16)
    step = benchmark.Step(model, WORK, model)
    wanted = step()
    assert quantised(model, how).startswith("layers written out, torch 2.")
    assert len([each for each in model.parameters() if each.dtype is DTYPE]) == 7 * layers
    step.reset()
    assert (step() - wanted).norm() < 0.1 * wanted.norm()
    report = fuseplan.explain(model, device="h200", **step.arguments)
    assert (report.fused["norm_quant"], report.fused["act_quant"]) == (2 * layers, layers)


@pytest.mark.usefixtures("in_blocks")
def test_a_row_says_what_fusing_quantisations_takes_off_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "compiled", lambda name, model, reports, **how: benchmark.with_own_code(model))
    model: Any = model_of("qwen3-8b", 1, CPU, torch.bfloat16)
    whole = sum(stored_bytes(each) for each in model.parameters())
    quantised(model, "fp8_blocks")
    peers = [*benchmark.QUANTISED_PEERS]
    row = benchmark.measure(model, WORK, peers=peers, leave_one_out=False, precise=False, repeats=2, bytes_s=1e9)
    assert set(row["less_time"]) == {benchmark.PLAIN, ATTENTION, LEFT}
    elements = 256 * (2 * 512 + 2 * 128 + 3 * 256)
    assert whole - sum(stored_bytes(each) for each in model.parameters()) == elements - 4 * elements // BLOCK**2


def test_rows_of_zeros_go_behind_those_that_are_there() -> None:
    codes, scales = torch.ones(3, 256).to(DTYPE), torch.rand(2, 3).t()
    more, wider = with_rows(codes, scales, 1)
    assert torch.equal(restored(more, wider)[:3], restored(codes, scales))
    assert not restored(more, wider)[3].any()
    assert wider.stride() == (1, 4)
