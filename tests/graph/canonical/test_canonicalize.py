"""Norms, all-reduces, activations and quantisations as they occur after Inductor's post-grad passes."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical.unraised import Unraised, only_reader
from fuseplan.graph.canonical.view import CanonicalGraph
from fuseplan.graph.facts import aten
from fuseplan.record import Reason
from tests.helpers import (
    CONVENTIONS,
    HIDDEN,
    SPELLINGS,
    all_reduce,
    llama,
    quantize,
    quantize_rows,
    quickly_canonical,
    quickly_traced,
    randn,
    vllm,
    written,
)

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


def nodes(graph: CanonicalGraph, name: str) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=ops[name].overload))


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
)
def test_norms_with_and_without_residual(spelling: str, dtype: torch.dtype, dynamic: bool) -> None:
    norm = SPELLINGS[spelling]

    def model(x: Tensor, weight: Tensor) -> Tensor:
        y, residual = norm(x, None, weight)
        y, residual = norm(y.relu(), residual, weight)
        y, residual = norm(y.sigmoid(), residual, weight)
        return y

    raised = quickly_canonical(model, randn(5, HIDDEN, dtype=dtype), W.to(dtype), dynamic=dynamic)
    assert raised.recognized() == {f"fused_add_rms_norm[{HIDDEN}]": 2, f"rms_norm[{HIDDEN}]": 1}
    assert not raised.refusals
    if dtype is torch.float32:
        first, allowed = "gemma" if spelling == "gemma" else "llama", {"gemma", "llama"}
    else:
        first = "llama" if spelling == "vllm" else CONVENTIONS[spelling]
        # torch 2.11 leaves the residual of vLLM's spelling in float32.
        allowed = {"vllm", "vllm_fp32_residual"} if spelling == "vllm" else {CONVENTIONS[spelling]}
    assert [node.args[3] for node in nodes(raised, "rms_norm")] == [first]
    assert {str(node.args[4]) for node in nodes(raised, "fused_add_rms_norm")} <= allowed
    left = {str(node.target) for node in raised.graph.nodes if node.op == "call_function"}
    assert not {"aten.rsqrt.default", "aten.mean.dim"} & left
    raised.graph.lint()


@pytest.mark.parametrize("swap", [False, True])
def test_the_residual_is_the_shallower_addend_however_it_is_written(swap: bool) -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        block = x.relu().sigmoid()
        total = x + block if swap else block + x
        return llama(total, None, weight)[0] + total

    (norm,) = nodes(quickly_canonical(model, randn(5, HIDDEN), W), "fused_add_rms_norm")
    assert norm.args[1].op == "placeholder"  # type: ignore[union-attr]


def test_two_norms_of_one_sum_share_the_add() -> None:
    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return llama(total, None, weight)[0], llama(total, None, weight * 2)[0]

    raised = quickly_canonical(model, randn(5, HIDDEN), randn(5, HIDDEN, seed=1), W)
    assert raised.recognized() == {f"fused_add_rms_norm[{HIDDEN}]": 1, f"rms_norm[{HIDDEN}]": 1}


def test_dead_residual_has_no_node() -> None:
    raised = quickly_canonical(lambda x, r, w: llama(x, r, w)[0], randn(5, HIDDEN), randn(5, HIDDEN, seed=1), W)
    (norm,) = nodes(raised, "fused_add_rms_norm")
    assert [user.args[1] for user in norm.users if user.target is operator.getitem] == [0]


@pytest.mark.parametrize(
    "model", [lambda x, w: F.layer_norm(x, (HIDDEN,), w) + x.abs().rsqrt(), lambda x, w: F.silu(x) + w]
)
def test_what_computes_something_else_is_left_alone(model: Callable[..., object]) -> None:
    assert quickly_canonical(model, randn(5, HIDDEN), W).recognized() == {}


@pytest.mark.parametrize(
    ("epsilon", "fix"),
    [
        (torch.tensor(1e-6, dtype=torch.float64), "specialize_float"),  # what Dynamo makes of a dynamic Python float
        (torch.tensor(1e-6), "make epsilon a Python float"),
    ],
)
def test_an_epsilon_that_is_no_constant_is_named(epsilon: Tensor, fix: str) -> None:
    def model(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    raised = quickly_canonical(model, randn(5, HIDDEN), W, epsilon)
    assert raised.recognized() == {}
    assert [refusal.reason for refusal in raised.refusals] == [Reason.ATTRIBUTE]
    assert fix in str(raised.refusals[0].fix)


def test_the_original_graph_is_not_touched() -> None:
    graph = quickly_traced(
        lambda x, r, w: F.pad(vllm(x, r, w)[0], (0, 8)), randn(5, HIDDEN), randn(5, HIDDEN, seed=1), W
    )
    before = str(graph)
    raised = canonicalize(graph)
    assert raised.recognized() == {f"fused_add_rms_norm[{HIDDEN}]": 1, f"pad[{HIDDEN}]": 1}
    assert str(graph) == before


@pytest.mark.parametrize("function", [lambda g, u: F.silu(g) * u, lambda g, u: F.silu(g[:, :32]) * g[:, 32:]])
def test_silu_and_mul(function: Callable[..., object]) -> None:
    raised = quickly_canonical(function, randn(5, 64), randn(5, 64, seed=1))
    assert [name.partition("[")[0] for name in raised.recognized()] == ["silu_and_mul"]


def test_quantisation_of_one_row() -> None:
    """Decoding: the scale is one number."""
    raised = quickly_canonical(quantize_rows, randn(1, 1, 32))
    assert raised.recognized() == {"dynamic_per_token_scaled_fp8_quant[32]": 1}


@pytest.mark.parametrize(
    ("pad", "value", "count"),
    [((0, 8), 0.0, 1), ((8, 0), 0.0, 0), ((0, 8), 1.0, 0), ((0, 8, 0, 1), 0.0, 0), ((0, 0, 0, 1), 0.0, 0)],
)
def test_only_zeros_appended_to_rows_are_pads(pad: tuple[int, ...], value: float, count: int) -> None:
    raised = quickly_canonical(lambda x: F.pad(x.relu(), pad, value=value), randn(5, 32))
    assert raised.recognized().get("pad[32]", 0) == count


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("view", "width"), [("slice", 96), ("view", HIDDEN)])
def test_cases_3_and_4_a_view_is_hoisted_over_the_all_reduce(
    view: str, width: int, dynamic: bool, one_rank: str
) -> None:
    """vLLM #28841: a slice between the all-reduce and the norm hid the match; hoisted, it shrinks the message too.
    vLLM #48757, TensorRT-LLM #14781: so did a reshape; the batch must not be baked in.
    """

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        reduced = all_reduce(x.reshape(-1, width), one_rank)
        return llama(reduced[..., :HIDDEN] if view == "slice" else reduced.reshape(x.shape), residual, weight)

    rows = (15,) if view == "slice" else (3, 5)
    given = randn(*rows, width), randn(*rows, HIDDEN, seed=1), W
    raised = quickly_canonical(model, *given, dynamic=dynamic)
    (norm,) = nodes(raised, "fused_add_rms_norm")
    assert norm.args[0].target is ops.all_reduce.overload  # type: ignore[union-attr]
    assert raised.recognized()[f"all_reduce[{HIDDEN}]"] == 1


@pytest.mark.parametrize(
    "behind", [lambda reduced: (reduced[..., :8].relu(), reduced.sigmoid()), lambda reduced: reduced.float()]
)
def test_what_is_read_elsewhere_or_not_exact_is_not_hoisted(behind: Callable[[Tensor], object], one_rank: str) -> None:
    (reduce,) = nodes(quickly_canonical(lambda x: behind(all_reduce(x, one_rank)), randn(5, 32)), "all_reduce")
    assert reduce.args[0].op == "placeholder"  # type: ignore[union-attr]


def dequantized(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return codes.float() * scale


@pytest.mark.parametrize("viewed", [False, True])
def test_layers_that_quantise_one_value_each_by_itself_share_it(viewed: bool) -> None:
    """A view between is another shape of the results."""

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return dequantized(x), dequantized(x.view(1, 5, 32)) if viewed else dequantized(x) * 2

    raised = quickly_canonical(model, randn(5, 32))
    assert raised.recognized() == {"dynamic_per_token_scaled_fp8_quant[32]": 1 + viewed}
    raised.graph.lint()


@pytest.mark.parametrize("dynamic", [False, True])
def test_reshapes_sink_below_pads_and_quants(dynamic: bool) -> None:
    def model(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y, _ = llama(x, None, weight)
        flat = y.reshape(-1, HIDDEN)
        return F.pad(flat, (0, 8)), quantize(flat, scale), *quantize_rows(flat)

    raised = quickly_canonical(model, randn(3, 5, HIDDEN), W, torch.tensor([0.02]), dynamic=dynamic)
    for name in ("pad", "static_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant"):
        (node,) = nodes(raised, name)
        assert node.args[0].target is ops.rms_norm.overload  # type: ignore[union-attr]
    raised.graph.lint()


@pytest.mark.parametrize("asked", [True, False])
def test_noops_are_seen_through_only_when_asked(asked: bool) -> None:
    graph = written(lambda x: ops.pad(aten.clone.default(x), 8), {"x": randn(5, HIDDEN)})
    (pad,) = nodes(canonicalize(graph, see_through_noops=asked), "pad")
    assert (pad.args[0].op == "placeholder") is asked  # type: ignore[union-attr]


def test_a_copy_raises_others_as_it_was_raised_itself() -> None:
    graph = quickly_traced(lambda x, w: llama(x, None, w)[0], randn(5, HIDDEN), W)
    assert canonicalize(graph).raised_alike(graph).recognized() == {f"rms_norm[{HIDDEN}]": 1}
    assert CanonicalGraph.copy_of(graph).raised_alike(graph).recognized() == {}
    assert CanonicalGraph.copy_of(graph, canonicalize).raised_alike(graph).recognized() == {f"rms_norm[{HIDDEN}]": 1}


@pytest.mark.parametrize(
    ("expected", "named"),
    [(aten.tanh.default, ("aten.tanh.default", "aten.relu.default")), (None, (None, None))],
)
def test_what_is_in_the_way_is_named_with_what_should_be_there(
    expected: object, named: tuple[str | None, str | None]
) -> None:
    canonical = CanonicalGraph.copy_of(quickly_traced(lambda x: x.relu() * 2, randn(5, HIDDEN)))
    x, relu, product, _ = canonical.graph.nodes
    why = Unraised(Reason.OP, "it is another", relu, "write tanh", expected=expected)
    why.tell(canonical, ops.rms_norm, "RMSNorm", at=[relu, product], place=product)
    (refusal,) = canonical.refusals
    assert (refusal.reason, refusal.op, refusal.fix) == (Reason.OP, "rms_norm", "write tanh")
    assert (refusal.detail, refusal.nodes) == ("RMSNorm not recognised: it is another", (relu.name,))
    assert (refusal.expected, refusal.found) == named
    assert {*canonical.unraised} == {relu, product}
    Unraised(Reason.OP, "", x, expected=aten.tanh.default).tell(canonical, ops.pad, "", at=[x], place=x)
    assert canonical.unraised[x].found is None, "no op"


@pytest.mark.parametrize(
    ("function", "reason", "detail", "at"),
    [
        (lambda x: (y := x.relu(), y * 2), Reason.USERS, "the root is returned from the graph, too", "relu"),
        (lambda x: ((y := x.relu()) * 2, y.tanh()), Reason.USERS, "also read by aten.tanh.default (tanh)", "tanh"),
        (lambda x: ((y := x.relu()).tanh(), y * 2), Reason.USERS, "also read by aten.tanh.default (tanh)", "tanh"),
        (lambda x: x.relu(), Reason.DEAD, "the root isn't read", "relu"),
    ],
)
def test_what_several_or_none_read_has_no_one_reader(
    function: Callable[[Tensor], object], reason: Reason, detail: str, at: str
) -> None:
    canonical = CanonicalGraph.copy_of(quickly_traced(function, randn(5, HIDDEN)))
    (value,) = canonical.calls(aten.relu.default)
    if reason is Reason.DEAD:
        canonical.graph.output_node().args = ((),)
    with pytest.raises(Unraised) as caught:
        only_reader(value, "the root")
    assert (caught.value.reason, caught.value.node.name) == (reason, at)
    assert caught.value.detail.endswith(detail)


def test_the_one_reader_of_a_value() -> None:
    canonical = CanonicalGraph.copy_of(quickly_traced(lambda x: x.relu().tanh(), randn(5, HIDDEN)))
    (tanh,) = canonical.calls(aten.tanh.default)
    assert only_reader(canonical.calls(aten.relu.default)[0], "it") is tanh
