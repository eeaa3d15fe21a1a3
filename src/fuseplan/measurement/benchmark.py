"""A model's steps, timed: compiled under several policies and without fuseplan, side by side in one process."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fuseplan.config import PassConfig, Policy
from fuseplan.errors import ConfigError, FuseplanError, FuseplanWarning, WorkloadError
from fuseplan.explanation.capture import capture
from fuseplan.explanation.explanation import Explanation
from fuseplan.frontend import compile as compile_fused
from fuseplan.measurement.costs import origin_of
from fuseplan.measurement.tuning import LEAST_REPEATS, Ranks, Subject, Times, busy, interleaved, subject_of
from fuseplan.providers import BUILT_IN_PROVIDERS, Provider, local_profile
from fuseplan.record import Report
from fuseplan.record.bench import PLAIN, BatchTimes, Bench, PolicyTime
from fuseplan.record.paired import Paired
from fuseplan.record.report import latest, merged
from fuseplan.record.text import one_line
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES

REPEAT_NS = 20_000_000
"""The least duration of a repeat: a step has hundreds of kernels, and its time varies more than one kernel's."""

MOST_COMPILED = 64
"""The most compilations of one function: each policy is one, and beyond torch's own limit the function would run
uncompiled.
"""

Arguments = tuple[Sequence[Any], Mapping[str, Any]]
Program = tuple[str, ...]


def bench(
    model: Callable[..., Any],
    arguments_of: Callable[[int], Arguments],
    batches: Sequence[int],
    *,
    workload: str,
    policies: Sequence[Policy] = (),
    config: PassConfig | None = None,
    rules: Sequence[Rule] = (),
    providers: Sequence[Provider] = (),
    repeats: int = 9,
    steps: int | None = None,
    ranks: Ranks | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    watch: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> Bench:
    """Times a step of a model under each policy, at each batch size.

    On a GPU the steps of a repeat are one CUDA graph, whatever the policy, so that the time Python takes to launch them
    isn't counted; on the CPU it is. Policies that apply the same fusions are timed as one: two compilations of one
    program only differ by noise, such as where their memory lies. Dynamo's caches are dropped.

    Args:
        model: a module or function with real weights, for inference.
        arguments_of: returns the positional and keyword arguments of a step at a batch size.
        batches: the sizes.
        workload: its name.
        policies: the policies to time; none: `planned`, every order of registration that differs in effect, and `off`.
            Plain `torch.compile` is always timed.
        config: flags and where costs come from; its policy and ranges aren't used.
        rules: fusions beside the built-in ones.
        providers: beside the built-in ones.
        repeats: of each time, at least 5.
        steps: in one repeat; None: as many as last long enough for the clock.
        ranks: of a tensor-parallel group: all run the same, and the slowest one counts.
        notes: caveats about the workload.
        command: for the record, so that readers can run it again.
        watch: called with the current step, the number of times taken, and their total.

    Raises:
        ConfigError: fewer repeats or steps, or a flag and a policy contradict each other.
        WorkloadError: the model can't be traced or run.
        RanksError: another rank failed, or didn't come in time.
    """
    check_timing(repeats, steps, batches)
    notes = (*notes, *busy())
    runner = _Runner(
        model=model, config=replace(config or PassConfig(), compile_ranges=(), force=(), plan=None), rules=rules,
        providers=providers, repeats=repeats, steps=steps, ranks=ranks or Ranks(),
    )  # fmt: skip
    found, sizes = [], sorted(set(batches))
    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED), torch.no_grad(), _errors_of(workload):
        for number, batch in enumerate(sizes):
            arguments = arguments_of(batch)
            chosen = [*(policies or runner.policies(arguments)), None]

            def tell(doing: str, number: int = number, count: int = len(chosen), batch: int = batch) -> None:
                watch(f"{doing} at batch {batch}", number * count, len(sizes) * count)

            found.append(runner.run(batch, arguments, chosen, tell))
    device = local_profile().name
    origin = origin_of(device, runner.ranks.size, command)
    sources = sorted({source for times in found for each in times.policies for source in each.prices})
    priced = [f"costs of the plan are {' and '.join(sources)} for {device}"] if sources else []
    return Bench(
        workload=workload, tp=runner.ranks.size, device=device, torch=origin.torch, triton=origin.triton,
        date=origin.date, command=command, repeats=repeats,
        batches=tuple(found), notes=(*notes, *priced, *runner.notes),
    )  # fmt: skip


def check_timing(repeats: int, steps: int | None, batches: Sequence[int]) -> None:
    """Checks arguments of `bench` before anything is built.

    Raises:
        ConfigError: fewer repeats than 5, or less than one step or sequence.
    """
    if repeats < LEAST_REPEATS:
        raise ConfigError(f"repeats={repeats}: a median and its spread need at least {LEAST_REPEATS}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps}: give a number of steps of at least 1")
    for batch in batches:
        if batch < 1:
            raise ConfigError(f"batch={batch}: give a number of sequences of at least 1")


