"""The doors: `compile`, `inductor_options`, `explain`, and `compare`, which `fuseplan explain` prints."""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from fuseplan import store
from fuseplan.capture import Capture, capture
from fuseplan.compatibility import require_supported_torch
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.dispatch import dispatch_by_tokens
from fuseplan.errors import ConfigError
from fuseplan.manager import Analysis, PostGradPassManager, ReportCallback
from fuseplan.providers import BUILT_IN_PROVIDERS, DeviceProfile, Provider, device_profile
from fuseplan.record import Comparison, GraphReport, Reason, Report

T = TypeVar("T", bound=Callable[..., Any])

HOOK = "post_grad_custom_post_pass"


class FuseplanWarning(UserWarning):
    """Something that is on and can have no effect, or was left undone. Each is shown once for a compiled model."""


def inductor_options(
    config: PassConfig | None = None,
    *,
    on_report: ReportCallback | None = None,
    options: Mapping[str, Any] | None = None,
    passes: Sequence[object] = (),
) -> dict[str, Any]:
    """Options for `torch.compile(model, options=...)` that put fuseplan into Inductor's custom-pass hook.

    One plan serves every number of tokens that the graph may see; `fuseplan.compile` makes one for each compile range.

    Args:
        config: flags and policy; None: the defaults.
        on_report: called with a `Report` for every graph that is compiled cold. A warm compile cache skips the pass
            and this call with it; `fuseplan.compile` delivers reports then too.
        options: further Inductor options. A custom pass among them, or in Inductor's global configuration, runs before
            fuseplan's and is not dropped.
        passes: other people's passes, as for `compile`.

    Returns:
        `options` with fuseplan's pass manager in its hook.

    Raises:
        ConfigError: flags and policy contradict each other, or the environment is malformed.
        CompatibilityError: this torch is too old.
    """
    require_supported_torch()
    config = config or PassConfig()
    ranges = config.compile_ranges
    whole = CompileRange(start=ranges[0].start, end=ranges[-1].end) if ranges else None
    return _options(config, whole, on_report, dict(options or {}), passes)


def _options(
    config: PassConfig,
    compile_range: CompileRange | None,
    on_report: ReportCallback | None,
    options: dict[str, Any],
    passes: Sequence[object],
) -> dict[str, Any]:
    given = options.get(HOOK, getattr(inductor_config, HOOK))
    previous = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    manager = PostGradPassManager(
        config, compile_range=compile_range, on_report=on_report, previous=previous, passes=passes
    )
    return {**options, HOOK: manager}


def compile(
    model: T,
    *,
    config: PassConfig | None = None,
    on_report: ReportCallback | None = None,
    passes: Sequence[object] = (),
    **torch_compile_arguments: Any,
) -> T:
    """`torch.compile(model)` with planned fusions.

    Args:
        model: a module, function or bound method.
        config: flags, policy and compile ranges; None: the defaults. With `compile_ranges`, a call goes to the graph
            whose range holds its number of tokens: the product of the leading dimensions of its first tensor argument,
            [B, S] for integers, [B, S, hidden] for activations. A call outside of all ranges runs as under plain
            `torch.compile`.
        on_report: called with a `Report` for every graph that is compiled, from a warm compile cache too.
        passes: other people's passes: `PatternMatcherPass` objects, unmodified, join the plan under `planned`, each
            match worth one kernel launch, or what an `ExternalPass` around the pass says. Functions of a graph, and
            passes whose patterns hold what another one puts in, run before or after the plan, where they stand among
            these.
        **torch_compile_arguments: go to `torch.compile` (`dynamic`, `fullgraph`, `mode`, `options` ...).

    Returns:
        What `torch.compile` returns; with compile ranges a module or function that chooses among several of those.

    Raises:
        ConfigError: flags and policy contradict each other, `backend` isn't Inductor, `mode` and `options` set one
            option to different values.
        CompatibilityError: this torch is too old.
    """
    require_supported_torch()
    config = config or PassConfig()
    arguments = dict(torch_compile_arguments)
    backend = arguments.pop("backend", "inductor")
    if backend != "inductor":
        raise ConfigError(f"backend={backend!r}: fusions are passes of Inductor; leave backend out or use 'inductor'")
    options = _merge_mode(arguments.pop("mode", None), arguments.pop("options", None), arguments.get("dynamic"))
    _warn_if_nothing_compiles(arguments)
    warner = _Warner(on_report)

    def compiled(compile_range: CompileRange | None) -> Any:
        backend = _Backend(config, compile_range, warner, options, arguments.get("dynamic"), passes)
        return torch.compile(model, backend=backend, **arguments)

    if not config.compile_ranges:
        return compiled(None)  # type: ignore[no-any-return]
    plain = torch.compile(model, options=options, **arguments)
    branches = {compile_range: compiled(compile_range) for compile_range in config.compile_ranges}
    return dispatch_by_tokens(model, branches, plain, warner.warn)


