"""Sites: the places of a graph that fusions contend for, and what stands around them, for the cost model.

A site is a core, e.g. one `fused_add_rms_norm`, with the all-reduce before it and the epilogues after it. What a fusion
leaves of its site is run unfused, so that a price always covers the whole site.
"""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fuseplan.dialect import ops
from fuseplan.graph.facts import aten, group_size, is_call, item, tensor_of
from fuseplan.planner.costs import CostModel, Kernel, Region
from fuseplan.planner.costs.model import Core, Epilogue, Rotation

CORES = (ops.rms_norm, ops.fused_add_rms_norm, ops.silu_and_mul)
EPILOGUES: dict[str, Epilogue] = {
    ops.pad.name: "pad",
    ops.static_scaled_fp8_quant.name: "static_fp8_quant",
    ops.dynamic_per_token_scaled_fp8_quant.name: "dynamic_fp8_quant",
    ops.rotary_embedding.name: "rotary",
}


@dataclass(frozen=True, kw_only=True)
class Tail:
    """An epilogue of a site: its kind, and the width after it; heads and angles where it rotates."""

    kind: Epilogue
    padded: int
    rotation: Rotation | None = None

    @property
    def text(self) -> str:
        """For a signature."""
        heads = f" {self.rotation.q_heads}+{self.rotation.k_heads} heads" if self.rotation else ""
        return f"{self.kind}{heads}"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All of a site that prices depend on, at one size.

    Attributes:
        core: what is in the middle, its residual aside.
        residual: whether a residual is added before it.
        ranks: of the all-reduce before it; 1: there is none, or nobody to reduce with.
        rows: of the activations.
        width: of the core's result.
        itemsize: bytes of an activation.
        tails: what comes after it, in graph order.
        convention: dtype and rounding, which kernels are chosen by and prices are not.
    """

    core: Core
    residual: bool
    ranks: int
    rows: int
    width: int
    itemsize: int
    tails: tuple[Tail, ...]
    convention: str

    @property
    def signature(self) -> str:
        """The site without its rows, e.g. `all_reduce[2] -> add -> rms_norm -> pad 2880:3072 bfloat16 gpt_oss`."""
        parts = [f"all_reduce[{self.ranks}]"] * (self.ranks > 1) + ["add"] * self.residual + [self.core]
        parts += [f"{tail.kind} {self.width}:{tail.padded}" if tail.kind == "pad" else tail.text for tail in self.tails]
        return f"{' -> '.join(parts)} {self.width} {self.convention}"

    def region(self, *, reduce: bool, tail: Tail | None) -> Region:
        """The parts of the site that one op takes."""
        return Region(
            core=self.core,
            tokens=self.rows,
            width=self.width,
            padded=tail.padded if tail else self.width,
            itemsize=self.itemsize,
            reduce=reduce and self.ranks > 1,
            residual=self.residual,
            epilogue=tail.kind if tail else None,
            ranks=self.ranks if reduce else 1,
            rotation=tail.rotation if tail else None,
        )

    def unfused(self, model: CostModel) -> tuple[Kernel, ...]:
        """The site as Inductor leaves it: quantisations join the core's kernel, a pad is one of its own."""
        inside = [tail for tail in self.tails if tail.kind != "pad"]
        first = self.region(reduce=self.ranks > 1, tail=inside[0] if inside else None)
        kernels = (*(model.reduce(first) if first.reduce else ()), *model.core(first))
        more = [self.region(reduce=False, tail=tail).result_bytes for tail in inside[1:]]
        if more:
            kernels = (*kernels, Kernel(name="further results", memory=round(sum(map(model.hardware.memory_ns, more)))))
        padded = [tail for tail in self.tails if tail.kind == "pad"]
        rest = [kernel for tail in padded for kernel in model.epilogue(self.region(reduce=False, tail=tail))]
        return (*kernels, *rest)

    def fused(self, model: CostModel, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone."""
        return model.fused(self.region(reduce=reduce, tail=tail), provider)

    def rest(self, model: CostModel, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """What a fused op leaves of the site: the all-reduce, and other epilogues, each a kernel of its own."""
        left = list(self.tails)
        if tail is not None:
            left.remove(tail)
        before = model.reduce(self.region(reduce=True, tail=None)) if self.ranks > 1 and not reduce else ()
        after = [kernel for other in left for kernel in model.epilogue(self.region(reduce=False, tail=other))]
        return (*before, *after)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The parts of a site beside its core that a fusion takes."""

    reduce: bool
    tail: Tail | None


@dataclass(frozen=True, eq=False)
class Site:
    """One core of a graph.

    Attributes:
        ordinal: of all cores, in graph order; the same on every rank.
        core: the node.
        reduce: the all-reduce whose result it reads, if any.
        tails: the epilogues that read its result.
    """

    ordinal: int
    core: fx.Node
    reduce: fx.Node | None
    tails: tuple[fx.Node, ...]

    @property
    def parts(self) -> list[fx.Node]:
        """The nodes that belong to it."""
        return [self.core, *([self.reduce] if self.reduce is not None else []), *self.tails]

    @cached_property
    def ranks(self) -> int:
        """Of the group that reduces."""
        if self.reduce is None:
            return 1
        return group_size(str(self.reduce.args[1])) or 1

    def shape(self, rows: int) -> Shape:
        """The site at a number of rows."""
        value, op = tensor_of(self.core.args[0]), ops.of(self.core.target)
        assert value is not None and op is not None
        has_residual = op is ops.fused_add_rms_norm
        rounding = self.core.args[-1]
        width = hint(value.shape[-1])
        return Shape(
            core="silu_and_mul" if op is ops.silu_and_mul else "rms_norm",
            residual=has_residual,
            ranks=self.ranks,
            rows=rows,
            width=width,
            itemsize=value.dtype.itemsize,
            tails=tuple(self.tail(node) for node in self.tails),
            convention=f"{str(value.dtype).removeprefix('torch.')} {rounding}",
        )

    def taken(self, nodes: Collection[fx.Node]) -> Taken | None:
        """What a fusion that consumes `nodes` takes; None where that is more than parts of one site."""
        parts = {self.core, *([self.reduce] if self.reduce is not None else ()), *self.tails}
        parts |= {part for node in self.tails for part in _beside(node)}
        inside = set(nodes)
        others = [node for node in inside - parts if node.target is not operator.getitem]
        tails = [node for node in self.tails if node in inside]
        if others or len(tails) > 1 or self.core not in inside:
            return None
        return Taken(reduce=self.reduce in inside, tail=self.tail(tails[0]) if tails else None)

    def tail(self, node: fx.Node) -> Tail:
        """An epilogue's part in the site's shape."""
        op, value = ops.of(node.target), tensor_of(self.core.args[0])
        assert op is not None and value is not None
        width = hint(value.shape[-1])
        right = node.args[1] if op is ops.pad else 0
        assert isinstance(right, int)
        rotation = _rotation(node, self.core) if op is ops.rotary_embedding else None
        return Tail(kind=EPILOGUES[op.name], padded=width + right, rotation=rotation)


def norm_site(ordinal: int, core: fx.Node) -> Site:
    """The site of a norm or an activation."""
    source = core.args[0]
    reduce = source if isinstance(source, fx.Node) and ops.of(source.target) is ops.all_reduce else None
    result = item(core, 0) if ops.of(core.target) is ops.fused_add_rms_norm else core
    users = list(result.users) if result is not None else []
    tails = [user for user in users if (op := ops.of(user.target)) is not None and op.name in EPILOGUES]
    tails = [tail for tail in tails if ops.of(tail.target) is not ops.rotary_embedding]
    return Site(ordinal, core, reduce, tuple(sorted({*tails, *_rotations(core)})))


def _rotations(core: fx.Node) -> list[fx.Node]:
    """The rotary embeddings of which a norm's result is the queries."""
    moved = [user for user in core.users if is_call(user, aten.permute.default)]
    readers = [reader for node in (core, *moved) for reader in node.users]
    rotary = [each for each in readers if ops.of(each.target) is ops.rotary_embedding]
    return [each for each in rotary if _normed(each.args[0])[-1:] == [core] and _normed(each.args[1])]


def _normed(value: object) -> list[fx.Node]:
    """What stands between a rotary embedding and a norm, and the norm; empty where there is none."""
    between = [value] if is_call(value, aten.permute.default) else []
    norm = between[0].args[0] if between else value
    return [*between, norm] if isinstance(norm, fx.Node) and ops.of(norm.target) is ops.rms_norm else []


def _beside(tail: fx.Node) -> list[fx.Node]:
    """What a rotary embedding takes along: the norm of the keys, and transpositions."""
    if ops.of(tail.target) is not ops.rotary_embedding:
        return []
    return [node for source in tail.args[:2] for node in _normed(source)]


def _rotation(rotary: fx.Node, core: fx.Node) -> Rotation:
    q, cos = tensor_of(core.args[0]), tensor_of(rotary.args[2])
    k = tensor_of(_normed(rotary.args[1])[-1].args[0])
    assert q is not None and k is not None and cos is not None
    q_heads, k_heads = (max(1, hint(value.shape[-2])) for value in (q, k))
    return Rotation(q_heads=q_heads, k_heads=k_heads, angles=2 * hint(cos.shape[-1]))


def hint(size: Any) -> int:
    """A size, or the one that a symbolic size had when the graph was traced."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


@dataclass(frozen=True)
class Rows:
    """How many rows a tensor has at a number of tokens.

    Tokens are the product of the leading dimensions of the model's input: [B, S] gives B * S.

    Attributes:
        tokens: this product, in the symbols of the graph; None where the graph has none.
        traced: the number of tokens that the graph was traced with; 1 where no input tells.
    """

    tokens: Any
    traced: int
    _varies: dict[tuple[Any, ...], bool] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, graph: fx.Graph) -> "Rows":
        """Reads it off the inputs of the graph: of those with symbolic leading dimensions the first of integers, or
        else the first. Where there are none, off the first of integers, since any other input may be a weight.
        """
        inputs = [value for node in graph.find_nodes(op="placeholder") if (value := tensor_of(node)) is not None]
        symbolic = [value for value in inputs if any(isinstance(size, torch.SymInt) for size in _leading(value))]
        integers = [value for value in symbolic or inputs if not value.is_floating_point() and value.dim()]
        for value in integers or symbolic:
            exact = _expression(_leading(value))
            traced = _product([hint(size) for size in _leading(value)])
            return cls(exact if symbolic else None, traced)
        return cls(None, 1)

    @property
    def is_dynamic(self) -> bool:
        """Whether the graph serves several numbers of tokens."""
        return self.tokens is not None

    def at(self, value: torch.Tensor, tokens: int) -> int:
        """The rows of a tensor, all its dimensions but the last, at a number of tokens; an empty one has one.

        Where tokens have several symbols, the last one varies and the others stay as traced.
        """
        leading = value.shape[:-1]
        rows = max(1, _product([hint(size) for size in leading]))
        if self.tokens is None:
            return rows
        sizes: list[Any] = list(leading)
        key = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
        if key not in self._varies:
            symbols: set[Any] = getattr(_expression(leading), "free_symbols", set())
            self._varies[key] = bool(symbols & self.tokens.free_symbols)
        return max(1, round(rows * tokens / self.traced)) if self._varies[key] else rows


def _expression(sizes: Iterable[Any]) -> Any:
    """The product of sizes in the symbols of the graph."""
    product: Any = 1
    for size in sizes:
        product = product * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return product


def _leading(value: torch.Tensor) -> Sequence[Any]:
    return value.shape[:-1] if value.is_floating_point() and value.dim() > 1 else value.shape


def _product(sizes: Collection[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
