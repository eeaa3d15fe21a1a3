"""Chosen fusions in the original graph: it computes what it did, and what isn't fused stays as it was."""

import operator
from collections.abc import Collection, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.layout import storage_of
from fuseplan.graph.surgery import copy_graph
from fuseplan.matching import Match, find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS, Provider, provider_of
from fuseplan.rewriting import apply
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import HIDDEN, all_reduce, llama, post_grad, quantize_rows, randn, written
from tests.rules.test_rules import arguments_of, rule_id

aten = torch.ops.aten
RULES = by_name(BUILT_IN_RULES)
W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()
INPUTS = {"x": randn(5, HIDDEN), "r": randn(5, HIDDEN, seed=1), "w": W}


def rewrite(graph: fx.Graph, rules: Sequence[Rule], provider: Provider = BUILT_IN_PROVIDERS[0]) -> list[Match]:
    """Applies every match of the rules by one provider, and returns them."""
    canonical = canonicalize(graph)
    chosen = list(find_matches(canonical, by_name(rules), [provider]).candidates)
    apply(canonical, chosen)
    return chosen


def run(graph: fx.Graph, inputs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return fx.Interpreter(fx.GraphModule({}, graph)).run(*inputs)


def check_values(graph: fx.Graph, inputs: Sequence[Tensor], new: Collection[fx.Node]) -> None:
    """What new nodes yield is what their fake values say."""

    def facts(value: Any) -> list[Any]:
        each = value if isinstance(value, tuple) else (value,)
        return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in each]

    class Checked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            real = super().run_node(n)
            if n in new:
                assert facts(n.meta["val"]) == facts(real), n.name
            return real

    with torch.no_grad():
        Checked(fx.GraphModule({}, graph)).run(*inputs)


def calls(graph: fx.Graph) -> list[str]:
    """Of what writes in place, the op that a functional call stands for."""
    functional = torch.ops.higher_order.auto_functionalized_v2
    called = (node for node in graph.nodes if node.op == "call_function")
    return [str(node.args[0] if node.target is functional else node.target) for node in called]


def check_rewritten(
    graph: fx.Graph, inputs: Sequence[Tensor], rules: Sequence[Rule], exact: bool = True
) -> list[Match]:
    (before, _), old = copy_graph(graph), set(graph.nodes)
    chosen = rewrite(graph, rules)
    graph.lint()
    expected, actual = run(before, inputs), run(graph, inputs)
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype is right.dtype
        assert left.shape == right.shape
        if exact:
            assert torch.equal(left.float(), right.float())
        else:
            torch.testing.assert_close(left, right, rtol=2**-7, atol=2**-7)
    check_values(graph, inputs, set(graph.nodes) - old)
    return chosen


def pattern_of(rule: Rule) -> tuple[fx.Graph, list[Tensor]]:
    """A graph of a rule's own pattern, in which all that it yields is read."""
    given = arguments_of(rule, torch.device("cpu"))[0]
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in given.items() if name not in tensors}

    def model(**values: Any) -> Any:
        results = rule.pattern(**values, **plain)
        return tuple(aten.alias.default(result) for result in results)

    return written(model, tensors), [*tensors.values()]


@pytest.mark.parametrize("rule", BUILT_IN_RULES, ids=rule_id)
def test_a_rules_own_pattern_becomes_its_op(rule: Rule, one_rank: str) -> None:
    graph, inputs = pattern_of(rule)
    readers = [node for node in graph.nodes if node.target is aten.alias.default]
    (match,) = check_rewritten(graph, inputs, [rule])
    assert match.rule is rule
    assert calls(graph).count(str(rule.op.implementation("torch"))) == 1
    parts = {str(node.target) for node in rule.calls if ops.of(node.target) is not None}
    assert parts.isdisjoint(calls(graph))
    assert [node for node in graph.nodes if node.target is aten.alias.default] == readers


def padded(x: Any, r: Any, w: Any) -> Any:
    """Two norms, each with a pad; the second adds what the first yields."""
    y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
    wide = ops.pad(y, 8)
    z, total = ops.fused_add_rms_norm(aten.slice.Tensor(wide, -1, 0, HIDDEN), total, w, 1e-5, "llama")
    return ops.pad(z, 8), aten.relu.default(y), total


def test_one_fusion_reads_what_another_yields() -> None:
    graph = written(padded, INPUTS)
    kept = {node for node in graph.nodes if node.target in (aten.relu.default, aten.slice.Tensor)}
    assert len(check_rewritten(graph, [*INPUTS.values()], RULES["act_padding"])) == 2
    fused = "fuseplan.fused_add_rms_norm_pad.default"
    unpadded = "aten.slice.Tensor"
    item = str(operator.getitem)
    # The first slice is the unpadded value; of the second norm nobody reads it, so that it isn't there.
    assert calls(graph) == [fused, item, item, unpadded, unpadded, fused, item, item, "aten.relu.default"]
    assert kept <= set(graph.nodes)


