"""Rotary position embedding of queries and keys, which may be normed before it, head by head (QK norm)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph, is_dialect
from fuseplan.graph.canonical.engines import read_at
from fuseplan.graph.facts import aten, hint, is_call, item, tensor_of
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Epilogue, Stage
from fuseplan.rules.parts.cache_write import bytes_of, cache_write
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.rotary.op import rotary_embedding
from fuseplan.rules.parts.rotary.spellings import raise_rotary_embeddings
from fuseplan.rules.parts.traffic import Clock, Kernel, Middle, Region, Tail


def _refuse_engines(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """Refuses `_C::rotary_embedding(positions, query!, key!, head_size, cos_sin_cache, is_neox, ...)`: it takes a table
    where the dialect op takes angles.
    """
    table = tensor_of(values["cos_sin_cache"])
    size, rotated = values["head_size"], None if table is None else table.shape[-1]
    reason, why = Reason.OP, "it looks its angles up itself"
    if not values["is_neox"]:
        reason, why = Reason.ATTRIBUTE, f"it rotates neighbours (interleaved), and {why[3:]}"
    elif rotated != size:
        reason, why = Reason.ATTRIBUTE, f"it rotates {rotated} of the {size} elements of a head, and {why[3:]}"
    canonical.refuse(
        rotary_embedding, read_at(node), reason, f"rotary embedding not recognised: {why}", node=node, place=node,
        fix="let vLLM write it in aten: custom_ops -rotary_embedding in its compilation config",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rotation(Tail):
    """A rotary embedding of normed queries and normed keys; its region includes the norm of the keys. Inductor makes
    one kernel of the queries and one of the keys. Fewer aren't possible: the two reductions differ in size.

    Attributes:
        q_heads: heads of the queries.
        k_heads: heads of the keys.
        angles: number of cosines and sines of a token.
        values: elements of a token's values, where they and the keys are written into a cache behind it; 0: they aren't
            written. Inductor writes the keys in the keys' kernel, and the values in a separate one.
        cache_bytes: bytes of both caches.
        writes: whether a fusion that takes it also writes the caches.
    """

    q_heads: int
    k_heads: int
    angles: int
    values: int = 0
    cache_bytes: int = 0
    writes: bool = False

    name, eager_kernels, kind = "rotary", 34, "rotary"

    def text(self, width: int) -> str:
        """`rotary 32+8 heads`, with ` cached` where the keys are cached"""
        return f"{self.name} {self.q_heads}+{self.k_heads} heads{' cached' if self.values else ''}"

    def result_bytes(self, region: Region) -> int:
        """Bytes of rotated queries and keys, and of written values."""
        written = self._value_bytes(region) if self.writes else 0
        return self._heads_bytes(region, self.q_heads + self.k_heads) + written

    def read_bytes(self, region: Region) -> int:
        """Bytes of queries, keys, angles and both weights, and of written values."""
        rotated = self._rotated_bytes(region, self.q_heads + self.k_heads) + 2 * region.width * region.itemsize
        return rotated + (self._value_bytes(region) if self.writes else 0)

    def joined(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """Norm and rotation of the queries, the same of the keys, and the write of the values."""
        both = tuple(self._normed(clock, region, heads) for heads in (self.q_heads, self.k_heads))
        return (*both, *self._values_written(clock, region))

    def alone(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """The rotation of normed queries, norm and rotation of the keys, and the write of the values."""
        rotated = clock.local(self.name, self._rotated_bytes(region, self.q_heads) + region.row_bytes)
        return (rotated, self._normed(clock, region, self.k_heads), *self._values_written(clock, region))

    def behind(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """The writes of keys and values into their caches, behind an op that doesn't write them."""
        if self.writes or not self.values:
            return ()
        keys = clock.local("cache_write", 2 * self._heads_bytes(region, self.k_heads))
        return (keys, *self._values_written(clock, region))

    def at_site(self) -> "Rotation":
        """The rotation, regardless of where the caches are written."""
        return replace(self, writes=False)

    def eager(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        """Copies of both caches for the reference to write to, and copies back."""
        return (clock.local("copy", 2 * self.cache_bytes),) * 2 * self.writes

    def eager_count(self, core: Middle) -> int:
        """The number of eager kernels, including the norm of the keys."""
        return self.eager_kernels + core.eager_kernels

    def _normed(self, clock: Clock, region: Region, heads: int) -> Kernel:
        nbytes = self._rotated_bytes(region, heads) + self._heads_bytes(region, heads) + region.width * region.itemsize
        return clock.local(f"{region.core.name}+{self.name}", nbytes, reduces_rows=True)

    def _values_written(self, clock: Clock, region: Region) -> tuple[Kernel, ...]:
        return (clock.local("cache_write", 2 * self._value_bytes(region)),) if self.values else ()

    def _value_bytes(self, region: Region) -> int:
        return region.tokens // self.q_heads * self.values * region.itemsize

    def _rotated_bytes(self, region: Region, heads: int) -> int:
        """Bytes that a rotation reads: this many heads, and the angles."""
        return self._heads_bytes(region, heads) + region.tokens // self.q_heads * self.angles * region.itemsize

    def _heads_bytes(self, region: Region, heads: int) -> int:
        return region.row_bytes // self.q_heads * heads


def _found(core: fx.Node) -> list[fx.Node]:
    """The rotary embeddings that have a norm's result as their queries."""
    moved = [user for user in core.users if is_call(user, aten.permute.default)]
    readers = [reader for node in (core, *moved) for reader in node.users]
    rotary = [each for each in readers if is_dialect(each, rotary_embedding)]
    return [each for each in rotary if _normed(each.args[0])[-1:] == [core] and _normed(each.args[1])]


def _normed(value: object) -> list[fx.Node]:
    """The nodes from a rotary embedding back to a norm, inclusive; empty where there is no norm."""
    between = [value] if is_call(value, aten.permute.default) else []
    norm = between[0].args[0] if between else value
    return [*between, norm] if is_dialect(norm, rms_norm) else []


def _beside(rotary: fx.Node) -> list[fx.Node]:
    """The norm of the keys, transpositions, and the write of the keys into a cache."""
    write = _stored(rotary)
    return [*(node for source in rotary.args[:2] for node in _normed(source)), *([write] if write else [])]


def _stored(rotary: fx.Node) -> fx.Node | None:
    """The op that writes rotated keys into a cache."""
    keys = item(rotary, 1)
    return next((user for user in keys.users if is_dialect(user, cache_write)), None) if keys is not None else None


def _taking(tail: Tail, nodes: Collection[fx.Node]) -> Tail:
    assert isinstance(tail, Rotation)
    return replace(tail, writes=any(is_dialect(node, cache_write) for node in nodes))


def _tail(rotary: fx.Node, core: fx.Node) -> Rotation:
    q, cos = tensor_of(core.args[0]), tensor_of(rotary.args[2])
    k = tensor_of(_normed(rotary.args[1])[-1].args[0])
    assert q is not None and k is not None and cos is not None
    q_heads, k_heads = (max(1, hint(value.shape[-2])) for value in (q, k))
    plain = Rotation(q_heads=q_heads, k_heads=k_heads, angles=2 * hint(cos.shape[-1]))
    write = _stored(rotary)
    return plain if write is None else _cached(plain, rotary, write)


def _cached(tail: Rotation, rotary: fx.Node, write: fx.Node) -> Rotation:
    """The tail with the writes into caches [batch, heads, length, head_dim], whose layout the rotated heads have."""
    q, k, v = (tensor_of(each) for each in (*rotary.args[:2], write.args[1]))
    assert q is not None and k is not None and v is not None
    return replace(
        tail, q_heads=max(1, hint(q.shape[1])), k_heads=max(1, hint(k.shape[1])),
        values=hint(v.shape[1]) * hint(v.shape[3]), cache_bytes=bytes_of(write.args[2:4]),
    )  # fmt: skip


PART = Epilogue(
    name="rotary",
    ops=(rotary_embedding,),
    cores=frozenset({"rms_norm"}),
    raising=((Stage.PAIRS, raise_rotary_embeddings),),
    engine_ops={"_C::rotary_embedding": _refuse_engines},
    traffic=Rotation,
    tail=_tail,
    found=_found,
    beside=_beside,
    taking=_taking,
)

__all__ = ["PART", "Rotation", "rotary_embedding"]
