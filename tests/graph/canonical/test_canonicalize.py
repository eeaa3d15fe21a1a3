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
)

W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


def nodes(graph: CanonicalGraph, name: str) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=ops[name].overload))


def aten_left(graph: CanonicalGraph) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
@pytest.mark.parametrize("dynamic", [False, True])
def test_norms_with_and_without_residual(spelling: str, dynamic: bool) -> None:
    norm = SPELLINGS[spelling]

    def model(x: Tensor, weight: Tensor) -> Tensor:
        y, residual = norm(x, None, weight)
        y, residual = norm(y.relu(), residual, weight)
        y, residual = norm(y.sigmoid(), residual, weight)
        return y

    raised = quickly_canonical(model, randn(5, HIDDEN), W, dynamic=dynamic)
    assert raised.recognized() == {f"fused_add_rms_norm[{HIDDEN}]": 2, f"rms_norm[{HIDDEN}]": 1}
    assert not raised.refusals
    first = "llama" if spelling == "vllm" else CONVENTIONS[spelling]
    assert [node.args[3] for node in nodes(raised, "rms_norm")] == [first]
    # torch 2.11 leaves the residual of vLLM's spelling in float32.
    allowed = {"vllm", "vllm_fp32_residual"} if spelling == "vllm" else {CONVENTIONS[spelling]}
    assert {str(node.args[4]) for node in nodes(raised, "fused_add_rms_norm")} <= allowed
    assert not {"aten.rsqrt.default", "aten.mean.dim"} & aten_left(raised)
    raised.graph.lint()


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_float32_models(spelling: str) -> None:
    norm = SPELLINGS[spelling]

    def model(x: Tensor, weight: Tensor) -> Tensor:
        y, residual = norm(x, None, weight)
        return norm(y.relu(), residual, weight)[0]

    raised = quickly_canonical(model, randn(5, HIDDEN, dtype=torch.float32), W.float())
    assert raised.recognized() == {f"fused_add_rms_norm[{HIDDEN}]": 1, f"rms_norm[{HIDDEN}]": 1}
    expected = "gemma" if spelling == "gemma" else "llama"
    assert [node.args[3] for node in nodes(raised, "rms_norm")] == [expected]


def test_the_residual_is_the_shallower_addend_however_it_is_written() -> None:
    def model(x: Tensor, weight: Tensor, swap: bool) -> Tensor:
        block = x.relu().sigmoid()
        total = x + block if swap else block + x
        return llama(total, None, weight)[0] + total

    for swap in (False, True):
        raised = quickly_canonical(lambda x, w, swap=swap: model(x, w, swap), randn(5, HIDDEN), W)
        (norm,) = nodes(raised, "fused_add_rms_norm")
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


def test_layer_norm_and_plain_rsqrt_are_left_alone() -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, (HIDDEN,), weight) + x.abs().rsqrt()

    assert quickly_canonical(model, randn(5, HIDDEN), W).recognized() == {}


