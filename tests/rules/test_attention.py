"""Grouped attention: where it fires, what it computes, what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.nn import functional as F

from fuseplan.graph.facts import Call
from fuseplan.graph.surgery import copy_graph
from fuseplan.providers.attention import Packs, Shared
from fuseplan.record import GraphReport, Reason
from fuseplan.rules import Bindings
from fuseplan.verification.layout import significant_strides
from tests.attention import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    KEYS,
    SHARED,
    SPELLINGS,
    attend,
    decode,
    hugging_face,
    inputs,
    on_gpu,
    tiled,
)
from tests.eager_attention import PLAIN
from tests.helpers import post_grad, quickly_canonical, quickly_traced, randn
from tests.rules.planning import planned, providers_of, run

aten = torch.ops.aten
ATTENTION = {
    "cudnn": aten._scaled_dot_product_cudnn_attention.default,
    "flash": aten._scaled_dot_product_flash_attention.default,
    "efficient": aten._scaled_dot_product_efficient_attention.default,
    "cpu": aten._scaled_dot_product_flash_attention_for_cpu.default,
}
COPIES = (aten.clone.default, aten.repeat.default)


def called(graph: fx.Graph, kernel: str) -> Call:
    """The one call of a kernel."""
    (node,) = graph.find_nodes(op="call_function", target=ATTENTION[kernel])
    return cast(Call, node)


def applied(report: GraphReport) -> list[str]:
    return providers_of(report, "grouped_attention")


def check_shared(attention: Callable[..., Any], provider: str, *given: Tensor, runs: bool = True) -> fx.Graph:
    """One kernel, which is verified, and computes what the graph does; the rewritten graph."""
    graph = quickly_traced(attention, *given)
    expected = run(graph, *given) if runs else None
    report = planned(graph, verify="always")
    assert applied(report) == [provider]
    assert all(each.passed for each in report.verified)
    if runs:
        torch.testing.assert_close(run(graph, *given), expected, rtol=2**-7, atol=2**-7)
    return graph


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_fires_in_every_spelling_and_nothing_is_copied(spelling: str, queries: int) -> None:
    provider = "sdpa_packed" if queries == 1 else "sdpa"
    graph = check_shared(attend(SPELLINGS[spelling]), provider, *inputs(queries))
    assert not [node for node in graph.nodes if node.target in COPIES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["sdpa", "sdpa_packed"])
def test_either_form_is_verified_and_close_to_float64(form: str, dtype: torch.dtype) -> None:
    arguments = inputs(dtype=dtype)
    graph = quickly_traced(attend(hugging_face, scale=0.3), *arguments)
    plain = run(graph, *arguments)
    report = planned(graph, verify="always", force=(f"grouped_attention:{form}",))
    assert applied(report) == [form]
    assert [each.passed for each in report.verified] == [True]
    wide = [each.double() if each.is_floating_point() else each for each in arguments]
    exact = attend(hugging_face, scale=0.3)(*wide)
    off, allowed = ((each.double() - exact).abs().max() for each in (run(graph, *arguments), plain))
    assert off <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("checked", [False, True])
def test_lengths_that_need_not_be_equal_are_refused(checked: bool) -> None:
    """torch gives keys and values symbols of their own where equal sizes needn't stay equal."""
    q, k, v, mask = inputs()
    for value, dim in ((k, 2), (v, 2), (mask, 3)):
        torch._dynamo.mark_dynamic(value, dim)

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if checked:
            torch._check(k.shape[2] == v.shape[2])
        return attend(hugging_face)(q, k, v, mask)

    with symbolic_shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        report = planned(post_grad(model, q, k, v, mask), verify="always")
    assert applied(report) == ["sdpa_packed"] * checked
    reasons = [(each.reason, each.fix) for each in report.refusals if each.rule == "grouped_attention"]
    assert reasons == [] if checked else [(Reason.SIZE, "torch._check that these lengths are equal")]


@pytest.mark.parametrize("masked", [True, False])
def test_causal_queries_keep_their_order(masked: bool) -> None:
    check_shared(attend(hugging_face, is_causal=not masked), "sdpa", *inputs(32, masked=masked), runs=masked)


def test_heads_that_are_repeated_in_part_are_shared_by_what_is_left() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check_shared(attention, "sdpa", *inputs(5))
    check_shared(attend(lambda x: x.expand(-1, HEADS, -1, -1)), "sdpa_packed", *inputs(shared=1))


@pytest.mark.parametrize("queries", [1, 5])
def test_the_batch_may_be_a_symbol(queries: int) -> None:
    arguments = inputs(queries)
    for value in arguments:
        torch._dynamo.maybe_mark_dynamic(value, 0)
    graph = post_grad(attend(hugging_face), *arguments)
    assert [node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], torch.SymInt)]
    report = planned(graph, verify="always")
    assert applied(report) == ["sdpa_packed" if queries == 1 else "sdpa"]
    assert all(each.passed for each in report.verified)