def test_what_is_not_chosen_stays_as_it_was() -> None:
    graph = written(padded, INPUTS)
    before, canonical = str(graph), canonicalize(graph)
    apply(canonical, [])
    assert str(graph) == before
    first, _ = find_matches(canonical, {"act_padding": RULES["act_padding"]}, BUILT_IN_PROVIDERS).candidates
    tail, raised = list(graph.nodes)[-6:], str(canonical.graph)
    apply(canonical, [first])
    assert list(graph.nodes)[-6:] == tail
    assert calls(graph).count("fuseplan.fused_add_rms_norm.default") == 1
    assert str(canonical.graph) == raised


def test_new_nodes_know_their_place_in_the_users_model_and_the_values_that_are_known() -> None:
    graph = written(padded, INPUTS)
    for node in graph.nodes:
        node.meta |= {"stack_trace": f"trace of {node.name}", "custom": {"of": node.name}, "seq_nr": 7}
    norms = list(graph.find_nodes(op="call_function", target=ops.fused_add_rms_norm.overload))
    old = {node.name: node.meta["val"] for node in graph.nodes}
    before = set(graph.nodes)
    matches = rewrite(graph, RULES["act_padding"])
    new = [node for node in graph.nodes if node not in before]
    assert {node.meta["stack_trace"] for node in new} == {f"trace of {norm.name}" for norm in norms}
    assert all(set(node.meta) == {"stack_trace", "custom", "val"} for node in new)
    fused = list(graph.find_nodes(op="call_function", target=ops.fused_add_rms_norm_pad.overload))
    for node, match in zip(fused, matches, strict=True):
        wide, _, total = match.outputs
        assert wide is not None
        assert total is not None
        assert all(found is old[each.name] for found, each in zip(node.meta["val"], (wide, total), strict=True))
    (view,) = [node for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor) if node.args[3] == -8]
    assert storage_of(view.meta["val"]) == storage_of(view.args[0].meta["val"])


@pytest.mark.parametrize(
    ("eps", "rounding", "pad", "count"),
    [(1e-5, "llama", 8, 1), (1e-5, "llama", 16, 2), (1e-6, "llama", 8, 2), (1e-5, "gpt_oss", 8, 2)],
)
def test_replacements_of_equal_values_are_traced_once(eps: float, rounding: str, pad: int, count: int) -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        first, second = ops.rms_norm(x, w, 1e-5, "llama"), ops.rms_norm(r, w, eps, rounding)
        return ops.pad(first, 8), ops.pad(second, pad)

    graph = written(model, INPUTS)
    canonical = canonicalize(graph)
    chosen = find_matches(canonical, {"act_padding": RULES["act_padding"]}, [BUILT_IN_PROVIDERS[0]]).candidates
    with mock.patch.object(Rule, "trace_replacement", autospec=True, side_effect=Rule.trace_replacement) as traced:
        apply(canonical, chosen)
    assert traced.call_count == count
    fused = graph.find_nodes(op="call_function", target=ops.rms_norm_pad.overload)
    assert [node.args[2:] for node in fused] == [(1e-5, "llama", 8), (eps, rounding, pad)]


def test_values_that_are_not_contiguous_are_computed_again() -> None:
    def model(x: Any, w: Any) -> Any:
        return ops.pad(ops.rms_norm(x, w, 1e-5, "llama"), 8), aten.relu.default(x)

    graph = written(model, {"x": INPUTS["x"], "w": W})
    (pad,) = graph.find_nodes(op="call_function", target=ops.pad.overload)
    with FakeTensorMode() as mode:
        pad.meta["val"] = mode.from_tensor(torch.empty(HIDDEN + 8, 5, dtype=torch.bfloat16).t())
    rewrite(graph, RULES["act_padding"])
    check_values(graph, [INPUTS["x"], W], graph.find_nodes(op="call_function", target=ops.rms_norm_pad.overload))
    assert all(isinstance(n.meta["val"], FakeTensor) for n in graph.nodes if n.op == "call_function")


