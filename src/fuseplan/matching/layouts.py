"""Results of fusions keep the graph's memory layout wherever a reader can tell; else they are copied, or refused.

A fused op may yield a view, such as a norm that is a slice of its padded twin, or strides of its own. Elementwise
readers can't tell. Where a reader can, the value is copied to the promised strides, in memory of its own, and the plan
pays for the copy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import tensor_of
from fuseplan.graph.layout import (
    carriers,
    computed,
    is_reordered,
    layout_of,
    layout_reader,
    memory_order,
    same_layout,
    storage_of,
    writers,
)
from fuseplan.matching.match import Match

Kind: TypeAlias = tuple[Any, ...]
"""The key that equal matches share; see `Layouts.kind_of`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Unkept:
    """A promise that can't be kept: a reader depends on a value's layout, and no copy can have it.

    Attributes:
        node: the value, in the canonical graph.
        reader: the node that depends on it, in the original graph.
        detail: the promised layout and the actual one.
    """

    node: fx.Node
    reader: fx.Node
    detail: str


class _Landing(NamedTuple):
    """A value of the original graph that a fusion replaces.

    Attributes:
        place: of the result, among all.
        node: the value in the canonical graph.
        original: in the original one.
        promise: its value in the graph, as a fake tensor.
        value: its replacement.
        promised: the storage of the promise.
        memory: the owner of the value's memory: the name of a variable, or the storage of a new tensor.
        is_kept: whether it has the promised layout.
        is_reordered: whether its strides may come in another order than promised, which changes the layout of values
            computed from it, too.
    """

    place: int
    node: fx.Node
    original: fx.Node
    promise: Tensor
    value: Tensor
    promised: int
    memory: str | int
    is_kept: bool
    is_reordered: bool


@dataclass(frozen=True, eq=False)
class _Yielded:
    """The results of a replacement.

    Attributes:
        values: its results, as fake tensors.
        places: the layout number and the storage of each of them.
        variables: the pattern's variables that it was computed from, by storage.
    """

    values: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    variables: Mapping[int, str]


