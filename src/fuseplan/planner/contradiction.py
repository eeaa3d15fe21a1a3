"""Contradictions of forced fusions: which selectors contradict each other, and at which places."""

import itertools
from collections.abc import Callable, Iterable, Sequence

from fuseplan.errors import PlanError
from fuseplan.planner.program import IntegerProgram

Groups = Sequence[tuple[str, frozenset[int]]]
"""Forcing selectors, each with the candidates at one place; one of these has to be applied."""

ADVICE = "drop one of them, or narrow it down to other places, as RULE@PLACE"


class ContradictionError(PlanError):
    """Selectors that can't be followed together.

    Args:
        selectors: the user's, each with its verb, e.g. `force 'act_padding'`.
        sources: places in the user's model, None for an unknown one.
        why: one clause.
    """

    def __init__(self, selectors: Sequence[str], sources: Iterable[str | None], why: str) -> None:
        self.selectors, self.sources, self.why = selectors, tuple(dict.fromkeys(sources)), why
        super().__init__(self.message(lambda sources: ", ".join(filter(None, sources))))

    def message(self, fold: Callable[[Iterable[str | None]], str]) -> str:
        """The text of the error.

        Args:
            fold: places as one text.
        """
        where = fold(self.sources)
        who = " and ".join(self.selectors)
        verb = "contradict each other" if len(self.selectors) > 1 else "contradicts itself"
        return f"{who} {verb}{f' at {where}' if where else ''}: {self.why}; {ADVICE}"


def contradiction(program: IntegerProgram, groups: Groups, sources: Sequence[str | None]) -> ContradictionError:
    """The error for forced candidates that can't all be applied.

    Args:
        program: of the graph.
        groups: of forced candidates, without forbidden ones.
        sources: the place of each candidate.
    """
    pairs: dict[tuple[str, ...], list[str | None]] = {}
    for (first, left), (second, right) in itertools.combinations(groups, 2):
        if not left & right and all((min(i, j), max(i, j)) in program.conflicts for i in left for j in right):
            texts = tuple(dict.fromkeys((first, second)))
            pairs.setdefault(texts, []).extend(sources[i] for i in sorted(left | right))
    if pairs:
        selectors, where = next(iter(pairs.items()))
        why = "they want the same op there, which can be in one fusion only"
    else:
        selectors = tuple(dict.fromkeys(text for text, _ in groups))
        where = [sources[i] for _, group in groups for i in sorted(group)]
        why = "they can't all be applied together"
    return ContradictionError([f"force {text!r}" for text in selectors], where, why)
