"""Savings of alternatives at their sites, in a compile range: from measured rows or the cost model, never mixed."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fuseplan.devices.hardware import Error
from fuseplan.graph.facts import hint, tensor_of
from fuseplan.matching import ExternalMatch, Match
from fuseplan.planner.alternatives import (
    MAX_ENUMERATED,
    UNFUSED,
    alternative_name,
    break_ties,
    compatible,
    places_of,
)
from fuseplan.planner.candidates import Candidate
from fuseplan.planner.costs import (
    BUILT_IN_TIMINGS,
    EXACT,
    REDUCED,
    Estimate,
    Provenance,
    combined,
    ends,
)
from fuseplan.planner.declared import declared_ns, generated
from fuseplan.planner.doubt import SURE, Doubt, Price, contenders, weighted, weights_of
from fuseplan.planner.prices import Prices
from fuseplan.planner.program import IntegerProgram
from fuseplan.planner.rows import Rows
from fuseplan.rules.families.sites import Shape, Site, Taken
from fuseplan.rules.parts.traffic import Kernel


def sizes_of(span: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of tokens that a range is priced at: both ends and the geometric middle."""
    first, last = span
    return tuple(sorted({first, round(math.sqrt(first * last)), last}))


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A graph's prices.

    Attributes:
        tokens: the sizes.
        values: the saving of each candidate, weighted over sizes, in ns.
        savings: the saving of each candidate at each size; empty where unknown.
        costs: the time of each candidate's op and of the copies of its results at the middle size; None where unknown.
        provenance: where each candidate's price is from.
        alternatives: the saving of each alternative of components measured as a whole.
        together: the same at each size.
        unfused: all contested sites, as Inductor leaves them, by size.
        errors: the model's.
        doubts: the sources of error of each candidate's saving.
        together_doubts: the same of each alternative of components measured as a whole.
    """

    tokens: tuple[int, ...]
    values: list[int]
    savings: list[tuple[int, ...]]
    costs: list[int | None]
    provenance: list[Provenance]
    alternatives: dict[frozenset[int], dict[frozenset[int], int]]
    unfused: list[int]
    together: dict[frozenset[int], dict[frozenset[int], tuple[int, ...]]]
    errors: Mapping[str, Error]
    doubts: list[Doubt]
    together_doubts: dict[frozenset[int], dict[frozenset[int], Doubt]]
    _known: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_doubts(self) -> bool:
        """Whether the errors of these prices are known."""
        return bool(self.errors or self.together_doubts)

    def ends(self, value_ns: int, more: Collection[int], less: Collection[int] = ()) -> tuple[int, int]:
        """The ends of the interval of a selection's saving, or of its margin over another one, weighted over sizes.

        Args:
            value_ns: the saving, or the difference.
            more: its candidates.
            less: the other selection's.
        """
        counts: dict[int, tuple[Doubt, int]] = {}
        for sign, selected in ((1, set(more) - set(less)), (-1, set(less) - set(more))):
            for doubt, times in self._doubts(selected):
                key = id(doubt)
                counts[key] = doubt, counts.get(key, (doubt, 0))[1] + sign * times
        parts = ((e, factor * times) for doubt, times in counts.values() for e, factor in doubt.parts if times)
        return ends(value_ns, combined(parts), self.errors)

    def ends_of(self, index: int) -> tuple[int, int]:
        """The ends for one candidate's saving, computed once for all of equal components."""
        key = self.values[index], id(self.doubts[index])
        if key not in self._known:
            self._known[key] = self.ends(self.values[index], (index,))
        return self._known[key]

    def ends_at(self, size: int, saving_ns: int, selected: Collection[int]) -> tuple[int, int]:
        """The ends for a selection's saving at one of the sizes."""
        parts = (
            (doubt.exposures[size], float(times)) for doubt, times in self._doubts(selected) if doubt.exposures
        )  # fmt: skip
        return ends(saving_ns, combined(parts), self.errors)

    def _doubts(self, selected: Collection[int]) -> list[tuple[Doubt, int]]:
        """The doubts of a selection, each with its count: equal layers share one object."""
        left, found = set(selected), list[Doubt]()
        for members, doubts in self.together_doubts.items():
            if part := frozenset(left & members):
                found.append(doubts.get(part, SURE))
                left -= part
        found += [self.doubts[index] for index in left]
        counted = Counter(map(id, found))
        return [(doubt, counted[key]) for key, doubt in {id(each): each for each in found}.items()]


