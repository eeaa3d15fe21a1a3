"""Linear layers of few rows: which of them are read as one, where rules fire, and what they compute."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fuseplan.config import CompileRange
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.record import GraphReport, Reason
from fuseplan.rules.parts.linear import PART
from tests.helpers import all_reduce, llama, quickly_traced, randn
from tests.rules.planning import compiled_and_eager, fused
from tests.rules.planning import planned as planned_for

WIDTH = 64
ON: dict[str, Any] = {"fuse_merged_linear": True, "fuse_skinny_linear": True}


def weights(*features: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [randn(count, WIDTH, dtype=dtype, seed=index + 1) / 8 for index, count in enumerate(features)]


def recognized(function: Callable[..., Any], *inputs: Tensor, part: Any = PART) -> dict[str, int]:
    """How many of each op of linear layers there are."""
    counts = Counter[str]()
    for name, count in canonicalize(quickly_traced(function, *inputs), asked=(part,)).recognized().items():
        counts[name.split("[")[0]] += count
    return {name: count for name, count in counts.items() if "linear" in name}


def several(x: Tensor, *own: Tensor) -> list[Tensor]:
    return [F.linear(x, weight) for weight in own]


def mutated_between(x: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    y = F.linear(x, first)
    second.add_(1)
    return [y, F.linear(x, second)]


def product_read_twice(x: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    y = x.reshape(-1, WIDTH) @ first.T
    return [y.reshape(*x.shape[:-1], -1), y.sum(0), F.linear(x, second)]


READ: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, int]]] = {
    "one": (several, (32,), {"linear": 1}),
    "two": (several, (32, 16), {"linear_pair": 1}),
    "three": (several, (32, 16, 16), {"linear_triple": 1}),
    "five": (several, (32, 16, 16, 8, 8), {"linear_triple": 1, "linear_pair": 1}),
    "one of another input": (
        lambda x, first, second, third: [F.linear(x, first), F.linear(x.relu(), second), F.linear(x, third)],
        (32, 16, 8), {"linear": 1, "linear_pair": 1},
    ),
    "mutated between": (mutated_between, (32, 16), {"linear": 1}),
    "a computed weight": (
        lambda x, first, second: [F.linear(x, first), F.linear(x, second * 2)], (32, 16), {"linear": 1}
    ),
    "columns of weights, as in GPT-2": (lambda x, first, second: [x @ first, x @ second], (WIDTH, WIDTH), {}),
    "other views": (
        lambda x, first, second: [F.linear(x, first), F.linear(x.reshape(-1, WIDTH), second)],
        (32, 16), {"linear_pair": 1},
    ),
    "a product read twice": (product_read_twice, (32, 16), {"linear_pair": 1}),
    "one behind the other": (
        lambda x, first, *others: several(F.linear(x, first), *others), (WIDTH, 16, 16),
        {"linear": 1, "linear_pair": 1},
    ),
    "one bias for all": (
        lambda x, first, second: [
            torch.addmm(first[0, :1].clone(), x.reshape(-1, WIDTH), first.T), F.linear(x, second)
        ],
        (32, 16), {"linear": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 1, WIDTH)], ids=str)
def test_layers_that_read_one_input_are_one_op(case: str, shape: tuple[int, ...]) -> None:
    function, features, found = READ[case]
    assert recognized(function, randn(*shape), *weights(*features)) == found


def biased(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> list[Tensor]:
    return [F.linear(x, first, bias), F.linear(x, second)]


@pytest.mark.parametrize(
    ("function", "inputs", "found"),
    [
        (biased, (randn(3, WIDTH), *weights(32, 16), randn(32)), {"linear_pair": 1}),
        (lambda x, w, bias: torch.addmm(bias, x, w.T), (randn(3, WIDTH), *weights(32), randn(32)), {"linear": 1}),
        (lambda x, w, bias: torch.addmm(bias, x, w.T), (randn(3, WIDTH), *weights(32), randn(1)), {}),
        (several, [each.long() for each in (randn(3, WIDTH), *weights(32, 16))], {}),
        (several, (randn(3, 0), randn(32, 0), randn(16, 0)), {}),
    ],
    ids=["bias of one layer", "bias", "one number for all", "integers", "no width"],
)
def test_biases_are_inputs_and_layers_of_other_numbers_are_left(
    function: Callable[..., Any], inputs: Sequence[Tensor], found: dict[str, int]
) -> None:
    assert recognized(function, *inputs) == found
    assert not canonicalize(quickly_traced(function, *inputs)).recognized(), "nobody asked"


# Where rules fire.


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def layer(x: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Three layers of one input, two with an activation behind them, and one alone."""
    mixed = torch.cat([F.linear(x, weight) for weight in (q, k, v)], dim=-1)
    return F.linear(gated(mixed, gate, up), down) * 2


