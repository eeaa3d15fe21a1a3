"""One model under one setting, with and without fuseplan."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.exc import InductorError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import fuseplan
from fuseplan.errors import PlanError
from fuseplan.graph.facts import is_dense
from fuseplan.graph.surgery import is_sorted
from fuseplan.record import Reason, Report
from fuseplan.verification.layout import significant_strides
from tests.differential.errors import Exact, exactly, excess, same, widened
from tests.differential.program import Program
from tests.differential.recording import Recorded, copies, uncached
from tests.differential.settings import Setting


@dataclass
class Outcome:
    """What became of a model.

    Attributes:
        fused: applied fusions by rule.
        contradictory: whether what was forced contradicts itself.
        not_compiled: whether torch.compile fails on it without fuseplan, so that there is nothing to compare.
        problems: what is wrong, one line each.
    """

    fused: Counter[str] = field(default_factory=Counter)
    contradictory: bool = False
    not_compiled: bool = False
    problems: list[str] = field(default_factory=list)

    def add(self, reports: Iterable[Report]) -> None:
        """Counts what reports say was fused. Nothing may have gone wrong: all providers are right."""
        for report in reports:
            self.fused.update({rule: count for rule, count in report.fused.items() if count})
            for refusal in (each for graph in report.graphs for each in graph.refusals):
                if refusal.reason in (Reason.FAULT, Reason.VERIFICATION):
                    self.problems.append(f"{refusal.reason}: {refusal.rule or 'all'}: {refusal.detail}")


class Interpreted:
    """A recorded graph, interpreted before the passes and after them."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded

    @cached_property
    def before(self) -> list[list[Any]]:
        """What each call yields, and its arguments as they are afterwards."""
        return [_run(self.recorded.graph, call) for call in self.recorded.calls]

    @cached_property
    def exact(self) -> list[list[Any]]:
        """The same without rounding."""
        found = (exactly(fx.Interpreter(self.recorded.graph).run, call) for call in self.recorded.calls)
        return [[*results, *arguments] for results, arguments in found]

    def check(self, setting: Setting, rng: random.Random) -> Outcome:
        """Applies the passes to a copy of the graph and compares."""
        outcome, reports = Outcome(), list[Report]()
        graph, again = self.recorded.copy(), self.recorded.copy()
        text = str(graph)
        try:
            setting.manager(reports.append)(graph)
        except PlanError:
            outcome.contradictory = True
            if str(graph) != text:
                outcome.problems.append("a refused plan changed the graph")
            return outcome
        outcome.add(reports)
        setting.manager(shuffle=rng)(again)
        if str(again) != str(graph):
            outcome.problems.append("the order of rules and providers changed the plan")
        if not outcome.fused:
            if str(graph) != text:
                outcome.problems.append("nothing is fused, and the graph is another one")
            return outcome
        outcome.problems += _malformed(graph)
        if not outcome.problems:
            outcome.problems += self._differences(graph, setting)
        return outcome

    def _differences(self, graph: fx.Graph, setting: Setting) -> Iterator[str]:
        after = fx.GraphModule(self.recorded.graph, graph)
        is_exact = _rounds_as_before(graph, setting)
        for call, before, exact in zip(self.recorded.calls, self.before, self.exact, strict=True):
            yield from compare(_run(after, call, _StrictInterpreter), [before], exact, is_exact=is_exact)


def compare(
    actual: Sequence[Any], known: Sequence[Sequence[Any]], exact: Sequence[Any], *, is_exact: bool = False
) -> Iterator[str]:
    """What is wrong with results.

    Args:
        actual: the results.
        known: the same by ways that are right, the first of them with the dtypes that are expected.
        exact: the same without rounding.
        is_exact: whether results of low precision must be the same bit for bit.
    """
    for index, (result, truth, *right) in enumerate(zip(actual, exact, *known, strict=True)):
        first = right[0]
        if not isinstance(result, Tensor) or not isinstance(first, Tensor):
            if result != first:
                yield f"result {index} is {result}, not {first}"
        elif result.dtype is not first.dtype or result.shape != first.shape:
            yield f"result {index} is {result.dtype} {[*result.shape]}, not {first.dtype} {[*first.shape]}"
        elif not same(result, first):
            ratio = excess(result, truth, right)
            if ratio > 1:
                yield f"result {index}, {result.dtype} {[*result.shape]}, is {ratio:.3g} times as far off as it may be"
            elif is_exact and result.dtype.is_floating_point and result.dtype.itemsize < 4:
                moved = int((result.double() != first.double()).sum())
                yield f"result {index}, {result.dtype} {[*result.shape]}, is rounded differently in {moved} places"


