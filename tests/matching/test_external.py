"""Other people's `PatternMatcherPass` objects, written against torch only: what they match and when each of them runs,
on written graphs, and how they are planned, unmodified, together with ours.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    KeywordArg,
    ListOf,
    Match,
    MultiOutputPattern,
    PatternMatcherPass,
    RepeatedExpr,
    fwd_only,
    register_graph_pattern,
    register_replacement,
)

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.errors import ConfigError
from fuseplan.graph.facts import aten
from fuseplan.matching import ExternalMatch, ExternalPass
from fuseplan.matching.external import ChainedPass, as_external, external_of, find_external, run_pass
from fuseplan.providers import PROFILES
from fuseplan.record import Report
from tests.helpers import HIDDEN, llama, post_grad, randn, written

X, Y = torch.randn(4, 4), torch.randn(4, 4)
Model = Callable[[Any, Any], Any]


def replacing(
    name: str, search: Callable[..., Any], replacement: Callable[..., Any], count: int = 1, **options: Any
) -> PatternMatcherPass:
    result = PatternMatcherPass(pass_name=name)
    register_replacement(search, replacement, [torch.randn(4, 4) for _ in range(count)], fwd_only, result, **options)
    return result


def sigmoid(x: Tensor) -> Tensor:
    result: Tensor = aten.sigmoid(x)
    return result


def cos_of_sin(**options: Any) -> PatternMatcherPass:
    return replacing("cos_of_sin", lambda x: aten.cos(aten.sin(x)), lambda x: aten.tanh(aten.exp(x)), **options)


def of_tanh(name: str = "of_tanh") -> PatternMatcherPass:
    return replacing(name, lambda x: aten.neg(aten.tanh(x)), sigmoid)


def graph_of(model: Model) -> fx.Graph:
    return written(model, {"x": X, "y": Y})


def found(model: Model, *passes: PatternMatcherPass) -> list[ExternalMatch]:
    return [*find_external(graph_of(model), as_external(passes)).candidates]


def names(nodes: Sequence[fx.Node | None]) -> list[str]:
    return [node.name if node is not None else "" for node in nodes]


def cosine(x: Any, y: Any) -> Any:
    return aten.cos.default(aten.sin.default(x))


def cosines(x: Any, y: Any) -> Any:
    return aten.cos.default(aten.sin.default(x)), aten.cos.default(aten.sin.default(y))


def test_what_a_match_is() -> None:
    matcher = cos_of_sin()
    graph = graph_of(cosines)
    first, second = find_external(graph, as_external([matcher])).candidates
    assert (first.owner.matcher, first.owner.name) == (matcher, "cos_of_sin")
    assert (first.ordinal, second.ordinal) == (0, 1)
    assert names([first.anchor, second.anchor]) == ["cos_default", "cos_default_1"]
    assert names(first.consumed) == ["sin_default", "cos_default"]
    assert names(second.consumed) == ["sin_default_1", "cos_default_1"]
    assert first.emits == ("aten.exp.default", "aten.tanh.default")
    assert {node.name: name for node, name in second.variables.items()} == {"y": "x"}
    assert [node.name for node in first.arguments] == ["x"]
    assert names(first.outputs) == ["cos_default"]
    assert first.replacement.graph.find_nodes(op="call_function", target=aten.tanh.default)
    assert str(first.written_at).startswith("cos_of_sin.<locals>.<lambda> (test_external.py:")


@pytest.mark.parametrize("still", [True, False])
def test_a_match_is_applied_once_and_where_it_still_is_one(still: bool) -> None:
    graph = graph_of(cosine)
    (match,) = find_external(graph, as_external([cos_of_sin()])).candidates
    if not still:
        (sin,) = graph.find_nodes(op="call_function", target=aten.sin.default)
        sin.target = aten.exp.default
    assert match.apply() is still
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [aten.exp.default, aten.tanh.default if still else aten.cos.default]
    assert match.apply() is False, "its anchor is gone"


def test_what_the_owner_checks_is_asked() -> None:
    asked: list[Match] = []

    def extra_check(match: Match) -> bool:
        asked.append(match)
        return bool(match.kwargs["x"].name == "y")

    (match,) = found(cosines, cos_of_sin(extra_check=extra_check))
    assert (match.anchor.name, match.ordinal) == ("cos_default_1", 0)
    assert {each.kwargs["x"].name for each in asked} == {"x", "y"}


@pytest.mark.parametrize(("streams", "matches"), [((1, 1), 1), ((1, 2), 0), ((0, None), 1), ((None, 1), 0)])
def test_ops_of_different_streams_are_no_match(streams: tuple[int | None, ...], matches: int) -> None:
    """Where nothing is noted it is the first one."""
    graph = graph_of(cosine)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node, stream in zip(calls, streams, strict=True):
        if stream is not None:
            node.meta["custom"] = {"stream": stream}
    assert len(find_external(graph, as_external([cos_of_sin()])).candidates) == matches


@pytest.mark.parametrize("between", [False, True])
def test_ops_with_one_that_writes_between_them_are_no_match(between: bool) -> None:
    def model(x: Any, y: Any) -> Any:
        sin = aten.sin.default(x)
        if between:
            aten.neg_.default(y)
        cos = aten.cos.default(sin)
        aten.neg_.default(y)
        return cos, y, aten.cos.default(aten.sin.default(y))

    matches = found(model, cos_of_sin())
    assert [match.anchor.name for match in matches] == (
        ["cos_default_1"] if between else ["cos_default", "cos_default_1"]
    )
    assert [match.ordinal for match in matches] == [*range(len(matches))]


def test_a_match_that_would_make_a_cycle_is_none() -> None:
    def yielding(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        sin = aten.sin(x)
        return sin + y, sin

    matcher = replacing("cyclic", yielding, lambda x, y: (x * y, x), 2)

    def model(x: Any, y: Any) -> Any:
        sin = aten.sin.default(x)
        other = aten.sin.default(y)
        return aten.add.Tensor(sin, aten.cos.default(sin)), sin, aten.add.Tensor(other, x), other

    matches = found(model, matcher)
    assert {name for match in matches for name in names(match.consumed)} == {"sin_default_1", "add_tensor_1"}


def test_nodes_are_taken_once_by_a_pass() -> None:
    """Two of its patterns fit there, and end at different nodes."""

    def yielding(x: Tensor) -> tuple[Tensor, Tensor]:
        sin = aten.sin(x)
        return sin, aten.cos(sin)

    matcher = cos_of_sin()
    register_replacement(yielding, lambda x: (x, x * 2), [torch.randn(4, 4)], fwd_only, matcher)
    assert len(ExternalPass(matcher=matcher).entries) == 2

    matches = found(cosines, matcher)
    assert [match.ordinal for match in matches] == [0, 1]
    assert [names(match.consumed) for match in matches] == [
        ["sin_default", "cos_default"], ["sin_default_1", "cos_default_1"],
    ]  # fmt: skip


def test_a_node_at_which_one_pattern_is_no_match_is_held_against_the_next() -> None:
    """One that matches is enough."""
    matcher = cos_of_sin()
    register_replacement(lambda x: aten.cos(x), sigmoid, [torch.randn(4, 4)], fwd_only, matcher)  # noqa: PLW0108

    def model(x: Any, y: Any) -> Any:
        sin = aten.sin.default(x)
        aten.neg_.default(y)
        return aten.cos.default(sin), aten.cos.default(aten.exp.default(x)), aten.cos.default(aten.sin.default(x))

    assert [names(match.consumed) for match in found(model, matcher)] == [
        ["cos_default"], ["cos_default_1"], ["sin_default_1", "cos_default_2"],
    ]  # fmt: skip


# Which are planned, and what runs before and after.


def handler(name: str = "handler") -> PatternMatcherPass:
    result = PatternMatcherPass(pass_name=name)

    @register_graph_pattern(CallFunction(aten.exp.default, Arg()), pass_dict=result)
    def handle(match: Match, x: fx.Node) -> None:
        pass

    return result


def model_of_all(x: Any, y: Any) -> Any:
    return aten.cos.default(aten.sin.default(x)), aten.neg.default(aten.tanh.default(y)), aten.exp.default(x)


def test_a_pass_is_procedural_if_it_does_more_than_to_replace() -> None:
    assert not ExternalPass(matcher=cos_of_sin()).is_procedural
    both = cos_of_sin()
    for key, entries in handler().patterns.items():
        both.patterns[key].extend(entries)
    assert ExternalPass(matcher=both).is_procedural


def test_what_is_planned_and_what_runs_before_and_after() -> None:
    def first(graph: fx.Graph) -> None:
        """Somebody's."""

    def last(graph: fx.Graph) -> None:
        """Somebody's."""

    early, late = handler("early"), handler("late")
    passes = as_external([first, early, cos_of_sin(), last, late])
    external = find_external(graph_of(model_of_all), passes)
    assert [match.owner.name for match in external.candidates] == ["cos_of_sin"]
    assert external.before == (first, early.apply)
    assert external.after == (last, late.apply)