class _Table(NamedTuple):
    """The saving of each alternative of a component measured as a whole, weighted and at each size."""

    alternatives: dict[frozenset[int], int]
    by_size: dict[frozenset[int], tuple[int, ...]]
    doubts: dict[frozenset[int], Doubt]


class _Component(NamedTuple):
    """The prices of a component's candidates, and its sites as Inductor leaves them, by size."""

    prices: dict[int, Price]
    unfused: Sequence[int]
    table: _Table | None = None


class Pricing:
    """Prices the candidates of one graph in one range."""

    def __init__(self, candidates: Sequence[Candidate], sites: Sequence[Site], prices: Prices, rows: Rows,
                 span: tuple[int, int]) -> None:  # fmt: skip
        self.candidates, self.prices = candidates, prices
        self.is_dynamic = rows.is_dynamic
        self.tokens = sizes_of(span) if rows.is_dynamic else (rows.traced,)
        self._rows = rows
        self._inputs: dict[int, Tensor] = {}
        self.shapes: dict[int, tuple[Shape, ...]] = {}
        equal: dict[tuple[Shape, tuple[int, ...]], tuple[Shape, ...]] = {}
        for site in sites:
            value = tensor_of(site.core.args[0])
            assert value is not None
            self._inputs[site.ordinal] = value
            first, *others = rows.at_each(value, self.tokens)
            key = site.shape(first), tuple(others)
            if key not in equal:
                equal[key] = key[0], *(site.shape(each) for each in others)
            self.shapes[site.ordinal] = equal[key]
        kinds = {id(shapes): kind for kind, shapes in enumerate(equal.values())}
        self._kinds = {place: kinds[id(shapes)] for place, shapes in self.shapes.items()}
        self._known: dict[Hashable, tuple[tuple[Estimate, ...], tuple[int | None, ...]]] = {}
        self._unfused: dict[tuple[int, ...], list[int]] = {}
        self._prices: dict[Hashable, tuple[object, Price]] = {}
        self._doubts: dict[Hashable, tuple[object, Doubt]] = {}

    def price(self, components: Sequence[tuple[int, ...]], structure: IntegerProgram) -> Priced:
        """Prices every component from measured rows where they suffice, and else from the model.

        Args:
            components: of the candidates.
            structure: their conflicts and couplings.
        """
        priced = [self._look_up(each, structure) or self._model(each) for each in components]
        prices = {index: price for each in priced for index, price in each.prices.items()}
        in_order = [prices[index] for index in range(len(self.candidates))]
        tables = {frozenset(each.prices): each.table for each in priced if each.table is not None}
        return Priced(
            tokens=self.tokens,
            values=[price.value for price in in_order],
            savings=[price.savings for price in in_order],
            costs=[price.cost for price in in_order],
            provenance=[price.provenance for price in in_order],
            alternatives={members: table.alternatives for members, table in tables.items()},
            together={members: table.by_size for members, table in tables.items()},
            errors=self.prices.errors,
            doubts=[price.doubt for price in in_order],
            together_doubts={members: table.doubts for members, table in tables.items()},
            unfused=[sum(each.unfused[size] for each in priced) for size in range(len(self.tokens))],
        )

    def signature(self, places: Sequence[int]) -> str:
        """The key of a component with sites at `places` in a table."""
        return " & ".join(self.shapes[place][0].signature for place in places)

    def rows_at(self, places: Sequence[int], tokens: int) -> int:
        """The rows of a component's first site at a number of the model's tokens: `tokens` of a table's rows."""
        return self._rows.at(self._inputs[places[0]], tokens)

    def all_reduces(self, places: Iterable[int], size: int) -> tuple[str, ...]:
        """The names of the all-reduces that sites run unfused, by the model, at one of the sizes."""
        shapes = dict.fromkeys(self.shapes[place][size] for place in places)
        kernels = (kernel.name for shape in shapes for kernel in shape.unfused(self.prices.model))
        return tuple(sorted({name[len(REDUCED) : -1] for name in kernels if name.startswith(REDUCED)}))

    def copies(self, match: Match, tokens: int) -> tuple[Kernel, ...]:
        """The copies that a match needs beside its op, at a number of the model's tokens."""
        values = [value for node in match.copied if (value := tensor_of(node)) is not None]
        return tuple(self.prices.model.copy(self._nbytes(value, tokens)) for value in values)

    def _nbytes(self, value: Tensor, tokens: int) -> int:
        width = hint(value.shape[-1]) if value.dim() else 1
        return self._rows.at(value, tokens) * width * value.dtype.itemsize

    def _model(self, component: Sequence[int]) -> "_Component":
        """A component by the model."""
        places, sizes = places_of(component, self.candidates), range(len(self.tokens))
        kinds = tuple(self._kinds[place] for place in places)
        if kinds not in self._unfused:
            self._unfused[kinds] = [
                sum(self.prices.unfused(self.shapes[place][size]).ns for place in places) for size in sizes
            ]
        unfused = self._unfused[kinds]
        prices, weights = {}, weights_of(unfused)
        for index in component:
            estimates, costs, provenance = self._modelled(self.candidates[index])
            key = id(estimates), kinds
            if key not in self._prices:
                savings = tuple(each.ns for each in estimates)
                value = weighted(savings, unfused) if places else savings[len(savings) // 2]
                doubt = self._doubt(estimates, weights) if places and self.prices.errors else SURE
                # Kept beside it, so that the id doesn't become another's.
                self._prices[key] = estimates, Price(value, provenance, savings, costs[len(costs) // 2], doubt)
            prices[index] = self._prices[key][1]
        return _Component(prices, unfused)

    def _doubt(self, savings: tuple[Estimate, ...], weights: tuple[float, ...]) -> Doubt:
        """One object for all candidates of equal components that save the same: doubts are counted by their id."""
        key = id(savings), weights
        if key not in self._doubts:
            # Kept beside it, so that the id doesn't become another's.
            self._doubts[key] = savings, Doubt(tuple(each.exposure for each in savings), weights)
        return self._doubts[key][1]

    def _modelled(
        self, candidate: Candidate
    ) -> tuple[tuple[Estimate, ...], tuple[int | None, ...], Provenance]:  # fmt: skip
        """(saving of a candidate, time of its op and copies) by size, and its provenance. An op that the model doesn't
        know, without a declared cost, is assumed to save a launch for each op less, minus the copies.
        """
        match, site, sizes = candidate.match, candidate.site, len(self.tokens)
        if isinstance(match, ExternalMatch):
            given, unknown = match.owner.saving_us, (None,) * sizes
            if given is None:
                return (Estimate(self.prices.launch_ns, {}),) * sizes, unknown, Provenance.ASSUMED
            return (Estimate(round(given * 1000), {}),) * sizes, unknown, Provenance.DECLARED
        parts = candidate.taken
        copied = tuple(Estimate.of(self.copies(match, size)) if match.copied else EXACT for size in self.tokens)
        if site is not None and parts is not None and match.provider in self.prices.model.timings:
            ours = match.provider in BUILT_IN_TIMINGS
            how = Provenance.MODELLED if ours else Provenance.DECLARED
            return *self._known_parts(candidate, parts, copied), how
        if match.cost is not None and (declared := self._declared(candidate, match, parts, copied)) is not None:
            return *declared, Provenance.DECLARED
        if site is None or parts is None:
            saved = Estimate(self.prices.launch_ns * (len(match.rule.calls) - 1), {})
            return tuple(saved - copies for copies in copied), (None,) * sizes, Provenance.ASSUMED
        return *self._known_parts(candidate, parts, copied), Provenance.ASSUMED

    def _declared(
        self, candidate: Candidate, match: Match, parts: Taken | None, copied: Sequence[Estimate]
    ) -> tuple[tuple[Estimate, ...], tuple[int, ...]] | None:
        """The savings and times of an op whose provider declares its cost; None where the model doesn't know the ops it
        replaces.
        """
        model = self.prices.model
        savings, costs = list[Estimate](), list[int]()
        for index, tokens in enumerate(self.tokens):

            def sized(value: Tensor, tokens: int = tokens) -> Tensor:
                return self._rows.sized(value, tokens)

            fused = copied[index] + Estimate(declared_ns(match, model, sized), {})
            if parts is not None:
                before = self._replaced(self.taken(candidate, parts), index)
            elif (known := generated(match, model, sized)) is not None:
                before = Estimate.of(known)
            else:
                return None
            savings.append(before - fused)
            costs.append(fused.ns)
        return tuple(savings), tuple(costs)

    def _known_parts(
        self, candidate: Candidate, parts: Taken, copied: tuple[Estimate, ...]
    ) -> tuple[tuple[Estimate, ...], tuple[int | None, ...]]:
        """The savings and times of an op that fuses parts of a site, and maybe of others."""
        taken = self.taken(candidate, parts)
        kinds = [(self._kinds[place], each.reduce, each.tail) for place, each in taken]
        key = (tuple(kinds), candidate.provider, tuple(each.ns for each in copied))
        if key not in self._known:
            before, after, prices = list[Estimate](), list[int](), self.prices
            for index, copies in enumerate(copied):
                fused = copies
                for place, each in taken:
                    price = prices.fused if place == taken[0][0] else prices.within
                    fused += price(
                        self.shapes[place][index], candidate.provider, reduce=each.reduce, tail=each.tail
                    )  # fmt: skip
                before.append(self._replaced(taken, index) - fused)
                after.append(fused.ns)
            self._known[key] = tuple(before), tuple(after)
        return self._known[key]

    def taken(self, candidate: Candidate, parts: Taken) -> list[tuple[int, Taken]]:
        """The ordinals of a candidate's sites, its own first, and the parts that it fuses of each."""
        assert candidate.site is not None
        others = zip(candidate.others, parts.also, strict=True)
        return [(candidate.site.ordinal, parts), *((site.ordinal, each) for site, (_, each) in others)]

    def _replaced(self, taken: Sequence[tuple[int, Taken]], index: int) -> Estimate:
        """The unfused time of the parts of sites that a fusion replaces."""
        total = EXACT
        for place, parts in taken:
            shape = self.shapes[place][index]
            rest = self.prices.rest(shape, reduce=parts.reduce, tail=parts.tail)
            total += self.prices.unfused(shape) - rest
        return total

    def _look_up(self, component: Sequence[int], structure: IntegerProgram) -> "_Component | None":
        """A component by the table; None where the model has to do it."""
        prices, places = self.prices, places_of(component, self.candidates)
        ours = all(isinstance(self.candidates[index].match, Match) for index in component)
        if prices.table is None or prices.source == "modelled" or not places or not ours:
            return None
        if len(component) > MAX_ENUMERATED:
            return None
        signature, rows = self.signature(places), [self.rows_at(places, size) for size in self.tokens]
        unfused = prices.times(signature, UNFUSED, rows)
        if unfused is None and prices.source == "auto":
            return None
        times: dict[frozenset[int], list[tuple[int, int]]] = {}
        missing: list[frozenset[int]] = []
        for subset in compatible(component, structure):
            name = alternative_name([self.candidates[i] for i in subset], places)
            found = prices.times(signature, name, rows)
            if found is not None and unfused is not None:
                times[frozenset(subset)] = found
            else:
                missing.append(frozenset(subset))
        has_enough = unfused is not None and (not missing or self._is_settled(component, structure, missing))
        if prices.source == "auto" and not has_enough:
            return None
        before = [ns for ns, _ in unfused or [(0, 0)] * len(rows)]
        values: dict[frozenset[int], int] = {}
        by_size: dict[frozenset[int], tuple[int, ...]] = {}
        noise = {frozenset[int](): max(spread for _, spread in unfused or [(0, 0)])}
        doubts, weights = dict[frozenset[int], Doubt](), weights_of(before)
        for alternative, measured in times.items():
            savings = tuple(a - ns for a, (ns, _) in zip(before, measured, strict=True))
            values[alternative], noise[alternative] = weighted(savings, before), max(spread for _, spread in measured)
            by_size[alternative] = savings
            name = alternative_name([self.candidates[i] for i in sorted(alternative)], places)
            exposures = tuple(prices.deviations(signature, (UNFUSED, name), each) for each in rows)
            # Of equal components one may have other rows: only the last token goes through a model's last norm.
            key = signature, name, tuple(rows), weights
            doubts[alternative] = self._doubts.setdefault(key, (None, Doubt(exposures, weights)))[1]
        values = break_ties(values, noise)
        found_alone = {}
        for index in component:
            alone = frozenset((index,))
            cost = times[alone][len(rows) // 2][0] if alone in times else None
            found_alone[index] = Price(
                values.get(alone, 0), Provenance.MEASURED, by_size.get(alone, ()), cost, doubts.get(alone, SURE)
            )
        return _Component(found_alone, before, _Table(values, by_size, doubts))

    def _is_settled(
        self, component: Sequence[int], structure: IntegerProgram, missing: Collection[frozenset[int]]
    ) -> bool:
        """Whether, by the model, all alternatives that a table lacks are surely worse than another one."""
        errors = self.prices.errors
        found = contenders(component, structure, self._model(component).prices, errors) if errors else ()
        return bool(found) and not any(frozenset(each) in missing for each in found)