LAYER = (randn(3, WIDTH), *weights(32, 16, 16, 96, 96), randn(WIDTH, 96, seed=9) / 8)


planned = partial(planned_for, device="h200")


ALL = {"merged_linear_silu_and_mul": 1, "merged_linear_triple": 1, "skinny_linear": 1}
MERGED = {"merged_linear_pair": 1, "merged_linear_triple": 1}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (ON, ALL),
        ({}, ALL),
        ({"fuse_merged_linear": False}, {"skinny_linear": 1}),
        ({"fuse_merged_linear": False, "fuse_skinny_linear": False}, {}),
        (ON | {"forbid": ("merged_linear_silu_mul",)}, MERGED | {"skinny_linear": 1}),
        ({"policy": "ordered(merged_linear)"}, MERGED),
        (ON | {"policy": "off"}, {}),
    ],
)  # fmt: skip
def test_flags_and_policies_choose(config: dict[str, Any], found: dict[str, int]) -> None:
    assert fused(planned(quickly_traced(layer, *LAYER), **config)) == found


def of_tokens(tokens: Tensor, embedding: Tensor, *own: Tensor) -> list[Tensor]:
    return several(F.embedding(tokens, embedding), *own)


def decoding(tokens: int) -> fx.Graph:
    return quickly_traced(of_tokens, torch.zeros(tokens, dtype=torch.int64), randn(8, WIDTH), *weights(32, 16))


@pytest.mark.parametrize(
    ("tokens", "device", "compile_range", "found"),
    [
        (32, "h200", None, {"merged_linear_pair": 1}),
        (32, "h100", None, {"merged_linear_pair": 1}),
        (33, "h200", None, {}),
        (3, "a100", None, {}),
        (3, "cpu", None, {}),
        (3, "h200", CompileRange(start=1, end=32), {"merged_linear_pair": 1}),
        (3, "h200", CompileRange(start=1, end=33), {}),
    ],
)
def test_by_default_graphs_of_few_tokens_get_it_where_it_was_measured(
    tokens: int, device: str, compile_range: CompileRange | None, found: dict[str, int]
) -> None:
    report = planned(decoding(tokens), device=device, compile_range=compile_range)
    assert fused(report) == found
    assert [each for each in report.refusals if "linear" in str(each.rule)] == []


def test_rows_of_products_without_a_weight_do_not_count() -> None:
    """The angles of one sequence's rotary embedding: on a GPU Inductor makes a product of [1, 64, 1] @ [1, 1, 1]."""

    def rotated(tokens: Tensor, positions: Tensor, frequencies: Tensor, *own: Tensor) -> list[Tensor]:
        return [torch.mm(frequencies[:, None], positions[None].to(frequencies.dtype)), *of_tokens(tokens, *own)]

    graph = quickly_traced(
        rotated, torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), randn(64), randn(8, WIDTH),
        *weights(32, 16),
    )  # fmt: skip
    assert fused(planned(graph)) == {"merged_linear_pair": 1}


def test_by_default_rows_count_where_no_input_is_of_tokens() -> None:
    for rows, count in ((32, 1), (33, 0)):
        report = planned(quickly_traced(several, randn(rows, WIDTH), *weights(32, 16)))
        assert len(report.applied) == count
        assert bool(report.unfused_ns) is bool(count), "what can't be fused isn't contended for"