@pytest.mark.parametrize(
    ("epsilon", "mend"),
    [
        (torch.tensor(1e-6, dtype=torch.float64), "specialize_float"),  # what Dynamo makes of a dynamic Python float
        (torch.tensor(1e-6), "make epsilon a Python float"),
    ],
)
def test_an_epsilon_that_is_no_constant_is_named(epsilon: Tensor, mend: str) -> None:
    def model(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    raised = quickly_canonical(model, randn(5, HIDDEN), W, epsilon)
    assert raised.recognized() == {}
    assert [refusal.reason for refusal in raised.refusals] == [Reason.ATTRIBUTE]
    assert mend in str(raised.refusals[0].mend)


def test_the_original_graph_is_not_touched() -> None:
    graph = quickly_traced(
        lambda x, r, w: F.pad(vllm(x, r, w)[0], (0, 8)), randn(5, HIDDEN), randn(5, HIDDEN, seed=1), W
    )
    before = str(graph)
    raised = canonicalize(graph)
    assert raised.recognized() == {f"fused_add_rms_norm[{HIDDEN}]": 1, f"pad[{HIDDEN}]": 1}
    assert str(graph) == before


def test_silu_and_mul() -> None:
    raised = quickly_canonical(lambda g, u: F.silu(g) * u, randn(5, 32), randn(5, 32, seed=1))
    assert raised.recognized() == {"silu_and_mul[32]": 1}
    halves = quickly_canonical(lambda x: F.silu(x[..., :32]) * x[..., 32:], randn(5, 64))
    assert halves.recognized() == {"silu_and_mul[32]": 1}
    assert quickly_canonical(lambda g, u: F.silu(g) + u, randn(5, 32), randn(5, 32, seed=1)).recognized() == {}


def test_quantisation() -> None:
    scale = torch.tensor([0.02])
    for reciprocal, rounding in ((False, "divide"), (True, "multiply")):
        raised = quickly_canonical(lambda x, s, r=reciprocal: quantize(x, s, reciprocal=r), randn(5, 32), scale)
        (node,) = nodes(raised, "static_scaled_fp8_quant")
        assert node.args[2:] == (torch.float8_e4m3fn, rounding)
    alone = quickly_canonical(quantize_rows, randn(1, 1, 32))  # decoding: of a single row, the scale is one number
    assert alone.recognized() == {"dynamic_per_token_scaled_fp8_quant[32]": 1}
    raised = quickly_canonical(quantize_rows, randn(5, 32))
    (node,) = nodes(raised, "dynamic_per_token_scaled_fp8_quant")
    assert node.args[1:] == (torch.float8_e4m3fn, 1 / (448.0 * 512.0), 0.0, 0.0, None, "multiply")
    assert raised.recognized() == {"dynamic_per_token_scaled_fp8_quant[32]": 1}
    narrower = quickly_canonical(
        lambda x, s: (x.float() / s).clamp(-240.0, 240.0).to(torch.float8_e4m3fn), randn(5, 32), scale
    )
    assert narrower.recognized() == {}


@pytest.mark.parametrize(
    ("pad", "value", "count"),
    [((0, 8), 0.0, 1), ((8, 0), 0.0, 0), ((0, 8), 1.0, 0), ((0, 8, 0, 1), 0.0, 0), ((0, 0, 0, 1), 0.0, 0)],
)
def test_only_zeros_appended_to_rows_are_pads(pad: tuple[int, ...], value: float, count: int) -> None:
    raised = quickly_canonical(lambda x: F.pad(x.relu(), pad, value=value), randn(5, 32))
    assert raised.recognized().get("pad[32]", 0) == count


def test_case_3_a_slice_is_hoisted_over_the_all_reduce(one_rank: str) -> None:
    """vLLM #28841: a slice between the all-reduce and the norm hid the match. Hoisted, it shrinks the message too."""

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return llama(all_reduce(x, one_rank)[..., :HIDDEN], residual, weight)

    raised = quickly_canonical(model, randn(5, 96), randn(5, HIDDEN, seed=1), W)
    (reduce,) = nodes(raised, "all_reduce")
    assert reduce.args[0].target is aten.slice.Tensor  # type: ignore[union-attr]
    assert raised.recognized()[f"all_reduce[{HIDDEN}]"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_case_4_a_reshape_is_hoisted_over_the_all_reduce(one_rank: str, dynamic: bool) -> None:
    """vLLM #48757, TensorRT-LLM #14781: a reshape between them hid the match; the batch must not be baked in."""

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        flat = all_reduce(x.reshape(-1, HIDDEN), one_rank)
        return llama(flat.reshape(x.shape), residual, weight)

    raised = quickly_canonical(model, randn(3, 5, HIDDEN), randn(3, 5, HIDDEN, seed=1), W, dynamic=dynamic)
    (norm,) = nodes(raised, "fused_add_rms_norm")
    assert norm.args[0].target is ops.all_reduce.overload  # type: ignore[union-attr]


def test_what_is_read_elsewhere_or_not_exact_is_not_hoisted(one_rank: str) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        reduced = all_reduce(x, one_rank)
        return reduced[..., :8].relu(), reduced.sigmoid()

    (reduce,) = nodes(quickly_canonical(both, randn(5, 32)), "all_reduce")
    assert reduce.args[0].op == "placeholder"  # type: ignore[union-attr]
    (reduce,) = nodes(quickly_canonical(lambda x: all_reduce(x, one_rank).float(), randn(5, 32)), "all_reduce")
    assert reduce.args[0].op == "placeholder"  # type: ignore[union-attr]


def dequantized(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return codes.float() * scale


def grouped(x: Tensor) -> Tensor:
    groups = x.float().view(-1, 8)
    scale = groups.abs().amax(-1, keepdim=True).clamp(1e-4) / 448.0
    return (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: (dequantized(x), dequantized(x) * 2), {"dynamic_per_token_scaled_fp8_quant[32]": 1}),
        (lambda x: (grouped(x), grouped(x) * 2), {"per_token_group_fp8_quant[32]": 1}),
        # A view between is another shape of the results.
        (lambda x: (dequantized(x), dequantized(x.view(1, 5, 32))), {"dynamic_per_token_scaled_fp8_quant[32]": 2}),
    ],
)
def test_layers_that_quantise_one_value_each_by_itself_share_it(
    function: Callable[[Tensor], object], found: dict[str, int]
) -> None:
    raised = quickly_canonical(function, randn(5, 32))
    assert raised.recognized() == found
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


def test_noops_are_seen_through_only_when_asked() -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        y, _ = llama(x, None, weight)
        return F.pad(y.clone(), (0, 8))

    graph = quickly_traced(model, randn(5, HIDDEN), W)
    for see_through, expected in ((True, ops.rms_norm.overload), (False, aten.clone.default)):
        (pad,) = nodes(canonicalize(graph, see_through_noops=see_through), "pad")
        found = pad.args[0].target  # type: ignore[union-attr]
        assert found is expected or found is ops.rms_norm.overload


def test_a_new_node_is_as_deep_as_what_it_takes_the_place_of() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    shallow = graph.call_function(aten.relu.default, (x,))
    deep = graph.call_function(aten.add.Tensor, (graph.call_function(aten.neg.default, (shallow,)), x))
    graph.output((shallow, deep))
    canonical = CanonicalGraph.copy_of(graph)
    copies = {original: node for node, original in canonical.origin.items()}
    first = canonical.insert_before(copies[shallow], aten.sin.default, (copies[x],), None)
    second = canonical.insert_before(copies[deep], aten.sin.default, (first,), None)
    third = canonical.insert_before(second, aten.cos.default, (first,), None)
    canonical.replace(copies[deep], second)
    assert [canonical.depth(node) for node in (copies[x], copies[shallow], first, second, third)] == [0, 1, 1, 3, 3]


def test_a_copy_raises_others_as_it_was_raised_itself() -> None:
    graph = quickly_traced(lambda x, w: llama(x, None, w)[0], randn(5, HIDDEN), W)
    assert canonicalize(graph).raised_alike(graph).recognized() == {f"rms_norm[{HIDDEN}]": 1}
    assert CanonicalGraph.copy_of(graph).raised_alike(graph).recognized() == {}
    assert CanonicalGraph.copy_of(graph, canonicalize).raised_alike(graph).recognized() == {f"rms_norm[{HIDDEN}]": 1}


def refused(canonical: CanonicalGraph, **expected: object) -> None:
    (refusal,) = canonical.refusals
    assert {name: getattr(refusal, name) for name in expected} == expected


def test_what_is_in_the_way_is_named_with_what_should_be_there() -> None:
    graph = quickly_traced(lambda x: x.relu() * 2, randn(5, HIDDEN))
    relu = graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    relu.meta["stack_trace"], product = "", relu.next
    for expected, found in ((aten.tanh.default, "aten.relu.default"), (None, None)):
        canonical = CanonicalGraph.copy_of(graph)
        at = canonical.calls(aten.relu.default)[0], canonical.calls(aten.mul.Tensor)[0]
        Unraised(Reason.OP, "it is another", at[0], "write tanh", expected=expected).tell(
            canonical, ops.rms_norm, "RMSNorm", at=at, place=at[1]
        )
        wanted = str(expected) if expected is not None else None
        refused(canonical, reason=Reason.OP, op="rms_norm", detail="RMSNorm not recognised: it is another", found=found,
                expected=wanted, mend="write tanh", nodes=(relu.name,))  # fmt: skip
        assert set(canonical.unraised) == {*at}
    canonical = CanonicalGraph.copy_of(graph)
    x = canonical.graph.find_nodes(op="placeholder")[0]
    Unraised(Reason.OP, "", x, expected=aten.tanh.default).tell(canonical, ops.rms_norm, "", at=[x], place=x)
    refused(canonical, found=None, expected="aten.tanh.default")
    assert product.target == aten.mul.Tensor


def test_the_one_reader_of_a_value_is_that_or_says_who_else_reads_it() -> None:
    def reason(function: Callable[[Tensor], object]) -> tuple[Reason, str, str]:
        canonical = CanonicalGraph.copy_of(quickly_traced(function, randn(5, HIDDEN)))
        (value,) = canonical.calls(aten.relu.default)
        with pytest.raises(Unraised) as caught:
            only_reader(value, "the root")
        return caught.value.reason, caught.value.detail, caught.value.node.name

    canonical = CanonicalGraph.copy_of(quickly_traced(lambda x: x.relu().tanh(), randn(5, HIDDEN)))
    assert only_reader(canonical.calls(aten.relu.default)[0], "it") is canonical.calls(aten.tanh.default)[0]
    found = reason(lambda x: (y := x.relu(), y * 2))
    assert found == (Reason.USERS, "the root is returned from the graph, too", "relu")
    for function in (lambda x: ((y := x.relu()) * 2, y.tanh()), lambda x: ((y := x.relu()).tanh(), y * 2)):
        read = reason(function)
        assert read == (Reason.USERS, "the root is also read by aten.tanh.default (tanh)", "tanh")
    canonical = CanonicalGraph.copy_of(quickly_traced(lambda x: x.relu(), randn(5, HIDDEN)))
    value = canonical.calls(aten.relu.default)[0]
    canonical.graph.output_node().args = ((),)
    with pytest.raises(Unraised, match=r"^the root isn't read$") as caught:
        only_reader(value, "the root")
    assert (caught.value.reason, caught.value.node) == (Reason.DEAD, value)
