"""Alternatives of a component: which there are, and their names in tables."""

from collections.abc import Iterator, Mapping, Sequence

from fuseplan.matching import Match
from fuseplan.planner.candidates import Candidate, copies_text
from fuseplan.planner.program import IntegerProgram

UNFUSED = "unfused"
MAX_ENUMERATED = 12
"""Candidates up to which a component's alternatives are looked up as a whole; beyond, each candidate is modelled."""


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
