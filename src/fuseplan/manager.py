"""`PostGradPassManager`: Inductor's custom graph pass. It reads like the way of the data: canonical, matching,
choosing, rewriting, report.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V

from fuseplan.canonical import CanonicalGraph, canonicalize
from fuseplan.config import FUSION_FLAGS, CompileRange, Environment, PassConfig, Policy
from fuseplan.debug import DebugDump
from fuseplan.errors import UnsupportedError
from fuseplan.fingerprint import fingerprint, pass_key, provider_key, rule_key
from fuseplan.graph.facts import is_training
from fuseplan.matching import Match, Matches, find_matches, fusion_of, missing_ops
from fuseplan.planner import Choice, choose_in_order
from fuseplan.providers import BUILT_IN_PROVIDERS, DeviceProfile, Provider
from fuseplan.record import GraphReport, Loss, Reason, Refusal, Report
from fuseplan.rewriting import apply
from fuseplan.rules import BUILT_IN_RULES, Rule, enabled_rules

ReportCallback = Callable[[Report], None]
GraphPass = Callable[..., Any]


@dataclass(eq=False, kw_only=True)
class Analysis:
    """What is known of a graph before anything is chosen.

    Attributes:
        canonical: the raised copy.
        matches: every candidate and refusal.
        rules: the rules that were on, by name.
        stages_ns: time of each stage so far.
    """

    canonical: CanonicalGraph
    matches: Matches
    rules: Mapping[str, tuple[Rule, ...]]
    stages_ns: dict[str, int] = field(default_factory=dict)


class PostGradPassManager(CustomGraphPass):
    """Plans and applies fusions on each post-grad graph that Inductor hands over.

    Args:
        config: flags and policy.
        compile_range: the numbers of tokens that the graphs serve; None where they aren't limited.
        on_report: called with a `Report` for every graph that is compiled; a warm compile cache skips the pass, and
            with it this call.
        previous: a custom pass, or several, that stood in Inductor's hook; it runs first, as it would without fuseplan.
        rules: what can be fused.
        providers: who can run it.
        device: a profile whose providers are taken as present; None: those of this machine.
        environment: None reads it now.

    Raises:
        ConfigError: flags and policy contradict each other, or the environment is malformed.
    """

    def __init__(
        self,
        config: PassConfig,
        *,
        compile_range: CompileRange | None = None,
        on_report: ReportCallback | None = None,
        previous: Sequence[GraphPass] = (),
        rules: Sequence[Rule] = BUILT_IN_RULES,
        providers: Sequence[Provider] = BUILT_IN_PROVIDERS,
        device: DeviceProfile | None = None,
        environment: Environment | None = None,
    ) -> None:
        self.config = config
        self.compile_range = compile_range
        self.on_report = on_report
        self.previous = tuple(previous)
        self.rules = enabled_rules(config, rules)
        self.idle_flags = sorted(set(FUSION_FLAGS) - {flag for rule in rules for flag in rule.flags})
        self.providers = tuple(providers)
        self.device = device
        self.environment = environment or Environment.read()
        self._graphs = 0

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites `graph` in place, or leaves it exactly as it is.

        Raises:
            UnsupportedError: the graph is compiled by AOTInductor.
        """
        for graph_pass in self.previous:
            _run_previous(graph_pass, graph)
        name = f"graph_{self._graphs}"
        self._graphs += 1
        refusal = self.hands_off(graph)
        if refusal is not None:
            self._deliver(GraphReport(graph=name, range=self._range, refusals=(refusal,)))
            return
        dump = DebugDump.open(self.environment.debug_dir, name, self.compile_range)
        dump.graph("1-before", graph)
        analysis = self.analyze(graph)
        choice = self.choose(analysis, self.config.chosen_policy)
        dump.analysis(analysis.canonical, analysis.rules, analysis.matches, choice)
        if choice.chosen:
            with _stage(analysis.stages_ns, "rewriting"):
                apply(analysis.canonical, choice.chosen)
            dump.graph("3-after", graph)
        report = self.report(name, analysis, choice, rewritten=bool(choice.chosen))
        dump.report(report)
        self._deliver(report)

    def analyze(self, graph: fx.Graph) -> Analysis:
        """Raises a copy of the graph and finds every match on it."""
        stages: dict[str, int] = {}
        with _stage(stages, "canonical"):
            canonical = canonicalize(graph, see_through_noops=self.config.eliminate_noops)
        with _stage(stages, "matching"):
            matches = find_matches(canonical, self.rules, self.providers, self.device)
        return Analysis(canonical=canonical, matches=matches, rules=self.rules, stages_ns=stages)

    def choose(self, analysis: Analysis, policy: Policy) -> Choice:
        """What the policy would apply, `max_fusions` included."""
        with _stage(analysis.stages_ns, "choosing"):
            if policy.name == "off":
                return Choice(chosen=())
            candidates = [match for match in analysis.matches.candidates if match.rule.name in policy.order]
            choice = choose_in_order(analysis.canonical.graph, candidates, policy.order)
        return choice.at_most(self.config.max_fusions)

    def report(self, name: str, analysis: Analysis, choice: Choice, *, rewritten: bool = False) -> GraphReport:
        """The record of one graph."""
        canonical = analysis.canonical
        refusals = [*analysis.matches.refusals, *canonical.refusals, *self._ineffective(analysis)]
        limit = f"max_fusions={self.config.max_fusions}"
        refusals += [_given_up(canonical, match, Reason.LIMIT, f"beyond {limit}") for match in choice.limited]
        cycle = "together with fusions that were chosen it would make the graph cyclic"
        refusals += [_given_up(canonical, match, Reason.CYCLE, cycle) for match in choice.cyclic]
        matched = [match.rule.name for match in analysis.matches.candidates]
        return GraphReport(
            graph=name,
            range=self._range,
            applied=tuple(fusion_of(canonical, match) for match in choice.chosen),
            lost=tuple(
                Loss(fusion=fusion_of(canonical, match), blocked_by=tuple(fusion_of(canonical, w) for w in winners))
                for match, winners in choice.lost
            ),
            matched={rule: matched.count(rule) for rule in analysis.rules},
            recognized=canonical.recognized(),
            refusals=tuple(refusals),
            stages_ns=dict(analysis.stages_ns),
            rewritten=rewritten,
        )

    def uuid(self) -> str:
        """The key under which Inductor caches what this pass does: a hash of everything that can change it."""
        return self._key

    @cached_property
    def _key(self) -> str:
        return fingerprint(
            config=repr(self.config),
            enabled=self.environment.enabled,
            compile_range=str(self.compile_range),
            rules={name: [rule_key(rule) for rule in members] for name, members in self.rules.items()},
            providers=sorted(provider_key(provider, self.device) for provider in self.providers),
            device=self.device.name if self.device else None,
            previous=[pass_key(graph_pass) for graph_pass in self.previous],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PostGradPassManager) and self.uuid() == other.uuid()

    def __hash__(self) -> int:
        return hash(self.uuid())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: Inductor copies its configuration, and reports go to the one callback that the user gave."""
        return self

    @property
    def _range(self) -> tuple[int, int] | None:
        return (self.compile_range.start, self.compile_range.end) if self.compile_range else None

    def hands_off(self, graph: fx.Graph) -> Refusal | None:
        """Why a graph is left alone altogether, or None.

        Raises:
            UnsupportedError: the graph is compiled by AOTInductor.
        """
        if not self.environment.enabled:
            return Refusal(reason=Reason.DISABLED, detail="FUSEPLAN=0 switches every fusion off", mend="unset FUSEPLAN")
        if is_training(graph):
            return Refusal(
                reason=Reason.TRAINING,
                detail="the graph has a backward and is left alone; fuseplan is for inference",
                mend="run the model under torch.inference_mode() or torch.no_grad()",
            )
        if V.aot_compilation:
            raise UnsupportedError(
                "AOTInductor is not supported: fused ops are Python ops, which its packages can't carry; "
                "leave fuseplan's options out, or use torch.compile"
            )
        return None

    def _ineffective(self, analysis: Analysis) -> Iterator[Refusal]:
        """Rules that a flag switches on by name and that can do nothing in this graph."""
        for flag in self.idle_flags:
            if getattr(self.config, flag) is True:
                yield Refusal(reason=Reason.NO_EFFECT, detail=f"{flag}=True has no effect: no rule provides it yet")
        counts = {match.rule.name for match in analysis.matches.candidates}
        for name, members in analysis.rules.items():
            flags = members[0].flags
            if name in counts or not all(getattr(self.config, flag) is True for flag in flags):
                continue
            missing = missing_ops(analysis.canonical, members)
            refused = next((each.detail for each in analysis.matches.refusals if each.rule == name), None)
            why = f"the graph has no {' and no '.join(missing)}" if missing else refused or f"{name} matches nowhere"
            detail = f"{' and '.join(flags)}=True has no effect: {why}"
            yield Refusal(reason=Reason.NO_EFFECT, rule=name, detail=detail)

    def _deliver(self, graph: GraphReport) -> None:
        if self.on_report is not None:
            policy = self.config.chosen_policy
            warnings = tuple(refusal for refusal in graph.refusals if refusal.reason is Reason.NO_EFFECT)
            self.on_report(
                Report(
                    policy=policy.name, order=policy.order, rules=tuple(self.rules), graphs=(graph,), warnings=warnings
                )
            )


@contextmanager
def _stage(stages: dict[str, int], name: str) -> Iterator[None]:
    start = time.perf_counter_ns()
    yield
    stages[name] = stages.get(name, 0) + time.perf_counter_ns() - start


def _run_previous(graph_pass: GraphPass, graph: fx.Graph) -> None:
    if "is_inference" in inspect.signature(graph_pass).parameters:
        graph_pass(graph, is_inference=not is_training(graph))
    else:
        graph_pass(graph)


def _given_up(canonical: CanonicalGraph, match: Match, reason: Reason, detail: str) -> Refusal:
    fusion = fusion_of(canonical, match)
    return Refusal(reason=reason, rule=fusion.rule, detail=detail, nodes=(fusion.anchor,), source=fusion.source)
