"""The rows behind a plan's numbers: the time of each alternative at each class of places, and its provenance."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fuseplan.matching import Match
from fuseplan.planner.alternatives import UNFUSED, alternative_name, compatible, places_of, row_key
from fuseplan.planner.candidates import Candidate
from fuseplan.planner.costs import ROW, Estimate, Provenance, Row, ends
from fuseplan.planner.pose import Problem
from fuseplan.planner.prices import of_fused_op
from fuseplan.record import CostRow, KernelTime
from fuseplan.rules.parts.traffic import Kernel, total_ns


def cost_rows(programs: Iterable[Problem]) -> tuple[CostRow, ...]:
    """The prices of the problems, each row once: by class of places, size and alternative.

    Args:
        programs: of one graph or several, in one range or several.
    """
    rows: dict[tuple[str, int, str], CostRow] = {}
    for problem in programs:
        for row in (*_modelled(problem), *_measured(problem)):
            rows.setdefault((row.site, row.tokens, row.alternative), row)
    order = {name: place for place, name in enumerate(dict.fromkeys(site for site, _, _ in rows))}
    return tuple(sorted(rows.values(), key=lambda row: (order[row.site], row.tokens, _unfused_first(row))))


def _unfused_first(row: CostRow) -> tuple[bool, str]:
    return row.alternative != UNFUSED, row.alternative


def _modelled(problem: Problem) -> Iterator[CostRow]:
    """Rows of every contested site that wasn't measured; of several together where a candidate fuses parts of each."""
    contenders: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate, provenance in zip(problem.candidates, problem.priced.provenance, strict=True):
        is_ours = candidate.site is not None and isinstance(candidate.match, Match)
        if is_ours and provenance is not Provenance.MEASURED:
            contenders.setdefault(tuple(sorted(candidate.places)), []).append(candidate)
    names = {ordinals: " & ".join(problem.sites[each] for each in ordinals) for ordinals in contenders}
    places = Counter(names.values())
    seen: set[tuple[str, frozenset[str]]] = set()
    for ordinals, candidates in contenders.items():
        name = names[ordinals]
        # Of places of one class, some may need copies.
        kind = name, frozenset(alternative_name([each], ordinals) for each in candidates)
        if kind not in seen:
            seen.add(kind)
            for size, tokens in enumerate(problem.priced.tokens):
                for alternative, kernels in _alternatives(problem, ordinals, candidates, size):
                    low, high = _ends(problem, kernels)
                    yield CostRow(
                        site=name, places=places[name], alternative=alternative, tokens=tokens, spread_ns=0,
                        time_ns=total_ns(kernels), provenance=Provenance.MODELLED.value,
                        kernels=tuple(map(_time, kernels)), low_ns=low, high_ns=high,
                    )  # fmt: skip
                unfused = total_ns(_unfused(problem, ordinals, size))
                for candidate in candidates:
                    index = problem.index[id(candidate.match)]
                    provenance = problem.priced.provenance[index]
                    if provenance is not Provenance.MODELLED:
                        yield CostRow(
                            site=name, places=places[name], alternative=alternative_name([candidate], ordinals),
                            tokens=tokens, time_ns=unfused - problem.priced.savings[index][size], spread_ns=0,
                            provenance=provenance.value,
                        )  # fmt: skip


def _unfused(problem: Problem, ordinals: Sequence[int], size: int) -> tuple[Kernel, ...]:
    model, shapes = problem.pricing.prices.model, problem.pricing.shapes
    return tuple(kernel for each in ordinals for kernel in shapes[each][size].unfused(model))


def _alternatives(
    problem: Problem, ordinals: Sequence[int], candidates: Sequence[Candidate], size: int
) -> Iterator[tuple[str, tuple[Kernel, ...]]]:
    pricing = problem.pricing
    model = pricing.prices.model
    yield UNFUSED, _unfused(problem, ordinals, size)
    for candidate in candidates:
        assert candidate.site is not None and isinstance(candidate.match, Match)
        is_modelled = problem.priced.provenance[problem.index[id(candidate.match)]] is Provenance.MODELLED
        if candidate.taken is not None and is_modelled:
            fused, rest = list[Kernel](), list[Kernel]()
            for place, parts in pricing.taken(candidate, candidate.taken):
                shape = pricing.shapes[place][size]
                kernels = shape.fused if place == candidate.site.ordinal else shape.within
                fused += of_fused_op(kernels(model, candidate.provider, reduce=parts.reduce, tail=parts.tail))
                rest += shape.rest(model, reduce=parts.reduce, tail=parts.tail)
            copies = pricing.copies(candidate.match, problem.priced.tokens[size])
            yield alternative_name([candidate], ordinals), (*fused, *copies, *rest)


def _ends(problem: Problem, kernels: tuple[Kernel, ...]) -> tuple[int, int]:
    estimate = Estimate.of(kernels)
    return ends(estimate.ns, estimate.exposure, problem.priced.errors)


def _time(kernel: Kernel) -> KernelTime:
    return KernelTime(
        name=kernel.name, launch=kernel.launch, signal=kernel.signal, staging=kernel.staging, memory=kernel.memory,
        wire=kernel.wire,
    )  # fmt: skip


def _measured(problem: Problem) -> Iterator[CostRow]:
    """Rows of every component that was measured as a whole."""
    table = problem.pricing.prices.table
    classes: Counter[str] = Counter()
    first: dict[tuple[str, frozenset[str]], tuple[int, ...]] = {}
    for component in problem.components:
        if table is not None and frozenset(component) in problem.program.alternatives:
            places = places_of(component, problem.candidates)
            name = " & ".join(problem.sites[place] for place in places)
            classes[name] += 1
            kind = frozenset(alternative_name([problem.candidates[index]], places) for index in component)
            first.setdefault((name, kind), component)
    for (name, _), component in first.items():
        assert table is not None
        places = places_of(component, problem.candidates)
        for tokens, shape in zip(problem.priced.tokens, problem.pricing.shapes[places[0]], strict=True):
            for subset in ((), *compatible(component, problem.program)):
                alternative = alternative_name([problem.candidates[index] for index in subset], places)
                key = row_key(name, alternative)
                found = table.interpolate(key, shape.rows)
                if found is not None:
                    low, high = ends(found[0], {f"{ROW}{key}": table.deviation(key, shape.rows)}, {})
                    yield CostRow(
                        site=name, places=classes[name], alternative=alternative, tokens=tokens, time_ns=found[0],
                        spread_ns=found[1], provenance=Provenance.MEASURED.value,
                        origin=tuple(map(_origin, table.neighbours(key, shape.rows))), low_ns=low, high_ns=high,
                    )  # fmt: skip


def _origin(row: Row) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in (("torch", row.torch), ("triton", row.triton)) if value)
    parts = (f"{row.provenance} at {row.tokens} tokens", row.device, row.topology, versions, row.date, row.command)
    return "; ".join(part for part in parts if part)
