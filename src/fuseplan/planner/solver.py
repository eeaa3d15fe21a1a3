"""The best legal selection, with a bound that certifies it.

Components are solved apart and equal ones once. Cycles are cut lazily: a selection that turns out cyclic forbids the
candidates on the cycle to be selected together, and the components that this ties together are solved again.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from fuseplan.errors import PlanError
from fuseplan.planner.baselines import greedy, heaviest
from fuseplan.planner.branch_and_bound import search
from fuseplan.planner.components import Component, components, isolate
from fuseplan.planner.milp import solve_linear
from fuseplan.planner.packing import Packing, contract
from fuseplan.planner.program import CycleFinder, IntegerProgram, Solution

DEFAULT_NODE_BUDGET = 20_000
LARGE = 48
"""Atoms from which on a component that the root of the search doesn't settle goes to linear relaxations."""
FIRST_NODES = 50
"""The search's budget for such a component before that: most are solved within it, with all ties broken."""
FIRST_VISITS = 1_000_000
"""The most conflicts that these nodes may look at; a node looks at all of them."""


class Rival(NamedTuple):
    """The best selection of a component with a candidate that the optimum lacks, or without one that it has.

    Attributes:
        lost_ns: how much less it saves; negative where it saves more, but with unsure candidates.
        best: candidates of the best selection of the component.
        selected: candidates of the rival.
    """

    lost_ns: int
    best: tuple[int, ...]
    selected: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A component's answer: candidates by their place in it."""

    chosen: tuple[int, ...]
    saving_ns: int
    bound_ns: int
    nodes: int


_Parts: TypeAlias = tuple[
    IntegerProgram, tuple[tuple[int, ...], ...], list[tuple[int, ...]], list[Component]
]  # fmt: skip
"""A program, cuts, its components under these, and the problem of each."""