def _merge_mode(mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None) -> dict[str, Any]:
    """torch.compile refuses a mode beside options; here the mode is expanded to its options."""
    expanded = dict(list_mode_options(mode, dynamic)) if mode and mode != "default" else {}
    for name, value in (options or {}).items():
        if expanded.get(name, value) != value:
            raise ConfigError(
                f"mode={mode!r} sets {name}={expanded[name]!r} and options set it to {value!r}; drop one of them"
            )
    return {**expanded, **(options or {})}


def _warn_if_nothing_compiles(arguments: Mapping[str, Any]) -> None:
    if arguments.get("disable") or torch._dynamo.config.disable:
        why = "disable=True" if arguments.get("disable") else "torch._dynamo.config.disable (TORCHDYNAMO_DISABLE)"
        warnings.warn(
            f"fuseplan has no effect: torch.compile is switched off by {why}, so no graph reaches it",
            FuseplanWarning,
            stacklevel=3,
        )


class _Warner:
    """Hands reports on, and shows each of their warnings once."""

    def __init__(self, on_report: ReportCallback | None) -> None:
        self.on_report = on_report
        self._shown: set[str] = set()

    def __call__(self, report: Report) -> None:
        refusals = [refusal for graph in report.graphs for refusal in graph.refusals]
        for refusal in (*report.warnings, *(r for r in refusals if r.reason is Reason.TRAINING)):
            self.warn(refusal.detail + (f"; {refusal.mend}" if refusal.mend else ""))
        if self.on_report is not None:
            self.on_report(report)

    def warn(self, text: str) -> None:
        """Shows `text`, unless it was shown before."""
        if text not in self._shown:
            self._shown.add(text)
            warnings.warn(text, FuseplanWarning, stacklevel=2)


class _Backend(torch._TorchCompileInductorWrapper):
    """Inductor with fuseplan's pass, which delivers a report for every graph, compiled cold or found in a warm
    cache.
    """

    __name__ = "fuseplan"

    def __init__(
        self,
        config: PassConfig,
        compile_range: CompileRange | None,
        deliver: _Warner,
        options: Mapping[str, Any],
        dynamic: bool | None,
        passes: Sequence[object],
    ) -> None:
        self.deliver = deliver
        self.fresh: list[Report] = []
        merged = _options(config, compile_range, self.fresh.append, dict(options), passes)
        super().__init__(None, merged, dynamic)  # type: ignore[no-untyped-call]

    def __call__(self, model_: fx.GraphModule, inputs_: Sequence[Any], **extra: Any) -> Any:
        manager: PostGradPassManager = self.config[HOOK]
        key = store.graph_key(model_, inputs_, manager.uuid())
        self.fresh.clear()
        compiled = super().__call__(model_, inputs_, **extra)  # type: ignore[no-untyped-call]
        if self.fresh:
            merged = replace(
                self.fresh[0],
                graphs=tuple(graph for report in self.fresh for graph in report.graphs),
                warnings=tuple(dict.fromkeys(warning for report in self.fresh for warning in report.warnings)),
            )
            store.save(key, merged)
            self.deliver(merged)
        elif (stored := store.load(key)) is not None:
            self.deliver(stored)
        return compiled

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Backend) or self.deliver.on_report is not other.deliver.on_report:
            return False
        return bool(super().__eq__(other))  # type: ignore[no-untyped-call]

    def __hash__(self) -> int:
        return hash(self.config[HOOK])


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    config: PassConfig | None = None,
    device: DeviceProfile | str | None = None,
    **model_arguments: Any,
) -> Report:
    """What `compile(model, config=config)` would fuse in `model(*inputs, **model_arguments)`, and what not and why.

    The model is traced as `torch.compile` would, and run once; no code is generated. Fake tensors will do for its
    weights and inputs, and so neither a GPU nor weights are needed.

    Args:
        model: a module or function.
        *inputs: its positional arguments.
        config: flags, policy and compile ranges; with ranges, tracing treats sizes as dynamic.
        device: a profile, or its name, whose providers are taken as present and whose costs are modelled; None: those
            of this machine.
        **model_arguments: its keyword arguments.

    Returns:
        One report over all graphs and compile ranges.

    Raises:
        WorkloadError: nothing could be traced.
        ConfigError: flags and policy contradict each other.
    """
    require_supported_torch()
    config = config or PassConfig()
    profile = device_profile(device) if isinstance(device, str) else device
    traced = capture(model, inputs, model_arguments, dynamic=bool(config.compile_ranges))
    return _Explanation(traced, config, profile, BUILT_IN_PROVIDERS).report(config.chosen_policy)


