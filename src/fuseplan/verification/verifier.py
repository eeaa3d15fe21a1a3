"""`Verifier`, which checks every rule x provider x signature that a decision applies, once, before the first use."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fuseplan.distributed.groups import STAND_IN
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import group_size, process_group
from fuseplan.matching import ExternalMatch, Match
from fuseplan.planner.candidates import Candidate
from fuseplan.providers import REFERENCE, DeviceProfile, Provider
from fuseplan.record import Pending, Verification
from fuseplan.rules import Rule
from fuseplan.verification import outcomes
from fuseplan.verification.check import CheckResult, call_without_data, check
from fuseplan.verification.deadline import AttemptError, attempt
from fuseplan.verification.foreign import Foreign
from fuseplan.verification.region import MatchedRegion
from fuseplan.verification.specs import Case, Sizes, case_of, cases_of
from fuseplan.verification.together import pending_of, shared_seed
from fuseplan.verification.variants import with_further_code

UNVERIFIED = "its kernel is collective, and ranks verify it together only under fuseplan.compile and in vLLM"


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """Checks fused ops against the unfused ones.

    Attributes:
        mode: `first-use`, `always` or `off`, from `PassConfig.verify`.
        providers: the providers of fused ops.
        deadline_s: the most seconds for one size, including the compilation of a kernel.
        device: a profile whose providers are taken as present; None: those of this machine.
        rank: the rank of this process, if all ranks verify the same candidates in lock step; None: it verifies alone,
            and doesn't run collective kernels.
        settles: whether collective kernels are left to all ranks, which settle before the first run; otherwise they are
            refused.
    """

    mode: str
    providers: Sequence[Provider]
    deadline_s: float
    device: DeviceProfile | None = None
    rank: int | None = None
    settles: bool = False

    def verify(
        self, candidates: Sequence[Candidate], canonical: CanonicalGraph, span: tuple[int, int]
    ) -> list[Verification | Pending | None]:
        """An outcome for each candidate, or a verification for all ranks to do; None for all where verification is off.

        Args:
            candidates: candidates of rules and of other people's passes.
            canonical: the graph that they were found in.
            span: first and last number of tokens.
        """
        if self.mode == "off" or not candidates:
            return [None] * len(candidates)
        sizes = Sizes(canonical.graph)
        kinds: dict[tuple[Rule, str], outcomes.Kind] = {}
        known: dict[object, Verification | Pending] = {}
        asked, left = list[object](), dict[object, _Question]()
        for each in candidates:
            if isinstance(each.match, ExternalMatch):
                asked.append(own := object())
                known[own] = self._foreign.verify(each.match, sizes, span)
                continue
            is_met = self._meets(each.match)
            cases = self._cases(each.match, sizes, span, is_met)
            question = _Question.of(each, canonical, cases, is_met, self._kind(each.match, kinds))
            asked.append(question.identity)
            if question.identity in known or question.identity in left:
                continue
            # In lock step, another rank may not have a stored outcome.
            stored = outcomes.load(question.key) if question.is_stored and self.mode == "first-use" else None
            if stored is None:
                left[question.identity] = question
            else:
                known[question.identity] = replace(stored, from_cache=True, time_ns=0)
        self._compile_ahead(left.values())
        for identity, question in left.items():
            known[identity] = found = self._run(question)
            if question.is_stored and isinstance(found, Verification) and not found.transient:
                outcomes.save(question.key, found)
        return [known[each] for each in asked]

    def verify_chained(
        self, matches: Sequence[ExternalMatch], graph: fx.Graph, span: tuple[int, int]
    ) -> list[Verification]:
        """Outcomes for the matches of an unplanned pass, each verified once."""
        if self.mode == "off" or not matches:
            return []
        sizes = Sizes(graph)
        return list(dict.fromkeys(self._foreign.verify(each, sizes, span) for each in matches))

    def _cases(self, match: Match, sizes: Sizes, span: tuple[int, int], is_met: bool) -> tuple[Case, ...]:
        """The cases of a match, at several numbers of tokens."""
        cases = cases_of(match, sizes, span, traced=not is_met)
        needs = self._provider(match.provider).needs
        if needs is None or match.rule.op.collective or cases[0].device.type != "cuda":
            return cases
        # Layers repeat, and so do graphs.
        key = match.rule, match.provider, span, str([(each.tokens, each.arguments) for each in cases])
        if key not in self._further:
            self._further[key] = with_further_code(match, cases, sizes, span, needs)
        further = (case_of(match, sizes, tokens) for tokens in self._further[key])
        return tuple(sorted((*cases, *further), key=lambda case: case.tokens))

    @cached_property
    def _further(self) -> dict[tuple[object, ...], tuple[int, ...]]:
        """A cache of the numbers of tokens at which kernels need further code."""
        return {}

    def _provider(self, name: str) -> Provider:
        (provider,) = [each for each in self.providers if each.name == name]
        return provider

    @cached_property
    def _foreign(self) -> Foreign:
        return Foreign(self.mode, self.deadline_s)

    def _kind(self, match: Match, kinds: dict[tuple[Rule, str], outcomes.Kind]) -> outcomes.Kind:
        asked = match.rule, match.provider
        if asked not in kinds:
            kinds[asked] = outcomes.kind_of(match.rule, self._provider(match.provider), self.device)
        return kinds[asked]

    def _compile_ahead(self, questions: Iterable["_Question"]) -> None:
        """Compiles the kernels for the runs below, several at a time instead of one after the other."""
        calls: dict[tuple[str, torch.device], list[Callable[[], object]]] = {}
        for each in questions:
            name, device = each.match.provider, each.cases[0].device
            if device.type == "cuda" and not each.meets:
                made = (partial(call_without_data, each.match.rule, name, case) for case in each.cases)
                calls.setdefault((name, device), []).extend(made)
        for (name, device), of_one in calls.items():
            if (compile_ahead := self._provider(name).compile_ahead) is not None:
                with suppress(AttemptError):  # the run has the same error, and reports it
                    attempt(self.deadline_s, partial(compile_ahead, of_one), device)

    def _run(self, question: "_Question") -> Verification | Pending:
        start, match = time.perf_counter_ns(), question.match
        outcome = Verification(
            rule=match.rule.name, op=match.rule.op.name, provider=match.provider, signature=question.signature
        )
        if self.rank is None and question.meets:
            return self._left_to_all(question, outcome)
        worst: float | None = 0.0
        tokens, detail, transient = list[int](), None, False
        for case in question.cases:
            tokens.append(case.tokens)
            finding, is_lasting = self._finding(question, case)
            transient = transient or not is_lasting
            worst = None if finding.worst is None else max(worst or 0.0, finding.worst)
            if finding.wrong is not None:
                detail = detail or f"at {case.tokens} tokens: {finding.wrong}"
                if self.rank is None:
                    break  # in lock step, the other ranks go on, and wait for this one
        return replace(
            outcome, tokens=tuple(tokens), passed=detail is None, detail=detail, worst=worst, transient=transient,
            time_ns=time.perf_counter_ns() - start,
        )  # fmt: skip

    def _left_to_all(self, question: "_Question", outcome: Verification) -> Verification | Pending:
        """The verification to do before the first run. The reading of the graph is checked now, with the reference,
        since the graph will be gone by then.
        """
        group = process_group(str(question.match.values["group_name"]))
        if not self.settles or group is None or dist.get_backend(group) == STAND_IN:
            return replace(outcome, passed=False, detail=UNVERIFIED)
        finding, is_lasting = self._finding(question, question.middle, REFERENCE.name)
        if finding.wrong is not None:
            tokens = question.middle.tokens
            detail = f"at {tokens} tokens: {finding.wrong}"
            return replace(outcome, tokens=(tokens,), passed=False, detail=detail, transient=not is_lasting)
        try:
            return pending_of(question.match, question.signature, question.cases, question.unfused)
        except TypeError as error:
            return replace(outcome, passed=False, detail=f"its arguments can't be kept until the first run: {error}")

    def _meets(self, match: Match) -> bool:
        """Whether its kernel would wait for ranks that may not be verifying. torch's all-reduces are intercepted, and
        some kernels can run on one rank that also plays the others.
        """
        group = match.values.get("group_name")
        alone = group is None or group_size(str(group)) == 1 or (self.rank is None and match.shares)
        return match.rule.op.collective and not match.runs_reference and not alone

    def _finding(self, question: "_Question", case: Case, provider: str | None = None) -> tuple[CheckResult, bool]:
        """The finding at one size, and whether it is repeatable: the next attempt may have enough memory and time."""
        match = question.match
        rank = self.rank if question.meets else None
        seed = outcomes.seed_of(question.key) if rank is None else shared_seed(question.signature, case.tokens)
        # The reading of the graph doesn't depend on the size.
        region = question.region if case is question.middle else None

        def run() -> CheckResult:
            return check(
                match.rule, provider or match.provider, case, seed=seed, unfused=question.unfused, region=region,
                free=question.free, rank=rank,
            )  # fmt: skip

        try:
            return attempt(self.deadline_s, run, case.device), True
        except AttemptError as error:
            return CheckResult(wrong=str(error)), False


@dataclass(frozen=True, kw_only=True)
class _Question:
    """The parts of a candidate that an outcome depends on, and whether its kernel is collective.

    Attributes:
        key: the key of its outcome.
        is_stored: whether the outcome is stored for other processes.
    """

    match: Match
    signature: str
    cases: Sequence[Case]
    unfused: Mapping[str, Any]
    region: MatchedRegion | None
    free: frozenset[int]
    meets: bool
    key: str
    is_stored: bool

    @property
    def identity(self) -> tuple[object, ...]:
        """A key of questions that share an outcome. An outcome of one group's ranks doesn't hold for another group."""
        match = self.match
        return self.key, match.rule, match.provider, match.values["group_name"] if self.meets else None

    @property
    def middle(self) -> Case:
        """A size that is neither the smallest nor large, where there are some."""
        return self.cases[min(2, len(self.cases) - 1)]

    @classmethod
    def of(
        cls, candidate: Candidate, canonical: CanonicalGraph, cases: Sequence[Case], is_met: bool, kind: outcomes.Kind
    ) -> "_Question":  # fmt: skip
        match = candidate.match
        assert isinstance(match, Match)
        unfused = {"rounding": match.rounding_change[0]} if match.rounding_change else {}
        region = MatchedRegion.of(canonical, match)
        free = frozenset(i for i, node in enumerate(match.outputs) if node in (*match.copied, *match.loose))
        return cls(
            match=match, signature=candidate.signature, cases=cases, unfused=unfused, region=region, free=free,
            meets=is_met, key=outcomes.outcome_key(kind, cases, unfused, region, free),
            is_stored=kind.is_known and not is_met,
        )  # fmt: skip
