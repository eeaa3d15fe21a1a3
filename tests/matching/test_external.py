"""Other people's `PatternMatcherPass` objects, written against torch only, planned unmodified together with ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.errors import ConfigError
from fuseplan.matching import ExternalPass
from fuseplan.providers import PROFILES
from fuseplan.record import Report
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.matching.test_external_matches import replacing

aten = torch.ops.aten
W = torch.ones(HIDDEN, dtype=torch.bfloat16)


@torch.library.custom_op("others::add_relu", mutates_args=())
def add_relu(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


@torch.library.custom_op("others::relu_neg", mutates_args=())
def relu_neg(x: Tensor) -> Tensor:
    return -torch.relu(x)


add_relu.register_fake(lambda x, y: torch.empty_like(x))
relu_neg.register_fake(torch.empty_like)


def add_relu_call(x: Tensor, y: Tensor) -> Any:
    return torch.ops.others.add_relu(x, y)


def relu_neg_call(x: Tensor) -> Any:
    return torch.ops.others.relu_neg(x)


def add_relu_pass() -> PatternMatcherPass:
    return replacing("add_relu", lambda x, y: torch.relu(x + y), add_relu_call, 2)


def relu_neg_pass() -> PatternMatcherPass:
    return replacing("relu_neg", lambda x: -torch.relu(x), relu_neg_call, 1)


def both_passes(add: float, neg: float) -> list[ExternalPass]:
    """With what each of them saves, in us."""
    return [ExternalPass(matcher=add_relu_pass(), saving_us=add), ExternalPass(matcher=relu_neg_pass(), saving_us=neg)]


def fought_over(x: Tensor, y: Tensor) -> Tensor:
    """Both passes want the relu."""
    return -torch.relu(x + y)


def compiled(function: Callable[..., Any], passes: list[Any], **config: Any) -> tuple[Any, list[Report]]:
    torch._dynamo.reset()
    reports: list[Report] = []
    with torch._inductor.utils.fresh_cache(), torch.inference_mode():
        model = fuseplan.compile(function, config=PassConfig(**config), on_report=reports.append, passes=passes)
        return model(*inputs_of(function)), reports


def inputs_of(function: Callable[..., Any]) -> list[Tensor]:
    count = function.__code__.co_argcount
    return [torch.linspace(-2, 2, 16).reshape(4, 4) + i for i in range(count)]


def decided(graph: fx.Graph, external: Any) -> Any:
    """What is known and chosen of a graph, on an H200."""
    manager = PostGradPassManager(PassConfig(), passes=[external], device=PROFILES["h200"])
    analysis = manager.analyze(graph)
    return analysis, manager.decide(analysis, manager.config.chosen_policy, "graph_0")


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("add", "neg", "winner"), [(3.0, 1.0, "add_relu"), (1.0, 3.0, "relu_neg")])
def test_two_passes_that_fight_are_settled_by_what_they_save(
    swapped: bool, add: float, neg: float, winner: str
) -> None:
    passes = both_passes(add, neg)
    output, (report,) = compiled(fought_over, passes[::-1] if swapped else passes)
    torch.testing.assert_close(output, fought_over(*inputs_of(fought_over)))
    (graph,) = report.graphs
    assert [fusion.rule for fusion in graph.applied] == [winner]
    assert report.fused[winner] == 1
    (loss,) = graph.lost
    assert [each.rule for each in loss.blocked_by] == [winner]
    assert loss.lost_ns == 2000
    assert report.saved_us == 3.0


def test_independent_passes_all_join() -> None:
    def both(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.relu(x + y) * (-torch.relu(z))

    output, (report,) = compiled(both, [add_relu_pass(), relu_neg_pass()])
    torch.testing.assert_close(output, both(*inputs_of(both)))
    assert report.fused["add_relu"] == report.fused["relu_neg"] == 1
    assert report.saved_us > 0


def test_they_compete_with_rules() -> None:
    """Somebody's pass wants the pad that a rule wants too; who saves more gets it."""

    def padded(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(llama(x, None, weight)[0], (0, 8))

    other = replacing(
        "own_pad", lambda x: aten.constant_pad_nd.default(x, [0, 8], 0.0),
        lambda x: torch.cat([x, x.new_zeros(x.shape[0], 8)], -1), 1,
    )  # fmt: skip

    graph = post_grad(padded, randn(4, HIDDEN), W)
    for saving, winner in ((1000.0, "own_pad"), (0.001, "act_padding")):
        analysis, decision = decided(graph, ExternalPass(matcher=other, saving_us=saving))
        chosen = [analysis.problem.candidates[index].rule for index in decision.selected]
        assert chosen == [winner]


def test_procedural_and_chained_passes_stay_where_their_owner_put_them() -> None:
    calls: list[str] = []

    def first(graph: fx.Graph) -> None:
        calls.append(f"first {len(graph.find_nodes(op='call_function', target=aten.relu.default))}")

    def last(graph: fx.Graph) -> None:
        fused = graph.find_nodes(op="call_function", target=torch.ops.others.relu_neg.default)
        calls.append(f"last {len(fused)}")

    handler = PatternMatcherPass(pass_name="handler")

    @register_graph_pattern(CallFunction(torch.ops.others.relu_neg.default, Arg()), pass_dict=handler)
    def handle(match: Match, x: fx.Node) -> None:
        calls.append("handled")

    chained = replacing("chained", relu_neg_call, lambda x: torch.ops.others.relu_neg(x) + 0.0, 1)
    output, (report,) = compiled(fought_over, [first, relu_neg_pass(), handler, chained, last])
    torch.testing.assert_close(output, fought_over(*inputs_of(fought_over)))
    assert calls == ["first 1", "handled", "last 1"]
    assert report.fused["relu_neg"] == 1
    assert "handler" not in report.fused


def test_ordered_and_off_leave_them_alone() -> None:
    for policy in ("off", "ordered(act_padding)"):
        _, (report,) = compiled(fought_over, [add_relu_pass()], policy=policy)
        assert report.fused.get("add_relu", 0) == 0


def test_force_and_forbid_by_name() -> None:
    for config in ({"forbid": ["add_relu"]}, {"force": ["relu_neg"]}):
        _, (report,) = compiled(fought_over, both_passes(3.0, 1.0), **config)
        assert (report.fused["add_relu"], report.fused["relu_neg"]) == (0, 1)


def test_a_match_across_a_mutation_is_refused() -> None:
    def mutated(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        y.mul_(2)
        return torch.relu(total) + y

    given, expected = inputs_of(mutated), inputs_of(mutated)
    with torch._inductor.utils.fresh_cache(), torch.inference_mode():
        model = fuseplan.compile(mutated, passes=[add_relu_pass()])
        torch.testing.assert_close(model(*given), mutated(*expected))
    torch.testing.assert_close(given, expected)


def test_passes_are_part_of_the_cache_key() -> None:
    keys = {
        PostGradPassManager(PassConfig(), passes=passes).uuid()
        for passes in (
            [],
            [ExternalPass(matcher=add_relu_pass(), uuid="1")],
            [ExternalPass(matcher=add_relu_pass(), uuid="2")],
            [ExternalPass(matcher=relu_neg_pass(), uuid="1")],
            [ExternalPass(matcher=add_relu_pass(), uuid="1", saving_us=2.0)],
        )
    }
    assert None not in keys
    assert len(keys) == 5
    manager = PostGradPassManager(PassConfig(), passes=[ExternalPass(matcher=add_relu_pass(), uuid=lambda: "1")])
    assert manager.uuid() in keys


@pytest.mark.parametrize("wrap", [lambda matcher: matcher, lambda matcher: ExternalPass(matcher=matcher)])
def test_patterns_whose_owner_says_nothing_of_them_have_no_key(wrap: Callable[[Any], Any]) -> None:
    passes = [wrap(add_relu_pass())]
    first, second = (PostGradPassManager(PassConfig(), passes=passes) for _ in range(2))
    assert first.uuid() is None
    assert first == second
    assert first != PostGradPassManager(PassConfig(), passes=[wrap(add_relu_pass())])


def test_an_external_pass_needs_a_pattern_matcher_pass() -> None:
    with pytest.raises(ConfigError, match="isn't a PatternMatcherPass"):
        ExternalPass(matcher=lambda graph: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "fired"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_a_pass_whose_matches_overlap_each_other_conflicts_with_itself(length: int, fired: int) -> None:
    """cos of cos, in a chain of cosines: every two neighbours match, and no node can be in two of them."""

    def chain(x: Tensor) -> Tensor:
        for _ in range(length):
            x = torch.cos(x)
        return x

    pairs = replacing("pairs", lambda x: torch.cos(torch.cos(x)), relu_neg_call, 1)
    analysis, decision = decided(post_grad(chain, torch.randn(4, 4)), pairs)
    assert len(analysis.problem.candidates) == length - 1
    assert len(decision.selected) == fired
    assert all(lost.blocked_by for lost in decision.lost)