class Layouts:
    """The layouts of the values that fusions would put into one graph.

    Args:
        canonical: the graph.
        outside: nodes of the original graph that other people's replacements would read, and where these match: a
            replacement may read any of them by its strides.
    """

    def __init__(self, canonical: CanonicalGraph, outside: Mapping[fx.Node, fx.Node]) -> None:
        self._canonical, self.outside = canonical, outside
        self._settled: dict[Match, Match | Unkept] = {}
        self._known: dict[Kind, _Yielded] = {}
        self._kinds: dict[Match, Kind] = {}
        self._interned: dict[Kind, Kind] = {}
        # Repeated layers have few layouts, which are numbered: hashing and comparing symbolic ones takes long.
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._places: dict[fx.Node, tuple[int, int] | None] = {}
        self._compared: dict[tuple[int, int], tuple[bool, bool]] = {}
        self._reordered: set[fx.Node] = set()

    @classmethod
    def of(cls, canonical: CanonicalGraph, outside: Mapping[fx.Node, fx.Node]) -> "Layouts":
        """The layouts of a graph, with those computed before."""
        known: Layouts | None = canonical.known.get(cls)
        if known is None or known.outside != outside:
            canonical.known[cls] = known = cls(canonical, outside)
        return known

    def settle(self, match: Match) -> Match | Unkept:
        """The match with the values to copy, or why it can't be applied."""
        if match not in self._settled:
            self._settled[match] = self._settle(match)
        return self._settled[match]

    def _settle(self, match: Match) -> Match | Unkept:
        yielded = self._yielded(match)
        landings = sorted(self._landings(match, yielded), key=lambda each: (not each.is_kept, each.place))
        places = ((name, self._place(value)) for name, value in match.values.items() if isinstance(value, fx.Node))
        storages: Mapping[str | int, int] = {name: place[1] for name, place in places if place is not None}
        copied, loose, owners = list[fx.Node](), list[fx.Node](), dict(storages)
        for landing in landings:
            owner = owners.get(landing.memory)
            shares = owner is not None and owner != landing.promised
            ties = _ties(landing, landings, storages)
            if not landing.is_kept or shares or not all(ties):
                reader = self._reader(landing, match, owner if shares else None)
                if reader is None:
                    loose.append(landing.node)
                    self._reordered.update([landing.node] if landing.is_reordered else ())
                elif ties or memory_order(landing.promise) is None:
                    return Unkept(node=landing.node, reader=reader, detail=_difference(landing))
                else:
                    copied.append(landing.node)
                    continue
            owners.setdefault(landing.memory, landing.promised)
        return match.but(copied=tuple(copied), loose=tuple(loose), yields=yielded.values)

    def settle_readers(self, matches: Sequence[Match]) -> list[Match]:
        """The matches, with a copy of each loose value that another match reads, whose kernel takes arguments in the
        layout that the other fusions leave.

        Args:
            matches: settled ones.
        """
        readers: dict[fx.Node, list[Match]] = {}
        for match in matches:
            for value in match.values.values():
                if isinstance(value, fx.Node):
                    readers.setdefault(value, []).append(match)
        return [self._for_readers(match, readers) if match.loose else match for match in matches]

    def _for_readers(self, match: Match, readers: Mapping[fx.Node, Sequence[Match]]) -> Match:
        consumed, seen = set(match.consumed), list[fx.Node]()
        for node in match.loose:
            reached = carriers(node, consumed, reordered=node in self._reordered)
            others = (other for each in reached for other in readers.get(each, ()))
            if any(consumed.isdisjoint(other.consumed) for other in others) and self._can_be_copied(node):
                seen.append(node)
        loose = tuple(node for node in match.loose if node not in seen)
        return match.but(copied=(*match.copied, *seen), loose=loose)

    def _can_be_copied(self, node: fx.Node) -> bool:
        value = tensor_of(self._canonical.origin[node])
        return value is not None and memory_order(value) is not None

    def _yielded(self, match: Match) -> _Yielded:
        """The replacement's results; computed once for arguments of one kind."""
        key = self.kind_of(match)
        if key not in self._known:
            traced, op = match.rule.trace_replacement(match.values), match.rule.op
            values = {traced.inputs[n]: v.meta["val"] for n, v in match.values.items() if isinstance(v, fx.Node)}
            names = {placeholder: name for name, placeholder in traced.inputs.items()}
            variables = {storage_of(v): names[n] for n, v in values.items() if isinstance(v, Tensor)}
            for node in traced.graph.nodes:
                if node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
                    # The dispatcher would call the same, and doubles the time.
                    function = op.fake if node.target is op.overload else node.target
                    values[node] = computed(function, args, kwargs)
            results = tuple(values[node] for node in traced.outputs)
            self._known[key] = _Yielded(results, tuple(map(self._lies, results)), variables)
        return self._known[key]

    def _landings(self, match: Match, yielded: _Yielded) -> Iterator[_Landing]:
        """The values of the original graph that the results replace; for a result without one, those computed
        from it.
        """
        stack = [
            (index, node, value, place)
            for index, (node, value, place) in enumerate(
                zip(match.outputs, yielded.values, yielded.places, strict=True)
            )
            if node is not None
        ]
        while stack:
            index, node, value, (layout, storage) = stack.pop()
            original = self._canonical.origin.get(node)
            place = self._place(original) if original is not None else None
            if original is not None and place is not None:
                promise, memory = original.meta["val"], yielded.variables.get(storage, storage)
                kept = self._compare(value, promise, (layout, place[0]))
                yield _Landing(index, node, original, promise, value, place[1], memory, *kept)
            for user in node.users if original is None else ():
                if user not in match.consumed:
                    made = _made(user, {node: value})
                    if isinstance(made, Tensor):
                        stack.append((index, user, made, self._lies(made)))

    def _place(self, node: fx.Node) -> tuple[int, int] | None:
        """The layout number of a node's value, and its storage; None where it is no tensor."""
        if node not in self._places:
            value = tensor_of(node)
            self._places[node] = None if value is None else self._lies(value)
        return self._places[node]

    def _lies(self, value: Tensor) -> tuple[int, int]:
        """The number of a tensor's dtype, device and layout, and its storage."""
        look = value.dtype, value.device, layout_of(value)
        return self._numbers.setdefault(look, len(self._numbers)), storage_of(value)

    def _compare(self, value: Tensor, promise: Tensor, key: tuple[int, int]) -> tuple[bool, bool]:
        """Whether a value has the promised layout, and whether its strides may come in another order; once for each
        pair of layout numbers.
        """
        if key not in self._compared:
            self._compared[key] = same_layout(promise, value), is_reordered(value, promise)
        return self._compared[key]

    def kind_of(self, match: Match) -> Kind:
        """Equal for matches of one rule whose arguments are alike: dtypes, devices, sizes, strides, which of them share
        memory, and plain values.
        """
        if match not in self._kinds:
            kind = match.rule, *self._alike(match.values)
            self._kinds[match] = self._interned.setdefault(kind, kind)
        return self._kinds[match]

    def _alike(self, values: Mapping[str, Any]) -> Iterator[Any]:
        storages: dict[int, int] = {}
        for name, value in values.items():
            place = self._place(value) if isinstance(value, fx.Node) else None
            if place is None:
                yield name, str(value.meta.get("val") if isinstance(value, fx.Node) else value)
            else:
                layout, storage = place
                yield name, layout, storages.setdefault(storage, len(storages))

    def _reader(self, landing: _Landing, match: Match, owner: int | None) -> fx.Node | None:
        """The first node that can tell that a value isn't as promised, None if there is none."""
        claims = self._canonical.claims(match.consumed)
        reader = layout_reader(landing.original, claims, reordered=landing.is_reordered)
        if reader is None and self.outside:
            reached = carriers(landing.original, claims, reordered=landing.is_reordered)
            reader = next((self.outside[each] for each in reached if each in self.outside), None)
        if reader is None and owner is not None and any(user not in claims for user in landing.original.users):
            return self._writers.get(owner)
        return reader

    @cached_property
    def _writers(self) -> dict[int, fx.Node]:
        return writers(self._canonical.original)


def _made(user: fx.Node, given: Mapping[fx.Node, Tensor]) -> Any:
    """A node's result with some of its arguments replaced."""
    args, kwargs = fx.map_arg((user.args, user.kwargs), lambda source: given.get(source, source.meta["val"]))
    return computed(user.target, args, kwargs)


def _ties(landing: _Landing, landings: Sequence[_Landing], storages: Mapping[str | int, int]) -> list[bool]:
    """For each variable and each other result that a value aliases in the graph, whether it does so after the
    fusion.
    """
    mine = landing.promised
    ties = [storages.get(landing.memory) == mine for storage in storages.values() if storage == mine]
    others = [each for each in landings if each is not landing and each.promised == mine]
    return [*ties, *(each.memory == landing.memory for each in others)]


def _difference(landing: _Landing) -> str:
    promise, value = landing.promise, landing.value
    if landing.is_kept:
        return "it would share memory with other values than in the graph"
    return (
        f"its strides are {tuple(promise.stride())} from element {promise.storage_offset()} on, and would be "
        f"{tuple(value.stride())} from element {value.storage_offset()} on"
    )
