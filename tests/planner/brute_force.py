"""The optimum by trying every subset. Shares no code with the solver: bit masks, and networkx for cycles."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import networkx as nx

Legal = Callable[[frozenset[int]], bool]


def subsets(count: int) -> Iterable[frozenset[int]]:
    """All subsets of 0 .. count - 1: by size, then in lexicographic order."""
    for size in range(count + 1):
        for chosen in combinations(range(count), size):
            yield frozenset(chosen)


def saving(
    chosen: frozenset[int], savings: Sequence[int], tables: Mapping[frozenset[int], Mapping[frozenset[int], int]]
) -> int | None:
    """What a subset saves, None where a table doesn't list the part of it that it measures."""
    total = sum(savings[i] for i in chosen if not any(i in members for members in tables))
    for members, rows in tables.items():
        part = chosen & members
        if part and part not in rows:
            return None
        total += rows[part] if part else 0
    return total


def best(
    savings: Sequence[int], legal: Legal, tables: Mapping[frozenset[int], Mapping[frozenset[int], int]] | None = None
) -> tuple[int, tuple[int, ...]] | None:
    """(saving, candidates) of the best legal subset: of equals the smallest, then the first; None if none is legal."""
    found: tuple[int, tuple[int, ...]] | None = None
    for chosen in subsets(len(savings)):
        value = saving(chosen, savings, tables or {})
        if value is not None and (found is None or value > found[0]) and legal(chosen):
            found = value, tuple(sorted(chosen))
    return found


def is_acyclic(edges: Iterable[tuple[int, int]], groups: Sequence[frozenset[int]], chosen: frozenset[int]) -> bool:
    """Whether a graph stays acyclic when each chosen group of its nodes becomes one node."""
    owner = {node: -1 - index for index in chosen for node in groups[index]}
    quotient = nx.DiGraph()
    for a, b in edges:
        a, b = owner.get(a, a), owner.get(b, b)
        if a != b:
            quotient.add_edge(a, b)
    return bool(nx.is_directed_acyclic_graph(quotient))
