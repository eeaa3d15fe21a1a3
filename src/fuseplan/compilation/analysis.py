"""The analysis of a graph before anything is chosen, and the record of the choice."""

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from torch import fx

from fuseplan.config import PassConfig, Policy
from fuseplan.cpython import uncollected
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import tensor_of
from fuseplan.graph.regions import regions_of
from fuseplan.matching import ExternalMatch, ExternalMatches, Match, Matches
from fuseplan.planner import Decision, Problem, fusion_record, ineffective_requests, not_sure, plan_record, undecided
from fuseplan.planner.candidates import EXTERNAL, Candidate
from fuseplan.planner.costs import Hardware, assumptions
from fuseplan.record import (
    Fusion,
    GraphReport,
    Loss,
    Nearness,
    Pending,
    Reason,
    Refusal,
    Report,
    SizePrice,
    Verification,
)
from fuseplan.record.near_miss import is_of_a_place
from fuseplan.record.plan import choice_digest
from fuseplan.record.report import again
from fuseplan.rules import Rule
from fuseplan.verification.verifier import UNVERIFIED


@dataclass(frozen=True, eq=False, kw_only=True)
class Analysis:
    """The analysis of a graph before anything is chosen.

    Attributes:
        canonical: the raised copy.
        matches: every candidate and refusal.
        near_misses: refusals beside those of `matches`.
        external: matches of other people's passes.
        problem: the problem.
        rules: the rules that were on, by name.
        stages_ns: time of each stage so far.
    """

    canonical: CanonicalGraph
    matches: Matches
    near_misses: tuple[Refusal, ...]
    external: ExternalMatches
    problem: Problem
    rules: Mapping[str, tuple[Rule, ...]]
    stages_ns: Mapping[str, int] = field(default_factory=dict)


