"""Sites: the places of a graph that fusions contend for, and what stands around them, for the cost model.

A site is a core, e.g. one `fused_add_rms_norm`, with the all-reduce before it and the epilogues after it. What a fusion
leaves of its site is run unfused, so that a price always covers the whole site.
"""

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseplan.graph.facts import fill_of, group_size, hint, item, tensor_of
from fuseplan.ops import ops
from fuseplan.parts import PARTS, Core, Epilogue, Prologue, part_at
from fuseplan.parts.traffic import Kernel, Middle, Region, Tail
from fuseplan.planner.costs import CostModel


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
        makes_weight: its norm has no weight, and a fused op gets one of ones, which a kernel of its own makes.
    """

    core: Middle
    residual: bool
    ranks: int
    rows: int
    width: int
    itemsize: int
    tails: tuple[Tail, ...]
    convention: str
    makes_weight: bool = False

    @property
    def signature(self) -> str:
        """The site without its rows, e.g. `all_reduce[2] -> add -> rms_norm -> pad 2880:3072 bfloat16 gpt_oss`."""
        parts = [f"all_reduce[{self.ranks}]"] * (self.ranks > 1) + ["add"] * self.residual + [self.core.name]
        parts += [tail.text(self.width) for tail in self.tails]
        return f"{' -> '.join(parts)} {self.width} {self.convention}{' unweighted' * self.makes_weight}"

    def region(self, *, reduce: bool, tail: Tail | None) -> Region:
        """The parts of the site that one op takes."""
        return Region(
            core=self.core,
            tokens=self.rows,
            width=self.width,
            itemsize=self.itemsize,
            reduce=reduce and self.ranks > 1,
            residual=self.residual,
            tail=tail,
            ranks=self.ranks if reduce else 1,
        )

    def unfused(self, model: CostModel) -> tuple[Kernel, ...]:
        """The site as Inductor leaves it: an epilogue joins the core's kernel, unless it stands alone."""
        inside = [tail for tail in self.tails if not tail.stands_alone(self.core)]
        first = self.region(reduce=self.ranks > 1, tail=inside[0] if inside else None)
        kernels = (*(model.reduce(first) if first.reduce else ()), *model.core(first))
        more = [self.region(reduce=False, tail=tail).result_bytes for tail in inside[1:]]
        if more:
            kernels = (*kernels, Kernel(name="further results", memory=round(sum(map(model.hardware.memory_ns, more)))))
        apart = [tail for tail in self.tails if tail.stands_alone(self.core)]
        rest = [kernel for tail in apart for kernel in model.epilogue(self.region(reduce=False, tail=tail))]
        return (*kernels, *rest)

    def fused(self, model: CostModel, provider: str, *, reduce: bool, tail: Tail | None) -> tuple[Kernel, ...]:
        """The fused op alone."""
        ones = (Kernel(name="ones", launch=round(model.hardware.launch.value)),) if self.makes_weight else ()
        return (*ones, *model.fused(self.region(reduce=reduce, tail=tail), provider))

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
            width=hint(value.shape[-1]),
            itemsize=value.dtype.itemsize,
            tails=tuple(self.tail(node) for node in self.tails),
            convention=f"{str(value.dtype).removeprefix('torch.')} {rounding}",
            makes_weight=part.weight is not None and fill_of(self.core.args[part.weight]) is not None,
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
        part = part_at(node)
        assert isinstance(part, Epilogue), node.format_node()
        return part.tail(node, self.core)


def row_site(ordinal: int, core: fx.Node) -> Site:
    """The site of a core that works on rows, such as a norm or an activation."""
    part, source = part_at(core), core.args[0]
    assert isinstance(part, Core), core.format_node()
    result = item(core, 0) if ops.of(core.target) is part.residual_op else core
    tails = set[fx.Node]()
    for epilogue in PARTS:
        if isinstance(epilogue, Epilogue) and result is not None:
            users = (user for user in result.users if part_at(user) is epilogue)
            tails.update(users if epilogue.found is None else epilogue.found(core))
    reduce = source if isinstance(source, fx.Node) and isinstance(part_at(source), Prologue) else None
    return Site(ordinal, core, reduce, tuple(sorted(tails)))


def _beside(tail: fx.Node) -> list[fx.Node]:
    """What a fusion takes along that takes an epilogue."""
    part = part_at(tail)
    return part.beside(tail) if isinstance(part, Epilogue) and part.beside is not None else []


@dataclass(frozen=True)
class Rows:
    """How many rows a tensor has at a number of tokens.

    Tokens are the product of the leading dimensions of the model's input: [B, S] gives B * S.

    Attributes:
        tokens: this product, in the symbols of the graph; None where the graph has none.
        traced: the number of tokens that the graph was traced with; 1 where no input tells.
        environment: the `ShapeEnv` of the symbols, which has their ranges.
    """

    tokens: Any
    traced: int
    environment: Any = None
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
            return cls(exact, traced, _environment(_leading(value))) if symbolic else cls(None, traced)
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

    def most(self, value: torch.Tensor, tokens: int | None) -> float:
        """The most rows that a tensor can have; infinity where nothing limits them.

        Args:
            value: a tensor of the graph.
            tokens: the most tokens that the graph serves; None: as many as its symbols let it.
        """
        rows, environment = _expression(value.shape[:-1]), _environment(value.shape[:-1])
        if environment is None:
            return max(1, int(rows))
        most = _upper(environment, rows)
        if tokens is not None and self.tokens is not None:
            above, below = (rows / self.tokens).as_numer_denom()
            if not above.free_symbols:
                least = 1 if not below.free_symbols else max(1, int(ShapeEnv.bound_sympy(environment, below).lower))
                share = int(above) * tokens // (least if below.free_symbols else int(below))
                most = min(most, max(1, share))
        return most

    @property
    def most_tokens(self) -> float:
        """The most tokens that the graph's symbols let it have; infinity where nothing limits them."""
        return self.traced if self.tokens is None else _upper(self.environment, self.tokens)

    def sized(self, value: torch.Tensor, tokens: int) -> torch.Tensor:
        """A tensor without data that has a tensor's dtype, and its shape at a number of tokens. Where tokens have
        several symbols, the sizes that have the last of them vary and the others stay as traced.
        """
        moving = max(self.tokens.free_symbols, key=str) if self.tokens is not None else None
        sizes, shape = list[int](), list[Any](value.shape)
        for size in shape:
            varies = isinstance(size, torch.SymInt) and moving in size.node.expr.free_symbols
            sizes.append(max(1, round(hint(size) * tokens / self.traced)) if varies else hint(size))
        return torch.empty(sizes, dtype=value.dtype, device="meta")


def _expression(sizes: Iterable[Any]) -> Any:
    """The product of sizes in the symbols of the graph."""
    product: Any = 1
    for size in sizes:
        product = product * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return product


def _environment(sizes: Iterable[Any]) -> Any:
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def _upper(environment: Any, expression: Any) -> float:
    """The upper end of an expression's range: what Dynamo guards, or was told by `mark_dynamic(..., max=)`."""
    upper: Any = ShapeEnv.bound_sympy(environment, expression).upper if environment is not None else math.inf
    return int(upper) if getattr(upper, "is_Integer", isinstance(upper, int)) else math.inf


def _leading(value: torch.Tensor) -> Sequence[Any]:
    return value.shape[:-1] if value.is_floating_point() and value.dim() > 1 else value.shape


def _product(sizes: Collection[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