def test_a_pass_that_matches_what_an_earlier_one_puts_in_runs_after_it() -> None:
    graph = graph_of(model_of_all)
    external = find_external(graph, as_external([cos_of_sin(), of_tanh()]))
    assert [match.owner.name for match in external.candidates] == ["cos_of_sin"]
    (chained,) = external.after
    assert isinstance(chained, ChainedPass)
    assert [match.anchor.name for match in chained.matches(graph)] == ["neg_default"]
    chained(graph)
    assert graph.find_nodes(op="call_function", target=aten.sigmoid.default)
    assert not graph.find_nodes(op="call_function", target=aten.neg.default)


@pytest.mark.parametrize(
    ("model", "passes", "planned"),
    [
        (model_of_all, [of_tanh(), cos_of_sin()], ["of_tanh", "cos_of_sin"]),
        (lambda x, y: aten.neg.default(aten.tanh.default(y)), [cos_of_sin(), of_tanh()], ["of_tanh"]),
        (model_of_all, [], []),
    ],
    ids=["one that stands before it", "behind one that matches nothing", "no pass"],
)
def test_what_is_planned_itself(model: Model, passes: list[PatternMatcherPass], planned: list[str]) -> None:
    external = find_external(graph_of(model), as_external(passes))
    assert [match.owner.name for match in external.candidates] == planned
    assert external.before == external.after == ()