def test_gate_and_up_are_told_apart_in_either_order() -> None:
    def up_first(x: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        raised = F.linear(x, up)
        return F.silu(F.linear(x, gate)) * raised

    x, first, second = randn(3, WIDTH), *weights(32, 32)
    orders = (gated, (first, second), ["arg1_1", "arg2_1"]), (up_first, (second, first), ["arg2_1", "arg1_1"])
    for function, gate_and_up, names in orders:
        graph = quickly_traced(function, x, first, second)
        assert fused(planned(graph, **ON)) == {"merged_linear_silu_and_mul": 1}
        (node,) = graph.find_nodes(op="call_function", target=ops.merged_linear_silu_and_mul.implementation("triton"))
        assert [each.name for each in node.args[1:3]] == names
        got = ops.merged_linear_silu_and_mul(x, *gate_and_up, None, None, node.args[-1])
        torch.testing.assert_close(got, function(x, first, second))


def chunked(x: Tensor, both: Tensor, bias: Tensor | None = None) -> Tensor:
    """As Phi-3 has it."""
    gate, up = F.linear(x, both, bias).chunk(2, dim=-1)
    return up * F.silu(gate)


def sliced(x: Tensor, both: Tensor, bias: Tensor | None = None) -> Tensor:
    """As vLLM has it."""
    y = F.linear(x, both, bias)
    half = y.shape[-1] // 2
    return F.silu(y[..., :half]) * y[..., half:]


@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("function", [chunked, sliced])
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 1, WIDTH)], ids=str)
def test_gate_and_up_may_be_halves_of_one_layer(
    function: Callable[..., Any], shape: tuple[int, ...], is_biased: bool
) -> None:
    inputs = randn(*shape), *weights(96), *([randn(96, seed=7)] if is_biased else [])
    graph = quickly_traced(function, *inputs)
    (chosen,) = planned(graph, **ON).applied
    assert chosen.op == "linear_silu_and_mul"
    assert chosen.site_class == f"linear {WIDTH} -> 96 -> silu_and_mul bfloat16"
    assert chosen.saving_ns == pytest.approx(4300 + 1402 - 2200, abs=20)
    (node,) = graph.find_nodes(op="call_function", target=ops.linear_silu_and_mul.implementation("triton"))
    got = ops.linear_silu_and_mul(*inputs[:2], inputs[2] if is_biased else None, node.args[-1])
    torch.testing.assert_close(got, function(*inputs))


def gated_halves(halves: Callable[[Tensor], tuple[Tensor, ...]], more: Any = None) -> Callable[..., Any]:
    """Gate and up of one layer's result, and maybe more of it."""

    def function(x: Tensor, both: Tensor) -> Any:
        y = F.linear(x, both)
        gate, up = halves(y)
        return F.silu(gate) * up if more is None else (F.silu(gate) * up, more(y))

    return function


OTHER_HALVES = {
    "up before gate": gated_halves(lambda y: y.chunk(2, dim=-1)[::-1]),
    "gate as both": gated_halves(lambda y: (y.chunk(2, dim=-1)[0],) * 2),
    "read as a whole": gated_halves(lambda y: y.chunk(2, dim=-1), lambda y: y * 2),
    "halves of rows": gated_halves(lambda y: y.chunk(2, dim=0)),
    "interleaved": gated_halves(lambda y: (y[..., ::2], y[..., 1::2])),
    "unequal": gated_halves(lambda y: (y[..., :32], y[..., 64:])),
}


@pytest.mark.parametrize("case", OTHER_HALVES)
def test_a_layer_whose_halves_are_something_else_stays_alone(case: str) -> None:
    graph = quickly_traced(OTHER_HALVES[case], randn(4, WIDTH), *weights(96))
    assert fused(planned(graph, **ON)) == {"skinny_linear": 1}


def check_refused(report: GraphReport, rule: str, reason: Reason, says: str) -> None:
    """Triton's kernel is, for one reason, and nothing is applied."""
    assert not report.applied
    (refusal,) = [each for each in report.refusals if (each.rule, each.provider) == (rule, "triton")]
    assert refusal.reason is reason
    assert says in refusal.detail


