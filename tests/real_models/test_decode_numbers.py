"""Decode steps of unmodified models with `grouped_attention` beside those of the models as they are: numbers, caches,
how many graphs are compiled, and errors. The graphs are interpreted.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from transformers import CompileConfig, DynamicCache, StaticCache

import fuseplan
from fuseplan.providers.attention import EFFICIENT_SHARES
from tests.interpreted import no_code
from tests.real_models import decoding
from tests.real_models.decoding import COMMON, LAYERS, ROWS, assert_all_close, held, step
from tests.traced import Traced

WINDOW = 6
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 1}),
    "qwen3": ("qwen3", {"num_hidden_layers": 1}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "sliding window": ("mistral", {"sliding_window": 5}),
}  # fmt: skip
SHARES = TorchVersion(torch.__version__) >= EFFICIENT_SHARES
"""Whether torch's efficient attention takes unequal heads."""
Call = Callable[..., Any]


def by_day(name: str, *left: str) -> pytest.MarkDecorator:
    """One model, and those that are left to the night."""
    return pytest.mark.parametrize("name", [name, *(pytest.param(each, marks=pytest.mark.nightly) for each in left)])


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    torch._dynamo.reset()
    with no_code(), torch.no_grad():
        yield


def built(name: str, dtype: torch.dtype = torch.float32, **further: Any) -> Any:
    model_type, own = MODELS[name]
    return decoding.built(model_type, **{**own, **further}).to(dtype)


def layers_of(model: Any) -> int:
    """One, but for models whose layers differ: `test_static_cache` has several alike."""
    layers: int = model.config.num_hidden_layers
    return layers


@functools.cache
def traced(name: str, dtype: torch.dtype) -> Traced:
    model = built(name, dtype, num_hidden_layers=LAYERS)
    return Traced(model, **step(model, padded=2))


@pytest.mark.parametrize(
    ("name", "device", "dtype", "provider"),
    [
        ("llama", "cpu", torch.float32, "sdpa_packed"),
        ("sliding window", "cpu", torch.float32, "sdpa_packed"),
        pytest.param("qwen3", "cpu", torch.float32, "sdpa_packed", marks=pytest.mark.nightly),
        ("llama", "h100", torch.bfloat16, "triton"),
        # Where torch has it, efficient attention takes unequal heads.
        (
            "llama",
            "h100",
            torch.float32,
            "sdpa" if TorchVersion(torch.__version__) >= EFFICIENT_SHARES else "sdpa_packed",
        ),
        ("llama", "mi300x", torch.bfloat16, "triton"),
        ("llama", "mi300x", torch.float32, "sdpa_packed"),
    ],
)
def test_it_is_planned_once_a_layer_by_the_kernel_that_is_priced_best(
    name: str, device: str, dtype: torch.dtype, provider: str
) -> None:
    apart = fuseplan.PassConfig(fuse_cached_attention=None if device == "cpu" else False)
    report = traced(name, dtype).explain(device=device, config=apart)
    assert report.fused["grouped_attention"] == LAYERS
    fusions = [each for each in report.graphs[0].applied if each.rule == "grouped_attention"]
    assert [each.source for each in fusions] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    assert {each.provider for each in fusions} == {provider}


def fused(model: Any, reports: list[fuseplan.Report], **how: Any) -> Any:
    return fuseplan.compile(model, on_report=reports.append, **how)


def ids_of(tokens: int) -> Tensor:
    return torch.randint(0, COMMON["vocab_size"], (ROWS, tokens), generator=torch.Generator().manual_seed(1))


