"""What is cut out around a component, and that it computes what it computes in the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.graph.facts import aten
from fuseplan.measurement.tuning.compiled import PRODUCED, argument_sets, at_size, compiled, producers, specs_of
from fuseplan.measurement.tuning.context import Context, context_of
from fuseplan.planner import Problem
from fuseplan.planner.alternatives import places_of
from fuseplan.verification.specs import Sizes
from tests.cached import arguments, layer
from tests.helpers import all_reduce, gpt_oss, post_grad, randn

WIDTH = 64
W = torch.linspace(0.5, 1.5, WIDTH).bfloat16()
M = randn(WIDTH + 8, WIDTH, seed=3)


def problem_of(function: Any, *inputs: Tensor, dynamic: bool = False) -> Problem:
    manager = PostGradPassManager(PassConfig())
    return manager.analyze(post_grad(function, *inputs, dynamic=dynamic)).problem


def context(given: Problem, component: int = 0) -> Context:
    members = given.components[component]
    return context_of(given, members, places_of(members, given.candidates))


def targets(graph: Any) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    y, total = gpt_oss((x @ M[:WIDTH]).tanh(), residual, W)
    return F.pad(y, (0, 8)).sigmoid() @ M, total


def test_a_component_is_cut_out_with_what_inductor_may_fuse_and_no_more() -> None:
    given = problem_of(block, randn(4, WIDTH), randn(4, WIDTH))
    found = [node.target for node in context(given).nodes]
    assert {aten.tanh.default, aten.rsqrt.default, aten.constant_pad_nd.default, aten.sigmoid.default} <= set(found)
    assert aten.mm.default not in found
    assert [node.target for node in context(given).outputs][-1] is aten.sigmoid.default
    assert len(context(given).outputs) == 2


def test_it_ends_where_another_component_begins() -> None:
    given = problem_of(lambda x, residual: block(*block(x, residual)), randn(4, WIDTH), randn(4, WIDTH))
    first, second = context(given, 0), context(given, 1)
    assert set(first.nodes).isdisjoint(second.nodes)
    assert first.text == second.text


def run(graph: Any, arguments: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.fx.Interpreter(at_size(graph, {})).run(*arguments))


def test_fused_or_not_it_computes_the_same() -> None:
    given = problem_of(block, randn(4, WIDTH), randn(4, WIDTH))
    part = context(given)
    (arguments, *_) = argument_sets(specs_of(part.fused(()), {}), 0)
    expected = run(part.fused(()), arguments)
    fused = part.fused([given.candidates[0].match])  # type: ignore[list-item]
    assert torch.ops.fuseplan.fused_add_rms_norm_pad.default in targets(fused)
    assert aten.constant_pad_nd.default not in targets(fused)
    for actual, wanted in zip(run(fused, arguments), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2**-6, atol=2**-6)
    # The model's own graph is as it was.
    assert torch.ops.fuseplan.fused_add_rms_norm_pad.default not in targets(part.canonical.original)


def test_symbolic_sizes_become_numbers() -> None:
    given = problem_of(block, randn(4, WIDTH), randn(4, WIDTH), dynamic=True)
    part, symbols = context(given), Sizes(given.canonical.graph).at(7)
    graph = part.fused(())
    specs = specs_of(graph, symbols)
    assert {spec.shape for spec in specs} == {(7, WIDTH), (WIDTH,)}
    (arguments, *_) = argument_sets(specs, 0)
    results = torch.fx.Interpreter(at_size(graph, symbols)).run(*arguments)
    assert {tuple(result.shape) for result in results} == {(7, WIDTH), (7, WIDTH + 8)}


def test_what_an_all_reduce_reads_is_produced_first_as_in_the_model(one_rank: str) -> None:
    def reduced(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, total = gpt_oss(all_reduce(x @ M[:WIDTH], one_rank), residual, W)
        return F.pad(y, (0, 8)), total

    given = problem_of(reduced, randn(4, WIDTH), randn(4, WIDTH))
    part = context(given)
    (name,) = part.produced
    assert name.startswith("mm")
    assert targets(at_size(part.fused(()), {}, part.produced).graph)[0] is PRODUCED
    assert targets(producers(part.fused(()), part.produced).graph) == [PRODUCED]
    read_only = problem_of(lambda x, r: gpt_oss(all_reduce(x, one_rank), r, W), randn(4, WIDTH), randn(4, WIDTH))
    if read_only.components:
        assert context(read_only).produced == frozenset()


def test_caches_are_written_in_place_as_in_the_model() -> None:
    given = problem_of(layer(read=lambda cache: cache[:, :, 0]), *arguments())
    part = context(given)
    assert [node.target for node in part.nodes].count(aten.copy_.default) == 2
    (match,) = [each.match for each in given.candidates if each.rule == "rope_cache"]
    shape = list(arguments()[3].shape)
    for matches in ((), (match,)):
        graph = part.fused(matches)  # type: ignore[arg-type]
        (inputs, *_) = argument_sets(specs_of(graph, {}), 0)
        caches = [each for each in inputs if list(each.shape) == shape]
        before = [each.clone() for each in caches]
        _, (code,) = run_and_get_code(lambda gm, own: compiled(gm, own)(*own), at_size(graph, {}), inputs)
        assert f"empty_strided_cpu({tuple(shape)}" not in code
        assert ("fuseplan.rope_cache_" in code) is bool(matches)
        assert len(caches) == 2
        assert not any(torch.equal(a, b) for a, b in zip(caches, before, strict=True))
