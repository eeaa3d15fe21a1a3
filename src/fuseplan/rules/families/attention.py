"""Fusions of attention, by a kernel of torch or spelled out, with the repeated heads that it reads, and their sites."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.view import is_dialect
from fuseplan.graph.facts import aten, dtype_text, equal_size, hint, tensor_of
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.cached_rotary import CachedRotarySite
from fuseplan.rules.families.compose import fused_as
from fuseplan.rules.families.sites import Pricer, Shape, Site, Taken
from fuseplan.rules.parts import Core
from fuseplan.rules.parts.attention import PART, attention, repeat_heads
from fuseplan.rules.parts.attention.kernels import target_kernel
from fuseplan.rules.parts.attention.op import SIZES
from fuseplan.rules.parts.attention.traffic import AttentionRegion, grouped, repeated
from fuseplan.rules.parts.cached_rotary import cached_rotary
from fuseplan.rules.parts.eager_attention import PART as EAGER_PART
from fuseplan.rules.parts.eager_attention import eager_attention
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.traffic import Kernel, Tail

grouped_attention = fused_as(attention, "grouped_attention", samples=[sizes.sample(shared=True) for sizes in SIZES])
fused_attention = fused_as(eager_attention, "fused_attention")


class GroupedAttention(Rule):
    """repeat_heads(k), repeat_heads(v) -> attention  =>  the same attention without copies of heads.

    y = softmax(q @ repeat(k)^T * scale + mask) @ repeat(v)
    """

    name, flags = "grouped_attention", ("fuse_grouped_attention",)
    op, core = grouped_attention, attention

    def pattern(self, groups: Any, **bound: Any) -> Any:
        q, k, v, *how = bound.values()
        return (attention(q, repeat_heads(k, groups), repeat_heads(v, groups), *how),)

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses keys, values and masks whose lengths the graph doesn't know to be equal: verification can't make up
        calls for these.
        """
        return unequal_lengths(m)


class EagerAttention(Rule):
    """eager_attention  =>  the same in one op that neither writes scores nor copies heads.

    y = softmax(cat(softcap * tanh(q @ k^T * scale / softcap) + mask, sinks)) @ v
    """

    name, flags = "eager_attention", ("fuse_eager_attention",)
    op, core = fused_attention, eager_attention

    def pattern(self, **bound: Any) -> Any:
        return (eager_attention(*bound.values()),)

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses unknown numbers of heads, and the lengths that `GroupedAttention` refuses."""
        if not all(isinstance(each.shape[1], int) for each in (m.q, m.k)):
            return m.refuse(Reason.SIZE, "q", "the number of heads isn't known when the graph is compiled")
        return unequal_lengths(m)


def unequal_lengths(m: Bindings) -> Refusal | None:
    """Refuses keys `k`, values `v` and a mask whose lengths the graph doesn't know to be equal."""
    read = m.k.shape[2]
    for name, length in (("v", m.v.shape[2]), ("mask", read if m.mask is None else m.mask.shape[-1])):
        if not equal_size(length, read) and not (name == "mask" and equal_size(length, 1)):
            other = f"{length} values" if name == "v" else f"a mask of {length}"
            detail = f"attention reads {read} keys and {other}, and the graph doesn't know these to be equal"
            return m.refuse(Reason.SIZE, name, detail, fix="torch._check that these lengths are equal")
    return None


