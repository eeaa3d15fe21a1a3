"""A component as a weighted packing problem, whose heaviest packing is the one optimum left after breaking ties.

Candidates that go together become one atom, and so does every alternative that was measured. An atom's weight is one
integer whose digits are its saving, then the number of its candidates, then their places, so that no two packings weigh
the same and comparing weights compares (saving, fewer candidates, earlier candidates).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fuseplan.planner.components import Component
from fuseplan.planner.disjoint_sets import DisjointSets

# A place is a bit of the weight, so that places take memory quadratic in the size of a component. Beyond this many
# candidates they are left out, and of packings that tie in saving and number the first one found wins.
MAX_PLACES = 4096


@dataclass(frozen=True)
class Limit:
    """The sum of `counts[atom]` over the atoms chosen is at most `room`."""

    counts: Mapping[int, int]
    room: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Packing:
    """Choose atoms of the largest total weight.

    Attributes:
        scale: the weight of 1 ns.
        weights: by atom.
        savings: ns, by atom.
        members: the candidates of each atom.
        neighbours: atoms that may not be chosen with an atom.
        closures: an atom and all atoms that it needs.
        limits: further constraints.
        mandatory: of each of these sets one atom has to be chosen. Their weights hold a bonus that pays for anything.
        bonus: the size of it.
        alive: the atoms that can be chosen.
        chosen: the atoms that have been chosen already; they are not alive.
        weight: of `chosen`.
    """

    scale: int
    weights: list[int]
    savings: list[int]
    members: list[tuple[int, ...]]
    neighbours: list[frozenset[int]]
    closures: list[frozenset[int]]
    limits: list[Limit]
    mandatory: list[frozenset[int]]
    bonus: int
    alive: frozenset[int] = frozenset()
    chosen: frozenset[int] = frozenset()
    weight: int = 0

    @cached_property
    def dependents(self) -> list[set[int]]:
        """The atoms that need an atom, itself included."""
        result: list[set[int]] = [set() for _ in self.weights]
        for atom, closure in enumerate(self.closures):
            for needed in closure:
                result[needed].add(atom)
        return result

    @cached_property
    def limits_of(self) -> list[list[Limit]]:
        """The limits that count an atom."""
        result: list[list[Limit]] = [[] for _ in self.weights]
        for limit in self.limits:
            for atom in limit.counts:
                result[atom].append(limit)
        return result

    @cached_property
    def coupled(self) -> bool:
        """Whether there are other constraints than neighbours."""
        return bool(self.limits) or any(len(each) > 1 for each in self.closures)

    def feasible(self, chosen: Collection[int]) -> bool:
        """Whether a packing has an atom of every mandatory set."""
        return all(not each.isdisjoint(chosen) for each in self.mandatory)

    def weigh(self, chosen: Iterable[int]) -> int:
        """The weight of a packing."""
        return sum(self.weights[atom] for atom in chosen)

    def candidates(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """The candidates of a packing, in ascending order."""
        return tuple(sorted(candidate for atom in chosen for candidate in self.members[atom]))

    def saving(self, weight: int) -> int:
        """The saving in ns of a feasible packing of this weight, or the most that one not heavier can save."""
        return -(-(weight - self.bonus * len(self.mandatory)) // self.scale)


class State:
    """A packing in the making.

    Attributes:
        alive: atoms that are neither chosen nor excluded. All that they need is alive or chosen.
        chosen: atoms that are chosen, with all that they need.
        weight: of the atoms chosen.
    """

    __slots__ = ("alive", "chosen", "packing", "weight")

    def __init__(self, packing: Packing, alive: Collection[int], chosen: Collection[int], weight: int) -> None:
        self.packing, self.weight = packing, weight
        self.alive, self.chosen = set(alive), set(chosen)

    @classmethod
    def root(cls, packing: Packing) -> "State":
        """Where a search begins."""
        return cls(packing, packing.alive, packing.chosen, packing.weight)

    def copy(self) -> "State":
        """A state that changes apart from this one."""
        return State(self.packing, self.alive, self.chosen, self.weight)

    def gain(self, atom: int) -> int:
        """The weight that taking an open atom would add."""
        weights = self.packing.weights
        return sum(weights[each] for each in self.packing.closures[atom] if each not in self.chosen)

    def take(self, atom: int) -> bool:
        """Chooses an atom that is alive and all that it needs; if limits forbid it, changes nothing, returns False."""
        packing = self.packing
        group = packing.closures[atom] - self.chosen
        touched = {id(limit): limit for each in group for limit in packing.limits_of[each]}
        loads = {key: self._load(limit, group) for key, limit in touched.items()}
        if any(loads[key] > limit.room for key, limit in touched.items()):
            return False
        self.alive -= group
        self.chosen |= group
        self.weight += sum(packing.weights[each] for each in group)
        for each in group:
            self.drop(packing.neighbours[each])
        for key, limit in touched.items():
            self.drop(each for each, count in limit.counts.items() if loads[key] + count > limit.room)
        return True

    def drop(self, atoms: Iterable[int]) -> None:
        """Excludes those of `atoms` that are alive, and whatever needs them."""
        dependents = self.packing.dependents
        for atom in self.alive.intersection(atoms):
            self.alive -= dependents[atom]

    def _load(self, limit: Limit, group: Collection[int]) -> int:
        counts = limit.counts.items()
        return sum(count for atom, count in counts if atom in self.chosen or atom in group)


def contract(component: Component) -> Packing | None:
    """The packing problem of a component, or None if forced candidates rule each other out."""
    size = len(component.savings)
    places = size if size <= MAX_PLACES else 0
    scale = (size + 1) << places

    def weigh(saving: int, candidates: Iterable[int]) -> int:
        weight = saving * scale
        for candidate in candidates:
            weight -= 1 << places
            weight += (1 << (places - 1 - candidate)) if places else 0
        return weight

    atoms = _Atoms(component)
    weights = [weigh(saving, candidates) for candidates, saving in zip(atoms.members, atoms.savings, strict=True)]
    mandatory = [*atoms.mandatory, *(atoms.holders(group) for group in component.one_of)]
    bonus = 1 + sum(map(abs, weights)) if mandatory else 0
    for atom in (atom for block in mandatory for atom in block):
        weights[atom] += bonus
    closures = [_closure(atom, atoms.needs) for atom in range(len(weights))]
    limits = atoms.limits(component.cuts)
    packing = Packing(
        scale=scale,
        weights=weights,
        savings=atoms.savings,
        members=atoms.members,
        neighbours=[frozenset(each) for each in atoms.neighbours],
        closures=closures,
        limits=limits,
        mandatory=mandatory,
        bonus=bonus,
    )
    state = State(packing, range(len(weights)), (), 0)
    state.drop(atoms.excluded(component))
    state.drop([atom for atom, each in enumerate(closures) if any(packing.neighbours[a] & each for a in each)])
    state.drop([atom for limit in limits for atom, count in limit.counts.items() if count > limit.room])
    for candidate in component.forced:
        held = atoms.of.get(candidate)
        if held is not None and held not in state.chosen and (held not in state.alive or not state.take(held)):
            return None
    if any(state.alive.isdisjoint(block) and state.chosen.isdisjoint(block) for block in packing.mandatory):
        return None
    return replace(packing, alive=frozenset(state.alive), chosen=frozenset(state.chosen), weight=state.weight)


class _Atoms:
    """The atoms of a component and the constraints between two of them.

    Attributes:
        members: the candidates of each atom.
        savings: ns, by atom.
        neighbours: atoms never chosen together; an atom that rules itself out is its own neighbour.
        needs: atoms that an atom needs directly.
        of: the atom of each candidate outside tables.
        mandatory: for each table with forced candidates the atoms that hold all of these.
    """

    def __init__(self, component: Component) -> None:
        self.members: list[tuple[int, ...]] = []
        self.savings: list[int] = []
        self.of: dict[int, int] = {}
        self.mandatory: list[frozenset[int]] = []
        blocks = [self._add_table(component, *table) for table in component.tables]
        tabled = {candidate for members, _ in component.tables for candidate in members}
        sets = DisjointSets(len(component.savings))
        for group in component.together:
            sets.union(group)
        for candidates in sets.sets():
            if tabled.isdisjoint(candidates):
                self.of.update(dict.fromkeys(candidates, len(self.members)))
                self._add(candidates, sum(component.savings[candidate] for candidate in candidates))
        self.neighbours: list[set[int]] = [set() for _ in self.members]
        self.needs: list[set[int]] = [set() for _ in self.members]
        for block in blocks:
            for atom in block:
                self.neighbours[atom].update(other for other in block if other != atom)
        for first, second in component.conflicts:
            if first not in tabled:
                self._separate(self.of[first], self.of[second])
        for first, second in component.requires:
            if first not in tabled:
                self.needs[self.of[first]].add(self.of[second])

    def _add(self, candidates: tuple[int, ...], saving: int) -> None:
        self.members.append(candidates)
        self.savings.append(saving)

    def _add_table(
        self, component: Component, members: tuple[int, ...], alternatives: tuple[tuple[tuple[int, ...], int], ...]
    ) -> range:
        forced = set(component.forced).intersection(members)
        first = len(self.members)
        for candidates, saving in alternatives:
            if forced.issubset(candidates) and _is_allowed(component, set(candidates)):
                self._add(candidates, saving)
        block = range(first, len(self.members))
        if forced:
            self.mandatory.append(frozenset(block))
        return block

    def _separate(self, first: int, second: int) -> None:
        self.neighbours[first].add(second)
        self.neighbours[second].add(first)

    def holders(self, candidates: Iterable[int]) -> frozenset[int]:
        """The atoms that hold any of the candidates."""
        wanted = set(candidates)
        return frozenset(atom for atom, members in enumerate(self.members) if not wanted.isdisjoint(members))

    def excluded(self, component: Component) -> list[int]:
        """The atoms that can't be chosen by themselves."""
        forbidden = [self.of[candidate] for candidate in component.forbidden if candidate in self.of]
        forced = {self.of.get(candidate) for candidate in component.forced}
        unsure = {self.of[candidate] for candidate in component.unsure if candidate in self.of} - forced
        return [*forbidden, *sorted(unsure), *(atom for atom, others in enumerate(self.neighbours) if atom in others)]

    def limits(self, cuts: Iterable[tuple[int, ...]]) -> list[Limit]:
        """Cuts as limits; two atoms that no limit has room for become neighbours instead."""
        holders: dict[int, list[int]] = {}
        for atom, candidates in enumerate(self.members):
            for candidate in candidates:
                holders.setdefault(candidate, []).append(atom)
        limits = []
        for cut in cuts:
            inside = set(cut)
            counts: dict[int, int] = {}
            for candidate in cut:
                for atom in holders.get(candidate, ()):
                    counts[atom] = counts.get(atom, 0) + 1
            room = len(inside) - 1
            open_pairs = False
            for first, count in counts.items():
                for second, other in counts.items():
                    if first < second and second not in self.neighbours[first]:
                        if count + other > room:
                            self._separate(first, second)
                        else:
                            open_pairs = True
            if open_pairs or any(count > room for count in counts.values()):
                limits.append(Limit(counts, room))
        return limits


def _is_allowed(component: Component, chosen: set[int]) -> bool:
    """Whether a subset in a table contradicts no other constraint."""
    return (
        chosen.isdisjoint(component.forbidden)
        and not any(chosen.issuperset(pair) for pair in component.conflicts)
        and not any(first in chosen and second not in chosen for first, second in component.requires)
        and all(chosen.issuperset(group) or chosen.isdisjoint(group) for group in component.together)
        and not any(chosen.issuperset(cut) for cut in component.cuts)
    )


def _closure(atom: int, needs: list[set[int]]) -> frozenset[int]:
    if not needs[atom]:
        return frozenset((atom,))
    found, stack = {atom}, [atom]
    while stack:
        new = needs[stack.pop()] - found
        found |= new
        stack.extend(new)
    return frozenset(found)
