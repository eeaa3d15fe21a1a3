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
from fuseplan.record import GraphReport, Nearness, Reason, Refusal
from fuseplan.rules import Bindings
from fuseplan.verification.layout import significant_strides
from tests.attention import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    SHARED,
    SPELLINGS,
    attend,
    decode,
    hugging_face,
    inputs,
    on_gpu,
    tiled,
)
from tests.helpers import post_grad, quickly_canonical, quickly_traced, randn
from tests.rules.planning import planned

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
    return [fusion.provider for fusion in report.applied if fusion.rule == "grouped_attention"]


def run(graph: fx.Graph, *arguments: Tensor) -> Tensor:
    """Graphs take their inputs in the order in which they read them."""
    named = dict(zip(("q", "k", "v", "mask"), arguments, strict=False))
    shapes = {tuple(value.shape): value for value in named.values()}
    assert len(shapes) == len(named) - 1  # keys and values are alike, in this order
    given = []
    keys = iter((named["k"], named["v"]))
    for node in graph.find_nodes(op="placeholder"):
        shape = tuple(node.meta["val"].shape)
        given.append(next(keys) if shape == tuple(named["k"].shape) else shapes[shape])
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*given)[0]  # type: ignore[no-any-return]


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
    reasons = [(each.reason, each.mend) for each in report.refusals if each.rule == "grouped_attention"]
    assert reasons == [] if checked else [(Reason.SIZE, "torch._check that these lengths are equal")]


@pytest.mark.parametrize("masked", [True, False])
def test_causal_queries_keep_their_order(masked: bool) -> None:
    check_shared(attend(hugging_face, is_causal=not masked), "sdpa", *inputs(32, masked=masked), runs=masked)


def test_one_head_for_all_queries_is_shared_too() -> None:
    graph = quickly_traced(attend(lambda x: x.expand(-1, HEADS, -1, -1)), *inputs(shared=1))
    assert applied(planned(graph)) == ["sdpa_packed"]


def test_heads_that_are_repeated_in_part_are_shared_by_what_is_left() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check_shared(attention, "sdpa", *inputs(5))


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


# As traced for a GPU.


@pytest.mark.parametrize("device", ["h100", "h200", "b200"])
def test_cudnn_reads_unrepeated_heads_on_nvidia(device: str) -> None:
    graph = on_gpu(decode())
    before = called(graph, "cudnn")
    promised = before.meta["val"][0]
    report = planned(graph, device, force=("grouped_attention:sdpa",))
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


@pytest.mark.parametrize(("device", "where"), [("h100", "before torch 2.14"), ("mi300x", "on ROCm")])
def test_memory_efficient_attention_takes_packed_heads_alone(device: str, where: str) -> None:
    if device == "h100" and Shared("nvidia")(_bound("efficient")) is None:
        pytest.skip("this torch's takes shared heads")
    report = planned(on_gpu(decode(), "efficient"), device, forbid=("grouped_attention:triton",))
    assert applied(report) == ["sdpa_packed"]
    (declined,) = [each for each in report.refusals if each.provider == "sdpa"]
    assert declined.nearness is Nearness.DECLINED
    assert where in declined.detail


def _bound(kernel: str, **values: Any) -> Bindings:
    q, k, v, _ = inputs()
    mask = torch.zeros(3, 1, 1, 32, dtype=q.dtype)
    given = {"q": q, "k": k, "v": v, "mask": mask, "is_causal": False, "kernel": kernel, "scale": 1.0, **values}
    return Bindings("grouped_attention", given)


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (replace(Shared(), torch_version="2.13.0", is_rocm=False), Reason.PROVIDER),
        (replace(Shared(), torch_version="2.14.0", is_rocm=False), None),
        (replace(Shared(), torch_version="2.14.0", is_rocm=True), Reason.PROVIDER),
        (Shared("amd"), Reason.PROVIDER),
    ],
)
def test_memory_efficient_attention_by_version_and_device(check: Shared, reason: Reason | None) -> None:
    refusal = check(_bound("efficient"))
    assert (refusal.reason if refusal else None) is reason


@pytest.mark.parametrize("check", [Shared(), Packs()])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_heads_whose_elements_lie_apart_are_declined(check: Callable[[Any], Refusal | None], name: str) -> None:
    given = _bound("cpu")
    assert check(given) is None
    apart = getattr(given, name).repeat_interleave(2, dim=-1)[..., ::2]
    refusal = check(_bound("cpu", **{name: apart}))
    assert refusal is not None
    assert refusal.reason is Reason.LAYOUT
    assert f"strides of {name} are" in refusal.detail


@pytest.mark.parametrize("check", [Shared(), Packs()])
def test_the_kernel_of_another_device_is_declined(check: Callable[[Any], Refusal | None]) -> None:
    refusal = check(_bound("overrideable"))
    assert refusal is not None
    assert refusal.reason is Reason.PROVIDER


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"is_causal": True, "mask": None}, Reason.ATTRIBUTE),
        ({"q": torch.zeros(3, HEADS, 2, HEAD_DIM)}, Reason.SIZE),
        ({"mask": torch.zeros(3, 1, 2, 32)}, Reason.SIZE),
        ({"mask": torch.zeros(1, 1, 32)}, Reason.SIZE),
        ({"mask": torch.zeros(1, 32)}, None),
        ({"mask": torch.zeros(3, HEADS, 1, 32)}, None),
        ({"mask": None}, None),
    ],
)
def test_what_packing_takes(values: dict[str, Any], reason: Reason | None) -> None:
    refusal = Packs()(_bound("cudnn", **values))
    assert (refusal.reason if refusal else None) is reason


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
    "shared unlike": (lambda: traced(shared_unlike), Reason.ATTRIBUTE, "keys have 2 heads, 4 times each"),
    "heads that don't divide": (of_six_heads, Reason.SIZE, "6 query heads don't divide by 8 heads"),
    "a mask of truths": (masked_by_truths, Reason.DTYPE, ""),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_is_in_the_way_is_named(case: str) -> None:
    make, reason, detail = NEAR_MISSES[case]
    report = planned(make())
    assert not applied(report)
    (refusal,) = [each for each in report.refusals if each.rule == "grouped_attention"]
    assert refusal.reason is reason
    assert detail in refusal.detail
    assert case != "dropout" or refusal.mend == "call model.eval()"


# What stays as it is.


@pytest.mark.parametrize("config", [{"fuse_grouped_attention": False}, {"policy": "off"}])
def test_disabled_is_identity(config: dict[str, Any]) -> None:
    graph = decode()
    before = str(copy_graph(graph)[0])
    assert not applied(planned(graph, **config))
    assert str(graph) == before


def test_unshared_heads_are_nothing_to_speak_of() -> None:
    raised = quickly_canonical(attend(lambda x: x), randn(2, 4, 3, 16), randn(2, 4, 8, 16), randn(2, 4, 8, 16))
    assert not raised.refusals
    assert "attention[16]" not in raised.recognized()
