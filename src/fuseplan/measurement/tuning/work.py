"""The work of tuning: every class of components once, with all its alternatives, at each size."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fuseplan.matching import Match
from fuseplan.measurement.tuning.context import Context, context_of
from fuseplan.planner import Problem
from fuseplan.planner.alternatives import MAX_ENUMERATED, UNFUSED, alternative_name, compatible, places_of, row_key
from fuseplan.planner.costs import CostTable
from fuseplan.planner.undecided import is_open, open_alternatives


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """One class of components in one compile range.

    Attributes:
        signature: of its sites, the key in the table.
        problem: of the graph with the component that represents the class.
        span: first and last number of tokens of the range.
        places: ordinals of the component's sites.
        alternatives: candidates by name, `unfused` without any among them.
        tokens: the sizes, in tokens of the model.
        rows: the sizes in rows of the first site, as in the table.
        count: how many components the class has.
    """

    signature: str
    problem: Problem
    span: tuple[int, int]
    component: tuple[int, ...]
    places: tuple[int, ...]
    alternatives: Mapping[str, tuple[int, ...]]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    count: int

    @property
    def context(self) -> Context:
        """The part of the graph that is run."""
        return context_of(self.problem, self.component, self.places)

    @property
    def steps(self) -> int:
        """How many times are taken."""
        return len(self.alternatives) * len(self.tokens)

    @property
    def unsure(self) -> "Work | None":
        """The alternatives that could change the plan, with `unfused`, the baseline; None where none could."""
        names = {""} if not is_open(self.problem, self.component) else {
            alternative_name([self.problem.candidates[index] for index in subset], self.places)
            for subset in open_alternatives(self.problem, self.component)
        }  # fmt: skip
        kept = {name: chosen for name, chosen in self.alternatives.items() if name in names or name == UNFUSED}
        return replace(self, alternatives=kept) if len(names) > 1 and kept.keys() - {UNFUSED} else None

    def is_in(self, table: CostTable) -> bool:
        """Whether a table has all of it."""
        keys = (row_key(self.signature, name) for name in self.alternatives)
        return all(table.lookup(key, rows) is not None for key in keys for rows in self.rows)

    def without(self, failed: frozenset[int]) -> "Work":
        """The work without alternatives that have one of these candidates."""
        kept = {name: chosen for name, chosen in self.alternatives.items() if failed.isdisjoint(chosen)}
        return replace(self, alternatives=kept)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An alternative that isn't measured.

    Attributes:
        site: the signature of a component's sites.
        alternative: the one that is skipped; None: all of them.
        tokens: rows of the activations; None: at every size.
        reason: one clause.
    """

    site: str
    alternative: str | None = None
    tokens: int | None = None
    reason: str


def work_of(
    graphs: Sequence[tuple[Problem, tuple[int, int]]], tokens: Sequence[int] = ()
) -> tuple[list[Work], list[Skipped]]:
    """The classes of all graphs in all ranges, and their alternatives that can't be measured.

    Where equal components have different neighbours, the most common kind is measured; alternatives that it lacks are
    measured where they exist.

    Args:
        graphs: each with first and last number of tokens of its range.
        tokens: the sizes, each in the range that has it; none: the sizes that ranges are priced at.
    """
    found: list[Work] = []
    skipped: dict[Skipped, None] = {}
    known: set[tuple[str, int, str]] = set()
    for problem, span in graphs:
        classes: dict[str, list[Work]] = {}
        sizes = _sizes(problem, span, tokens)
        for work in _components(problem, span, sizes, skipped) if sizes else ():
            classes.setdefault(work.signature, []).append(work)
        for members in classes.values():
            fresh = (_unmeasured(work, known) for work in _by_frequency(members))
            found += [replace(work, count=len(members)) for work in fresh if work is not None]
    return found, list(skipped)


def _sizes(problem: Problem, span: tuple[int, int], tokens: Sequence[int]) -> tuple[int, ...]:
    """The sizes at which a graph is measured in a range; a graph of one size alone has no choice."""
    if not tokens or not problem.pricing.is_dynamic:
        return problem.pricing.tokens
    return tuple(size for size in sorted(set(tokens)) if span[0] <= size <= span[1])


def _components(
    problem: Problem, span: tuple[int, int], tokens: Sequence[int], skipped: dict[Skipped, None]
) -> Iterator[Work]:
    for component in problem.components:
        candidates = [problem.candidates[index] for index in component]
        places = places_of(component, problem.candidates)
        if not places or not all(isinstance(candidate.match, Match) for candidate in candidates):
            continue
        signature = problem.pricing.signature(places)
        if len(component) > MAX_ENUMERATED:
            why = f"it has {len(component)} candidates; beyond {MAX_ENUMERATED} each is priced by the model"
            skipped[Skipped(site=signature, reason=why)] = None
            continue
        alternatives: dict[str, tuple[int, ...]] = {UNFUSED: ()}
        for subset in compatible(component, problem.program):
            name = alternative_name([problem.candidates[index] for index in subset], places)
            if problem.find_cycles(subset):
                skipped[Skipped(site=signature, alternative=name, reason="applied together they make a cycle")] = None
            else:
                alternatives.setdefault(name, subset)
        yield Work(
            signature=signature, problem=problem, span=span, component=component, places=tuple(places),
            alternatives=alternatives, tokens=tuple(tokens), count=1,
            rows=tuple(problem.pricing.rows_at(places, size) for size in tokens),
        )  # fmt: skip


def _by_frequency(members: Sequence[Work]) -> list[Work]:
    """One member of each kind: those with the most alternatives first, then those among the commonest neighbours."""
    kinds: dict[tuple[str, frozenset[str]], Work] = {}
    counts: Counter[tuple[str, frozenset[str]]] = Counter()
    for work in members:
        kind = work.context.text, frozenset(work.alternatives)
        counts[kind] += 1
        kinds.setdefault(kind, work)
    return [kinds[kind] for kind in sorted(kinds, key=lambda kind: (-len(kind[1]), -counts[kind]))]


def _unmeasured(work: Work, known: set[tuple[str, int, str]]) -> Work | None:
    """The part of a component's work that no other one covers; it is added to `known`."""
    sizes = list(dict.fromkeys(zip(work.tokens, work.rows, strict=True)))
    fresh = {
        name: chosen
        for name, chosen in work.alternatives.items()
        if any((work.signature, rows, name) not in known for _, rows in sizes)
    }
    known.update((work.signature, rows, name) for _, rows in sizes for name in fresh)
    if not fresh:
        return None
    by_rows = {rows: tokens for tokens, rows in reversed(sizes)}
    return replace(
        work, alternatives=fresh, tokens=tuple(by_rows[rows] for rows in sorted(by_rows)), rows=tuple(sorted(by_rows))
    )
