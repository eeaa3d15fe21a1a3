"""How many rows tensors of a graph have at a number of tokens."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseplan.graph.facts import aten, exact, hint, is_attention_op, targets_of, tensor_of
from fuseplan.graph.reach import is_view

PRODUCTS = {aten.mm.default: 1, aten.addmm.default: 2, aten._scaled_mm.default: 1}
"""Products with a weight, and the place of the weight among their arguments."""


@dataclass(frozen=True)
class Rows:
    """How many rows a tensor has at a number of tokens.

    Tokens are the product of the leading dimensions of the model's input: [B, S] gives B * S.

    Attributes:
        tokens: this product, in the symbols of the graph; None where the graph has none.
        traced: the number of tokens that the graph was traced with; 1 where no input shows it.
        environment: the `ShapeEnv` of the symbols, which has their ranges.
        equal: the expressions that further symbols equal by the graph's guards: two inputs whose rows are added have
            different symbols.
    """

    tokens: Any
    traced: int
    environment: Any = None
    equal: Mapping[Any, Any] = field(default_factory=dict, compare=False)
    _known: dict[tuple[Any, ...], tuple[int, bool]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, graph: fx.Graph) -> "Rows":
        """Reads it off the inputs of the graph: of those with symbolic leading dimensions the first of integers, or
        else the first. Where there are none, off the first of integers, since any other input may be a weight.
        """
        inputs = [value for node in graph.find_nodes(op="placeholder") if (value := tensor_of(node)) is not None]
        integers = [value for value in inputs if not value.is_floating_point() and value.dim()]
        # There are few integers, and an input of weights for every layer.
        symbolic = next(filter(_is_symbolic, itertools.chain(integers, inputs)), None)
        value = symbolic if symbolic is not None else next(iter(integers), None)
        if value is None:
            return cls(None, 1)
        leading = _leading(value)
        traced = _product([hint(size) for size in leading])
        if symbolic is None:
            return cls(None, traced)
        tokens, environment = _expression(leading), _environment(leading)
        return cls(tokens, traced, environment, _equal(environment, tokens.free_symbols))

    @property
    def is_dynamic(self) -> bool:
        """Whether the graph serves several numbers of tokens."""
        return self.tokens is not None

    def at(self, value: torch.Tensor, tokens: int) -> int:
        """The rows of a tensor, all its dimensions but the last, at a number of tokens; an empty one has one.

        Where tokens have several symbols, the last one varies and the others stay as traced.
        """
        return self.at_each(value, (tokens,))[0]

    def at_each(self, value: torch.Tensor, tokens: Sequence[int]) -> tuple[int, ...]:
        """The rows of a tensor at several numbers of tokens."""
        sizes: list[Any] = list(value.shape[:-1])
        key = tuple(map(exact, sizes))
        if key not in self._known:
            symbols: set[Any] = getattr(self._own(_expression(sizes)), "free_symbols", set())
            varies = self.tokens is not None and bool(symbols & self.tokens.free_symbols)
            self._known[key] = max(1, _product([hint(size) for size in sizes])), varies
        rows, varies = self._known[key]
        return tuple(max(1, round(rows * each / self.traced)) if varies else rows for each in tokens)

    def most(self, value: torch.Tensor, tokens: int | None) -> float:
        """The most rows that a tensor can have; infinity where nothing limits them.

        Args:
            value: a tensor of the graph.
            tokens: the most tokens that the graph serves; None: as many as its symbols let it.
        """
        return self.most_of(value.shape[:-1], tokens)

    def most_of(self, sizes: Sequence[Any], tokens: int | None) -> float:
        """The largest product of some sizes; infinity where nothing limits them."""
        rows, environment = _expression(sizes), _environment(sizes)
        if environment is None:
            return max(1, int(rows))
        most = _upper(environment, rows)
        if tokens is not None and self.tokens is not None:
            above, below = (self._own(rows) / self.tokens).as_numer_denom()
            if not above.free_symbols:
                least = ShapeEnv.bound_sympy(environment, below).lower if below.free_symbols else below
                most = min(most, max(1, int(above) * tokens // max(1, int(least))))
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
            varies = isinstance(size, torch.SymInt) and moving in self._own(exact(size)).free_symbols
            sizes.append(max(1, round(hint(size) * tokens / self.traced)) if varies else hint(size))
        return torch.empty(sizes, dtype=value.dtype, device="meta")

    def _own(self, size: Any) -> Any:
        """The expression of a size, without symbols that stand for others."""
        return size.xreplace(self.equal) if self.equal and not isinstance(size, int) else size


def most_rows(graph: fx.Graph, tokens: int | None, rows: Rows | None = None) -> float:
    """The most tokens of a graph, or the most rows of a product with a weight, or queries of attention, where these are
    more: they are the only evidence where no input is of integers, or only positions are.

    Args:
        graph: as Inductor made it.
        tokens: the most that it serves; None: as many as its symbols let it.
        rows: of the graph; None reads them.
    """
    rows = rows or Rows.of(graph)
    found = rows.most_tokens if tokens is None else tokens
    products = (
        (node, node.args[place])
        for target, place in PRODUCTS.items()
        for node in graph.find_nodes(op="call_function", target=target)
    )
    values = [value for node, weight in products if _is_input(weight) and (value := tensor_of(node)) is not None]
    attention = [target for target in targets_of(graph) if is_attention_op(target)]
    asked = (node for target in attention for node in graph.find_nodes(op="call_function", target=target))
    queries = (tensor_of(node.args[0]) for node in asked)
    asking = [value for value in queries if value is not None]
    leading = [*(value.shape[:-1] for value in values), *((value.shape[0], value.shape[2]) for value in asking)]
    known = {tuple(map(exact, sizes)): sizes for sizes in leading}
    return max([found, *(rows.most_of(sizes, tokens) for sizes in known.values())])


def _is_input(value: Any) -> bool:
    """Whether a value is an input of the graph, or a view of one."""
    while isinstance(value, fx.Node) and is_view(value):
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "placeholder"


def _expression(sizes: Iterable[Any]) -> Any:
    """The product of sizes in the symbols of the graph."""
    product: Any = 1
    for size in sizes:
        product = product * exact(size)
    return product


def _equal(environment: Any, kept: Collection[Any]) -> dict[Any, Any]:
    """Symbols in terms of others by guards `left == right` of products and quotients, of `kept` ones as far as
    possible.
    """
    found: dict[Any, Any] = {}
    guards = (guard.expr for guard in environment.guards if isinstance(guard.expr, sympy.Eq))
    for demanded in (ShapeEnv.replace(environment, each) for each in guards):
        left, right = (each.xreplace(found) for each in demanded.args or (sympy.S.Zero, sympy.S.Zero))
        if left == 0 or right == 0:
            continue  # it is known anyway, or no product
        ratio: Any = left / right
        for symbol in sorted(ratio.free_symbols.difference(kept), key=str, reverse=True):
            value = next((each for each in (symbol / ratio, symbol * ratio) if symbol not in each.free_symbols), None)
            if value is not None:
                found = {each: known.xreplace({symbol: value}) for each, known in found.items()}
                found[symbol] = value
                break
    return found


def _is_symbolic(value: torch.Tensor) -> bool:
    """Whether tokens may be among the leading dimensions of an input."""
    return any(isinstance(size, torch.SymInt) for size in _leading(value))


def _environment(sizes: Iterable[Any]) -> Any:
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def _upper(environment: Any, expression: Any) -> float:
    """The upper end of an expression's range: Dynamo's guard, or the bound given to `mark_dynamic(..., max=)`."""
    upper: Any = ShapeEnv.bound_sympy(environment, expression).upper if environment is not None else math.inf
    return int(upper) if getattr(upper, "is_Integer", isinstance(upper, int)) else math.inf


def _leading(value: torch.Tensor) -> Sequence[Any]:
    return value.shape[:-1] if value.is_floating_point() and value.dim() > 1 else value.shape


def _product(sizes: Collection[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
