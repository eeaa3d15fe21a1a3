"""Several policies on one workload, for `fuseplan explain`."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.cpython import uncollected
from fuseplan.errors import ConfigError
from fuseplan.explanation.capture import capture
from fuseplan.explanation.explanation import Explanation
from fuseplan.providers import BUILT_IN_PROVIDERS, DeviceProfile, Provider
from fuseplan.record import Comparison, Report
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES


@uncollected()
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
    rules: Sequence[Rule] = BUILT_IN_RULES,
    evidence: bool = False,
    notes: Sequence[str] = (),
    watch: Callable[[str], None] = lambda stage: None,
) -> Comparison:
    """Several policies on one workload.

    Args:
        model: a module or function.
        inputs: its positional arguments.
        workload: its name.
        tp: ranks of tensor parallelism.
        ranges: the compile ranges.
        device: the profile whose providers are assumed present.
        policies: those to compare; empty: `planned`, every order of registration that differs in effect, and `off`.
        config: flags; its policy and ranges aren't used.
        build_ns: how long the model took to build.
        providers: those that may run fused ops.
        rules: the fusions.
        evidence: whether the comparison includes drawings of graphs, the rows behind its figures and the policies at
            many sizes, which takes a second or two more.
        notes: caveats about the workload, one line each.
        watch: called with each stage as it begins.

    Raises:
        WorkloadError: nothing could be traced.
        ConfigError: a policy names an unknown rule, or contradicts a flag; or something is forced, which concerns none
            of the policies.
    """
    config = replace(config or PassConfig(), compile_ranges=tuple(ranges))
    for policy in policies:
        PostGradPassManager(replace(config, policy=policy, force=(), plan=None), rules=rules)
    _check_force(config, policies)
    config = replace(config, policy=Policy(name="planned"))
    traced = capture(model, inputs, {}, dynamic=True, watch=watch)
    watch("planning")
    explanation = Explanation(traced, config, device, providers, rules)
    every = policies or (config.chosen_policy, *explanation.orders(), Policy(name="off"))
    reports = [explanation.report(policy) for policy in every]
    subject = _concerned(config, every)
    return Comparison(
        workload=workload,
        tp=tp,
        device=device.name,
        ranges=tuple((each.start, each.end) for each in config.compile_ranges),
        reports=tuple(reports),
        breaks=tuple(map(str, traced.breaks)),
        trace_ns=build_ns + traced.time_ns,
        notes=(*notes, *_notes(reports, providers, device)),
        unconstrained=explanation.unconstrained(subject) if subject else None,
        evidence=explanation.evidence(every) if evidence else None,
    )


def _check_force(config: PassConfig, policies: Sequence[Policy]) -> None:
    if config.force and policies and not any(policy.name == "planned" for policy in policies):
        forced, shown = " and ".join(map(repr, config.force)), ", ".join(map(str, policies))
        raise ConfigError(
            f"force {forced} applies to policy planned only, and shown is {shown}; add planned, or leave it out"
        )


def _concerned(config: PassConfig, policies: Sequence[Policy]) -> Policy | None:
    """The first policy that forcing, or else forbidding, affects."""
    names = ("planned",) if config.force else ("planned", "ordered") if config.forbid else ()
    return next((policy for policy in policies if policy.name in names), None)


def _notes(reports: Sequence[Report], providers: Sequence[Provider], device: DeviceProfile) -> Iterator[str]:
    """Notes on the figures: how they were priced, and which kernels this version prices without running them."""
    plans = [graph.plan for report in reports for graph in report.graphs if graph.plan is not None]
    sources = sorted({source for plan in plans for source in plan.prices}) or ["modelled"]
    yield f"costs are {' and '.join(sources)} for {device.name}"
    known = {provider.name: provider for provider in providers}
    fusions = [(graph.range, fusion) for report in reports[:1] for graph in report.graphs for fusion in graph.applied]
    priced = _most(
        (span, each.provider) for span, each in fusions if _is_priced_alone(known.get(each.provider), each.op)
    )
    for name, count in priced:
        yield f"{count} of the fusions shown first are {name}'s: priced here, not yet run by this version of fuseplan"
    changes = _most((span, each.rounding_change) for span, each in fusions if each.rounding_change is not None)
    for (before, after), count in changes:
        yield f"{count} of the fusions shown first round as {after} where the graph rounds as {before}"


def _is_priced_alone(provider: Provider | None, op: str) -> bool:
    return provider is not None and not provider.runs(op)


def _most(found: Iterable[tuple[Any, Any]]) -> list[tuple[Any, int]]:
    """How often each occurs in the range where it occurs most."""
    most: dict[Any, int] = {}
    for (_, what), count in Counter(found).items():
        most[what] = max(most.get(what, 0), count)
    return sorted(most.items())