class _StrictInterpreter(fx.Interpreter):
    """Compares what nodes yield with what their fake tensors say."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        fake = n.meta.get("val")
        if n.op == "call_function" and str(n.target).startswith("fuseplan."):
            for value, expected in zip(_tensors(result), _tensors(fake), strict=True):
                assert value.dtype is expected.dtype, f"{n.name} yields {value.dtype}, its fake says {expected.dtype}"
                assert value.is_contiguous() or not is_dense(expected), f"{n.name} isn't as contiguous as its fake"
                for size, known in zip(value.shape, expected.shape, strict=True):
                    assert not isinstance(known, int) or size == known, f"{n.name} yields a size {size}, not {known}"
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _run(
    graph: fx.GraphModule, call: Sequence[Any], interpreter: Callable[[fx.GraphModule], fx.Interpreter] = fx.Interpreter
) -> list[Any]:
    arguments = copies(call)
    with torch.no_grad():
        results = interpreter(graph).run(*arguments)
    return [*torch.utils._pytree.tree_leaves(results), *arguments]


def _malformed(graph: fx.Graph) -> list[str]:
    """What is wrong with a graph as a graph."""
    graph.lint()
    problems = [] if is_sorted(graph) else ["a node stands before one of its inputs, or there is a cycle"]
    problems += [f"{n.name} has no fake value" for n in _fused(graph) if "val" not in n.meta]
    return problems + [f"{node.name} is dead" for node in _fused(graph) if not node.users]


def _fused(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if str(node.target).startswith("fuseplan.")]


def _rounds_as_before(graph: fx.Graph, setting: Setting) -> bool:
    """Whether fused ops round where the graph did, bit for bit.

    That is so of references, but for SiLU, which has two formulas, and for norms of rows that don't lie in memory one
    after the other, whose elements are summed in another order.
    """
    fused = _fused(graph)
    inputs = [value for node in fused for source in node.all_input_nodes for value in _tensors(source.meta["val"])]
    plain = not {provider.name for provider in setting.providers} - {"mine"}
    return plain and all("silu" not in str(node.target) for node in fused) and all(map(is_dense, inputs))


def through_inductor(program: Program, setting: Setting, group: str) -> Outcome:
    """Compiles a program by Inductor with and without fuseplan, and compares results, arguments and buffers."""
    outcome, reports = Outcome(), list[Report]()
    options: dict[str, Any] = {"freezing": setting.freezing}
    try:
        plain = _runs(program, torch.compile(program.module(group), options=options))
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
        if program.marked == "unbacked":
            return through_inductor(replace(program, marked="dynamic"), setting, group)
        outcome.not_compiled = isinstance(error, InductorError)  # torch 2.11 has a few bugs that random models find
        if not outcome.not_compiled:
            raise
        return outcome
    compiled = fuseplan.compile(
        program.module(group), config=setting.config, rules=setting.rules, providers=setting.providers,
        passes=setting.passes, on_report=reports.append, options=options,
    )  # fmt: skip
    try:
        actual = _runs(program, compiled)
    except InductorError as error:
        outcome.contradictory = isinstance(error.inner_exception, PlanError)
        if not outcome.contradictory:
            raise
        return outcome
    outcome.add(reports)
    eager = _runs(program, program.module(group))
    with Exact():
        exact = _runs(program, program.module(group).double(), widened)
    for result, first, second, truth in zip(actual, plain, eager, exact, strict=True):
        outcome.problems += compare(result, [first, second], truth)
        outcome.problems += [
            f"result {index} has the strides {left.stride()}, not {right.stride()}"
            for index, (left, right) in enumerate(zip(result, first, strict=True))
            if isinstance(left, Tensor) and significant_strides(left) != significant_strides(right)
        ]
        if not outcome.fused and not all(map(same, result, first)):
            outcome.problems.append("nothing is fused, and the results are others")
    return outcome


def _runs(program: Program, module: Any, prepare: Callable[[Tensor], Tensor] = lambda value: value) -> list[list[Any]]:
    """For each run of a program its results, its arguments and the buffers as they are afterwards."""
    found = []
    with uncached(), torch.no_grad():
        for run in range(len(program.sizes)):
            arguments = [prepare(each) for each in program.inputs(run)]
            results = module(*arguments)
            found.append(copies([*results, *arguments, *module.buffers()]))
    return found