def test_what_holds_ops_together_chains_nothing() -> None:
    flat = replacing("flat", lambda x: aten.cos(aten.sin(x)), lambda x: aten.exp(x).reshape(16).reshape(4, 4))
    reshaped = replacing(
        "reshaped", lambda x: aten.tanh(aten.reshape(x, [16])), lambda x: aten.sigmoid(aten.reshape(x, [16]))
    )

    def model(x: Any, y: Any) -> Any:
        return aten.cos.default(aten.sin.default(x)), aten.tanh.default(aten.reshape.default(y, [16]))

    external = find_external(graph_of(model), as_external([flat, reshaped]))
    assert [match.emits for match in external.candidates] == [("aten.exp.default",)]
    assert external.after == ()


def by_hand(name: str, pattern: Any, search: Callable[..., Any]) -> PatternMatcherPass:
    """A pass of replacements with a pattern that its owner wrote."""
    result = replacing(name, search, sigmoid)
    for entries in result.patterns.values():
        for entry in entries:
            entry.pattern = pattern
    return result


TANH = CallFunction(aten.tanh.default, KeywordArg("x"))
WRITTEN = {
    "in a list": CallFunction(aten.cat.default, [TANH, TANH], 0),
    "an argument by name": CallFunction(aten.neg.default, 1, other=TANH),
    "one of several results": MultiOutputPattern([CallFunction(aten.neg.default, KeywordArg("x")), TANH]),
    "each of a list": CallFunction(aten.cat.default, ListOf(CallFunction(aten.neg.default, TANH)), 0),
    "repeated": RepeatedExpr(CallFunction(aten.neg.default, TANH)),
    "one of several overloads": CallFunction([aten.sin.default, aten.tanh.default], KeywordArg("x")),
}


