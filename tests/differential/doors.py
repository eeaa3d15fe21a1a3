"""A model under one setting, compiled by `fuseplan.compile` and by `torch.compile`, and used by a caller."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import fuseplan
from fuseplan.errors import FuseplanWarning, PlanError
from fuseplan.record import Report
from tests.differential.checking import Outcome, Seen, compare
from tests.differential.errors import Exact, same, widened
from tests.differential.program import Program
from tests.differential.recording import interpreted, uncached
from tests.differential.settings import Setting
from tests.differential.uses import Session, Steps


def through_doors(program: Program, setting: Setting, steps: Steps, group: str, *, coded: bool) -> Outcome:
    """Compiles a program with and without fuseplan, and compares what a caller sees of it.

    Args:
        program: a model.
        setting: what it is compiled with.
        steps: what its caller does.
        group: the name of a process group of one rank.
        coded: whether Inductor makes code of its graphs; otherwise they are interpreted after its passes.
    """
    outcome = Outcome()
    options: dict[str, Any] = {"freezing": setting.freezing and coded}
    try:
        plain, usual = _played(program, steps, group, lambda module: torch.compile(module, options=options), coded)
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
        if program.marked == "unbacked":
            return through_doors(replace(program, marked="dynamic"), setting, steps, group, coded=coded)
        outcome.not_compiled = isinstance(error, InductorError)  # torch 2.11 has a few bugs that random models find
        if not outcome.not_compiled:
            raise
        return outcome
    compiler = Compiler(setting, options)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual, found = _played(program, steps, group, compiler, coded)
    except Exception as error:  # noqa: BLE001 - whatever torch says of a graph that fuseplan has made
        outcome.contradictory = isinstance(getattr(error, "inner_exception", error), PlanError)
        if not outcome.contradictory:
            outcome.problems.append(f"{type(error).__name__}: {str(error)[:400]}")
        return outcome
    outcome.add(compiler.reports)
    warned = [str(each.message) for each in caught if issubclass(each.category, FuseplanWarning)]
    if found.eager > usual.eager and not any("eager" in text for text in warned):
        outcome.problems.append(f"{found.eager} frames run eagerly, under torch.compile {usual.eager}")
    # With an epsilon of its own a second model may be traced twice, so that the epsilon becomes a constant.
    if not setting.config.compile_ranges and "epsilon" not in program.source and found.graphs > usual.graphs:
        outcome.problems.append(f"{found.graphs} graphs are compiled, by torch.compile {usual.graphs}")
    if steps[-1] == "another" and "epsilon" in program.source:
        outcome.problems += compiler.unequal()
    eager, _ = _played(program, steps, group, lambda module: module, coded)
    with Exact():
        session = Session(program, lambda: program.module(group).double(), lambda module: module, widened)
        exact = session.play(steps)
    for result, first, second, truth in zip(actual, plain, eager, exact, strict=True):
        outcome.problems += compare(result.values, [first.values, second.values], truth.values)
        outcome.problems += result.layout.differences(first.layout, second.layout)
        if not outcome.fused and not all(map(same, result.values, first.values)):
            outcome.problems.append("nothing is fused, and the results are others")
    return outcome


class Compiler:
    """Compiles modules by `fuseplan.compile`, one like the other, and has all reports in one list.

    Attributes:
        reports: in the order in which they came.
        starts: how many there were when each module was compiled.
    """

    def __init__(self, setting: Setting, options: dict[str, Any]) -> None:
        self.setting, self.options = setting, options
        self.reports: list[Report] = []
        self.starts: list[int] = []

    def __call__(self, module: nn.Module) -> Any:
        self.starts.append(len(self.reports))
        setting = self.setting
        return fuseplan.compile(
            module, config=setting.config, rules=setting.rules, providers=setting.providers, passes=setting.passes,
            on_report=self.reports.append, options=self.options,
        )  # fmt: skip

    def unequal(self) -> list[str]:
        """What is fused in the first call of a model, and not in that of another one of its class."""
        others = self.reports[self.starts[-1] :]
        first, other = (
            dict(sum((Counter(report.fused) for report in reports), Counter[str]()))
            for reports in (self.reports[: len(others)], others)
        )
        return [] if first == other else [f"one model fuses {first}, and another one of its class {other}"]


class Counts(NamedTuple):
    """Frames that Dynamo gave up, and graphs that it had compiled."""

    eager: int
    graphs: int


def _played(
    program: Program, steps: Steps, group: str, compiled: Callable[[nn.Module], Any], coded: bool
) -> tuple[list[Seen], Counts]:
    counters.clear()
    with uncached(), contextlib.nullcontext() if coded else interpreted():
        seen = Session(program, lambda: program.module(group), compiled).play(steps)
    frames = counters["frames"]
    return seen, Counts(frames["total"] - frames["ok"], counters["stats"]["unique_graphs"])