@dataclass(frozen=True, kw_only=True)
class AttentionShape(Shape):
    """Everything about an attention that prices depend on, at one size.

    Attributes:
        sizes: sizes of the attention and of the copies before it.
        kernels: the kernel that runs it, by vendor: the graph's own, or torch's choice on a device that the graph
            wasn't traced on.
    """

    sizes: AttentionRegion
    kernels: tuple[tuple[str, str], ...]

    @property
    def signature(self) -> str:
        """The site without a batch that varies, e.g. `repeat_heads x4 -> attention 32 heads of 128, 1 x 1280 keys,
        cudnn bfloat16 masked`.
        """
        sizes = self.sizes
        heads = f"{sizes.q_heads} heads of {sizes.width}, {sizes.queries} x {sizes.keys} keys"
        return f"repeat_heads x{sizes.groups} -> attention {heads}, {sizes.kernel} {self.convention}"

    def unfused(self, model: Pricer) -> tuple[Kernel, ...]:
        """The kernels of the unfused site."""
        return repeated(model.hardware, self._on(model))

    def fused(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone."""
        return grouped(model.hardware, self._on(model), model.timing(provider).heads)

    def rest(self, model: Pricer, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The unfused rest of the site behind a fused op: nothing."""
        return ()

    def _on(self, model: Pricer) -> AttentionRegion:
        return replace(self.sizes, kernel=dict(self.kernels)[model.hardware.vendor])


@dataclass(frozen=True, eq=False)
class AttentionSite(Site):
    """One attention over repeated heads.

    Attributes:
        canonical: the graph.
    """

    canonical: CanonicalGraph = field(repr=False)

    @classmethod
    def at(cls, ordinal: int, core: fx.Node, canonical: CanonicalGraph) -> Self:
        """The site of an attention in a graph."""
        return cls(ordinal, core, None, (), canonical)

    @property
    def parts(self) -> list[fx.Node]:
        """The nodes that belong to it."""
        return [*self._repeats, self.core]

    @cached_property
    def _repeats(self) -> list[fx.Node]:
        return [node for node in dict.fromkeys(self.core.args[1:3]) if is_dialect(node, repeat_heads)]

    def shape(self, rows: int) -> AttentionShape:
        """The site at a number of rows, by which a dynamic batch, or otherwise dynamic tokens, are scaled."""
        q, k, mask = (tensor_of(self.core.args[index]) for index in (0, 1, 3))
        shared = tensor_of(self._repeats[0].args[0]) if self._repeats else k
        assert q is not None and k is not None and shared is not None
        batch, queries, keys = _sizes(q, k, rows)
        kernel, is_causal = str(self.core.args[6]), bool(self.core.args[5])
        sizes = AttentionRegion(
            batch=batch, q_heads=hint(q.shape[1]), heads=hint(shared.shape[1]), queries=queries, keys=keys,
            width=hint(q.shape[3]), itemsize=q.dtype.itemsize, kernel=kernel, copies=self._copies,
            is_causal=is_causal,
        )  # fmt: skip
        flags = " masked" * (mask is not None) + " causal" * is_causal + _sequences(q)
        return AttentionShape(
            core=PART.traffic, rows=rows, width=sizes.width, itemsize=sizes.itemsize, sizes=sizes,
            kernels=self._kernels(kernel, q, mask), convention=f"{dtype_text(q.dtype)}{flags}",
        )  # fmt: skip

    def _kernels(self, kernel: str, q: Tensor, mask: Tensor | None) -> tuple[tuple[str, str], ...]:
        return tuple((vendor, target_kernel(kernel, vendor, q, mask)) for vendor in ("nvidia", "amd", "cpu"))

    @property
    def _copies(self) -> bool:
        """Whether heads are copied in memory; copies of a single head may be a view."""
        claimed = self.canonical.claims(self._repeats)
        return any(node.target in (aten.clone.default, aten.repeat.default) for node in claimed) or any(
            (value := tensor_of(node.args[0])) is not None and value.shape[1] != 1 for node in self._repeats
        )

    def taken(self, nodes: Collection[fx.Node]) -> Taken | None:
        """The parts that a fusion takes if it consumes `nodes`; None if they include more than the site and the
        rotation and cache writes before it.
        """
        others = {*nodes} - {*self.parts}
        if self.core not in nodes:
            return None
        also = self._before(others)
        return Taken(reduce=False, tail=None, also=also) if also or not others else None

    def _before(self, nodes: Collection[fx.Node]) -> tuple[tuple[fx.Node, Taken], ...]:
        """The site that contains all of `nodes`."""
        sites: dict[Any, type[Site]] = {cached_rotary.overload: CachedRotarySite, rms_norm.overload: Site}
        for node in sorted(nodes):
            if node.target in sites:
                taken = sites[node.target].at(self.ordinal, node, self.canonical).taken(nodes)
                if taken is not None:
                    return ((node, taken),)
        return ()


@dataclass(frozen=True, kw_only=True)
class EagerAttentionShape(AttentionShape):
    """Everything about a spelled-out attention that prices depend on, at one size."""

    @property
    def signature(self) -> str:
        """The site without a batch that varies, e.g. `eager_attention 32 heads of 128 in groups of 4, 1 x 1280 keys
        bfloat16 masked sinks`.
        """
        sizes = self.sizes
        heads = f"{sizes.q_heads} heads of {sizes.width} in groups of {sizes.groups}"
        return f"eager_attention {heads}, {sizes.queries} x {sizes.keys} keys {self.convention}"


@dataclass(frozen=True, eq=False)
class EagerAttentionSite(AttentionSite):
    """One spelled-out attention."""

    @property
    def parts(self) -> list[fx.Node]:
        """The nodes that belong to it."""
        return [self.core]

    def shape(self, rows: int) -> EagerAttentionShape:
        """The site at a number of rows, as for `AttentionSite`."""
        q, k, mask, sinks = (tensor_of(self.core.args[index]) for index in (0, 1, 3, 4))
        assert q is not None and k is not None
        batch, queries, keys = _sizes(q, k, rows)
        is_joined = sinks is not None
        q_heads, heads = hint(q.shape[1]), hint(k.shape[1])
        sizes = AttentionRegion(
            batch=batch, q_heads=q_heads, heads=heads, queries=queries, keys=keys, width=hint(q.shape[3]),
            itemsize=q.dtype.itemsize, kernel="cpu", copies=q_heads > heads > 1, passes=1 + is_joined,
        )  # fmt: skip
        flags = " masked" * (mask is not None) + " sinks" * is_joined + " capped" * (self.core.args[6] is not None)
        flags += _sequences(q)
        return EagerAttentionShape(
            core=EAGER_PART.traffic, rows=rows, width=sizes.width, itemsize=sizes.itemsize, sizes=sizes,
            kernels=self._kernels("cpu", q, mask), convention=f"{dtype_text(q.dtype)}{flags}",
        )  # fmt: skip


def _sizes(q: Tensor, k: Tensor, rows: int) -> tuple[int, int, int]:
    """(batch, queries, keys) at a number of rows of queries."""
    factor = rows / max(1, math.prod(map(hint, q.shape[:-1])))
    scaled = _symbols(q.shape[0]) or _symbols(q.shape[2])
    batch, queries, keys = (
        max(1, round(hint(size) * factor)) if scaled & _symbols(size) else hint(size)
        for size in (q.shape[0], q.shape[2], k.shape[2])
    )
    return batch, queries, keys


def _sequences(q: Tensor) -> str:
    """Where the length of several sequences varies, and not their number: how many there are. Rows alone don't say
    whether they are of one long sequence, whose attention takes longer.
    """
    batch = hint(q.shape[0])
    return f", {batch} sequences" if batch > 1 and not _symbols(q.shape[0]) and _symbols(q.shape[2]) else ""


def _symbols(size: Any) -> frozenset[Any]:
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


ATTENTION_RULES: tuple[Rule, ...] = (GroupedAttention(), EagerAttention())
ATTENTION_SITES: Mapping[Core, type[Site]] = {PART: AttentionSite, EAGER_PART: EagerAttentionSite}