class Solver:
    """Remembers the components it has solved, so that graphs and ranges with equal layers share their answers.

    Args:
        node_budget: branch-and-bound nodes a component; then the best selection found stands, beside its bound.
    """

    def __init__(self, node_budget: int = DEFAULT_NODE_BUDGET) -> None:
        self.node_budget = node_budget
        self._answers: dict[Component, _Part | None] = {}
        self._rivals: dict[Component, tuple[_Part | None, ...]] = {}
        self._last: _Parts | None = None

    def solve(self, program: IntegerProgram, find_cycles: CycleFinder | None = None) -> Solution:
        """Chooses.

        Args:
            program: the candidates and their constraints.
            find_cycles: in a selection that is legal otherwise; None: there can be none.

        Raises:
            PlanError: forced fusions rule each other out.
        """
        cuts: list[tuple[int, ...]] = []
        nodes = 0
        while True:
            members, parts = self._parts_of(program, tuple(cuts))
            answers = [self._answer(program, part, candidates) for part, candidates in zip(parts, members, strict=True)]
            selected = sorted(candidates[i] for a, candidates in zip(answers, members, strict=True) for i in a.chosen)
            nodes += sum(answer.nodes for answer in dict(zip(parts, answers, strict=True)).values())
            cycles = find_cycles(selected) if find_cycles and selected else ()
            objective, bound = sum(a.saving_ns for a in answers), sum(a.bound_ns for a in answers)
            if cycles and len(cuts) >= self.node_budget:
                assert find_cycles
                repaired = greedy(program, heaviest, find_cycles, selected)
                selected, objective, cycles = [*repaired.selected], repaired.objective_ns, ()
            if not cycles:
                return Solution(
                    selected=tuple(selected),
                    objective_ns=objective,
                    bound_ns=bound,
                    components=len(members),
                    classes=len(set(parts)),
                    nodes=nodes,
                    cuts=tuple(cuts),
                )
            new = [tuple(sorted(cycle)) for cycle in cycles]
            assert not set(new) & set(cuts), "a cut selection came back"
            cuts += dict.fromkeys(new)

    def rivals(self, program: IntegerProgram, cuts: Sequence[tuple[int, ...]]) -> list[Rival | None]:
        """For each candidate the rival that holds it, or lacks it if it is selected; None where there is none. In
        components too large to be solved again for each of them it is the best selection without its neighbours.

        Args:
            program: as it was solved.
            cuts: of its solution.
        """
        result: list[Rival | None] = [None] * len(program.names)
        members, parts = self._parts_of(program, tuple(cuts))
        for part, candidates in zip(parts, members, strict=True):
            if part not in self._rivals:
                self._rivals[part] = self._rivals_of(part)
            best = self._answers[part]
            assert best is not None
            for candidate, rival in zip(candidates, self._rivals[part], strict=True):
                if rival is not None:
                    result[candidate] = Rival(
                        lost_ns=best.saving_ns - rival.saving_ns,
                        best=tuple(candidates[index] for index in best.chosen),
                        selected=tuple(candidates[index] for index in rival.chosen),
                    )
        return result

    def _parts_of(
        self, program: IntegerProgram, cuts: tuple[tuple[int, ...], ...]
    ) -> tuple[list[tuple[int, ...]], list[Component]]:
        """The components of a program, and their problems; kept, since rivals are asked for right after solving."""
        if self._last is None or self._last[0] is not program or self._last[1] != cuts:
            members = components(program, cuts)
            self._last = program, cuts, members, isolate(program, members, cuts)
        return self._last[2:]

    def _rivals_of(self, part: Component) -> tuple[_Part | None, ...]:
        best = self._answers[part]
        assert best is not None
        chosen, size = set(best.chosen), len(part.savings)
        if size > LARGE:
            neighbours: list[set[int]] = [set() for _ in range(size)]
            for i, j in part.conflicts:
                neighbours[i].add(j)
                neighbours[j].add(i)
            return tuple(
                best if i in chosen else self._near(part, (chosen - neighbours[i]) | {i}) for i in range(size)
            )  # fmt: skip
        return tuple(self._rival_of(part, index, chosen) for index in range(size))

    def _rival_of(self, part: Component, index: int, chosen: Collection[int]) -> _Part | None:
        if index in chosen:
            others = replace(part, forbidden=tuple(sorted({*part.forbidden, index})))
            return None if index in part.forced else self._solved(others)
        return self._solved(replace(part, forced=tuple(sorted({*part.forced, index}))))

    def _near(self, part: Component, selected: Collection[int]) -> _Part:
        saving = sum(part.savings[index] for index in selected)
        return _Part(chosen=tuple(sorted(selected)), saving_ns=saving, bound_ns=saving, nodes=0)

    def _solved(self, part: Component) -> _Part | None:
        if part not in self._answers:
            packing = contract(part)
            self._answers[part] = None if packing is None else _solve_packing(part, packing, self.node_budget)
        return self._answers[part]

    def _answer(self, program: IntegerProgram, part: Component, candidates: Sequence[int]) -> _Part:
        answer = self._solved(part)
        if answer is None:
            raise PlanError(_contradiction(program, candidates))
        return answer


def _solve_packing(part: Component, packing: Packing, node_budget: int) -> _Part | None:
    is_large = len(packing.alive) > LARGE
    visits = 1 + sum(map(len, packing.neighbours))
    first = min(node_budget, FIRST_NODES, 1 + FIRST_VISITS // visits)
    outcome = search(packing, first if is_large else node_budget)
    if not packing.feasible(outcome.chosen):
        return None
    chosen, bound, nodes = outcome.chosen, packing.saving(outcome.bound), outcome.nodes
    if is_large and not outcome.is_optimal and node_budget > first:
        relaxed = solve_linear(packing, node_budget)
        if relaxed is not None:
            bound, nodes = min(bound, relaxed.bound_ns), nodes + relaxed.nodes
            if relaxed.chosen is not None and packing.weigh(relaxed.chosen) > outcome.weight:
                chosen = relaxed.chosen
    selected = packing.candidates(chosen)
    saving = part.saving(selected)
    return _Part(chosen=selected, saving_ns=saving, bound_ns=max(bound, saving), nodes=nodes)


def _contradiction(program: IntegerProgram, candidates: Sequence[int]) -> str:
    forced = [program.names[c] for c in candidates if c in program.forced]
    forced += [" or ".join(program.names[c] for c in sorted(g)) for g in program.one_of if g.issubset(candidates)]
    forbidden = [program.names[c] for c in candidates if c in program.forbidden]
    without = f" without {', '.join(forbidden[:3])}" if forbidden else ""
    return f"the forced fusions can't all be applied{without}: {'; '.join(forced[:3])}"