@pytest.mark.parametrize(
    ("batch", "varies", "end"), [(1, 2, "masked"), (8, 2, "masked, 8 sequences"), (8, 0, "masked")]
)
def test_sequences_of_varying_length_are_priced_by_their_number(batch: int, varies: int, end: str) -> None:
    """Rows don't say whether they are of one long sequence or of several."""
    arguments = inputs(KEYS, batch=batch)
    for value in arguments[:3]:
        torch._dynamo.maybe_mark_dynamic(value, varies)
    for dim in (2, 3) if varies else (0,):
        torch._dynamo.maybe_mark_dynamic(arguments[3], dim)
    report = planned(post_grad(attend(hugging_face), *arguments))
    assert report.plan is not None
    (site,) = report.plan.sites
    assert site.endswith(end)


# As traced for a GPU.


def test_cudnn_reads_unrepeated_heads_on_nvidia() -> None:
    graph = on_gpu(decode())
    before = called(graph, "cudnn")
    promised = before.meta["val"][0]
    report = planned(graph, "h200", force=("grouped_attention:sdpa",))
    assert applied(report) == ["sdpa"]
    call = called(graph, "cudnn")
    assert call is not before
    assert [value.meta["val"].shape[1] for value in call.args[:3]] == [HEADS, SHARED, SHARED]
    assert call.args[3].meta["val"].shape == (3, 1, 1, 32)
    assert (call.meta["val"][0].shape, call.meta["val"][0].stride()) == (promised.shape, promised.stride())
    assert not [node for node in graph.nodes if node.target in COPIES]


@pytest.mark.parametrize("device", ["h100", "h200", "b200"])
@pytest.mark.parametrize(("queries", "provider"), [(1, "triton"), (16, "triton"), (17, "sdpa")])
def test_keys_of_a_few_queries_are_split_among_programs(device: str, queries: int, provider: str) -> None:
    graph = on_gpu(decode(queries=queries))
    promised = called(graph, "cudnn").meta["val"][0]
    assert applied(planned(graph, device)) == [provider]
    assert not [node for node in graph.nodes if node.target in COPIES]
    (result,) = graph.output_node().all_input_nodes
    assert result.meta["val"].shape == promised.shape
    assert significant_strides(result.meta["val"]) == significant_strides(promised)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_heads_are_packed_for_every_kernel(kernel: str) -> None:
    graph = on_gpu(quickly_traced(attend(hugging_face), *inputs(masked=kernel != "flash")), kernel)
    promised = called(graph, kernel).meta["val"][0]
    report = planned(graph, "h100", force=("grouped_attention:sdpa_packed",))
    assert applied(report) == ["sdpa_packed"]
    call = called(graph, kernel)
    assert call.args[0].meta["val"].shape == (3, SHARED, GROUPS, HEAD_DIM)
    if kernel != "flash":
        mask = call.args[3].meta["val"]
        assert mask.shape == (3, SHARED if kernel == "efficient" else 1, GROUPS, 32)
        assert mask.stride(-1) == 1
    (result,) = graph.output_node().all_input_nodes
    assert result.meta["val"].shape == promised.shape
    assert significant_strides(result.meta["val"]) == significant_strides(promised)


def _bound(kernel: str, **values: Any) -> Bindings:
    q, k, v, _ = inputs()
    mask = torch.zeros(3, 1, 1, 32, dtype=q.dtype)
    given = {"q": q, "k": k, "v": v, "mask": mask, "is_causal": False, "kernel": kernel, "scale": 1.0, **values}
    return Bindings("grouped_attention", given)


def efficient(version: str, is_rocm: bool) -> Shared:
    return replace(Shared(), torch_version=version, is_rocm=is_rocm)


def apart(size: int, heads: int = SHARED) -> Tensor:
    """Heads whose elements lie apart."""
    return torch.empty(3, heads, size, 2 * HEAD_DIM, dtype=torch.bfloat16)[..., ::2]


EITHER: list[tuple[str, dict[str, Any], Reason | None]] = [
    ("cpu", {}, None),
    ("cpu", {"q": apart(1, HEADS)}, Reason.LAYOUT),
    ("cpu", {"k": apart(32)}, Reason.LAYOUT),
    ("cpu", {"v": apart(32)}, Reason.LAYOUT),
    ("overrideable", {}, Reason.PROVIDER),
]


