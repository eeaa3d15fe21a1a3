"""Explanations of obstacles at a place, the decisive ones alone; each kind of place is tried once a graph."""

from dataclasses import replace

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import tensor_of
from fuseplan.matching.obstacles import Obstruction, likeliest_first, obstruction
from fuseplan.matching.siblings import Siblings
from fuseplan.matching.trial import Place, Way, decisive


class Shared:
    """Facts that rules with the same parts share: read once a graph."""

    def __init__(self, canonical: CanonicalGraph) -> None:
        self.canonical, self.siblings = canonical, Siblings(canonical)
        self._decisive: dict[tuple[object, ...], tuple[list[int], bool]] = {}

    def obstruction(self, place: Place, consumer: fx.Node) -> Obstruction:
        """Explains the obstacles between two ops: those without which the rule would match."""
        way = place.ways[0]
        calls = [(node.target, len(node.users)) for node in place.calls]
        key = (place.members[0].name, consumer.target, *map(_kind_of_way, place.ways), *calls)
        if key not in self._decisive:
            found = decisive(self.canonical, place, likeliest_first(way.nodes, way.goal))
            self._decisive[key] = [*map([*way.nodes].index, found.nodes)], found.suffices
        chosen, suffices = self._decisive[key]
        reported = obstruction([way.nodes[index] for index in chosen], way.goal, consumer)
        return reported if suffices else replace(reported, fix=None)


def _kind_of_way(way: Way) -> str:
    """Equal for ways with the same decisive obstacles."""
    kinds = []
    for node in (*way.nodes, way.goal):
        constants = [each for each in node.args if not isinstance(each, fx.Node)]
        kinds.append((node.target, len(node.users), str(tensor_of(node)), constants))
    return str(kinds)
