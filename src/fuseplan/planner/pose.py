"""From matches to a problem: candidates, conflicts, couplings, prices, and the user's selectors."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from fuseplan.config import unknown
from fuseplan.errors import ConfigError
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.legality import Contraction
from fuseplan.matching import ExternalMatch, Match
from fuseplan.planner.candidates import Candidate, candidates_of, conflicts_of, couplings_of
from fuseplan.planner.components import components
from fuseplan.planner.contradiction import ContradictionError, Groups
from fuseplan.planner.costs import Provenance
from fuseplan.planner.prices import Prices
from fuseplan.planner.pricing import Priced, Pricing
from fuseplan.planner.program import IntegerProgram
from fuseplan.planner.rows import Rows
from fuseplan.rules.families import find_sites


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A graph's problem, as planned and reported.

    Attributes:
        canonical: the graph.
        candidates: in order of name; the problem knows them by index.
        program: the solver's input, in integers.
        priced: the candidates' prices.
        pricing: the source of the prices, for the rows behind them.
        sites: the signature of every site, in graph order.
        ineffective: selectors without a match in this graph.
        forced: forcing selectors, each with its open candidates at each place.
        failed: candidates that failed verification or can't be packaged, or need one such, and why.
        unpriced: candidates that a plan doesn't apply since no price is known for them and they aren't forced.
        unsure: unforced candidates that a plan doesn't apply since the interval of their saving reaches below zero.
        unmet: candidates without a fusion that their rule requires, and which one.
    """

    canonical: CanonicalGraph
    candidates: tuple[Candidate, ...]
    program: IntegerProgram
    priced: Priced
    pricing: Pricing
    sites: tuple[str, ...]
    ineffective: tuple[str, ...]
    forced: Groups = ()
    failed: Mapping[int, str] = field(default_factory=dict)
    unpriced: frozenset[int] = frozenset()
    unsure: frozenset[int] = frozenset()
    unmet: Mapping[int, str] = field(default_factory=dict)

    @property
    def ruled_out(self) -> frozenset[int]:
        """Candidates that no policy applies: forbidden, failed or without one that they require."""
        return (self.program.forbidden - self.unpriced) | self.failed.keys()

    def without(self, failed: Mapping[int, str]) -> "Problem":
        """The same problem without candidates that failed (reasons by index), and those that need them. A place whose
        forced candidates have all failed is open again.
        """
        reasons = {**self.failed, **failed}
        program = self.program
        while more := {
            **{i: self._needs(j, reasons) for i, j in program.requires if j in reasons and i not in reasons},
            **{
                i: self._needs(min(group & reasons.keys()), reasons)
                for group in program.together
                if not group.isdisjoint(reasons)
                for i in group - reasons.keys()
            },
        }:
            reasons.update(more)
        gone = frozenset(reasons)
        groups = dict.fromkeys(left for _, group in self.forced if (left := group - gone))
        return replace(
            self,
            failed=reasons,
            forced=tuple((text, left) for text, group in self.forced if (left := group - gone)),
            program=replace(
                program, forbidden=program.forbidden | gone,
                forced=frozenset(i for group in groups if len(group) == 1 for i in group),
                one_of=tuple(group for group in groups if len(group) > 1),
            ),
        )  # fmt: skip

    def _needs(self, index: int, reasons: Mapping[int, str]) -> str:
        candidate = self.candidates[index]
        return f"needs {candidate.rule} by {candidate.provider}, which {reasons[index]}"

    @property
    def unfused_ns(self) -> int:
        """All contested sites at the middle size, as Inductor leaves them."""
        return self.priced.unfused[len(self.priced.unfused) // 2]

    def saved_by_size(self, selected: Sequence[int]) -> list[int]:
        """The saving of a selection at each size, in ns; parts that were never measured together count 0."""
        left, found = set(selected), list[tuple[int, ...]]()
        for members, savings in self.priced.together.items():
            if part := frozenset(left & members):
                found.append(savings.get(part, ()))
                left -= part
        found += [self.priced.savings[index] for index in left]
        return [sum(savings[k] for savings in found if savings) for k in range(len(self.priced.tokens))]

    def interval(self, index: int) -> tuple[int | None, int | None]:
        """The ends of the interval of a candidate's saving; None where its price is assumed, or errors aren't known."""
        if self.priced.provenance[index] is Provenance.ASSUMED or not self.priced.has_doubts:
            return None, None
        return self.priced.ends_of(index)

    def interval_of(
        self, selected: Sequence[int], saving_ns: int, size: int | None = None
    ) -> tuple[int | None, int | None]:
        """The ends of the interval of a selection's saving, weighted over the sizes or at one of them."""
        is_known = all(self.priced.provenance[index] is not Provenance.ASSUMED for index in selected)
        if not is_known or not self.priced.has_doubts:
            return None, None
        if size is None:
            return self.priced.ends(saving_ns, selected)
        return self.priced.ends_at(size, saving_ns, selected)

    def all_reduces(self, size: int) -> tuple[str, ...]:
        """The kernels that unfused all-reduces of contested sites run at one of the sizes, where they weren't
        measured.
        """
        known = zip(self.candidates, self.priced.provenance, strict=True)
        places = {place for each, how in known if how is not Provenance.MEASURED for place in each.places}
        return self.pricing.all_reduces(sorted(places), size)

    def in_graph_order(self, selected: Iterable[int]) -> list[int]:
        """A selection by the places of its matches in the original graph, which all kinds of matches have."""
        return sorted(selected, key=lambda i: (self.canonical.source_node(self.candidates[i].anchor), i))

    def illegal(self, selected: Sequence[int]) -> str | None:
        """Why a selection can't be applied, or None."""
        chosen, names = set(selected), [candidate.name for candidate in self.candidates]
        for i in sorted(chosen & self.unmet.keys()):
            return f"{names[i]} can't be applied: {self.unmet[i]}"
        for i, j in sorted(self.program.conflicts):
            if i in chosen and j in chosen:
                return f"{names[i]} and {names[j]} can't be applied together"
        for i, j in sorted(self.program.requires):
            if i in chosen and j not in chosen:
                return f"{names[i]} needs {names[j]}, which isn't applied"
        for group in self.program.together:
            if missing := group - chosen if group & chosen else None:
                return f"{names[min(group & chosen)]} and {names[min(missing)]} are applied together or not at all"
        return "its fusions can't be applied together" if self.find_cycles(selected) else None

    @cached_property
    def index(self) -> dict[int, int]:
        """The candidate of a match, by the match's identity."""
        return {id(candidate.match): i for i, candidate in enumerate(self.candidates)}

    @cached_property
    def components(self) -> list[tuple[int, ...]]:
        """Candidates that constrain each other, apart from cycles."""
        return components(self.program)

    def find_cycles(self, selected: Sequence[int]) -> list[tuple[int, ...]]:
        """A `CycleFinder`. Matches of rules are contracted in the canonical graph; with matches of passes, all are
        contracted in the original graph, too.
        """
        ours = [i for i in selected if isinstance(self.candidates[i].match, Match)]
        groups = [self.candidates[i].match.consumed for i in ours]
        found = [tuple(ours[k] for k in cycle) for cycle in self._canonical_contraction.cycles(groups)]
        if len(ours) < len(selected):
            claims = [sorted(self.candidates[i].consumed) for i in selected]
            cycles = self._original_contraction.cycles(claims)
            known = {each for cycle in found for each in cycle}
            found += [t for cycle in cycles if known.isdisjoint(t := tuple(selected[k] for k in cycle))]
        return found

    @cached_property
    def _canonical_contraction(self) -> Contraction:
        return Contraction(self.canonical.graph)

    @cached_property
    def _original_contraction(self) -> Contraction:
        return Contraction(self.canonical.original)


def pose(
    canonical: CanonicalGraph,
    matches: Sequence[Match],
    external: Sequence[ExternalMatch],
    prices: Prices,
    span: tuple[int, int],
    *,
    force: Sequence[str] = (),
    forbid: Sequence[str] = (),
    rows: Rows | None = None,
) -> Problem:
    """The problem of one graph in one range.

    Args:
        canonical: the graph.
        matches: of rules, in any order.
        external: of other people's passes, in any order.
        prices: of fusions.
        span: first and last number of tokens.
        force: selectors of fusions that have to be applied; see `selects`.
        forbid: selectors of fusions that must not.
        rows: of the graph; None reads them.

    Raises:
        PlanError: a forced fusion is forbidden.
    """
    sites = find_sites(canonical)
    candidates = candidates_of(canonical, sites, matches, external)
    couplings = couplings_of(candidates)
    structure = IntegerProgram(
        names=tuple(candidate.name for candidate in candidates),
        savings_ns=(0,) * len(candidates),
        conflicts=conflicts_of(candidates),
        requires=couplings.requires,
        together=couplings.together,
    )
    pricing = Pricing(candidates, sites, prices, rows or Rows.of(canonical.graph), span)
    priced = pricing.price(components(structure), structure)
    forbidden = frozenset(i for text in forbid for i, c in enumerate(candidates) if selects(text, c))
    groups = [(text, group) for text in force for group in _groups(text, candidates, structure)]
    _check_open(groups, forbidden, forbid, candidates)
    closed = forbidden | couplings.unmet.keys()
    unpriced = _unpriced(candidates, priced, [group - closed for _, group in groups], structure) - closed
    forced = tuple((text, group - closed - unpriced) for text, group in groups)
    open_groups = dict.fromkeys(group for _, group in forced)
    doubtful = _unsure(candidates, priced, frozenset().union(*open_groups), structure)
    unsure = doubtful.unsure - closed - unpriced
    program = replace(
        structure,
        savings_ns=tuple(priced.values),
        forced=frozenset(i for group in open_groups if len(group) == 1 for i in group),
        one_of=tuple(group for group in open_groups if len(group) > 1),
        forbidden=closed | unpriced,
        unsure=unsure,
        only_with=doubtful.only_with,
        alternatives=priced.alternatives,
    )
    signatures = tuple(pricing.shapes[site.ordinal][0].signature for site in sites)
    ineffective = tuple(text for text in (*force, *forbid) if not any(selects(text, each) for each in candidates))
    return Problem(
        canonical=canonical, candidates=candidates, program=program, priced=priced, pricing=pricing, sites=signatures,
        ineffective=ineffective, forced=forced, unpriced=unpriced, unsure=unsure,
        unmet=couplings.unmet,
    )  # fmt: skip


def _unpriced(
    candidates: Sequence[Candidate], priced: Priced, forced: Sequence[frozenset[int]], structure: IntegerProgram
) -> frozenset[int]:
    """Matches of rules without a price, except forced ones where no alternative has a price, and those that these need.
    Users hand passes over to be applied: an assumed price will do for them.
    """
    assumed = {
        index
        for index, (candidate, provenance) in enumerate(zip(candidates, priced.provenance, strict=True))
        if provenance is Provenance.ASSUMED and isinstance(candidate.match, Match)
    }
    meant = {index for group in forced if group <= assumed for index in group}
    while more := {
        *(j for i, j in structure.requires if i in meant and j not in meant),
        *(j for group in structure.together if group & meant for j in group - meant),
    }:
        meant |= more
    return frozenset(assumed - meant)


class _Doubtful(NamedTuple):
    """Candidates that a plan doesn't apply since they may not gain, and pairs whose first one it only applies with the
    second, which surely gains.
    """

    unsure: frozenset[int]
    only_with: frozenset[tuple[int, int]]


def _unsure(
    candidates: Sequence[Candidate], priced: Priced, forced: frozenset[int], structure: IntegerProgram
) -> _Doubtful:
    """Matches of rules whose saving's interval reaches below zero, alone and together with any match that requires
    them. Measured rows were compared by their spreads; owners vouch for declared prices; users want their passes
    applied.
    """
    if not priced.has_doubts:
        return _Doubtful(frozenset(), frozenset())
    mine = {
        index
        for index, (each, how) in enumerate(zip(candidates, priced.provenance, strict=True))
        if how is Provenance.MODELLED and isinstance(each.match, Match) and priced.values[index] > 0
    }
    unsure = {index for index in mine if priced.ends_of(index)[0] < 0} - forced
    if not unsure or not (structure.requires or structure.together):
        return _Doubtful(frozenset(unsure), frozenset())
    needs = _closures(structure, len(candidates))
    meant = forced.union(*(needs[index] for index in forced))
    unsure -= meant
    sure_with = dict[int, list[int]]()
    for index in mine - meant:
        whole = needs[index]
        if len(whole) > 1 and priced.ends(sum(priced.values[each] for each in whole), whole)[0] >= 0:
            for each in whole & unsure:
                sure_with.setdefault(each, []).append(index)
    ties = {(each, others[0]) for each, others in sure_with.items() if len(others) == 1 and others[0] != each}
    return _Doubtful(frozenset(unsure - sure_with.keys()), frozenset(ties))


def _closures(structure: IntegerProgram, count: int) -> list[frozenset[int]]:
    """By candidate, all candidates that are applied with it."""
    needs: list[set[int]] = [{index} for index in range(count)]
    for i, j in structure.requires:
        needs[i].add(j)
    for group in structure.together:
        for index in group:
            needs[index] |= group
    result = []
    for index in range(count):
        found, stack = {index}, [index]
        while stack:
            new = needs[stack.pop()] - found
            found |= new
            stack.extend(new)
        result.append(frozenset(found))
    return result


def _check_open(
    groups: Groups, forbidden: frozenset[int], forbid: Sequence[str], candidates: Sequence[Candidate]
) -> None:
    """Refuses forcing selectors whose candidates are all forbidden."""
    ruled_out: dict[str, set[int]] = {}
    for text, group in groups:
        if group <= forbidden:
            ruled_out.setdefault(text, set()).update(group)
    for text, indices in ruled_out.items():
        against = [each for each in forbid if any(selects(each, candidates[i]) for i in indices)]
        raise ContradictionError(
            [f"force {text!r}", *(f"forbid {each!r}" for each in against)],
            [candidates[i].source for i in sorted(indices)],
            "every fusion forced there is forbidden",
        )


_SELECTOR = re.compile(
    r"(?P<rule>[^@:#\s]+)(?:#(?P<ordinal>[0-9]{1,9})|@(?P<place>[^:\s]+))?(?::(?P<provider>[^:\s]+))?"
)
SELECTOR_FORM = "RULE[@PLACE | #SITE][:PROVIDER], e.g. act_padding, act_padding@model.layers.3.*, act_padding#17:triton"


def check_selector(text: str, rules: Sequence[str]) -> None:
    """Refuses an invalid selector.

    Args:
        text: `RULE`, `RULE@PLACE` with a pattern of module paths, or `RULE#SITE`, each with `:PROVIDER` or without.
        rules: the names there are.

    Raises:
        ConfigError: it isn't of that form, or the rule is unknown.
    """
    match = _SELECTOR.fullmatch(text)
    if match is None:
        raise ConfigError(f"selector {text!r} isn't of the form {SELECTOR_FORM}")
    if match["rule"] not in rules:
        raise unknown("rule", match["rule"], rules)


def selects(text: str, candidate: Candidate) -> bool:
    """Whether a selector of the form `SELECTOR_FORM` means a candidate."""
    match = _SELECTOR.fullmatch(text)
    assert match is not None, text
    return (
        match["rule"] == candidate.rule
        and match["provider"] in (None, candidate.provider)
        and (
            match["ordinal"] is None or (candidate.site is not None and candidate.site.ordinal == int(match["ordinal"]))
        )
        and (match["place"] is None or fnmatch.fnmatchcase(candidate.source or "", match["place"]))
    )


def _groups(text: str, candidates: Sequence[Candidate], structure: IntegerProgram) -> list[frozenset[int]]:
    """The groups of a forcing selector: its candidates at each place, of which one is applied, by any provider."""
    by_place: dict[object, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if selects(text, candidate):
            by_place.setdefault(candidate.site.ordinal if candidate.site else candidate.name, []).append(index)
    groups: list[frozenset[int]] = []
    for place in by_place.values():
        # Candidates that don't exclude each other, e.g. coupled ones, are all applied.
        exclusive = all((i, j) in structure.conflicts for k, j in enumerate(place) for i in place[:k])
        groups += [frozenset(place)] if exclusive else [frozenset((index,)) for index in place]
    return groups
