"""Sites: the places of a graph that fusions contend for, and their surroundings, for the cost model.

A site is a core, e.g. one `fused_add_rms_norm`, with the all-reduce before it and the epilogues after it. The parts of
a site that a fusion doesn't take run unfused, so that a price always covers the whole site.
"""

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

from torch import fx

from fuseplan.devices.hardware import TORCH, Hardware
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import dtype_text, fill_of, group_size, hint, item, tensor_of
from fuseplan.graph.ops import ops
from fuseplan.rules.parts import PARTS, Core, Epilogue, Prologue, RowEpilogue, part_at, reducer_of
from fuseplan.rules.parts.attention.traffic import Heads
from fuseplan.rules.parts.traffic import Clock, Kernel, Middle, Region, Tail


class Timing(Protocol):
    """The parts of a provider's pricing that a site depends on."""

    @property
    def eager(self) -> bool:
        """Whether an op is the reference, op by op in eager mode, and no kernel."""

    @property
    def heads(self) -> Heads:
        """How an attention kernel reads keys and values that several query heads share."""


class Pricer(Clock, Protocol):
    """The cost model of a device, which prices the parts of a site."""

    @property
    def hardware(self) -> Hardware:
        """The device."""

    def reduce(self, region: Region) -> tuple[Kernel, ...]:
        """The all-reduce alone."""

    def core(self, region: Region) -> tuple[Kernel, ...]:
        """The kernels that Inductor makes of the core and of an epilogue after it."""

    def epilogue(self, region: Region) -> tuple[Kernel, ...]:
        """The epilogue alone, behind an op that is opaque to Inductor."""

    def fused(self, region: Region, provider: str) -> tuple[Kernel, ...]:
        """One fused op of all parts of a region."""

    def timing(self, provider: str) -> Timing:
        """How a provider's kernels are priced."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything about a site that prices depend on, at one size.

    Attributes:
        core: the core, without its residual.
        residual: whether a residual is added before it.
        ranks: ranks of the all-reduce before it; 1: no all-reduce, or a group of one rank.
        rows: rows of the activations.
        width: width of the core's result.
        itemsize: bytes of an element of an activation.
        tails: its epilogues, in graph order.
        convention: dtype and rounding; the choice of kernels depends on them, prices don't.
        makes_weight: whether its norm has no weight, so that a fused op needs a weight of ones from a separate kernel.
        reducer: the library of the all-reduce before it.
        kept: whether the core's result has readers beside the epilogues and no epilogue's result contains it.
    """

    core: Middle
    residual: bool = False
    ranks: int = 1
    rows: int
    width: int
    itemsize: int
    tails: tuple[Tail, ...] = ()
    convention: str
    makes_weight: bool = False
    reducer: str = TORCH
    kept: bool = False

    @property
    def signature(self) -> str:
        """The site without its rows, e.g. `all_reduce[2] -> add -> rms_norm -> pad 2880:3072 bfloat16 gpt_oss`."""
        group = f"{self.ranks}" if self.reducer == TORCH else f"{self.ranks} {self.reducer}"
        parts = [f"all_reduce[{group}]"] * (self.ranks > 1) + ["add"] * self.residual + [self.core.name]
        parts += [tail.text(self.width) for tail in self.tails]
        marks = " unweighted" * self.makes_weight + " kept" * self.kept
        return f"{' -> '.join(parts)} {self.width} {self.convention}{marks}"

    def region(self, *, reduce: bool, tail: Tail | None) -> Region:
        """The region of the site that one op takes."""
        return Region(
            core=self.core,
            tokens=self.rows,
            width=self.width,
            itemsize=self.itemsize,
            reduce=reduce and self.ranks > 1,
            residual=self.residual,
            tail=tail,
            ranks=self.ranks if reduce else 1,
            keeps_core=self.kept or len(self.tails) > 1,
            reducer=self.reducer,
        )

    def unfused(self, model: Pricer) -> tuple[Kernel, ...]:
        """The kernels of the unfused site: an epilogue joins the core's kernel, unless it stands alone."""
        inside = [tail for tail in self.tails if not tail.stays_apart(self.core)]
        apart = [tail for tail in self.tails if tail.stays_apart(self.core)]
        first = self.region(reduce=self.ranks > 1, tail=inside[0] if inside else None)
        first = replace(first, keeps_core=self.kept or bool(apart))
        kernels = (*(model.reduce(first) if first.reduce else ()), *model.core(first))
        more = [self.region(reduce=False, tail=tail).result_bytes for tail in inside[1:]]
        if more:
            kernels = (*kernels, Kernel(name="further results", memory=round(sum(map(model.hardware.memory_ns, more)))))
        rest = [kernel for tail in apart for kernel in model.epilogue(self.region(reduce=False, tail=tail))]
        return (*kernels, *rest)

    def fused(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone."""
        ones = (Kernel(name="ones", launch=round(model.hardware.launch.value)),) if self.makes_weight else ()
        return (*ones, *model.fused(self.region(reduce=reduce, tail=tail), provider))

    def within(self, model: Pricer, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The cost that `fused` adds to the kernel of an op that also takes parts of another site: no launch. The
        reference runs both, one after the other.
        """
        kernels = self.fused(model, provider, reduce=reduce, tail=tail)
        return kernels if model.timing(provider).eager else tuple(replace(each, launch=0) for each in kernels)

    def rest(self, model: Pricer, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The unfused rest of the site behind a fused op: the all-reduce and other epilogues, each in a separate
        kernel, and the work of the op's own epilogue that Inductor would have done in its kernels.
        """
        left, behind = list(self.tails), tuple[Kernel, ...]()
        if tail is not None:
            left.remove(tail.at_site())
            behind = tail.behind(model, self.region(reduce=False, tail=tail))
        before = model.reduce(self.region(reduce=True, tail=None)) if self.ranks > 1 and not reduce else ()
        after = [kernel for other in left for kernel in model.epilogue(self.region(reduce=False, tail=other))]
        return (*before, *behind, *after)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The parts of a site beside its core that a fusion takes.

    Attributes:
        reduce: whether its all-reduce is one of them.
        tail: its epilogue, as the fusion takes it.
        also: the cores of other sites that it takes, each with the parts taken.
    """

    reduce: bool
    tail: Tail | None
    also: "tuple[tuple[fx.Node, Taken], ...]" = ()


FINDING = tuple(part.found for part in PARTS if isinstance(part, Epilogue) and part.found is not None)
"""The finders of epilogues that have their own."""


@dataclass(frozen=True, eq=False)
class Site:
    """One core of a graph.

    Attributes:
        ordinal: its position among all cores, in graph order; the same on every rank.
        core: the core's node.
        reduce: the all-reduce whose result it reads, if any.
        tails: the epilogues that read its result.
    """

    ordinal: int
    core: fx.Node
    reduce: fx.Node | None
    tails: tuple[fx.Node, ...]

    @classmethod
    def at(cls, ordinal: int, core: fx.Node, canonical: CanonicalGraph) -> Self:
        """The site of a core that works row by row, such as a norm or an activation."""
        part, source = part_at(core), core.args[0]
        assert isinstance(part, Core), core.format_node()
        result = _result(core, part)
        tails = set[fx.Node]()
        if result is not None:
            found = ((user, part_at(user)) for user in result.users)
            tails.update(user for user, each in found if isinstance(each, Epilogue) and each.found is None)
            tails.update(node for find in FINDING for node in find(core))
        reduce = source if isinstance(source, fx.Node) and isinstance(part_at(source), Prologue) else None
        return cls(ordinal, core, reduce, tuple(sorted(tails)))

    @property
    def parts(self) -> list[fx.Node]:
        """The nodes that belong to it."""
        return [self.core, *([self.reduce] if self.reduce is not None else []), *self.tails]

    @cached_property
    def ranks(self) -> int:
        """Ranks of the group that reduces."""
        if self.reduce is None:
            return 1
        return group_size(str(self.reduce.args[1])) or 1

    @property
    def part(self) -> Core:
        """The part that the core calls."""
        part = part_at(self.core)
        assert isinstance(part, Core), self.core.format_node()
        return part

    def shape(self, rows: int) -> Shape:
        """The site at a number of rows."""
        value, op, part = tensor_of(self.core.args[0]), ops.of(self.core.target), self.part
        assert value is not None
        rounding = self.core.args[-1]
        return Shape(
            core=part.traffic,
            residual=op is part.residual_op,
            ranks=self.ranks,
            rows=rows,
            width=max(1, hint(value.shape[-1])),  # like rows: an empty one costs as much as one element
            itemsize=value.dtype.itemsize,
            tails=self._tails,
            convention=f"{dtype_text(value.dtype)} {rounding}",
            makes_weight=part.weight is not None and fill_of(self.core.args[part.weight]) is not None,
            reducer=reducer_of(self.reduce) if self.reduce is not None else TORCH,
            kept=self._is_kept,
        )

    @cached_property
    def _tails(self) -> tuple[Tail, ...]:
        return tuple(self.tail(node) for node in self.tails)

    @cached_property
    def _is_kept(self) -> bool:
        """Whether the core's result has readers beside the epilogues, and no epilogue's result contains it."""
        alone = [node for node in self.tails if isinstance(part := part_at(node), RowEpilogue) and not part.core_of]
        result = _result(self.core, self.part) if alone else None
        return result is not None and any(user not in self.tails for user in result.users)

    def taken(self, nodes: Collection[fx.Node]) -> Taken | None:
        """The parts that a fusion takes if it consumes `nodes`; None if they aren't parts of one site."""
        parts = {self.core, *([self.reduce] if self.reduce is not None else ()), *self.tails}
        parts |= {part for node in self.tails for part in _beside(node)}
        inside = set(nodes)
        others = [node for node in inside - parts if node.target is not operator.getitem]
        tails = [node for node in self.tails if node in inside]
        if others or len(tails) > 1 or self.core not in inside:
            return None
        tail = _taken(tails[0], self._tails[self.tails.index(tails[0])], inside) if tails else None
        return Taken(reduce=self.reduce in inside, tail=tail)

    def tail(self, node: fx.Node) -> Tail:
        """An epilogue's traffic, in the site's shape."""
        part = part_at(node)
        assert isinstance(part, Epilogue), node.format_node()
        return part.tail(node, self.core)


def _result(core: fx.Node, part: Core) -> fx.Node | None:
    """A core's result, not its sum; None where nothing reads it."""
    return item(core, 0) if ops.of(core.target) is part.residual_op else core


def _taken(node: fx.Node, tail: Tail, nodes: Collection[fx.Node]) -> Tail:
    """The part of an epilogue that a fusion takes if it consumes `nodes`."""
    part = part_at(node)
    return part.taking(tail, nodes) if isinstance(part, Epilogue) and part.taking is not None else tail


def _beside(tail: fx.Node) -> list[fx.Node]:
    """Further nodes that a fusion takes along with an epilogue."""
    part = part_at(tail)
    return part.beside(tail) if isinstance(part, Epilogue) and part.beside is not None else []