@pytest.mark.parametrize("place", WRITTEN)
def test_an_op_anywhere_in_a_pattern_chains_it(place: str) -> None:
    chained = by_hand("chained", WRITTEN[place], lambda x: aten.neg(aten.abs(x)))
    other = by_hand("other", CallFunction(aten.neg.default, KeywordArg("x")), lambda x: aten.neg(aten.abs(x)))
    graph = graph_of(cosine)
    external = find_external(graph, as_external([cos_of_sin(), chained, other]))
    assert [each.owner.name for each in external.after if isinstance(each, ChainedPass)] == ["chained"]
    assert len(external.after) == 1


# What is a pass.


def test_what_a_match_may_save_is_nothing_or_a_finite_number() -> None:
    for saving in (True, 0, -1.5, 3, None):
        assert ExternalPass(matcher=cos_of_sin(), saving_us=saving).saving_us is saving
    for refused in (float("inf"), float("nan"), "3", [1]):
        with pytest.raises(ConfigError, match="allowed are None and finite numbers of microseconds"):
            ExternalPass(matcher=cos_of_sin(), saving_us=refused)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="isn't a PatternMatcherPass"):
        ExternalPass(matcher=lambda graph: None)  # type: ignore[arg-type]


def test_what_a_pass_is_called() -> None:
    assert ExternalPass(matcher=cos_of_sin(), name="mine").name == "mine"
    assert ExternalPass(matcher=PatternMatcherPass()).name == "external"


def test_passes_are_taken_as_they_are() -> None:
    def function(graph: fx.Graph) -> None:
        """Somebody's."""

    matcher, wrapped = cos_of_sin(), ExternalPass(matcher=of_tanh())
    first, second, third = as_external([matcher, wrapped, function])
    assert isinstance(first, ExternalPass)
    assert (first.matcher, second, third) == (matcher, wrapped, function)
    assert as_external(function) == (function,)  # type: ignore[arg-type]
    assert as_external(()) == ()
    with pytest.raises(ConfigError, match="pass 3 is neither a PatternMatcherPass, an ExternalPass nor a function"):
        as_external([function, 3])
    with pytest.raises(ConfigError, match="two passes are named 'of_tanh'; wrap them as ExternalPass"):
        as_external([cos_of_sin(), wrapped, of_tanh()])


def test_a_pass_that_asks_is_told_whether_it_is_inference() -> None:
    calls: list[Any] = []

    def asking(graph: fx.Graph, is_inference: bool) -> None:
        calls.append((graph, is_inference))

    graph = graph_of(model_of_all)
    run_pass(asking, graph)
    run_pass(calls.append, graph)
    assert calls == [(graph, True), graph]


def test_the_pass_that_an_object_keeps() -> None:
    matcher = cos_of_sin()
    for uuid in ({"uuid": "7"}, {}):
        owner = SimpleNamespace(patterns=3, inner=matcher, other=of_tanh(), **uuid)
        kept = external_of(owner, ["missing", "patterns", "inner", "other"], "mine")
        assert kept is not None
        assert (kept.matcher, kept.name, kept.uuid) == (matcher, "mine", uuid.get("uuid"))
    assert external_of(owner, ["missing", "patterns"], "mine") is None


# How they are planned.


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
