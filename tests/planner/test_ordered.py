"""`ordered` against the real thing: one PatternMatcherPass a rule, applied in sequence to the canonical graph."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._inductor.pattern_matcher import Match as InductorMatch
from torch._inductor.pattern_matcher import PatternMatcherPass, register_graph_pattern
from torch.nn import functional as F

from fuseplan.dialect.raising import canonicalize
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.surgery import erase_dead
from fuseplan.matching import compiled_pattern, find_matches
from fuseplan.planner.ordered import choose_in_order
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES
from tests.helpers import HIDDEN, SPELLINGS, all_reduce, quantize, quickly_traced, randn
from tests.workload_graphs import workload_graph

RULES = by_name(BUILT_IN_RULES)
W = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


def stack(layers: list[dict[str, Any]], group: str) -> Callable[..., Any]:
    """A stack in which each layer may have an all-reduce, a residual, a pad, a quantisation and further readers."""

    def model(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        residual, outputs = x, []
        for layer in layers:
            block = x.sigmoid()
            block = all_reduce(block, group) if layer["reduce"] else block
            y, total = SPELLINGS[layer["spelling"]](block, residual if layer["residual"] else None, weight)
            residual = total if layer["residual"] else residual
            if layer["pad"]:
                outputs.append(F.pad(y, (0, 8)))
            if layer["quant"]:
                outputs.append(quantize(y, scale))
            if layer["read"]:
                outputs.append(y.relu())
            x = y.cos()
        return x, residual, *outputs

    return model


def rewrite_with(canonical: CanonicalGraph, rule: Rule, taken: list[tuple[str, str]]) -> Callable[..., None]:
    """A handler for Inductor's pass that replaces a match as a rule does, if its other results allow it."""

    def handler(match: InductorMatch, *args: Any, **kwargs: Any) -> None:
        anchor = match.output_node()
        candidates = find_matches(canonical, {rule.name: (rule,)}, BUILT_IN_PROVIDERS).candidates
        ours = next((each for each in candidates if each.anchor is anchor), None)
        if ours is None:
            return
        traced = rule.trace_replacement(ours.values)
        mapping = {traced.inputs[name]: value for name, value in ours.values.items() if isinstance(value, fx.Node)}
        place = max((*mapping.values(), canonical.graph.find_nodes(op="placeholder")[-1])).next
        for node in traced.graph.nodes:
            if node.op == "call_function":
                with canonical.graph.inserting_before(place):
                    args = fx.map_arg(node.args, lambda source: mapping[source])
                    mapping[node] = canonical.graph.call_function(node.target, args)
                mapping[node].meta = dict(anchor.meta)
                canonical.region[mapping[node]] = canonical.region[anchor]
        for old, new in zip(ours.outputs, traced.outputs, strict=True):
            if old is not None:
                old.replace_all_uses_with(mapping[new])
        taken.append((rule.op.name, anchor.name))
        erase_dead(canonical.graph, ours.consumed)

    return handler


def really_apply(graph: fx.Graph, order: tuple[str, ...]) -> list[tuple[str, str]]:
    """What sequential `PatternMatcherPass.apply` takes."""
    canonical = canonicalize(graph)
    taken: list[tuple[str, str]] = []
    canonical.graph.owning_module = fx.GraphModule({}, canonical.graph)
    canonical.graph = canonical.graph.owning_module.graph
    for name in order:
        inductor_pass = PatternMatcherPass(pass_name=name)
        for rule in RULES[name]:
            expression = compiled_pattern(rule).expression
            register_graph_pattern(expression, pass_dict=inductor_pass)(rewrite_with(canonical, rule, taken))
        inductor_pass.apply(canonical.graph)
    return sorted(taken)


def emulated(graph: fx.Graph, order: tuple[str, ...], shuffle: int | None = None) -> list[tuple[str, str]]:
    canonical = canonicalize(graph)
    rules, providers = dict(RULES), list(BUILT_IN_PROVIDERS)
    if shuffle is not None:
        generator = random.Random(shuffle)
        items = [(name, tuple(generator.sample(members, len(members)))) for name, members in rules.items()]
        rules = dict(generator.sample(items, len(items)))
        generator.shuffle(providers)
    candidates = find_matches(canonical, rules, providers).candidates
    wanted = [match for match in candidates if match.rule.name in order]
    choice = choose_in_order(canonical.graph, wanted, order)
    assert len(choice.chosen) + len(choice.lost) + len(choice.cyclic) == len(wanted)
    for match, winners in choice.lost:
        assert winners, f"{match.rule.name} lost to nobody"
    return sorted((match.rule.op.name, match.anchor.name) for match in choice.chosen)


LAYER = st.fixed_dictionaries(
    {
        "reduce": st.booleans(),
        "residual": st.booleans(),
        "pad": st.booleans(),
        "quant": st.booleans(),
        "read": st.booleans(),
        "spelling": st.sampled_from(["llama", "gpt_oss", "vllm"]),
    }
)
INPUTS = (randn(5, HIDDEN), W, torch.tensor([0.02]))


@settings(
    max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(layers=st.lists(LAYER, min_size=1, max_size=4), data=st.data())
def test_random_stacks(layers: list[dict[str, Any]], data: st.DataObject, one_rank: str) -> None:
    graph = quickly_traced(stack(layers, one_rank), *INPUTS)
    order = tuple(data.draw(st.permutations(sorted(RULES))))
    expected = really_apply(graph, order)
    assert emulated(graph, order) == expected
    assert emulated(graph, order, shuffle=data.draw(st.integers(0, 99))) == expected


@pytest.mark.parametrize(("name", "tp"), [("gpt-oss-120b", 2), ("gpt-oss-120b:outer-reduce", 2), ("llama-3.1-8b", 4)])
def test_every_order_on_real_models(name: str, tp: int) -> None:
    with workload_graph(name, tp, 2) as graph:
        for order in itertools.permutations(("act_padding", "allreduce_rms", "allreduce_rms_padding")):
            taken = emulated(graph, order)
            assert taken
            assert taken == really_apply(graph, order)