def graph_report(
    name: str,
    span: tuple[int, int] | None,
    config: PassConfig,
    analysis: Analysis,
    decision: Decision,
    *,
    rules: Sequence[str],
    ineffective_flags: Sequence[str],
    overruled: Mapping[str, tuple[str, str]],
    device: str,
    rewritten: bool,
    further: Sequence[Refusal],
    verified: Sequence[Verification | Pending] = (),
) -> GraphReport:
    """The record of one graph.

    Args:
        name: of the graph.
        span: first and last number of tokens, None where they aren't limited.
        config: its settings.
        analysis: of the graph.
        decision: the fusions that are applied.
        rules: names of the rules and passes that are on.
        ineffective_flags: flags that no rule answers to.
        overruled: as for `planner.ineffective_requests`.
        device: the device used for pricing.
        rewritten: whether the graph was changed.
        further: refusals beside those of the analysis.
        verified: checks before fusions were applied, and those of all ranks before the first run.
    """
    canonical, problem = analysis.canonical, analysis.problem
    refusals = [*(miss.refusal for miss in analysis.matches.misses), *analysis.near_misses, *further]
    refusals += ineffective_requests(
        config, ineffective_flags, overruled, analysis.rules, analysis.matches, problem, decision
    )
    most = f"max_fusions={config.max_fusions}"
    refusals += [_given_up(fusion_record(problem, i), Reason.LIMIT, f"beyond {most}") for i in decision.limited]
    refusals += _failures(problem, decision)
    refusals += _unpriced(problem, decision)
    unsure = [] if decision.solution is None else not_sure(decision, problem.unsure)
    refusals += [_not_sure(fusion_record(problem, index)) for index in unsure]
    alone = "a fusion that it needs isn't applied"
    refusals += [_given_up(fusion_record(problem, i), Reason.COUPLED, alone) for i in decision.uncoupled]
    refusals += [_given_up(fusion_record(problem, i), Reason.COUPLED, why) for i, why in sorted(problem.unmet.items())]
    refusals += assumed_constants(problem.pricing.prices.model.hardware)
    if unmeasured := problem.program.unmeasured(decision.selected):
        names = " and ".join(sorted({problem.candidates[index].rule for index in unmeasured}))
        detail = f"the saving of {len(unmeasured)} fusions of {names} isn't known and counts as 0: they were measured "
        detail += "with others that aren't applied, and not without them"
        refusals.append(Refusal(reason=Reason.UNPRICED, detail=detail, fix="tune, or raise max_fusions"))
    cycle = "together with fusions that were chosen it would make the graph cyclic"
    refusals += [_given_up(fusion_record(problem, i), Reason.CYCLE, cycle) for i in decision.cyclic]
    matched = {(c.rule, c.op, c.anchor) for c in problem.candidates}
    counts = [rule for rule, _, _ in matched]
    saved = problem.saved_by_size(decision.selected)
    is_planned = decision.solution is not None
    left_out = problem.unpriced.union(unsure) if is_planned else frozenset()
    already_refused = problem.failed.keys() | problem.unmet.keys() | left_out
    low, high = problem.interval_of(decision.selected, decision.saving_ns)
    in_order = sorted(decision.selected, key=lambda i: (problem.candidates[i].provider == EXTERNAL, i))
    return GraphReport(
        graph=name,
        range=span,
        applied=tuple(fusion_record(problem, index) for index in in_order),
        lost=tuple(
            Loss(
                fusion=fusion_record(problem, lost.candidate),
                blocked_by=tuple(fusion_record(problem, winner) for winner in lost.blocked_by),
                lost_ns=lost.lost_ns,
                flips_at_ns=lost.flips_at_ns,
                forbidden=lost.candidate in problem.ruled_out,
                lost_low_ns=lost.lost_low_ns,
                lost_high_ns=lost.lost_high_ns,
            )
            for lost in decision.lost
            if lost.candidate not in already_refused
        ),
        matched={rule: counts.count(rule) for rule in rules},
        recognized=canonical.recognized(),
        refusals=tuple(refusals),
        stages_ns=dict(analysis.stages_ns),
        rewritten=rewritten,
        plan=plan_record(problem, decision, name, span, device) if is_planned else None,
        sizes=tuple(
            SizePrice(
                tokens=tokens,
                unfused_ns=unfused,
                saved_ns=saving,
                all_reduces=problem.all_reduces(index),
                saved_low_ns=low,
                saved_high_ns=high,
            )
            for index, (tokens, unfused, saving) in enumerate(
                zip(problem.priced.tokens, problem.priced.unfused, saved, strict=True)
            )
            for low, high in [problem.interval_of(decision.selected, saving, index)]
        ),
        saved_ns=decision.saving_ns,
        saved_low_ns=low,
        saved_high_ns=high,
        unsure=undecided(problem, device) if is_planned else (),
        unfused_ns=problem.unfused_ns,
        plan_ns=decision.plan_ns,
        verified=tuple(each for each in verified if isinstance(each, Verification)),
        pending=tuple(each for each in verified if isinstance(each, Pending)),
        digest=_digest(problem, decision) if decision.selected else "",
        workspaces=_workspaces(problem, decision) if rewritten else (),
    )


def _workspaces(problem: Problem, decision: Decision) -> tuple[tuple[str, str, str], ...]:
    """The workspaces of fuseplan's own collective kernels, each once, in graph order."""
    found = dict[tuple[str, str, str], None]()
    for index in decision.selected:
        match = problem.candidates[index].match
        if isinstance(match, Match) and match.shares:
            x = tensor_of(match.values["x"])
            assert x is not None
            found[str(match.values["group_name"]), str(x.dtype).removeprefix("torch."), str(x.device)] = None
    return tuple(found)


def _digest(problem: Problem, decision: Decision) -> str:
    """The digest that ranks have to agree on: the applied rules with their places and providers, and how messages are
    exchanged. Other inputs of a fusion may differ between ranks: a layer whose parts are summed over them has its bias
    on one rank alone.
    """
    chosen = [problem.candidates[index] for index in decision.selected]
    said = [(each.name, "" if _is_local(each.match) else each.signature) for each in chosen]
    return choice_digest([str(len(problem.sites))], said)


def _is_local(match: Match | ExternalMatch) -> bool:
    """Whether a fusion surely exchanges nothing with other ranks."""
    return isinstance(match, Match) and not match.rule.op.collective


