"""Attention that a model spells out: where it is raised and fused, what it computes, what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.surgery import copy_graph
from fuseplan.providers.attention import Packs, Spelled
from fuseplan.record import GraphReport, Nearness, Reason, Refusal
from fuseplan.rules import Bindings
from fuseplan.rules.families.attention import EagerAttention
from fuseplan.rules.parts.eager_attention.op import eager_attention_reference
from tests.attention import HEAD_DIM, HEADS, SHARED, SPELLINGS, attend, hugging_face, inputs, tiled
from tests.eager_attention import CAP, MODELS, PLAIN, SCALE, Eager, exact, online, unshared
from tests.helpers import post_grad, quickly_traced, randn
from tests.rules.planning import planned, providers_of, run

aten = torch.ops.aten
NARROW = (torch.bfloat16, torch.float16)
GIVEN = [randn(2, 4, 8, 16, seed=seed) for seed in range(3)]


def applied(report: GraphReport) -> list[str]:
    return providers_of(report, "eager_attention")


def raised(graph: fx.Graph) -> list[fx.Node]:
    canonical = canonicalize(graph)
    canonical.graph.lint()
    return canonical.calls(ops.eager_attention.overload)  # type: ignore[return-value]


# What is raised.


@pytest.mark.sampled
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_raised_whole(name: str, dtype: torch.dtype, queries: int) -> None:
    model = MODELS[name]
    (node,) = raised(model.graph(queries, dtype))
    q, k, v, mask, sinks, scale, softcap, rounding = node.args
    assert [each.meta["val"].shape for each in (q, k, v)] == [  # type: ignore[union-attr]
        (3, HEADS, queries, HEAD_DIM), (3, SHARED, 32, HEAD_DIM), (3, SHARED, 32, HEAD_DIM),
    ]  # fmt: skip
    assert isinstance(mask, fx.Node)
    assert mask.meta["val"].shape == (3, 1, queries, 32)
    assert (sinks is not None) == model.sinks
    assert (scale, softcap) == (SCALE, model.softcap)
    assert rounding == ("float32" if dtype is torch.float32 else "eager")
    assert node.graph.find_nodes(op="call_function", target=aten.bmm.default) == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("repeat", [*SPELLINGS.values(), unshared, tiled], ids=lambda each: each.__name__)
def test_heads_are_shared_in_every_spelling(repeat: Callable[[Tensor], Tensor], batch: int) -> None:
    (node,) = raised(Eager(repeat=repeat).graph(batch=batch))
    shared = HEADS if repeat in (unshared, tiled) else SHARED
    assert [each.meta["val"].shape[1] for each in node.args[:3]] == [HEADS, shared, shared]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODELS)
def test_softmaxes_are_read_as_inductor_prepares_them_on_cuda(name: str) -> None:
    model = MODELS[name]
    graph, arguments = online(model.graph()), model.inputs()
    assert len(raised(graph)) == 1
    assert graph.find_nodes(op="call_function", target=aten.amax.default) == []
    expected = run(graph, *arguments)
    report = planned(graph, verify="always", force=("eager_attention:torch",))
    assert applied(report) == ["torch"]
    torch.testing.assert_close(run(graph, *arguments), expected, rtol=2**-5, atol=2**-5)


def test_scales_may_divide_caps_be_products_and_keys_be_swapped_and_no_mask_is_needed() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (torch.tanh((q @ k.mT) / 4.0 * 0.5) * 2.0 + mask).softmax(-1) @ v

    q, k, v = GIVEN
    (node,) = raised(quickly_traced(model, q, k, v, randn(8, 8)))
    assert node.args[5:] == (0.25, 2.0, "eager")
    (node,) = raised(quickly_traced(lambda q, turned, v: (q @ turned).softmax(-1) @ v, q, k.mT.contiguous(), v))
    assert node.args[1].meta["val"].shape == k.shape  # type: ignore[union-attr]
    assert node.args[3] is None


@pytest.mark.parametrize("dynamic", [0, 2])
def test_the_batch_and_the_cache_may_be_symbols(dynamic: int) -> None:
    arguments = PLAIN.inputs(5, torch.float32)
    dims = {0: ((0, 0), (1, 0), (2, 0), (3, 0)), 2: ((1, 2), (2, 2), (3, 3))}[dynamic]
    for place, dim in dims:
        torch._dynamo.maybe_mark_dynamic(arguments[place], dim)
    graph = post_grad(PLAIN, *arguments)
    assert [node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], torch.SymInt)]
    report = planned(graph, verify="always")
    assert applied(report) == ["sdpa"]
    assert all(each.passed for each in report.verified)


# What it is fused by, and computes.


@pytest.mark.parametrize(
    ("queries", "dtype", "provider"),
    [(1, torch.float32, []), (5, torch.float32, ["sdpa"]), (1, torch.bfloat16, []), (5, torch.float16, ["sdpa"])],
)
def test_on_a_cpu_inductors_one_kernel_for_one_query_stays(
    queries: int, dtype: torch.dtype, provider: list[str]
) -> None:  # fmt: skip
    graph = PLAIN.graph(queries, dtype)
    assert applied(planned(graph, allow_rounding_changes=dtype is not torch.float32)) == provider


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "provider"), [(1, "sdpa_packed"), (5, "sdpa")])
def test_in_narrow_dtypes_rounding_has_to_be_allowed(dtype: torch.dtype, queries: int, provider: str) -> None:
    arguments = PLAIN.inputs(queries, dtype)
    graph = quickly_traced(PLAIN, *arguments)
    plain = run(graph, *arguments)
    if dtype in NARROW:
        refused = planned(copy_graph(graph)[0])
        assert not applied(refused)
        (said,) = [each for each in refused.refusals if each.provider == provider]
        assert (said.reason, said.fix) == (Reason.ROUNDING, "set allow_rounding_changes")
        how = "keeps scores and their softmax in float32, and the graph rounds both"
        assert said.detail == f"{provider}'s fused_attention {how}"

    force = (f"eager_attention:{provider}",)
    report = planned(graph, verify="always", allow_rounding_changes=dtype in NARROW, force=force)
    assert applied(report) == [provider]
    assert all(each.passed for each in report.verified)
    assert not graph.find_nodes(op="call_function", target=aten.bmm.default)
    if dtype is torch.float32:
        torch.testing.assert_close(run(graph, *arguments), plain, rtol=1e-5, atol=1e-5)
        return
    true = PLAIN(*(each.double() for each in arguments))
    off, own = ((each.double() - true).abs().max() for each in (run(graph, *arguments), plain))
    assert off <= own


@pytest.mark.parametrize("device", ["h100", "h200", "b200", "mi300x"])
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_gpus_have_the_split_kernel(name: str, queries: int, device: str) -> None:
    """With 32 keys, nothing is sure to be gained by it, so it is forced."""
    graph = MODELS[name].graph(queries)
    assert applied(planned(copy_graph(graph)[0], device)) == []
    report = planned(graph, device, allow_rounding_changes=True, force=("eager_attention:triton",))
    assert applied(report) == ["triton"]
    assert not graph.find_nodes(op="call_function", target=aten.bmm.default)


@pytest.mark.parametrize("name", MODELS)
def test_more_than_16_queries_are_left_alone_on_gpus(name: str) -> None:
    report = planned(MODELS[name].graph(17), "h100", allow_rounding_changes=True)
    assert applied(report) == []
    (detail,) = {each.detail for each in report.refusals if each.provider == "triton"}
    assert detail == "the kernel takes up to 16 query tokens; q has 17"


@pytest.mark.parametrize("name", ["capped", "sinks", "both"])
def test_torchs_kernels_have_neither_cap_nor_sinks(name: str) -> None:
    report = planned(MODELS[name].graph(1, torch.float32))
    assert applied(report) == []
    what = "soft-cap" if MODELS[name].softcap else "sinks"
    details = {each.detail for each in report.refusals if each.provider in ("sdpa", "sdpa_packed")}
    assert details == {f"torch's attention kernels have no {what}"}


@pytest.mark.parametrize("rounding", ["eager", "float32"])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_the_models(name: str, dtype: torch.dtype, rounding: str) -> None:
    model = MODELS[name]
    q, k, v, mask, *sinks = model.inputs(3, dtype)
    sink = sinks[0] if sinks else None
    actual = eager_attention_reference(q, k, v, mask, sink, SCALE, model.softcap, rounding)
    true = exact(q, k, v, mask, sink, SCALE, model.softcap)
    plain = model.both(q, k, v, mask, sink)[0]
    if rounding == "eager":
        torch.testing.assert_close(actual, plain, rtol=2**-7, atol=2**-7)
    off, own = ((each.double() - true).abs().max() for each in (actual, plain))
    assert off <= own * 1.5


# Near misses.


def missed(graph: fx.Graph, **config: Any) -> Refusal:
    report = planned(graph, **config)
    assert not applied(report)
    (refusal,) = [each for each in report.refusals if each.rule == "eager_attention"]
    return refusal


def scores_read_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.amax(-1)


def by_math(*arguments: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return attend(hugging_face)(*arguments)


def of_weights(step: Callable[[Tensor], Tensor]) -> fx.Graph:
    return Eager(weights=step).graph()


def in_another_dtype() -> fx.Graph:
    q, k, v, mask = PLAIN.inputs()
    return quickly_traced(PLAIN, q, k, v, mask.float())


NEAR_MISSES: dict[str, tuple[Callable[[], fx.Graph], Reason, str, str | None]] = {
    "weights that are asked for": (
        lambda: quickly_traced(PLAIN.both, *PLAIN.inputs()), Reason.USERS,
        "attention not recognised: the tensor of weights is returned from the graph, too",
        "leave output_attentions out",
    ),
    "a second reader of the scores": (
        lambda: quickly_traced(scores_read_too, *GIVEN), Reason.USERS,
        "the tensor of scores is also read by aten.amax.default", None,
    ),
    "dropout": (
        lambda: of_weights(lambda weights: F.dropout(weights, 0.1)), Reason.ATTRIBUTE,
        "attention not recognised: it drops some of its weights", "call model.eval()",
    ),
    "other ops on weights": (
        lambda: of_weights(lambda weights: weights * 2), Reason.OP,
        "aten.mul.Tensor stands between its weights and their product with values", None,
    ),
    "a mask of another dtype": (in_another_dtype, Reason.DTYPE, "queries, keys, values and terms added to", None),
    "math": (lambda: quickly_traced(by_math, *inputs()), Reason.OP, "", None),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_is_in_the_way_is_named(case: str) -> None:
    graph, reason, detail, fix = NEAR_MISSES[case]
    refusal = missed(graph())
    assert refusal.reason is reason
    assert detail in refusal.detail
    assert fix is None or refusal.fix == fix
    assert case != "math" or refusal.nearness is Nearness.UNRECOGNIZED


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (lambda scores: scores.clamp(-1, 1), "prims.convert_element_type"),
        (torch.tanh, "aten.tanh"),
        (lambda scores: scores + scores, "aten.mul|aten.add"),
        (lambda scores: scores.masked_fill(scores > 1, 0.0), "aten.where|aten.gt"),
        (lambda scores: scores + 1, "aten.add"),
    ],
)  # fmt: skip
def test_other_ops_on_scores_are_refused(step: Callable[[Tensor], Tensor], says: str) -> None:
    refusal = missed(Eager(scores=step).graph())
    assert refusal.reason in (Reason.OP, Reason.USERS)
    assert any(each in refusal.detail for each in says.split("|")), refusal.detail


def shifted(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


def capped_behind(scores: Tensor) -> Tensor:
    return torch.tanh(shifted(scores) / CAP) * CAP


@pytest.mark.parametrize("turned", [lambda keys: keys.transpose(2, 3), lambda keys: keys.mT.contiguous()])
@pytest.mark.parametrize(
    "model",
    [
        Eager(sinks=True, scores=shifted),
        Eager(scores=capped_behind),
        Eager(weights=lambda weights: weights.bool().to(weights.dtype)),
        Eager(weights=lambda weights: weights.to(torch.float8_e4m3fn).to(weights.dtype)),
    ],
    ids=["sinks beside shifted scores", "shifted scores capped", "weights as truths", "weights in fp8"],
)
def test_what_a_softmax_of_scores_does_not_do_is_refused(model: Eager, turned: Any) -> None:
    assert raised(replace(model, turned=turned).graph(dtype=torch.float32)) == []
    assert len(raised(Eager(scores=shifted).graph())) == 1, "before a mask is added"
    assert raised(quickly_traced(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, *GIVEN)) == []


def bound(**values: Any) -> Bindings:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    given = {
        "q": empty(2, 8, 1, 16), "k": empty(2, 2, 40, 16), "v": empty(2, 2, 40, 16), "mask": empty(2, 1, 1, 40),
        "sinks": None, "scale": 0.25, "softcap": None, "rounding": "float32",
    }  # fmt: skip
    changed = {name: empty(*value) if isinstance(value, tuple) else value for name, value in values.items()}
    return Bindings("eager_attention", {**given, **changed})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, None),
        ({"mask": (2, 1, 1, 1)}, None),
        ({"v": (2, 2, 41, 16)}, "attention reads 40 keys and 41 values"),
        ({"mask": (2, 1, 1, 39)}, "attention reads 40 keys and a mask of 39"),
    ],
)
def test_lengths_that_need_not_be_equal_are_refused(values: dict[str, Any], says: str | None) -> None:
    refusal = EagerAttention().check(bound(**values))
    assert (refusal.reason if refusal else None) is (Reason.SIZE if says else None)
    assert (says or "") in (refusal.detail if refusal else "")


@pytest.mark.parametrize(
    ("check", "values", "reason"),
    [
        (Spelled(), {}, None),
        (Spelled(Packs()), {}, None),
        (Spelled(), {"mask": None, "q": (2, 8, 30, 16)}, None),
        (Spelled(Packs()), {"q": (2, 8, 2, 16)}, Reason.SIZE),
        (Spelled(), {"v": (2, 2, 40, 24)}, Reason.SIZE),
        (Spelled(), {"mask": (1, 1, 40)}, Reason.SIZE),
        (Spelled(vendor="nvidia"), {}, Reason.PROVIDER),
        (Spelled(vendor="cpu"), {}, None),
    ],
)
def test_what_torchs_kernel_for_cpus_takes(check: Spelled, values: dict[str, Any], reason: Reason | None) -> None:
    refusal = check(bound(**values))
    assert (refusal.reason if refusal else None) is reason


# What stays as it is.
