"""Writes of keys and values into a static cache, as in post-grad graphs of Hugging Face's `StaticCache`.

    written = index_put(cache, [None, None, positions], x)          x [batch, heads, tokens, head_dim]
    ...                                                             attention reads `written`
    copy_(cache, written)                                           at the end of the graph

`cache` is an input of the graph, so Inductor writes to it in place. The checks here make sure that a fused op may do so
too, unobserved: nothing else reads the cache before the write, it is written once, and it shares memory with no other
input.

Keys and values are raised together, since they share their positions. Where the keys come from a rotary embedding of
normed keys, the two writes are one op. Where they are rotated but not normed, the op includes the rotations of keys and
queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from fuseplan.graph.canonical import CanonicalGraph, is_dialect
from fuseplan.graph.canonical.unraised import Unraised, only_reader
from fuseplan.graph.facts import Call, aten, dtype_name, dtype_of, equal_sizes, is_call, is_item, tensor_of
from fuseplan.graph.layout import memory_order, storage_of
from fuseplan.graph.legality import Contraction, is_convex
from fuseplan.graph.ops import DialectOp
from fuseplan.graph.reach import path_between
from fuseplan.graph.surgery import sort_topologically
from fuseplan.record import Reason
from fuseplan.rules.parts.cache_write import cache_write
from fuseplan.rules.parts.cached_rotary.op import cached_rotary
from fuseplan.rules.parts.rotary.angles import spread
from fuseplan.rules.parts.rotary.op import rotary_embedding
from fuseplan.rules.parts.rotary.spellings import Rotation, is_normed, read_rotations

TOKENS = 2
"""The dimension of tokens in a cache, and in the tensor written to it."""

MOST_BETWEEN = 10
"""The most ops between the root of an unrecognised rotation and the write of its result."""


@dataclass(frozen=True, eq=False)
class _Write:
    """A tensor that is written into a cache.

    Attributes:
        node: the write; its value is the updated cache.
        cache: the cache before the write.
        x: the tensor to write.
        positions: the positions to write to.
    """

    node: Call
    cache: fx.Node
    x: fx.Node
    positions: fx.Node


@dataclass(frozen=True, eq=False)
class _Found:
    """The nodes of one op: writes of keys and values, and the rotations of queries and keys if the op includes them."""

    keys: _Write
    values: _Write
    rotations: tuple[Rotation, Rotation] | None

    @property
    def region(self) -> set[fx.Node]:
        """The nodes that the op replaces."""
        rotated = [node for each in self.rotations or () for node in each.interior]
        return {self.keys.node, self.values.node, *rotated}

    @property
    def arguments(self) -> tuple[fx.Node | str, ...]:
        """The arguments of the op."""
        k, v = self.keys, self.values
        if self.rotations is None:
            return k.x, v.x, k.cache, v.cache, k.positions
        queries, keys = self.rotations
        return (
            queries.x, keys.x, v.x, k.cache, v.cache, queries.cos, queries.sin, k.positions, queries.rounding.value,
        )  # fmt: skip

    @property
    def is_legal(self) -> bool:
        """Whether one op can replace the region."""
        return is_convex(self.region, [each for each in self.arguments if isinstance(each, fx.Node)])

    def raise_in(self, canonical: CanonicalGraph) -> None:
        """Puts the op into the graph."""
        results = (self.keys.node, self.values.node)
        if self.rotations is None:
            canonical.raise_op(cache_write, self.arguments, results)
            return
        queries, keys = self.rotations
        cos, sin = (spread(canonical, angle, queries.x, queries.interior) for angle in (queries.cos, queries.sin))
        whole = replace(self, rotations=(replace(queries, cos=cos, sin=sin), keys))
        canonical.raise_op(cached_rotary, whole.arguments, (queries.y, *results))


def raise_cache_writes(canonical: CanonicalGraph) -> None:
    """Raises every write of rotated keys, and of values, into a static cache."""
    writes = [write for node in canonical.calls(aten.index_put.default) if (write := _read(node)) is not None]
    appended = [node for node in canonical.calls(aten.cat.default) if _is_appended(node)]
    if not writes and not appended:
        return
    rotations = dict[fx.Node, Rotation]()
    for root, read in read_rotations(canonical):
        if isinstance(read, Rotation):
            rotations[read.y] = read
        elif not is_normed(root) and (reached := path_between(root, _is_write, "users", MOST_BETWEEN)) is not None:
            read.tell(canonical, cached_rotary, "rotary embedding", at=[reached[1]], place=root)
    for cat in appended:
        op = _op_for(cat.args[0][1], rotations)
        if op is not None:
            canonical.refuse(
                op, [cat], Reason.OP, "write into a cache not recognised: keys are appended to a cache that grows",
                node=cat, place=cat, expected=str(aten.index_put.default), found=str(cat.target),
                fix="hand over a static cache, such as transformers' StaticCache",
            )  # fmt: skip
    sort_topologically(canonical.graph)
    search, found = _Search(canonical, writes, rotations), list[_Found]()
    for write in writes:
        op = _op_for(write.x, rotations)
        if op is not None:
            try:
                found.append(search.around(write))
            except Unraised as refused:
                refused.tell(canonical, op, "write into a cache", at=[write.node], place=write.node)
    cyclic = {
        index for cycle in Contraction(canonical.graph).cycles([each.region for each in found]) for index in cycle
    }
    for index, each in enumerate(found):
        if index not in cyclic:
            each.raise_in(canonical)


def _op_for(x: object, rotations: dict[fx.Node, Rotation]) -> DialectOp | None:
    """The op for a write of rotated keys; None for other writes."""
    if is_item(x) and is_dialect(x.args[0], rotary_embedding):
        return cache_write
    return cached_rotary if x in rotations else None


def _is_appended(cat: Call) -> bool:
    """Whether it appends tokens to a cache [batch, heads, tokens, head_dim] that is an input of the graph."""
    parts, dim = (*cat.args, 0)[:2]
    value = tensor_of(cat)
    return (
        len(parts) == 2 and parts[0].op == "placeholder" and value is not None and (value.dim(), dim % 4) == (4, TOKENS)
    )


def _is_write(node: fx.Node) -> bool:
    return is_call(node, aten.index_put.default) and _read(node) is not None


def _read(node: Call) -> _Write | None:
    """A write at positions along the tokens of [batch, heads, tokens, head_dim]; None for any other."""
    cache, indices, x, value = node.args[0], node.args[1], node.args[2], tensor_of(node)
    if value is None or value.dim() != 4 or len(indices) <= TOKENS:
        return None
    others = (*indices[:TOKENS], *indices[TOKENS + 1 :])
    positions = indices[TOKENS]
    if any(each is not None for each in others) or not all(isinstance(each, fx.Node) for each in (positions, cache, x)):
        return None
    return _Write(node, cache, x, positions)


class _Search:
    """A search for the nodes that belong to each write of a graph; no node belongs to two."""

    def __init__(self, canonical: CanonicalGraph, writes: Sequence[_Write], rotations: dict[fx.Node, Rotation]) -> None:
        self.canonical, self.writes, self.rotations = canonical, writes, rotations
        self.taken: set[fx.Node] = set()
        self.stored = {write.x for write in writes}
        self.inputs: dict[int, list[fx.Node]] = {}
        for node in canonical.graph.find_nodes(op="placeholder"):
            value = tensor_of(node)
            if value is not None:
                self.inputs.setdefault(storage_of(value), []).append(node)

    def around(self, keys: _Write) -> _Found:
        """The nodes that become one op with a write of rotated keys.

        Raises:
            Unraised: they can't be one op.
        """
        self._check(keys)
        values = self._values(keys)
        rotated = self.rotations.get(keys.x)
        if rotated is None:
            pairs = [_Found(keys, each, None) for each in values]
        else:
            only_reader(keys.x, "the rotated key")
            queries = [
                each
                for y, each in self.rotations.items()
                if y not in (*self.stored, *self.taken) and each.angles == rotated.angles
            ]
            if not queries:
                raise Unraised(Reason.OP, "no queries are rotated by the angles of the keys", keys.node)
            queries.sort(key=lambda each: self._distance(each.y, keys.x))
            pairs = [_Found(keys, each, (first, rotated)) for each in values for first in queries]
        found = next((each for each in pairs if each.is_legal and self._is_unbroken(each)), None)
        if found is None:
            raise Unraised(Reason.CYCLE, "the rotated or written values depend on the cache", keys.node)
        self.taken |= found.region
        return found

    def _values(self, keys: _Write) -> list[_Write]:
        """Writes of unrotated tensors at the positions of the keys that a fused op can do, the nearest first.

        Raises:
            Unraised: there is none.
        """
        others = [
            each
            for each in self.writes
            if each.positions is keys.positions
            and each.node not in self.taken
            and _op_for(each.x, self.rotations) is None
        ]
        if not others:
            raise Unraised(Reason.OP, "no values are written at the positions of the keys", keys.node)
        found, refusals = list[_Write](), list[Unraised]()
        for each in sorted(others, key=lambda each: self._distance(each.node, keys.node)):
            try:
                self._check(each)
                found.append(each)
            except Unraised as refused:
                refusals.append(refused)
        if not found:
            raise refusals[0]
        return found

    def _distance(self, node: fx.Node, other: fx.Node) -> int:
        return abs(self._places[node] - self._places[other])

    @cached_property
    def _places(self) -> dict[fx.Node, int]:
        return {node: place for place, node in enumerate(self.canonical.graph.nodes)}

    def _is_unbroken(self, found: _Found) -> bool:
        """Whether there is no in-place op between its nodes."""
        return len({self.canonical.region[node] for node in found.region}) == 1

    def _check(self, write: _Write) -> None:
        """Refuses a write that a fused op can't do, or can't do in place.

        Raises:
            Unraised: the write is refused.
        """
        self._check_memory(write)
        cache, x, positions = (tensor_of(each) for each in (write.cache, write.x, write.positions))
        assert cache is not None
        if x is None or positions is None or positions.dim() != 1 or positions.dtype not in (torch.int64, torch.int32):
            raise Unraised(Reason.SIZE, "its positions aren't one dimension of integers", write.node)
        if (*write.node.args, False)[3]:
            raise Unraised(Reason.ATTRIBUTE, "it adds to the cache's values", write.node)
        wanted = [*cache.shape[:TOKENS], positions.shape[0], cache.shape[3]]
        if not equal_sizes(x.shape, wanted):
            detail = f"{[*x.shape]} is written where the cache takes {wanted}"
            raise Unraised(Reason.SIZE, detail, write.node)
        if dtype_of(write.x) is not cache.dtype:
            detail = f"{dtype_name(write.x)} is written into a cache of {dtype_name(write.cache)}"
            raise Unraised(Reason.DTYPE, detail, write.node)

    def _check_memory(self, write: _Write) -> None:
        cache, node = write.cache, write.node
        value = tensor_of(cache)
        if cache.op != "placeholder":
            what = cache.target if cache.op == "call_function" else cache.op
            raise Unraised(
                Reason.OP, f"its cache is no input of the graph but computed by {what}: a window that rolls, a part of "
                "a larger cache, or one that is written twice", cache,
                "hand over each layer's cache as a tensor of its own that is written once a step",
            )  # fmt: skip
        epilogue = next((user for user in cache.users if is_call(user, aten.copy_.default)), None)
        if epilogue is None or epilogue.args != (cache, node):
            raise Unraised(Reason.OP, "its result isn't the updated cache", node, "write in place")
        reader = next((user for user in cache.users if user not in (node, epilogue)), None)
        if reader is not None:
            detail = f"the cache as it is before is also read by {reader.target} ({reader.name})"
            raise Unraised(Reason.USERS, detail, reader, "read the cache after the write")
        assert value is not None
        if self.inputs[storage_of(value)] != [cache]:
            raise Unraised(Reason.LAYOUT, "its cache shares memory with another input of the graph", node)
        if memory_order(value) is None:
            raise Unraised(
                Reason.LAYOUT, f"its cache has gaps or overlaps: strides {tuple(value.stride())} of "
                f"{tuple(value.shape)}", node,
            )  # fmt: skip
