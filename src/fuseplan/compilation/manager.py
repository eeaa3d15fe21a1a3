"""`PostGradPassManager`: Inductor's custom graph pass. Its stages: canonical, matching, choosing, rewriting, report."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from torch import fx

from fuseplan.caching.content import Known
from fuseplan.caching.fingerprint import (
    Identity,
    Keyed,
    config_key,
    pass_content,
    plans_key,
    provider_content,
    rule_content,
)
from fuseplan.compilation.analysis import Analysis, Regions, graph_report, report_of, stage
from fuseplan.compilation.chosen import apply_chosen
from fuseplan.compilation.debug import DebugDump
from fuseplan.compilation.home import is_beside_a_gpu, parts_for_the_cpu
from fuseplan.compilation.theirs import Theirs, run_theirs
from fuseplan.compilation.whole_graph import fault, hands_off, lost_in_package, needed_by_package
from fuseplan.config import FUSION_FLAGS, CompileRange, Environment, PassConfig, Policy
from fuseplan.cpython import uncollected
from fuseplan.dialect.raising import canonicalize
from fuseplan.errors import FuseplanError, PlanError
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import groups_in
from fuseplan.graph.surgery import undone_on_error
from fuseplan.matching import (
    ExternalMatch,
    ExternalPass,
    GraphPass,
    Matches,
    as_external,
    find_disabled,
    find_external,
    find_matches,
    find_near_misses,
    run_pass,
)
from fuseplan.planner import (
    ContradictionError,
    Decision,
    Prices,
    Solver,
    check_selector,
    decide_in_order,
    decide_off,
    decide_planned,
    limit,
    pose,
    prices_of,
    replay,
)
from fuseplan.planner.rows import Rows, most_rows
from fuseplan.providers import BUILT_IN_PROVIDERS, DeviceProfile, Provider
from fuseplan.record import GraphReport, Pending, Refusal, Report, SavedPlans, Verification
from fuseplan.report.places import places
from fuseplan.report.trace import publish
from fuseplan.rules import EnabledRules, Rule
from fuseplan.rules.families import BUILT_IN_RULES, opt_in_parts
from fuseplan.verification import Verifier

ReportCallback = Callable[[Report], None]
DEFAULT_SPAN = CompileRange(start=1, end=8192)
"""Sizes that a graph of any size is priced for: decoding one token to a prefill of vLLM's `max_num_batched_tokens`.
Applied fusions have to serve larger sizes too."""


class PostGradPassManager(Keyed):
    """Plans and applies fusions on each post-grad graph that Inductor hands over.

    Args:
        config: flags and policy.
        compile_range: the numbers of tokens that the graphs serve; None where they aren't limited.
        on_report: called with a `Report` for every graph that is compiled; a warm compile cache skips the pass, and
            with it this call.
        previous: custom passes that were in Inductor's hook; they run first, as they would without fuseplan.
        rules: the fusions.
        providers: those that can run fused ops.
        device: a profile whose providers are assumed present; None: this machine's.
        environment: None reads it now.
        prices: of fusions; None: the model of the device, and the cost table that configuration or environment
            name.
        solver: a solver, with the same budget, that may have solved equal components of other graphs; None: a new one.
        passes: other people's passes: `PatternMatcherPass` objects, unmodified, or `ExternalPass`es with the saving of
            a match, join the plan under `planned`; functions of a graph, and passes that are chained to others, run
            before or after the plan, in their order.
        engine_groups: returns an engine's identifiers of groups, with the names of the process groups behind them;
            called for each graph, since groups are made after managers.
        settles: whether ranks settle before each graph's first run, and verify collective kernels together.

    Raises:
        ConfigError: flags and policy contradict each other, the environment is malformed, or a cost table is broken.
        PlanError: a file of saved plans is broken.
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
        prices: Prices | None = None,
        solver: Solver | None = None,
        passes: Sequence[object] = (),
        engine_groups: Callable[[], Mapping[object, str]] = dict,
        settles: bool = False,
    ) -> None:
        self.config = config
        self.compile_range = compile_range
        self.on_report = on_report
        self.previous = tuple(previous)
        self.ineffective_flags = sorted(set(FUSION_FLAGS) - {flag for rule in rules for flag in rule.flags})
        self.providers = tuple(providers)
        self.device = device
        self.environment = environment or Environment.read()
        self.prices = prices or prices_of(config, self.environment, device, providers)
        self._enabled_on = partial(EnabledRules, config, rules)
        self.enabled = self._enabled_on(device=self.prices.model.name)
        self.rules = self.enabled.always
        self.passes = as_external(passes)
        self.engine_groups = engine_groups
        self.solver = solver or Solver(config.node_budget)
        assert self.solver.node_budget == config.node_budget, "the key has the configuration's"
        self._verifier_of = partial(
            Verifier, mode=config.verify, device=device, deadline_s=config.verify_timeout_s, settles=settles
        )
        self.verifier = self._verifier_of(providers=self.providers)
        self.saved = SavedPlans.load(Path(config.plan)) if config.plan else None
        names = sorted({rule.name for rule in rules} | {p.name for p in self.passes if isinstance(p, ExternalPass)})
        for selector in (*config.force, *config.forbid):
            check_selector(selector, names)
        self._graphs, self._regions, self.may_restart = 0, Regions(), False
        self.on_canonical: Callable[[CanonicalGraph], None] | None = None

    @uncollected()
    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites `graph` in place, or leaves it exactly as it is: also where a rule, a provider or fuseplan itself
        raises an unexpected error, which is reported.

        Raises:
            FuseplanError: the request can't be served, e.g. collectives under AOTInductor, or contradictory force.
        """
        for graph_pass in self.previous:
            run_pass(graph_pass, graph)
        name, home = f"graph_{self._graphs}", self
        groups, refusal = groups_in(graph), hands_off(graph, self.environment)
        try:
            left = GraphReport(graph=name, range=self._range, refusals=(refusal,)) if refusal is not None else None
            report = left or (home := self._at_home(graph)).fuse(graph, name)
        except FuseplanError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the model is right without fusions
            report = GraphReport(graph=name, range=self._range, refusals=(fault(error),))
        self._graphs += 1
        if not report.is_lasting:
            self.give_up_key()
        home.deliver(self._regions.with_calls(graph, replace(report, groups=groups)))

    def _at_home(self, graph: fx.Graph) -> "PostGradPassManager":
        """The manager for a graph: itself, or a copy with the attributes for graphs of the CPU."""
        if not is_beside_a_gpu(graph, self.device):
            return self
        home = copy.copy(self)
        vars(home).update(self._for_the_cpu)
        return home

    @cached_property
    def _for_the_cpu(self) -> dict[str, object]:
        return parts_for_the_cpu(self.config, self.environment, self.providers, self._enabled_on, self._verifier_of)

    def fuse(self, graph: fx.Graph, name: str) -> GraphReport:
        """All stages, one after the other."""
        dump = DebugDump.open(self.environment.debug_dir, name, self.compile_range)
        dump.graph("1-before", graph)
        analysis = self.analyze(graph)
        if self.on_canonical is not None:
            self.on_canonical(analysis.canonical)
        if not analysis.external.before:
            return self._change(graph, name, analysis, dump)
        with undone_on_error(graph):
            found = run_theirs(analysis.external.before, graph, self.verifier, self._span_of(Rows.of(graph)))
            return self._change(graph, name, self.analyze(graph), dump, found)

    def _change(
        self, graph: fx.Graph, name: str, analysis: Analysis, dump: DebugDump, known: Theirs = ((), ())
    ) -> GraphReport:
        """Decides, and applies the decision, all of it or nothing; `known` is from passes that have run before it."""
        analysis, decision, verified = self.decide_verified(analysis, name)
        verified[:0] = known[0]
        dump.analysis(analysis.canonical, analysis.rules, analysis.matches, analysis.problem, decision)
        stages, unapplied = dict(analysis.stages_ns), list(known[1])
        if decision.selected or analysis.external.after:
            with undone_on_error(graph):
                with stage(stages, "rewriting"):
                    unapplied += apply_chosen(analysis, decision)
                span = self._span_of(Rows.of(graph))
                found, failed = run_theirs(analysis.external.after, graph, self.verifier, span)
                verified += found
                unapplied += failed
        if decision.selected:
            dump.graph("3-after", graph)
            unapplied += needed_by_package(analysis.problem, decision)
        report = self.report(
            name, replace(analysis, stages_ns=stages), decision, rewritten=bool(decision.selected), further=unapplied,
            verified=verified,
        )  # fmt: skip
        dump.report(report)
        return report

    @uncollected()
    def analyze(self, graph: fx.Graph, canonical: CanonicalGraph | None = None) -> Analysis:
        """Raises a copy of the graph, finds every match and near miss on it, and prices the matches.

        Args:
            graph: as Inductor made it.
            canonical: its raised copy, where there is one already.

        Raises:
            PlanError: a forced fusion is forbidden.
        """
        stages: dict[str, int] = {}
        rows = Rows.of(graph)
        rules = self.rules_for(graph, rows)
        if canonical is None:
            with stage(stages, "canonical"):
                canonical = canonicalize(
                    graph, see_through_noops=self.config.eliminate_noops, engine_groups=self.engine_groups(),
                    asked=opt_in_parts(rules),
                )  # fmt: skip
        with stage(stages, "matching"):
            external = find_external(graph, self.passes)
            matches = self._find_matches(canonical, rules, rows, external.candidates)
        with stage(stages, "near misses"):
            near_misses = find_near_misses(canonical, self.rules, matches)
            # Nobody asked for rules that are on by default in such graphs, nor why they don't match.
            asked = tuple(miss for miss in matches.misses if miss.refusal.rule not in rules.keys() - self.rules.keys())
            matches = replace(matches, misses=asked)
            if off := self.enabled.disabled:
                near_misses += find_disabled(self._find_matches(canonical, off, rows, ()), self.enabled.disabled_by)
        with stage(stages, "pricing"), _places_folded():
            problem = pose(
                canonical, matches.candidates, external.candidates, self.prices,
                self._span_of(rows), force=self.config.force, forbid=self.config.forbid, rows=rows,
            )  # fmt: skip
        return Analysis(
            canonical=canonical, matches=matches, near_misses=near_misses, external=external, problem=problem,
            rules=rules, stages_ns=stages,
        )  # fmt: skip

    def rules_for(self, graph: fx.Graph, rows: Rows | None = None) -> Mapping[str, tuple[Rule, ...]]:
        """The rules that are on in a graph, opt-in ones by its size and device among them."""
        return self.enabled.of(most_rows(graph, self.compile_range.end if self.compile_range else None, rows))

    def _find_matches(
        self, canonical: CanonicalGraph, rules: Mapping[str, Sequence[Rule]], rows: Rows, other: Sequence[ExternalMatch]
    ) -> Matches:
        planned, most = self._span_of(rows)[1], self.compile_range.end if self.compile_range else None
        return find_matches(
            canonical, rules, self.providers, self.device, allow_rounding_changes=self.config.allow_rounding_changes,
            rows_of=lambda x: (rows.at(x, planned), rows.most(x, most)), external=other,
        )  # fmt: skip

    def _span_of(self, rows: Rows) -> tuple[int, int]:
        """The first and last number of tokens that a graph is priced for and its kernels are verified at."""
        if self.compile_range is not None:
            return self.compile_range.start, self.compile_range.end
        return DEFAULT_SPAN.start, int(min(DEFAULT_SPAN.end, rows.most_tokens))

    def decide(self, analysis: Analysis, policy: Policy, graph: str) -> Decision:
        """The policy's choice, `max_fusions` included.

        Args:
            analysis: of the graph.
            policy: how to choose.
            graph: its name, by which a saved plan is found.

        Raises:
            PlanError: a forced fusion can't be applied, or a saved plan doesn't fit.
        """
        problem = analysis.problem
        if policy.name == "off":
            decision = decide_off()
        elif policy.name == "ordered":
            decision = decide_in_order(problem, policy.order)
        elif self.saved is not None:
            decision = replay(problem, self.saved.find(graph, self._range))
        else:
            with _places_folded():
                decision = decide_planned(problem, self.solver)
        return limit(problem, decision, self.config.max_fusions)

    def decide_verified(
        self, analysis: Analysis, graph: str
    ) -> tuple[Analysis, Decision, list[Verification | Pending]]:
        """The configured policy's choice, all of it verified or left to all ranks: fusions that fail, or can't be
        packaged, are removed from the problem, and the rest is decided again.

        Returns:
            The analysis without failed fusions, the decision, and the outcomes of verification.

        Raises:
            PlanError: as for `decide`.
        """
        span, outcomes = self._span_of(Rows.of(analysis.canonical.graph)), dict[Verification, None]()
        stages = dict(analysis.stages_ns)
        while True:
            problem = analysis.problem
            with stage(stages, "choosing"):
                decision = self.decide(analysis, self.config.chosen_policy, graph)
            if lost := lost_in_package(analysis, chosen := decision.selected):
                analysis = replace(analysis, problem=problem.without(lost))
                continue
            with stage(stages, "verification"):
                found = self.verifier.verify([problem.candidates[i] for i in chosen], analysis.canonical, span)
            known = {i: each for i, each in zip(chosen, found, strict=True) if isinstance(each, Verification)}
            outcomes.update(dict.fromkeys(known.values()))
            failed = {i: each.failure for i, each in known.items() if not each.passed}
            if not failed:
                pending = dict.fromkeys(each for each in found if isinstance(each, Pending))
                return replace(analysis, stages_ns=stages), decision, [*outcomes, *pending]
            analysis = replace(analysis, problem=problem.without(failed))

    def report(
        self,
        name: str,
        analysis: Analysis,
        decision: Decision,
        *,
        rewritten: bool = False,
        further: Sequence[Refusal] = (),
        verified: Sequence[Verification | Pending] = (),
    ) -> GraphReport:
        """The record of one graph."""
        return graph_report(
            name, self._range, self.config, analysis, decision,
            rules=self.names, ineffective_flags=self.ineffective_flags, overruled=self.enabled.overruled,
            device=self.prices.model.name, rewritten=rewritten, further=further, verified=verified,
        )  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """The rules that are on, in any of the graphs so far, and other people's passes that can be planned."""
        external = sorted(p.name for p in self.passes if isinstance(p, ExternalPass) and not p.is_procedural)
        return (*sorted(self.enabled.names), *external)

    def _key(self) -> str | None:
        return self.identity.key(engine_groups=self.named_groups, may_restart=self.may_restart)

    @cached_property
    def identity(self) -> Identity:
        """Everything that can change the results of this pass."""
        passes = (*map(pass_content, self.previous), *map(pass_content, self.passes))
        known: Known = {}
        rules = (rule_content(rule, known) for rule in self.enabled.every)
        providers = (provider_content(provider, self.device, known) for provider in self.providers)
        facts = {
            "config": config_key(self.config),
            "enabled": self.environment.enabled,
            "compile_range": str(self.compile_range),
            "device": repr(self.device),
            "previous": len(self.previous),
            "prices": self.prices.key,
            "plan": plans_key(self.saved),
            "settles": self.verifier.settles,
        }
        return Identity(facts, (*rules, *providers), passes)

    @property
    def _range(self) -> tuple[int, int] | None:
        return (self.compile_range.start, self.compile_range.end) if self.compile_range else None

    def deliver(self, graphs: Sequence[GraphReport]) -> None:
        """Delivers a report of graphs to the callback and the trace."""
        report = report_of(self.config.chosen_policy, self.config, self.names, graphs)
        publish(report)
        if self.on_report is not None:
            self.on_report(report)


@contextmanager
def _places_folded() -> Iterator[None]:
    """Raises contradictions of forced fusions with their places folded as in reports."""
    try:
        yield
    except ContradictionError as error:
        raise PlanError(error.message(places)) from None