UNCALLED = "can't be called by AOTInductor's packages"


def _failures(problem: Problem, decision: Decision) -> list[Refusal]:
    """Refusals of fusions that failed verification or can't be packaged: once for the kernel, and once for every place
    that lost it.
    """
    places, applied = list[Refusal](), _applied(problem, decision)
    for index, why in sorted(problem.failed.items()):
        candidate, fusion = problem.candidates[index], fusion_record(problem, index)
        is_ours = candidate.provider != EXTERNAL
        fix = f"forbid {candidate.rule}:{candidate.provider}" if is_ours else f"forbid {candidate.rule}"
        reason = Reason.PACKAGE if UNCALLED in why else Reason.VERIFICATION
        if reason is Reason.VERIFICATION and UNVERIFIED not in why:
            fix = f"correct the {'kernel' if is_ours else 'pass'}, or {fix}"
        whose = f"{candidate.provider}'s {candidate.op}" if is_ours else f"the replacement of pass {candidate.rule}"
        place = _given_up(fusion, reason, f"{whose} {why}")
        places.append(_beside_others(candidate, applied, replace(place, fix=fix)))
    return _once_and_everywhere(places)


def _applied(problem: Problem, decision: Decision) -> frozenset[tuple[str, object]]:
    """Rules and sites of the fusions that are applied."""
    return frozenset((problem.candidates[index].rule, problem.candidates[index].site) for index in decision.selected)


def _beside_others(candidate: Candidate, applied: Collection[tuple[str, object]], place: Refusal) -> Refusal:
    """The refusal of a candidate, with a note if another provider's is applied in its place."""
    nearness = Nearness.DECLINED if (candidate.rule, candidate.site) in applied else Nearness.REFUSED
    return replace(place, nearness=nearness, provider=candidate.provider)


def _once_and_everywhere(places: Sequence[Refusal]) -> list[Refusal]:
    """Refusals of places, each after its kernel's, which occurs once."""
    kernels = dict[Refusal, None]()
    for place in places:
        detail = f"{place.rule} is not applied: {place.detail}"
        kernels[replace(place, nodes=(), source=None, site=None, nearness=None, detail=detail)] = None
    return [*kernels, *places]


class Regions:
    """Repeats reports as often as a step runs their graphs: a `nested_compile_region` is compiled only once."""

    def __init__(self) -> None:
        self._inside: WeakKeyDictionary[fx.GraphModule, tuple[GraphReport, ...]] = WeakKeyDictionary()
        self._copies = Counter[str]()

    def with_calls(self, graph: fx.Graph, report: GraphReport) -> tuple[GraphReport, ...]:
        """The report of a graph, preceded by one for each further run of the graphs that it calls.

        Args:
            graph: as Inductor compiles it, after the graphs that it calls.
            report: on it.
        """
        inside, copies = list[GraphReport](), list[GraphReport]()
        for region in regions_of(graph):
            reports = self._inside.get(region.module, ())
            inside += reports
            if region.caller is not None:
                report = replace(report, refusals=(*report.refusals, *_uncounted(region.caller, reports)))
                continue
            first, *others = region.places
            copies += [self._again(each, first, place) for place in others for each in reports]
        if graph.owning_module is not None:
            self._inside[graph.owning_module] = (*inside, *copies, report)
        return (*copies, report)

    def _again(self, report: GraphReport, first: str | None, place: str | None) -> GraphReport:
        self._copies[report.graph] += 1
        return again(report, self._copies[report.graph], first, place)


def _uncounted(caller: str, reports: Sequence[GraphReport]) -> list[Refusal]:
    """The note on fusions in a branch or a loop."""
    fused = [each.graph for each in reports if each.applied]
    detail = f"data decides how often {caller} runs {', '.join(fused)}, whose fusions are counted once"
    return [Refusal(reason=Reason.REPEATS, detail=detail)] if fused else []