def test_inputs_that_come_late_are_waited_for_and_nothing_else_moves() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y, total = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
        early = aten.relu.default(total)
        scale = aten.sum.default(aten.sigmoid.default(w))
        quantised = ops.static_scaled_fp8_quant(y, aten.to.dtype(scale, torch.float32), torch.float8_e4m3fn, "divide")
        return quantised, early, aten.neg.default(early)

    graph = written(model, INPUTS)
    check_rewritten(graph, [*INPUTS.values()], RULES["norm_quant"])
    item = str(operator.getitem)
    assert calls(graph) == [
        "aten.sigmoid.default", "aten.sum.default", "aten.to.dtype",
        "fuseplan.fused_add_rms_norm_static_fp8_quant.default", item, item, "aten.relu.default", "aten.neg.default",
    ]  # fmt: skip


def test_a_fused_op_stands_where_the_first_of_its_nodes_stood_without_what_nobody_reads() -> None:
    def model(x: Any, r: Any, w: Any) -> Any:
        y, _ = ops.fused_add_rms_norm(x, r, w, 1e-5, "llama")
        between = aten.neg.default(x)
        return ops.pad(y, 8), between

    graph = written(model, INPUTS)
    check_rewritten(graph, [*INPUTS.values()], RULES["act_padding"])
    assert calls(graph) == ["fuseplan.fused_add_rms_norm_pad.default", str(operator.getitem), "aten.neg.default"]


def test_a_provider_runs_its_own_overload() -> None:
    def kernel(x: Tensor, weight: Tensor, eps: float, rounding: str, right: int) -> Tensor:
        return F.pad(x + 1, (0, right))

    mine = provider_of("rewriting_test", {ops.rms_norm_pad: kernel}, cost=0.0)
    graph = written(lambda x, w: (ops.pad(ops.rms_norm(x, w, 1e-5, "llama"), 8),), {"x": INPUTS["x"], "w": W})
    rewrite(graph, RULES["act_padding"], mine)
    assert calls(graph) == ["fuseplan.rms_norm_pad.rewriting_test"]
    assert torch.equal(run(graph, [INPUTS["x"], W])[0], F.pad(INPUTS["x"] + 1, (0, 8)))


def test_fusions_that_are_cyclic_together_are_an_error(one_rank: str) -> None:
    def model(x: Any, w: Any) -> Any:
        a, b = (ops.all_reduce(op(x), one_rank) for op in (aten.sin.default, aten.cos.default))
        norms = [ops.rms_norm(a, aten.select.int(b, 0, 0), 1e-5, "llama")]
        return *norms, ops.rms_norm(b, aten.select.int(a, 0, 0), 1e-5, "llama"), w

    with pytest.raises(ValueError, match="cyclic"):
        rewrite(written(model, {"x": INPUTS["x"], "w": W}), RULES["allreduce_rms"])


@pytest.mark.parametrize("case", ["sliced", "reshaped", "sunk"])
def test_values_without_an_original_come_into_being(case: str, one_rank: str) -> None:
    """Case 3, vLLM #28841, and case 4, vLLM #48757: slices and reshapes that were moved out of the way."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        if case == "sliced":
            y, total = llama(all_reduce(x, one_rank)[..., :HIDDEN], r, w)
            return y, total, total * 2
        if case == "reshaped":
            return llama(all_reduce(x.reshape(-1, HIDDEN), one_rank).reshape(r.shape), r, w)
        y, total = llama(x, r, w)
        return F.pad(y.reshape(-1, HIDDEN), (0, 8)), total, y.relu()

    shapes = ((5, HIDDEN + 32), (5, HIDDEN)) if case == "sliced" else ((2, 3, HIDDEN),) * 2
    inputs = [*(randn(*shape, seed=seed) for seed, shape in enumerate(shapes)), W]
    graph = post_grad(model, *inputs)
    rule = "act_padding" if case == "sunk" else "allreduce_rms"
    assert len(check_rewritten(graph, inputs, RULES[rule], exact=False)) == 1
    assert sum("fuseplan" in each for each in calls(graph)) == 1


def test_what_another_fusion_yields_is_not_shared() -> None:
    """x is read by an activation, and yielded by a norm that adds; another activation computes it again."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        def dequantized(y: Tensor) -> Tensor:
            codes, scale = quantize_rows(y)
            return codes.float() * scale

        total = x + r
        first = dequantized(F.silu(total) * x)
        normed = dequantized(llama(total, None, w)[0])
        return first, normed, dequantized(F.silu(x + r) * r), total * 2

    inputs = list(INPUTS.values())
    graph = post_grad(model, *inputs)
    expected = run(copy_graph(graph)[0], inputs)
    chosen = rewrite(graph, [*RULES["norm_quant"], *RULES["act_quant"]])
    graph.lint()
    assert {match.rule.name for match in chosen} == {"norm_quant", "act_quant"}
    for got, wanted in zip(run(graph, inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-5, atol=2**-5)