@pytest.mark.parametrize(
    ("check", "kernel", "values", "reason"),
    [
        (efficient("2.13.0", is_rocm=False), "efficient", {}, Reason.PROVIDER),
        (efficient("2.14.0", is_rocm=False), "efficient", {}, None),
        (efficient("2.14.0", is_rocm=True), "efficient", {}, Reason.PROVIDER),
        (Shared("amd"), "efficient", {}, Reason.PROVIDER),
        *((check, *given) for check in (Shared(), Packs()) for given in EITHER),
        (Packs(), "cudnn", {"is_causal": True, "mask": None}, Reason.ATTRIBUTE),
        (Packs(), "cudnn", {"q": torch.zeros(3, HEADS, 2, HEAD_DIM)}, Reason.SIZE),
        (Packs(), "cudnn", {"mask": torch.zeros(3, 1, 2, 32)}, Reason.SIZE),
        (Packs(), "cudnn", {"mask": torch.zeros(1, 1, 32)}, Reason.SIZE),
        (Packs(), "cudnn", {"mask": torch.zeros(1, 32)}, None),
        (Packs(), "cudnn", {"mask": torch.zeros(3, HEADS, 1, 32)}, None),
    ],
)
def test_what_torchs_kernels_take(check: Any, kernel: str, values: dict[str, Any], reason: Reason | None) -> None:
    refusal = check(_bound(kernel, **values))
    assert (refusal.reason if refusal else None) is reason
    assert reason is not Reason.LAYOUT or f"strides of {next(iter(values))} are" in refusal.detail


# Near misses.


def with_arguments(graph: fx.Graph, kernel: str, first: int, *rest: Any) -> fx.Graph:
    """The same, whose call of a kernel keeps so many of its arguments."""
    call = called(graph, kernel)
    call.args = (*call.args[:first], *rest)
    return graph


def sums_read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return ATTENTION["cpu"](q, hugging_face(k), hugging_face(v))


def keys_read_too(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    wide = hugging_face(k)
    return F.scaled_dot_product_attention(q, wide, hugging_face(v), attn_mask=mask), wide


def keys_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    wide = torch.cat([v, v + 1, v + 2, v + 3], 1)
    return F.scaled_dot_product_attention(q, hugging_face(k), wide, attn_mask=mask)


def shared_unlike(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = hugging_face(k), v[:, :1].expand(-1, HEADS, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def of_six_heads() -> fx.Graph:
    graph = traced(attend(hugging_face))
    (q,) = [node for node in graph.find_nodes(op="placeholder") if node.meta["val"].shape[2:] == (1, HEAD_DIM)]
    with q.meta["val"].fake_mode:
        q.meta["val"] = torch.empty(3, 6, 1, HEAD_DIM, dtype=torch.bfloat16)
    return graph


def masked_by_truths() -> fx.Graph:
    graph = traced(attend(hugging_face))
    call = called(graph, "cpu")
    (mask,) = [node for node in graph.find_nodes(op="placeholder") if node.meta["val"].dtype is torch.bool]
    call.kwargs = {**call.kwargs, "attn_mask": mask}
    return graph


def traced(attention: Callable[..., Any]) -> fx.Graph:
    return quickly_traced(attention, *inputs())


NEAR_MISSES: dict[str, tuple[Callable[[], fx.Graph], Reason, str]] = {
    "dropout": (lambda: with_arguments(traced(attend(hugging_face)), "cpu", 3, 0.1), Reason.ATTRIBUTE, "drops 0.1"),
    "a debug mask": (lambda: with_arguments(on_gpu(decode()), "cudnn", 7, True), Reason.ATTRIBUTE, "debug mask"),
    "sums of exponentials are read": (lambda: traced(sums_read), Reason.USERS, "logsumexp"),
    "repeated keys are read, too": (lambda: traced(keys_read_too), Reason.USERS, "repeat_heads"),
    "heads after each other": (lambda: traced(attend(tiled)), Reason.ATTRIBUTE, "after each other"),
    "keys alone": (lambda: traced(keys_alone), Reason.OP, "values are not"),
    "heads that don't divide": (of_six_heads, Reason.SIZE, "6 query heads don't divide by 8 heads"),
    "a mask of truths": (masked_by_truths, Reason.DTYPE, ""),
    "shared unlike": (lambda: traced(shared_unlike), Reason.ATTRIBUTE, "keys have 2 heads, 4 times each"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_is_in_the_way_is_named(case: str) -> None:
    make, reason, detail = NEAR_MISSES[case]
    report = planned(make())
    assert not applied(report)
    (refusal,) = [each for each in report.refusals if each.rule == "grouped_attention"]
    assert refusal.reason is reason
    assert detail in refusal.detail
    assert case != "dropout" or refusal.fix == "call model.eval()"


# What stays as it is.


@pytest.mark.parametrize(
    "config", [{"fuse_grouped_attention": False, "fuse_eager_attention": False}, {"policy": "off"}]
)
@pytest.mark.parametrize("graph", [decode, lambda: PLAIN.graph(5, torch.float32)], ids=["grouped", "spelled out"])
def test_disabled_is_identity(graph: Callable[[], fx.Graph], config: dict[str, Any]) -> None:
    given = graph()
    before = str(copy_graph(given)[0])
    assert not planned(given, **config).applied
    assert str(given) == before


def test_unshared_heads_are_nothing_to_speak_of() -> None:
    raised = quickly_canonical(attend(lambda x: x), randn(2, 4, 3, 16), randn(2, 4, 8, 16), randn(2, 4, 8, 16))
    assert not raised.refusals
    assert "attention[16]" not in raised.recognized()