def _unpriced(problem: Problem, decision: Decision) -> list[Refusal]:
    """Fusions that a plan doesn't apply since no price is known: once for the kernel, and once for every place."""
    if decision.solution is None:
        return []
    places, applied = list[Refusal](), _applied(problem, decision)
    for index in sorted(problem.unpriced - problem.failed.keys()):
        candidate, fusion = problem.candidates[index], fusion_record(problem, index)
        why = f"no price is known for {candidate.op} by {candidate.provider}: it could be slower than what it replaces"
        hows = ["measure it (fuseplan.measurement.tune)"] if candidate.site is not None else []
        if isinstance(candidate.match, Match) and candidate.match.cost is not None:
            why = f"the cost of {candidate.op} by {candidate.provider} is declared, that of the unfused ops isn't known"
        else:
            hows.append("declare its cost (provider_of(..., cost=))")
        fix = " or ".join([*hows, f"force {candidate.rule}:{candidate.provider}"])
        place = replace(_given_up(fusion, Reason.UNPRICED, why), fix=fix)
        places.append(_beside_others(candidate, applied, place))
    return _once_and_everywhere(places)


def _not_sure(fusion: Fusion) -> Refusal:
    """A fusion that a plan doesn't apply since it may cost more than it saves."""
    assert fusion.saving_ns is not None and fusion.low_ns is not None and fusion.high_ns is not None
    saves = f"saves {fusion.saving_ns / 1000:.1f} us ({fusion.low_ns / 1000:.1f} to {fusion.high_ns / 1000:.1f})"
    return replace(
        _given_up(fusion, Reason.UNSURE, f"{fusion.op} by {fusion.provider} {saves}: not sure to gain"),
        nearness=Nearness.DECLINED, provider=fusion.provider,
        fix=f"fuseplan tune --only-unsure would settle it, or force {fusion.rule}:{fusion.provider}",
    )  # fmt: skip


def assumed_constants(hardware: Hardware) -> list[Refusal]:
    """The note that a device has no profile, with the assumed constants."""
    names = assumptions(hardware)
    if not names:
        return []
    listed = ", ".join(name for name in names if "." not in name) or "its links"
    links = " and its links" if any("." in name for name in names) and listed != "its links" else ""
    detail = f"{hardware.name} has no profile: its costs are modelled, and {listed}{links} are assumed to be another's"
    fix = "fuseplan tune --device-only measures launches and memory, fuseplan tune WORKLOAD the fusions themselves"
    return [Refusal(reason=Reason.UNPRICED, detail=detail, fix=fix)]


def _given_up(fusion: Fusion, reason: Reason, detail: str) -> Refusal:
    nearness = Nearness.REFUSED if reason is Reason.CYCLE else None
    return Refusal(
        reason=reason, rule=fusion.rule, op=fusion.contested_op, detail=detail, nodes=(fusion.anchor,),
        source=fusion.source, site=fusion.source, nearness=nearness,
    )  # fmt: skip


def report_of(policy: Policy, config: PassConfig, rules: Sequence[str], graphs: Sequence[GraphReport]) -> Report:
    """The record of all graphs under one policy.

    Args:
        policy: the one that chose.
        config: its settings; forcing only concerns plans.
        rules: enabled ones.
        graphs: one record each.
    """
    warned_of = (Reason.NO_EFFECT, Reason.UNPRICED, Reason.VERIFICATION, Reason.FAULT, Reason.PACKAGE)
    whole = (r for graph in graphs for r in graph.refusals if r.reason in warned_of and not is_of_a_place(r))
    warnings = dict.fromkeys(whole)
    return Report(
        policy=policy.name, order=policy.order, rules=tuple(rules), graphs=tuple(graphs), warnings=tuple(warnings),
        force=tuple(config.force) if policy.name == "planned" else (),
        forbid=tuple(config.forbid) if policy.name != "off" else (),
    )  # fmt: skip


@contextmanager
def stage(stages: dict[str, int], name: str) -> Iterator[None]:
    """Times a stage. The cyclic garbage collector waits meanwhile: stages make many objects and hardly any garbage."""
    with uncollected():
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            stages[name] = stages.get(name, 0) + time.perf_counter_ns() - start
