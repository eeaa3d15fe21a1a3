"""`Verifier`: every rule x provider x signature that a decision applies, once, before the first use."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fuseplan.canonical import CanonicalGraph
from fuseplan.graph.facts import group_size
from fuseplan.matching import Match
from fuseplan.planner.candidates import Candidate
from fuseplan.providers import DeviceProfile, Provider
from fuseplan.record import Verification
from fuseplan.record.text import one_line
from fuseplan.rules import Rule
from fuseplan.verification import outcomes
from fuseplan.verification.check import Finding, check
from fuseplan.verification.deadline import DeadlineError, within
from fuseplan.verification.region import Region
from fuseplan.verification.specs import Case, Sizes, cases_of

UNVERIFIED = "ranks meet in its kernel, which is run nowhere but in lock step"


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """Checks fused ops against the unfused ones.

    Attributes:
        mode: `first-use`, `always` or `off`, as `PassConfig.verify` says.
        providers: who can run fused ops.
        device: a profile whose providers are taken as present; None: those of this machine.
        deadline_s: seconds that one size may take, the compilation of a kernel included.
        rank: of this process, where all ranks verify the same candidates in lock step; None: it verifies alone, and
            kernels in which ranks meet are not run.
    """

    mode: str
    providers: Sequence[Provider]
    device: DeviceProfile | None = None
    deadline_s: float = 300.0
    rank: int | None = None

    def verify(
        self, candidates: Sequence[Candidate], canonical: CanonicalGraph, span: tuple[int, int]
    ) -> list[Verification | None]:
        """An outcome for each candidate, None for all where verification is off.

        Args:
            candidates: of rules.
            canonical: the graph that they were found in.
            span: first and last number of tokens.
        """
        if self.mode == "off" or not candidates:
            return [None] * len(candidates)
        sizes = Sizes(canonical.graph)
        kinds: dict[tuple[Rule, str], list[Any]] = {}
        known: dict[str, Verification] = {}
        return [self._once(_Question.of(each, canonical, sizes, span), kinds, known) for each in candidates]

    def _once(
        self, question: "_Question", kinds: dict[tuple[Rule, str], list[Any]], known: dict[str, Verification]
    ) -> Verification:
        rule, name = question.match.rule, question.match.provider
        if (rule, name) not in kinds:
            (provider,) = [each for each in self.providers if each.name == name]
            kinds[rule, name] = outcomes.kind_of(rule, provider, self.device)
        key = outcomes.outcome_key(kinds[rule, name], question.cases, question.unfused, question.region)
        if key not in known:
            # In lock step another rank may not have it stored.
            reads = self.mode == "first-use" and not self._meets(question.match)
            stored = outcomes.load(key) if reads else None
            known[key] = replace(stored, from_cache=True, time_ns=0) if stored else self._run(question, key)
        return known[key]

    def _run(self, question: "_Question", key: str) -> Verification:
        start, match = time.perf_counter_ns(), question.match
        outcome = Verification(
            rule=match.rule.name, op=match.rule.op.name, provider=match.provider, signature=question.signature
        )
        if self.rank is None and self._meets(match):
            return replace(outcome, passed=False, detail=UNVERIFIED)
        worst: float | None = 0.0
        tokens, detail, lasting = list[int](), None, True
        for case in question.cases:
            tokens.append(case.tokens)
            finding, lasting = self._finding(question, case, key)
            worst = None if finding.worst is None else max(worst or 0.0, finding.worst)
            if finding.wrong is not None:
                detail = detail or f"at {case.tokens} tokens: {finding.wrong}"
                if self.rank is None:
                    break  # in lock step the other ranks go on, and meet this one
        outcome = replace(
            outcome, tokens=tuple(tokens), passed=detail is None, detail=detail, worst=worst,
            time_ns=time.perf_counter_ns() - start,
        )  # fmt: skip
        if lasting and not self._meets(match):
            outcomes.save(key, outcome)
        return outcome

    def _meets(self, match: Match) -> bool:
        """Whether its kernel would wait for ranks that may not be verifying; torch's all-reduces are intercepted, and
        some kernels can be run by one rank that plays the others too.
        """
        group = match.values.get("group_name")
        (provider,) = [each for each in self.providers if each.name == match.provider]
        alone = group is None or group_size(str(group)) == 1 or (self.rank is None and provider.runs_alone)
        return match.rule.op.collective and match.provider != "torch" and not alone

    def _finding(self, question: "_Question", case: Case, key: str) -> tuple[Finding, bool]:
        """What came of one size, and whether it would come again: memory and time may be there next time."""
        match = question.match
        rank = self.rank if self._meets(match) else None
        # Keys name devices, which ranks have one each.
        seed = outcomes.seed_of(key if rank is None else f"{question.signature} {case.tokens}")
        # How the graph was read doesn't depend on the size.
        region = question.region if case is question.cases[min(2, len(question.cases) - 1)] else None

        def run() -> Finding:
            return check(
                match.rule, match.provider, case, seed=seed, unfused=question.unfused, region=region, rank=rank
            )

        try:
            return within(self.deadline_s, run), True
        except DeadlineError:
            return Finding(wrong=f"the kernel did not end within {self.deadline_s:g} s"), False
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the model runs without it
            return Finding(wrong=_told(error)), False
        except SystemExit as error:
            return Finding(wrong=f"the kernel calls sys.exit({error.code!r})"), False


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One candidate, as far as an outcome depends on it."""

    match: Match
    signature: str
    cases: Sequence[Case]
    unfused: Mapping[str, Any]
    region: Region | None

    @classmethod
    def of(cls, candidate: Candidate, canonical: CanonicalGraph, sizes: Sizes, span: tuple[int, int]) -> "_Question":
        match = candidate.match
        assert isinstance(match, Match), "other people's replacements are theirs to verify"
        return cls(
            match=match,
            signature=candidate.signature,
            cases=cases_of(match, sizes, span),
            unfused={"rounding": match.rounding_change[0]} if match.rounding_change else {},
            region=Region.of(canonical, match),
        )


def _told(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return f"the kernel needs more memory than there is: {text}"
    return f"the kernel raises {type(error).__name__}: {text}"
