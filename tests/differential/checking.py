"""A graph under one setting, interpreted with and without fuseplan."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fuseplan.errors import PlanError
from fuseplan.graph.facts import is_dense
from fuseplan.graph.surgery import is_sorted
from fuseplan.record import Reason, Report
from tests.differential.errors import exactly, excess, same
from tests.differential.layout import Layout, copies, strides_of
from tests.differential.recording import Lowered, Recorded, lower, modules_of, owner
from tests.differential.settings import COUPLED_RULES, Setting, coupling_broken

NUDGES = 3
"""Times that arguments are changed by their last bit, to see what that does to results."""


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
            self.fused.update(+Counter(report.fused))
            for refusal in (each for graph in report.graphs for each in graph.refusals):
                if refusal.reason in (Reason.FAULT, Reason.VERIFICATION):
                    self.problems.append(f"{refusal.reason}: {refusal.rule or 'all'}: {refusal.detail}")


class Seen(NamedTuple):
    """What a caller sees of a call.

    Attributes:
        values: copies of its results and of whatever it may write to.
        layout: how these lie in memory.
    """

    values: list[Any]
    layout: Layout

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Seen":
        """What is seen of values now."""
        return cls(copies(values), Layout.of(values))


class Interpreted:
    """A recorded graph, interpreted before the passes and after them."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded

    @cached_property
    def before(self) -> list["Seen"]:
        """What each call yields, and its arguments as they are afterwards."""
        return [_run(self.recorded.graph, call) for call in self.recorded.calls]

    @cached_property
    def lowered(self) -> list["Seen"]:
        """The same of the graph that Inductor makes of it without fuseplan."""
        module = owner(self.recorded.copy())
        lower(module)
        return [_run(module, call, Lowered) for call in self.recorded.calls]

    @cached_property
    def promised(self) -> list[Layout]:
        """Layouts of `before`, with the strides of the graph's own fake results, which a caller is given. Inductor has
        made an `addmm` of some sums, whose results may lie otherwise, before fuseplan sees the graph.
        """
        output = next(iter(reversed(self.recorded.graph.graph.nodes)))
        fakes = [each.meta.get("val") for each in torch.utils._pytree.tree_leaves(output.args) if hasattr(each, "meta")]
        sizes = [size for fake in fakes if isinstance(fake, Tensor) for size in (*fake.shape, *fake.stride())]
        if not all(isinstance(size, int) for size in sizes):
            return [each.layout for each in self.before]
        own = [strides_of(fake) if isinstance(fake, Tensor) else None for fake in fakes]
        return [
            replace(each.layout, strides=(*own, *each.layout.strides[len(own) :])) if len(own) <= len(each.values) else
            each.layout for each in self.before
        ]  # fmt: skip

    def nudged(self, call: Sequence[Any]) -> list[list[Any]]:
        """What a call yields for arguments of which each number is off by up to one unit in the last place."""
        random_signs = torch.Generator().manual_seed(0)

        def nudge(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2:
                return value
            off = 2 * torch.rand(value.shape, generator=random_signs, dtype=torch.float64) - 1
            changed = value.double() * (1 + torch.finfo(value.dtype).eps * off)
            return torch.empty_like(value).copy_(changed)

        return [_run(self.recorded.graph, [nudge(each) for each in copies(call)]).values for _ in range(NUDGES)]

    @cached_property
    def exact(self) -> list[list[Any]]:
        """The same without rounding."""
        found = (exactly(fx.Interpreter(self.recorded.graph).run, call) for call in self.recorded.calls)
        return [[*results, *arguments] for results, arguments in found]

    def check(self, setting: Setting, rng: random.Random) -> Outcome:
        """Applies the passes to a copy of the graph and compares."""
        outcome, reports = Outcome(), list[Report]()
        graph, again = self.recorded.copy(), self.recorded.copy()
        before, after = _texts(graph), list[str]()
        try:
            for module in modules_of(owner(graph)):
                setting.manager(reports.append)(module.graph)
                module.recompile()
        except PlanError:
            outcome.contradictory = True
            if not reports and _texts(graph) != before:
                outcome.problems.append("a refused plan changed the graph")
            return outcome
        outcome.add(reports)

        def shuffled(part: fx.Graph) -> None:
            setting.manager(shuffle=rng)(part)
            after.append(str(part))

        inductor = self.lowered  # torch's own failures are not ours
        try:
            lower(owner(again), shuffled)
        except Exception as error:  # noqa: BLE001 - whatever torch says of a graph that fuseplan has made
            outcome.problems.append(f"Inductor refuses the graph: {type(error).__name__}: {error}")
            return outcome
        if after != _texts(graph):
            outcome.problems.append("the order of rules and providers changed the plan")
        if setting.rules == COUPLED_RULES:
            outcome.problems += coupling_broken(setting, self.recorded.copy())
        if not outcome.fused:
            if after != before and setting.function is None:
                outcome.problems.append("nothing is fused, and the graph is another one")
            return outcome
        outcome.problems += [problem for each in modules_of(owner(graph)) for problem in _malformed(each.graph)]
        if not outcome.problems:
            outcome.problems += self._differences(graph, again, inductor, setting)
        return outcome

    def _differences(
        self, graph: fx.Graph, lowered: fx.Graph, inductor: Sequence[Seen], setting: Setting
    ) -> Iterator[str]:
        module, is_exact = owner(graph), _rounds_as_before(graph, setting)
        for call, before, plain, exact, promised in zip(
            self.recorded.calls, self.before, inductor, self.exact, self.promised, strict=True
        ):
            for seen, right in (
                (_run(module, call, _StrictInterpreter), [before]),
                (_run(owner(lowered), call, Lowered), [plain, before]),
            ):
                known = [each.values for each in right]
                problems = list(compare(seen.values, known, exact, is_exact=is_exact))
                if problems:
                    # Where codes of fp8 are between norms of few elements, the last bit of an argument moves results by
                    # more than ways of rounding do that happen to agree.
                    problems = list(compare(seen.values, [*known, *self.nudged(call)], exact, is_exact=is_exact))
                yield from problems
                yield from seen.layout.differences(*(each.layout for each in right), promised)


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
) -> Seen:
    arguments = copies(call)
    with torch.no_grad():
        results = interpreter(graph).run(*arguments)
    return Seen.of([*torch.utils._pytree.tree_leaves(results), *arguments])