@pytest.mark.parametrize(
    ("inputs", "reason", "says"),
    [
        ((randn(3, WIDTH, dtype=torch.float32), *weights(32, 16, dtype=torch.float32)), Reason.DTYPE, "x is float32"),
        ((randn(33, WIDTH), *weights(32, 16)), Reason.SIZE, "32 rows"),
        ((randn(3, WIDTH), randn(WIDTH, 32).T, *weights(16)), Reason.LAYOUT, "weight0 lie apart"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_by_name(
    inputs: tuple[Tensor, ...], reason: Reason, says: str
) -> None:
    check_refused(planned(quickly_traced(several, *inputs), **ON), "merged_linear", reason, says)


def check_computed(rule: str, model: Callable[..., Any], *given: Tensor) -> None:
    """What a model computes, compiled with one rule, which fires."""
    report, pairs = compiled_and_eager(model, *given, policy=f"ordered({rule})", fullgraph=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)
    assert report.fused[rule] >= 1


def test_a_layer_whose_result_is_reduced_through_moved_views(one_rank: str) -> None:
    """The all-reduce reads the layer's result itself, which in the graph only a view reads."""

    def function(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        reduced = all_reduce(F.linear(x, weight).transpose(0, 1), one_rank).transpose(0, 1)
        return llama(reduced, None, norm)[0]

    inputs = randn(2, 3, WIDTH), *weights(32), randn(32)
    graph = quickly_traced(function, *inputs)
    report = planned(graph, policy="ordered(allreduce_rms, skinny_linear)")
    assert fused(report) == {"all_reduce_rms_norm": 1, "skinny_linear": 1}
    assert report.rewritten


# With the norm behind them.

NORMED: dict[str, Any] = {"fuse_skinny_linear": True, "fuse_add_rms_norm": True}
APART = {"add_rms_norm": 1, "skinny_linear": 1}
TOGETHER = {"skinny_linear_add_rms_norm": 1}


def normed(x: Tensor, residual: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    return llama(F.linear(x, weight), residual, norm)


def of_rows(*leading: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return (
        randn(*leading, WIDTH, dtype=dtype), randn(*leading, 32, dtype=dtype, seed=1), *weights(32, dtype=dtype),
        randn(32, dtype=dtype, seed=2),
    )  # fmt: skip


def read_twice(x: Tensor, residual: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, weight)
    return *llama(y, residual, norm), y


BEHIND: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, int]]] = {
    "the layer's result first": (normed, NORMED, TOGETHER),
    "the residual first": (lambda x, residual, w, norm: llama(residual, F.linear(x, w), norm), NORMED, TOGETHER),
    "a residual of one row": (
        lambda x, residual, w, norm: llama(F.linear(x, w), residual[:1].expand_as(residual), norm), NORMED, TOGETHER
    ),
    "by default": (normed, {}, TOGETHER),
    "no layers": (normed, {"fuse_skinny_linear": False}, {"add_rms_norm": 1}),
    "forbidden": (normed, NORMED | {"forbid": ("skinny_linear_add_rms_norm",)}, APART),
    "ordered apart": (normed, {"policy": "ordered(add_rms_norm, skinny_linear)"}, APART),
    "ordered": (normed, {"policy": "ordered(skinny_linear_add_rms_norm)"}, TOGETHER),
    "read twice": (read_twice, NORMED, APART),
    "no residual": (
        lambda x, residual, w, norm: llama(F.linear(x, w), None, norm)[0] + residual, NORMED, {"skinny_linear": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_a_layer_is_one_op_with_the_norm_behind_it(case: str) -> None:
    function, config, found = BEHIND[case]
    assert fused(planned(quickly_traced(function, *of_rows(2, 1)), **config)) == found


@pytest.mark.parametrize(
    ("rule", "function", "given"),
    [
        ("merged_linear", layer, LAYER),
        ("merged_linear_silu_mul", layer, LAYER),
        ("merged_linear_silu_mul", chunked, (randn(3, WIDTH), *weights(96), randn(96, seed=7))),
        ("skinny_linear", layer, LAYER),
        ("skinny_linear_add_rms_norm", normed, of_rows(3, 1)),
    ],
)
def test_it_computes_what_the_model_does(rule: str, function: Callable[..., Any], given: tuple[Tensor, ...]) -> None:
    check_computed(rule, function, *given)


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        (lambda x, residual, weight, norm: (x, residual, weight, norm.float()), Reason.DTYPE, "norm_weight is float32"),
        (lambda *given: tuple(each.float() for each in given), Reason.DTYPE, "x is float32"),
    ],
)
def test_what_a_layer_with_a_norm_refuses(change: Callable[..., Any], reason: Reason, says: str) -> None:
    report = planned(quickly_traced(normed, *change(*of_rows(3, 1))), policy="ordered(skinny_linear_add_rms_norm)")
    assert "triton" not in {each.provider for each in report.applied}
    found = [(each.reason, each.detail) for each in report.refusals if each.provider in (None, "triton")]
    assert any(each is reason and says in detail for each, detail in found), found