@dataclass(kw_only=True)
class _Runner:
    """Compiles and times; its attributes are those of `bench`.

    Attributes:
        notes: fuseplan's warnings.
    """

    model: Callable[..., Any]
    config: PassConfig
    rules: Sequence[Rule]
    providers: Sequence[Provider]
    repeats: int
    steps: int | None
    ranks: Ranks
    notes: dict[str, None] = field(default_factory=dict)

    def policies(self, arguments: Arguments) -> list[Policy]:
        """`planned`, the orders that differ in effect, `off`."""
        args, kwargs = arguments
        traced = capture(self.model, args, dict(kwargs), dynamic=False)
        everyone, everything = (*BUILT_IN_PROVIDERS, *self.providers), (*BUILT_IN_RULES, *self.rules)
        planned, off = Policy(name="planned"), Policy(name="off")
        explanation = Explanation(traced, replace(self.config, policy=planned), None, everyone, everything)
        has_matches = any(entry.analysis.matches.candidates for entry in explanation.entries)
        return [planned, *(explanation.orders() if has_matches else ()), off]

    def run(
        self, batch: int, arguments: Arguments, policies: Sequence[Policy | None], tell: Callable[[str], None]
    ) -> BatchTimes:
        """Times all policies at one batch size; None stands for plain `torch.compile`."""
        torch._dynamo.reset()
        device = _device_of(arguments)
        subjects, reports = dict[str, Subject](), dict[str, list[Report]]()
        programs, same = dict[Program, str](), dict[str, str]()
        try:
            for policy in policies:
                name = str(policy) if policy is not None else PLAIN
                tell(f"compiling {name}")
                reports[name] = []
                call = self._compiled(policy, arguments, reports[name])
                subjects[name] = subject_of(call, [()], device)
                with self._noting():
                    subjects[name].warm_up()
                program = _program(reports[name])
                if self.ranks.exchange(program is not None and program in programs) == [True] * self.ranks.size:
                    assert program is not None
                    same[name] = programs[program]
                    subjects.pop(name).close()
                elif program is not None:
                    programs[program] = name
            tell("timing")
            times = interleaved(subjects, self.repeats, self.ranks, device, count=self.steps, least_ns=REPEAT_NS)
            steps = max(subject.count for subject in subjects.values())
        finally:
            for subject in subjects.values():
                subject.close()
        rows = tuple(_policy_time(name, times, each, same.get(name)) for name, each in reports.items())
        return BatchTimes(batch=batch, steps=steps, policies=rows)

    def _compiled(
        self, policy: Policy | None, arguments: Arguments, reports: list[Report]
    ) -> Callable[[Sequence[Tensor]], Any]:
        args, kwargs = arguments
        if policy is None:
            compiled = torch.compile(self.model, dynamic=False)
        else:
            config = replace(self.config, policy=policy)
            compiled = compile_fused(
                self.model, config=config, on_report=reports.append, rules=self.rules, providers=self.providers,
                dynamic=False,
            )  # fmt: skip
        return lambda _: compiled(*args, **kwargs)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """fuseplan's warnings are reported with the figures, once."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for each in caught:
            if issubclass(each.category, FuseplanWarning):
                self.notes[str(each.message)] = None


def _program(reports: Sequence[Report]) -> Program | None:
    """The applied fusions with their places, equal for equal programs; None without fuseplan."""
    return tuple(graph.digest for report in latest(reports) for graph in report.graphs) if reports else None


def _policy_time(
    name: str, repeats: Mapping[str, Sequence[int]], reports: Sequence[Report], same_as: str | None
) -> PolicyTime:
    times = Times.of(repeats[same_as or name])
    report = merged(latest(reports)) if reports else None
    plans = [graph.plan for graph in report.graphs if graph.plan is not None] if report else []
    return PolicyTime(
        policy=name, step_ns=times.median_ns, spread_ns=times.spread_ns,
        fused={rule: count for rule, count in report.fused.items() if count} if report else {},
        prices=tuple(sorted({source for plan in plans for source in plan.prices})), same_as=same_as,
        beside_plain=Paired.of(repeats[same_as or name], repeats[PLAIN]) if name != PLAIN else None,
    )  # fmt: skip


def _device_of(arguments: Arguments) -> torch.device:
    args, kwargs = arguments
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def _errors_of(workload: str) -> Iterator[None]:
    """Turns any error of the user's model into a one-line `WorkloadError`."""
    try:
        yield
    except FuseplanError:
        raise
    except Exception as error:
        raise WorkloadError(f"{workload} can't be run: {type(error).__name__}: {one_line(error)}") from error