def decoded(call: Call, model: Any, parts: list[int], *, room: int = 96, padded: int = 0) -> tuple[Tensor, Any]:
    """Logits of given tokens, so many a call, and the cache; of the second row some are padding at the left."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    cache.early_initialization(
        batch_size=ROWS, num_heads=2, head_dim=16, dtype=model.dtype, device=torch.device("cpu")
    )  # fmt: skip
    ids = ids_of(sum(parts))
    mask = torch.ones(ROWS, room, dtype=torch.long)
    mask[1, :padded] = 0
    logits, start = [], 0
    for part in ids.split(parts, dim=1):
        positions = torch.arange(start, start + part.shape[1]).expand(part.shape)
        out = call(input_ids=part, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(out.logits.clone())
        start += part.shape[1]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)], ids=str)
@by_day("llama", "qwen3", "gemma3")
def test_logits_are_as_near_to_float64_as_plain_ones(name: str, dtype: torch.dtype) -> None:
    model, wide = built(name, dtype), built(name, dtype).double()
    steps = [5, *[1] * 12]
    exact, _ = decoded(wide, wide, steps)
    reports = list[fuseplan.Report]()
    plain, ours = (decoded(call, model, steps)[0] for call in (model, fused(model, reports)))
    assert all(report.fused["grouped_attention"] == layers_of(model) for report in reports)
    errors = [float((logits.double() - exact).square().mean().sqrt()) for logits in (ours, plain)]
    assert 0 < errors[0] <= 1.05 * errors[1]


def graphs_of(model: Any, parts: list[int], plain_parts: list[int], *, padded: int = 0, **how: Any) -> int:
    """How many graphs there are for what is decoded, so many tokens a call, held to the model as it is."""
    reports = list[fuseplan.Report]()
    expected, plain = decoded(model, model, plain_parts, padded=padded)
    actual, ours = decoded(fused(model, reports, **how), model, parts, padded=padded)
    assert all(report.fused["grouped_attention"] == layers_of(model) for report in reports)
    # What stands where there is padding means nothing: those queries see no key.
    for row in range(ROWS):
        first = padded * (row == 1)
        torch.testing.assert_close(actual[row, first:], expected[row, first:], rtol=1e-4, atol=1e-4)
    assert_all_close(held(ours), held(plain))
    return len(reports)


@by_day("llama", "qwen3")
def test_many_lengths_of_padded_rows_share_one_graph(name: str) -> None:
    assert graphs_of(built(name), [1] * 64, [1] * 64, padded=3, fullgraph=True) == 1


@pytest.mark.parametrize("parts", [[4, 9, 1], pytest.param([4, 4, 9, 3, 1], marks=pytest.mark.nightly)], ids=str)
@by_day("llama", "qwen3", "gemma3")
def test_a_prompt_in_chunks_is_what_it_is_as_a_whole(name: str, parts: list[int]) -> None:
    assert graphs_of(built(name), parts, [sum(parts)])


@pytest.mark.parametrize(
    "layer_types",
    [["sliding_attention"], pytest.param(["sliding_attention", "full_attention"], marks=pytest.mark.nightly)],
)
def test_windows_slide_with_one_more_graph_at_their_edge(layer_types: list[str]) -> None:
    model, steps = built("gemma3", num_hidden_layers=len(layer_types), layer_types=layer_types), [1] * (3 * WINDOW)
    # One for the first length, one for those that follow, one for windows that are full.
    assert graphs_of(model, steps, steps) == 3


@by_day("qwen3", "llama")
def test_generate_compiles_by_itself_and_gives_equal_tokens(name: str) -> None:
    model, reports = built(name), list[fuseplan.Report]()
    prompts, mask = ids_of(7), torch.ones(ROWS, 7, dtype=torch.long)
    mask[1, :3] = 0

    def generated(**options: Any) -> Any:
        how: Any = CompileConfig(options=options)
        how.mode, how._compile_all_devices = None, True  # as for a user, and on a CPU too
        return model.generate(
            prompts, attention_mask=mask, max_new_tokens=24, do_sample=False, cache_implementation="static",
            pad_token_id=0, eos_token_id=None, compile_config=how, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    expected = generated()
    actual = generated(**fuseplan.inductor_options(on_report=reports.append))
    assert [report.fused["grouped_attention"] for report in reports] == [layers_of(model)]
    logits, others = (torch.stack(each.logits) for each in (expected, actual))
    best = logits.topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 10 * (logits - others).abs().max(), "another order of sums would do"
    assert len(set(expected.sequences[:, 7:].flatten().tolist())) > 10
    assert torch.equal(actual.sequences, expected.sequences)


def test_a_dynamic_cache_is_left_alone_and_no_gain_is_promised() -> None:
    model, reports = built("llama"), list[fuseplan.Report]()
    compiled = fused(model, reports)
    runs = []
    for call in (model, compiled):
        cache, logits = DynamicCache(config=model.config), []
        for length, part in enumerate(ids_of(10).split([7, 1, 1, 1], dim=1), 7):
            mask = torch.ones(ROWS, length, dtype=torch.long)
            mask[1, :2] = 0
            run = model if part.shape[1] > 1 else call
            logits.append(run(input_ids=part, attention_mask=mask, past_key_values=cache).logits[:, -1])
        runs.append(torch.stack(logits))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-4)
    growing = reports[-1]
    assert (growing.fused["grouped_attention"], growing.saved_us) == (0, 0)
    (miss,) = [each for each in growing.near_misses if each.rule == "grouped_attention"]
    assert (miss.count, miss.reason) == (layers_of(model), "size")
    assert "the graph doesn't know these to be equal" in miss.detail
    assert not any(character.isdigit() for character in miss.fix or "")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Of q [B, H, T, D] and k, v [B, H_kv, S, D], repeated as transformers repeats them."""
    shared = q.shape[1] // k.shape[1]
    k, v = (each[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def error_of(call: Call, *arguments: Any) -> Exception:
    with pytest.raises(RuntimeError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("heads", "mask", "expected"),
    [
        (2, (ROWS, 1, 1, 11), ("11", "12")),
        (2, (ROWS + 1, 1, 1, 12), (str(ROWS + 1), str(ROWS))),
        (3, None, ("6", "8")),
    ],
    ids=["a mask too short", "a mask of other rows", "heads that don't divide"],
)
def test_what_does_not_fit_is_told_as_without_fuseplan(
    heads: int, mask: tuple[int, ...] | None, expected: tuple[str, ...]
) -> None:
    kv = torch.randn(ROWS, heads, 12, 16)
    arguments = (torch.randn(ROWS, 8, 1, 16), kv, kv.clone(), None if mask is None else torch.zeros(mask))
    eager = str(error_of(attention, *arguments))
    plain, ours = (str(error_of(call(attention), *arguments)) for call in (torch.compile, fuseplan.compile))
    assert ours == plain
    for size in expected:
        assert size in eager
        assert size in ours


def test_a_cache_too_short_for_the_position_is_an_index_error() -> None:
    model, reports = built("llama"), list[fuseplan.Report]()
    for call in (model, fused(model, reports)):
        with pytest.raises(IndexError, match=r"index 8 is out of bounds for dimension \d with size 8"):
            decoded(call, model, [1] * 9, room=8)
    assert reports[-1].fused["grouped_attention"] == layers_of(model)