def compare(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    workload: str,
    tp: int,
    ranges: Sequence[CompileRange],
    device: DeviceProfile,
    policies: Sequence[Policy] = (),
    config: PassConfig | None = None,
    build_ns: int = 0,
    providers: Sequence[Provider] = BUILT_IN_PROVIDERS,
) -> Comparison:
    """Several policies on one workload.

    Args:
        model: a module or function.
        inputs: its positional arguments.
        workload: its name.
        tp: ranks of tensor parallelism.
        ranges: the compile ranges.
        device: the profile whose providers are taken as present.
        policies: what to compare; empty: `planned`, every order of registration that differs in effect, and `off`.
        config: flags; its policy and ranges aren't used.
        build_ns: how long the model took to build.
        providers: who may run fused ops.

    Raises:
        WorkloadError: nothing could be traced.
        ConfigError: a policy names an unknown rule, or contradicts a flag.
    """
    config = replace(config or PassConfig(), compile_ranges=tuple(ranges))
    for policy in policies:
        PostGradPassManager(replace(config, policy=policy, force=(), plan=None))
    config = replace(config, policy=Policy(name="planned"))
    traced = capture(model, inputs, {}, dynamic=True)
    explanation = _Explanation(traced, config, device, providers)
    every = policies or (config.chosen_policy, *explanation.orders(), Policy(name="off"))
    reports = [explanation.report(policy) for policy in every]
    return Comparison(
        workload=workload,
        tp=tp,
        device=device.name,
        ranges=tuple((each.start, each.end) for each in config.compile_ranges),
        reports=tuple(reports),
        breaks=traced.breaks,
        trace_ns=build_ns + traced.time_ns,
        notes=tuple(_notes(reports, providers, device)),
    )


def _notes(reports: Sequence[Report], providers: Sequence[Provider], device: DeviceProfile) -> Iterator[str]:
    """What the figures don't show: how they were priced, and which kernels this version prices without running them."""
    plans = [graph.plan for report in reports for graph in report.graphs if graph.plan is not None]
    sources = sorted({source for plan in plans for source in plan.prices}) or ["modelled"]
    yield f"costs are {' and '.join(sources)} for {device.name}"
    runs = {provider.name: provider.implements for provider in providers}
    priced = Counter(
        fusion.provider
        for report in reports[:1]
        for graph in report.graphs
        for fusion in graph.applied
        if fusion.provider in runs and fusion.op not in runs[fusion.provider]
    )
    for name, count in sorted(priced.items()):
        yield f"{count} of the fusions shown first are {name}'s: priced here, not yet run by this version of fuseplan"
    changes = Counter(
        fusion.rounding_change
        for report in reports[:1]
        for graph in report.graphs
        for fusion in graph.applied
        if fusion.rounding_change is not None
    )
    for (before, after), count in sorted(changes.items()):
        yield f"{count} of the fusions shown first round as {after} where the graph rounds as {before}"


class _Explanation:
    """Matches of every graph in every range, found once and shared by all policies."""

    def __init__(
        self, traced: Capture, config: PassConfig, device: DeviceProfile | None, providers: Sequence[Provider]
    ) -> None:
        self.config = config
        shared = PostGradPassManager(config, device=device, providers=providers)
        self.rules = tuple(shared.rules)
        self.entries: list[tuple[str, PostGradPassManager, Analysis]] = []
        self.skipped: list[GraphReport] = []
        for compile_range in config.compile_ranges or (None,):
            manager = PostGradPassManager(
                config, compile_range=compile_range, device=device, prices=shared.prices, providers=providers
            )
            manager.solver = shared.solver
            span = (compile_range.start, compile_range.end) if compile_range else None
            for index, gm in enumerate(traced.graphs):
                refusal = manager.hands_off(gm.graph)
                if refusal is not None:
                    self.skipped.append(GraphReport(graph=f"graph_{index}", range=span, refusals=(refusal,)))
                else:
                    self.entries.append((f"graph_{index}", manager, manager.analyze(gm.graph)))

    def report(self, policy: Policy) -> Report:
        graphs = list(self.skipped)
        for name, manager, analysis in self.entries:
            timed = replace(analysis, stages_ns=dict(analysis.stages_ns))
            graphs.append(manager.report(name, timed, manager.decide(timed, policy, name)))
        warnings = dict.fromkeys(r for graph in graphs for r in graph.refusals if r.reason is Reason.NO_EFFECT)
        rules = tuple(rule for rule in self.rules if not policy.order or rule in policy.order)
        return Report(
            policy=policy.name, order=policy.order, rules=rules, graphs=tuple(graphs), warnings=tuple(warnings)
        )

    def orders(self) -> list[Policy]:
        """One `ordered` policy for every distinct outcome among the orders of the rules that match anywhere.

        A composed rule, which does what several simple ones do, is left out, or comes first of all.
        """
        members = {match.rule.name: match.rule for _, _, each in self.entries for match in each.matches.candidates}
        simple = sorted(name for name, rule in members.items() if len(rule.flags) == 1)
        composed = sorted(set(members) - set(simple))
        if not simple:
            return [Policy(name="ordered", order=self.rules)] if self.rules else []
        outcomes: dict[tuple[Any, ...], Policy] = {}
        for first in ((), *itertools.permutations(composed)):
            for rest in itertools.permutations(simple):
                policy = Policy(name="ordered", order=(*first, *rest))
                outcomes.setdefault(self._outcome(policy), policy)
        return list(outcomes.values())

    def _outcome(self, policy: Policy) -> tuple[Any, ...]:
        outcome = []
        for name, manager, analysis in self.entries:
            selected = manager.decide(replace(analysis, stages_ns={}), policy, name).selected
            outcome.append(tuple(sorted(analysis.posed.candidates[index].name for index in selected)))
        return tuple(outcome)
