"""Ops that a layer lacks and other layers have at the same place: an op with a dead result leaves nothing behind."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TypeAlias

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import item, place_of, tensor_of
from fuseplan.matching.candidates import op_name
from fuseplan.matching.match import Match
from fuseplan.record import Nearness, Reason, Refusal
from fuseplan.rules import Rule

Layer: TypeAlias = tuple[str, int, str]
"""(what comes before the number of a layer, the number, what comes after) of a module path."""

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Siblings:
    """The layers of one graph, as far as modules tell; read once for all rules."""

    def __init__(self, canonical: CanonicalGraph) -> None:
        self.canonical = canonical

    @cached_property
    def _placed(self) -> list[tuple[fx.Node, str | None]]:
        return [(node, place_of(node)) for node in self.canonical.dialect_nodes]

    @cached_property
    def _present(self) -> dict[str, set[int]]:
        """The numbers of all layers, by what comes before the number."""
        present: dict[str, set[int]] = {}
        for layer in filter(None, (layer_of(place) for _, place in self._placed)):
            present.setdefault(layer[0], set()).add(layer[1])
        return present

    def missing(
        self, members: Sequence[Rule], candidates: Sequence[Match], refused: Collection[fx.Node]
    ) -> Iterator[Refusal]:
        """Layers without any of the ops that a rule fuses at the same place of most others.

        Args:
            members: of the rule.
            candidates: its matches.
            refused: nodes of places for which there is a refusal already.
        """
        matched: dict[tuple[str, str], dict[int, Match]] = {}
        for match in candidates:
            layer = layer_of(place_of(match.core))
            if layer is not None:
                matched.setdefault((layer[0], layer[2]), {}).setdefault(layer[1], match)
        wanting = {key: by_number for key, by_number in matched.items() if self._present[key[0]] - by_number.keys()}
        if not wanting:
            return
        overloads = {member.core.overload for member in members}
        here = {place: node for node, place in self._placed if node.target in overloads}
        cores, known = self._cores_by_layer(members), {place_of(node) for node in refused}
        for (before, after), by_number in sorted(wanting.items()):
            # A layer with as many cores as others has this one too, by another name or spelling.
            usual = max(cores[before, number] for number in by_number)
            lacking = {
                f"{before}{number}{after}": cores[before, number] < usual
                for number in sorted(self._present[before] - by_number.keys())
            }
            missing = [place for place, lacks in lacking.items() if place not in known and (lacks or place in here)]
            if len(missing) < len(by_number):
                yield from _missing(self.canonical, by_number, missing, here)

    def _cores_by_layer(self, members: Sequence[Rule]) -> Counter[tuple[str, int]]:
        """How many cores of a rule's members each layer has, with those that only look like one."""
        overloads, names = {member.core.overload for member in members}, {member.core.name for member in members}
        places = [place for node, place in self._placed if node.target in overloads]
        places += [refusal.source for refusal in self.canonical.refusals if refusal.op in names]
        return Counter(layer[:2] for layer in map(layer_of, places) if layer is not None)


def _missing(
    canonical: CanonicalGraph, matched: dict[int, Match], places: Sequence[str], here: Mapping[str | None, fx.Node]
) -> Iterator[Refusal]:
    sample = next(iter(matched.values()))
    usual = _readers(sample.core)
    for place in places:
        core = here.get(place)
        if core is not None and not _readers(core) <= usual:
            continue  # by design: another op has the result
        gone = sample.rule.core.name if core is None else op_name(sample.anchor)
        yield Refusal(
            reason=Reason.DEAD, rule=sample.rule.name, op=sample.rule.core.name,
            detail=f"{len(matched)} other layers have {gone} there and this one has none: is its result not used? Dead "
            "code is removed before matching",
            nodes=(canonical.source_node(core).name,) if core is not None else (), source=place, site=place,
            nearness=Nearness.MISSING, expected=gone, found="nothing",
        )  # fmt: skip


def _readers(core: fx.Node) -> set[tuple[object, str | None]]:
    """The readers of a core's result, each with its module within the layer."""
    values = [core] if tensor_of(core) is not None else [value] if (value := item(core, 0)) is not None else []
    found = [(user.target, layer_of(place_of(user))) for value in values for user in value.users]
    return {(target, layer[2] if layer else None) for target, layer in found}


@lru_cache(maxsize=16384)
def layer_of(place: str | None) -> Layer | None:
    """A module path taken apart at the number of its layer, the first number in it; None where there is none."""
    found = _NUMBER.search(place or "")
    if place is None or found is None:
        return None
    return place[: found.start()], int(found[0]), place[found.end() :]
