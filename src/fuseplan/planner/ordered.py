"""The policy `ordered(a, b, ...)`: what Inductor's greedy matcher does with one pass a rule, registered in that order.

`PatternMatcherPass.apply` walks the graph from its end to its beginning and replaces whatever matches at once, so that
a pass leaves nothing of a match for the passes after it. On canonical graphs no replacement creates a match of another
rule (fused ops occur in no pattern), so the outcome can be read off the candidates of the unmodified graph. A test
holds it against the real thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fuseplan.graph.legality import Contraction
from fuseplan.matching import Match


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of a policy.

    Attributes:
        chosen: the matches to apply, in graph order.
        lost: the other matches, each with those of `chosen` that took its nodes.
        cyclic: matches given up because together with chosen ones they would make the graph cyclic.
    """

    chosen: tuple[Match, ...]
    lost: tuple[tuple[Match, tuple[Match, ...]], ...] = ()
    cyclic: tuple[Match, ...] = ()


def choose_in_order(graph: fx.Graph, candidates: Sequence[Match], order: Sequence[str]) -> Choice:
    """Each rule of `order` takes, from the end of the graph to its beginning, every candidate whose nodes are still
    there.

    Args:
        graph: the canonical graph that the candidates are of.
        candidates: in graph order; one a rule and place, or more where several providers could run it: the first by
            name is taken.
        order: rule names.
    """
    taken: dict[fx.Node, Match] = {}
    chosen: list[Match] = []
    for name in order:
        turn = [match for match in candidates if match.rule.name == name]
        for match in sorted(turn, key=lambda m: m.anchor, reverse=True):
            if not any(node in taken for node in match.consumed):
                taken.update(dict.fromkeys(match.consumed, match))
                chosen.append(match)
    cyclic: list[Match] = []
    contraction = Contraction(graph)
    while cycles := contraction.cycles([match.consumed for match in chosen]):
        given_up = chosen.pop(max(cycles[0]))
        cyclic.append(given_up)
        for node in given_up.consumed:
            del taken[node]
    kept = {id(match) for match in (*chosen, *cyclic)}
    lost = []
    for match in candidates:
        if id(match) not in kept:
            winners = {id(taken[node]): taken[node] for node in match.consumed if node in taken}
            lost.append((match, tuple(winners.values())))
    chosen.sort(key=lambda m: m.anchor)
    return Choice(chosen=tuple(chosen), lost=tuple(lost), cyclic=tuple(cyclic))
