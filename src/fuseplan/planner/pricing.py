"""Savings of alternatives at their sites, in a compile range: from measured rows or the cost model, never mixed."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fuseplan.caching.content import content_of
from fuseplan.graph.facts import hint, tensor_of
from fuseplan.matching import ExternalMatch, Match
from fuseplan.planner.candidates import Candidate, copies_text
from fuseplan.planner.costs import BUILT_IN_TIMINGS, REDUCED, CostModel, CostTable, Provenance
from fuseplan.planner.declared import declared_ns, generated_ns
from fuseplan.planner.program import IntegerProgram
from fuseplan.planner.rows import Rows
from fuseplan.rules.families.sites import Shape, Site, Taken
from fuseplan.rules.parts.traffic import Kernel, Tail, total_ns

UNFUSED = "unfused"
MAX_ENUMERATED = 12
"""Candidates up to which a component's alternatives are looked up as a whole; beyond, each candidate is modelled."""


def sizes_of(span: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of tokens that a range is priced at: both ends and the geometric middle."""
    first, last = span
    return tuple(sorted({first, round(math.sqrt(first * last)), last}))


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Where prices come from.

    Attributes:
        model: of the device that the plan is for.
        table: measured rows, or a user's own.
        source: which of the two; `auto` takes the table where it has all rows of a component, and else the model.
    """

    model: CostModel
    table: CostTable | None = None
    source: str = "auto"
    _cache: dict[Hashable, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> list[str]:
        """What a plan depends on."""
        model = [self.model.name, self.model.pad, content_of(self.model.hardware).digest]
        return [*model, self.source, self.table.digest if self.table else ""]

    @property
    def launch_ns(self) -> int:
        """A kernel with next to nothing to do."""
        return round(self.model.hardware.launch.value)

    def unfused_ns(self, shape: Shape) -> int:
        """A site as Inductor leaves it, by the model."""
        return self._once((shape,), lambda: total_ns(shape.unfused(self.model)))

    def fused_ns(self, shape: Shape, provider: str, *, reduce: bool, tail: Tail | None) -> int:
        """A fused op at a site, by the model."""
        key = (shape, provider, reduce, tail)
        return self._once(key, lambda: total_ns(shape.fused(self.model, provider, reduce=reduce, tail=tail)))

    def within_ns(self, shape: Shape, provider: str, *, reduce: bool, tail: Tail | None) -> int:
        """What a site adds to the fused op of another one that takes parts of it, by the model."""
        key = ("within", shape, provider, reduce, tail)
        return self._once(key, lambda: total_ns(shape.within(self.model, provider, reduce=reduce, tail=tail)))

    def rest_ns(self, shape: Shape, *, reduce: bool, tail: Tail | None) -> int:
        """What a fused op leaves of a site, by the model."""
        return self._once((shape, reduce, tail), lambda: total_ns(shape.rest(self.model, reduce=reduce, tail=tail)))

    def _once(self, key: Hashable, compute: Callable[[], int]) -> int:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def times(self, signature: str, alternative: str, rows: Sequence[int]) -> "list[tuple[int, int]] | None":
        """(time, spread) in ns of a component under an alternative, by size; None where the table hasn't all of it."""
        assert self.table is not None
        times = [self.table.interpolate(row_key(signature, alternative), each) for each in rows]
        known = [time for time in times if time is not None]
        return known if len(known) == len(times) else None


def places_of(component: Sequence[int], candidates: Sequence[Candidate]) -> list[int]:
    """The ordinals of a component's sites."""
    return sorted({place for index in component for place in candidates[index].places})


def row_key(signature: str, alternative: str) -> str:
    """The key of a row in a cost table: a component's sites, and the fusions applied there."""
    return f"{signature}: {alternative}"


def alternative_name(candidates: Sequence[Candidate], places: Sequence[int]) -> str:
    """An alternative in a cost table, e.g. `act_padding fused_add_rms_norm_pad triton`; the place of each candidate
    among the component's sites comes first where there are several sites, and ` + 1 copy` behind it where a result has
    to be copied.
    """
    names = []
    for candidate in candidates:
        assert candidate.site is not None
        place = f"{places.index(candidate.site.ordinal)}: " if len(places) > 1 else ""
        copies = copies_text(len(candidate.match.copied) if isinstance(candidate.match, Match) else 0)
        names.append(f"{place}{candidate.rule} {candidate.op} {candidate.provider}{copies}")
    return " + ".join(sorted(names)) or UNFUSED


def weighted(savings: Sequence[int], unfused: Sequence[int]) -> int:
    """The mean over sizes of saving / unfused time, times the unfused time of the middle size: ns, and additive.

    Args:
        savings: by size.
        unfused: of the whole component, by size.
    """
    if len(savings) == 1:
        return savings[0]
    mean = statistics.fmean(saving / max(1, time) for saving, time in zip(savings, unfused, strict=True))
    return round(mean * unfused[len(unfused) // 2])


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A graph's prices.

    Attributes:
        tokens: the sizes.
        values: the saving of each candidate, weighted over sizes, in ns.
        savings: the saving of each candidate at each size; empty where it isn't known.
        costs: what each candidate's op and the copies of its results take at the middle size; None where nothing is
            known of it.
        provenance: where each candidate's price is from.
        alternatives: of components measured as a whole, what each alternative saves.
        together: likewise, at each size.
        unfused: all contested sites, as Inductor leaves them, by size.
    """

    tokens: tuple[int, ...]
    values: list[int]
    savings: list[tuple[int, ...]]
    costs: list[int | None]
    provenance: list[Provenance]
    alternatives: dict[frozenset[int], dict[frozenset[int], int]]
    unfused: list[int]
    together: dict[frozenset[int], dict[frozenset[int], tuple[int, ...]]]


class _Price(NamedTuple):
    """What is known of one candidate; see `Priced`."""

    value: int
    provenance: Provenance
    savings: tuple[int, ...]
    cost: int | None


class _Table(NamedTuple):
    """What each alternative of a component that was measured as a whole saves, weighted and at each size."""

    alternatives: dict[frozenset[int], int]
    by_size: dict[frozenset[int], tuple[int, ...]]


class _Component(NamedTuple):
    """The prices of a component's candidates, and its sites as Inductor leaves them, by size."""

    prices: dict[int, _Price]
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
        self.shapes: dict[int, list[Shape]] = {}
        for site in sites:
            value = tensor_of(site.core.args[0])
            assert value is not None
            self._inputs[site.ordinal] = value
            self.shapes[site.ordinal] = [site.shape(rows.at(value, size)) for size in self.tokens]
        kinds: dict[tuple[Shape, ...], int] = {}
        self._kinds = {place: kinds.setdefault(tuple(s), len(kinds)) for place, s in self.shapes.items()}
        self._known: dict[Hashable, tuple[tuple[int, ...], tuple[int | None, ...]]] = {}

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
            unfused=[sum(each.unfused[size] for each in priced) for size in range(len(self.tokens))],
        )

    def signature(self, places: Sequence[int]) -> str:
        """Under which a table has a component with sites at `places`."""
        return " & ".join(self.shapes[place][0].signature for place in places)

    def rows_at(self, places: Sequence[int], tokens: int) -> int:
        """The rows of a component's first site at a number of the model's tokens: what a table calls tokens."""
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
        unfused = [sum(self.prices.unfused_ns(self.shapes[place][size]) for place in places) for size in sizes]
        prices = {}
        for index in component:
            savings, costs, provenance = self._modelled(self.candidates[index])
            value = weighted(savings, unfused) if places else savings[len(savings) // 2]
            prices[index] = _Price(value, provenance, savings, costs[len(costs) // 2])
        return _Component(prices, unfused)

    def _modelled(self, candidate: Candidate) -> tuple[tuple[int, ...], tuple[int | None, ...], Provenance]:
        """(what a candidate saves, what its op and copies take) by size, and how that is known. Where the model doesn't
        know the op, and its owner hasn't said anything, it is assumed to save a launch for each op less, beside the
        copies.
        """
        match, site, sizes = candidate.match, candidate.site, len(self.tokens)
        if isinstance(match, ExternalMatch):
            given, unknown = match.owner.saving_us, (None,) * sizes
            if given is None:
                return (self.prices.launch_ns,) * sizes, unknown, Provenance.ASSUMED
            return (round(given * 1000),) * sizes, unknown, Provenance.DECLARED
        parts = site.taken(match.consumed) if site is not None else None
        copied = tuple(total_ns(self.copies(match, size)) for size in self.tokens)
        if site is not None and parts is not None and match.provider in self.prices.model.timings:
            ours = match.provider in BUILT_IN_TIMINGS
            how = Provenance.MODELLED if ours else Provenance.DECLARED
            return *self._known_parts(candidate, parts, copied), how
        if match.cost is not None and (declared := self._declared(candidate, match, parts, copied)) is not None:
            return *declared, Provenance.DECLARED
        if site is None or parts is None:
            saved = self.prices.launch_ns * (len(match.rule.calls) - 1)
            return tuple(saved - ns for ns in copied), (None,) * sizes, Provenance.ASSUMED
        return *self._known_parts(candidate, parts, copied), Provenance.ASSUMED

    def _declared(
        self, candidate: Candidate, match: Match, parts: Taken | None, copied: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The same of an op whose provider says what it takes; None where the model doesn't know what it replaces."""
        model = self.prices.model
        savings, costs = list[int](), list[int]()
        for index, tokens in enumerate(self.tokens):

            def sized(value: Tensor, tokens: int = tokens) -> Tensor:
                return self._rows.sized(value, tokens)

            fused = copied[index] + declared_ns(match, model, sized)
            if parts is not None:
                before: int | None = self._replaced_ns(self.taken(candidate, parts), index)
            else:
                before = generated_ns(match, model, sized)
            if before is None:
                return None
            savings.append(before - fused)
            costs.append(fused)
        return tuple(savings), tuple(costs)

    def _known_parts(
        self, candidate: Candidate, parts: Taken, copied: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
        """The same of an op that takes parts of a site, and maybe of others."""
        taken = self.taken(candidate, parts)
        kinds = [(self._kinds[place], each.reduce, each.tail) for place, each in taken]
        key = (tuple(kinds), candidate.provider, copied)
        if key not in self._known:
            before, after, prices = list[int](), list[int](), self.prices
            for index, copies in enumerate(copied):
                fused = copies
                for place, each in taken:
                    price = prices.fused_ns if place == taken[0][0] else prices.within_ns
                    fused += price(
                        self.shapes[place][index], candidate.provider, reduce=each.reduce, tail=each.tail
                    )  # fmt: skip
                before.append(self._replaced_ns(taken, index) - fused)
                after.append(fused)
            self._known[key] = tuple(before), tuple(after)
        return self._known[key]

    def taken(self, candidate: Candidate, parts: Taken) -> list[tuple[int, Taken]]:
        """The ordinals of a candidate's sites, its own first, and what it takes of each."""
        assert candidate.site is not None
        others = zip(candidate.others, parts.also, strict=True)
        return [(candidate.site.ordinal, parts), *((site.ordinal, each) for site, (_, each) in others)]

    def _replaced_ns(self, taken: Sequence[tuple[int, Taken]], index: int) -> int:
        """Sites as Inductor leaves them, without what a fusion leaves of them."""
        total = 0
        for place, parts in taken:
            shape = self.shapes[place][index]
            rest = self.prices.rest_ns(shape, reduce=parts.reduce, tail=parts.tail)
            total += self.prices.unfused_ns(shape) - rest
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
        times: dict[frozenset[int], list[tuple[int, int]]] = {}
        for subset in compatible(component, structure):
            name = alternative_name([self.candidates[i] for i in subset], places)
            found = prices.times(signature, name, rows)
            if found is not None and unfused is not None:
                times[frozenset(subset)] = found
            elif prices.source == "auto":
                return None
        before = [ns for ns, _ in unfused or [(0, 0)] * len(rows)]
        values: dict[frozenset[int], int] = {}
        by_size: dict[frozenset[int], tuple[int, ...]] = {}
        noise = {frozenset[int](): max(spread for _, spread in unfused or [(0, 0)])}
        for alternative, measured in times.items():
            savings = tuple(a - ns for a, (ns, _) in zip(before, measured, strict=True))
            values[alternative], noise[alternative] = weighted(savings, before), max(spread for _, spread in measured)
            by_size[alternative] = savings
        values = break_ties(values, noise)
        found_alone = {}
        for index in component:
            alone = frozenset((index,))
            cost = times[alone][len(rows) // 2][0] if alone in times else None
            found_alone[index] = _Price(values.get(alone, 0), Provenance.MEASURED, by_size.get(alone, ()), cost)
        return _Component(found_alone, before, _Table(values, by_size))


def compatible(component: Sequence[int], structure: IntegerProgram) -> Iterator[tuple[int, ...]]:
    """The subsets of a component, the empty one aside, in which nothing conflicts."""

    def grow(chosen: tuple[int, ...], rest: Sequence[int]) -> Iterator[tuple[int, ...]]:
        for position, index in enumerate(rest):
            if not any((other, index) in structure.conflicts for other in chosen):
                yield (*chosen, index)
                yield from grow((*chosen, index), rest[position + 1 :])

    for subset in grow((), sorted(component)):
        inside = set(subset)
        coupled = all(j in inside for i, j in structure.requires if i in inside)
        if coupled and all(len(inside & group) in (0, len(group)) for group in structure.together):
            yield subset


def break_ties(values: Mapping[frozenset[int], int], noise: Mapping[frozenset[int], int]) -> dict[frozenset[int], int]:
    """Makes alternatives equal whose margin to the best lies inside the noise, so that no fusion wins, then names do.

    Args:
        values: the saving of each alternative; leaving all unfused, the empty one, saves 0.
        noise: the spread of each, the empty one included.
    """
    empty = frozenset[int]()
    everything = {empty: 0, **values}
    best = max(everything, key=lambda subset: (everything[subset], -len(subset), sorted(subset)))
    tied = [s for s in everything if everything[best] - everything[s] <= max(noise[best], noise[s])]
    level = 0 if empty in tied else min(everything[subset] for subset in tied)
    return {subset: level if subset in tied else value for subset, value in values.items()}