def _texts(graph: fx.Graph) -> list[str]:
    return [str(module.graph) for module in modules_of(owner(graph))]


def _malformed(graph: fx.Graph) -> list[str]:
    """What is wrong with a graph as a graph."""
    graph.lint()
    problems = [] if is_sorted(graph) else ["a node stands before one of its inputs, or there is a cycle"]
    problems += [f"{n.name} has no fake value" for n in _fused(graph) if "val" not in n.meta]
    return problems + [f"{node.name} is dead" for node in _fused(graph) if not node.users]


def _fused(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if str(node.target).startswith("fuseplan.")]


def _all_fused(graph: fx.Graph) -> list[fx.Node]:
    return [node for module in modules_of(owner(graph)) for node in _fused(module.graph)]


def _rounds_as_before(graph: fx.Graph, setting: Setting) -> bool:
    """Whether fused ops round where the graph did, bit for bit.

    That is so of references, but for SiLU, which has two formulas, and for norms of rows that don't lie in memory one
    after the other, whose elements are summed in another order.
    """
    fused = _all_fused(graph)
    inputs = [value for node in fused for source in node.all_input_nodes for value in _tensors(source.meta["val"])]
    plain = not {provider.name for provider in setting.providers} - {"mine", "limited"}
    return plain and all("silu" not in str(node.target) for node in fused) and all(map(is_dense, inputs))
