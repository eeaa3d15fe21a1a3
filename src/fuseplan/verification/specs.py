"""What a fused op will be called with: the arguments of a match, at each number of tokens that they are checked at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.dialect import is_inlined
from fuseplan.graph.facts import fill_of, hint, tensor_of
from fuseplan.matching import Match
from fuseplan.planner.rows import Rows

ODD_SIZES = (1, 7, 33, 257, 389, 769, 1127, 8191)
"""Numbers of tokens that no tile divides, where they lie in the range: kernels forget their last, partial tile."""

SMALL = 64
"""Sizes up to which torch's own ops are run: right by definition, only how they are called is in question."""

ALIGNMENT = 128
"""Bytes: the modulus of pointers' alignment; the widest load of any kernel divides it."""

UNKNOWN = 16
"""A size that depends on data, such as how many tokens go to an expert."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor argument.

    Attributes:
        dtype: of its elements.
        shape: in elements.
        stride: in elements.
        misalignment: bytes from a multiple of `ALIGNMENT` to its first element.
        device: where it lies.
        same_as: an earlier argument that is the very same tensor, if any.
        fill: what all its elements are, of a constant; None: they are drawn.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    misalignment: int
    device: torch.device
    same_as: str | None = None
    fill: float | None = None

    @property
    def extent(self) -> int:
        """Elements from the first to the last in memory, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True, kw_only=True)
class Case:
    """All arguments at one number of tokens.

    Attributes:
        tokens: the size.
        arguments: a `TensorSpec` or a plain value by variable.
        symbols: the values of symbolic sizes.
    """

    tokens: int
    arguments: Mapping[str, Any]
    symbols: Mapping[Any, int] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        devices = (value.device for value in self.arguments.values() if isinstance(value, TensorSpec))
        return next(devices, torch.device("cpu"))


class Sizes:
    """Values for the symbols of a graph.

    Where the number of tokens is a product of several symbols, the last one varies and the others stay as traced.

    Args:
        graph: whose inputs have the symbols.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.rows = Rows.of(graph)
        self._traced = _traced_symbols(graph)

    def tokens(self, span: tuple[int, int], *, traced: bool = True) -> tuple[int, ...]:
        """What a kernel is checked at: both ends of the range, odd sizes in it, and the size that was traced; none for
        a graph of one size alone.

        Args:
            span: the range.
            traced: False: without the size that was traced, which may be another one on each rank.
        """
        if not self.rows.is_dynamic:
            return ()
        first, last = span
        sizes = (*ODD_SIZES, self.rows.traced) if traced else ODD_SIZES
        # The end is large and has a partial tile one below it: one of the two is enough.
        inside = (size for size in sizes if first <= size <= last and size != last - 1)
        return tuple(sorted({first, last, *inside}))

    def at(self, tokens: int) -> dict[Any, int]:
        """The value of each symbol."""
        values = dict(self._traced)
        if self.rows.is_dynamic:
            symbols = sorted(self.rows.tokens.free_symbols, key=str)
            others = self.rows.tokens.xreplace({symbol: values.get(symbol, UNKNOWN) for symbol in symbols[:-1]})
            factor = int(others.xreplace({symbols[-1]: 1}))
            values[symbols[-1]] = max(1, tokens // max(1, factor))
        return values


def _traced_symbols(graph: fx.Graph) -> dict[Any, int]:
    values: dict[Any, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                values[size.node.expr] = hint(size)
    return values


def cases_of(match: Match, sizes: Sizes, span: tuple[int, int], *, traced: bool = True) -> tuple[Case, ...]:
    """The arguments of a match, the smallest size first; of torch's own ops small sizes alone.

    Args:
        match: of a rule.
        sizes: of its graph.
        span: first and last number of tokens.
        traced: as for `Sizes.tokens`.
    """
    tokens_of = sizes.tokens(span, traced=traced) or (_rows_of(match),)
    if match.runs_reference or is_inlined(match.rule.op, match.provider):
        tokens_of = tuple(tokens for tokens in tokens_of if tokens <= max(SMALL, tokens_of[0]))
    return tuple(case_of(match, sizes, tokens) for tokens in tokens_of)


def case_of(match: Match, sizes: Sizes, tokens: int) -> Case:
    """The arguments of a match at a number of tokens."""
    symbols = sizes.at(tokens)
    return Case(tokens=tokens, arguments=_arguments(match.values, symbols), symbols=symbols)


def _rows_of(match: Match) -> int:
    """The rows of the first result, as traced."""
    value = tensor_of(match.anchor)
    return math.prod(map(hint, value.shape[:-1])) if value is not None else 1


def _arguments(values: Mapping[str, Any], symbols: Mapping[Any, int]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    first: dict[fx.Node, str] = {}
    for name, value in values.items():
        if not isinstance(value, fx.Node):
            arguments[name] = concrete(value, symbols)
            continue
        tensor = tensor_of(value)
        if tensor is None:
            arguments[name] = concrete(value.meta.get("val"), symbols)
        else:
            spec = spec_of(tensor, symbols, first.setdefault(value, name), name)
            arguments[name] = replace(spec, fill=fill_of(value))
    return arguments


def spec_of(tensor: Tensor, symbols: Mapping[Any, int], first: str, name: str) -> TensorSpec:
    """An argument as it lies in the graph, with values for its symbols.

    Args:
        tensor: fake.
        symbols: the values of symbolic sizes.
        first: the first argument that is the same tensor.
        name: of this one.
    """
    offset = concrete(tensor.storage_offset(), symbols) * tensor.dtype.itemsize
    return TensorSpec(
        dtype=tensor.dtype,
        shape=_concrete(tensor.shape, symbols),
        stride=_concrete(tensor.stride(), symbols),
        misalignment=offset % ALIGNMENT,
        device=tensor.device,
        same_as=first if first != name else None,
    )


def _concrete(values: Sequence[Any], symbols: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(concrete(value, symbols) for value in values)


def concrete(value: Any, symbols: Mapping[Any, int]) -> Any:
    """A size with values for its symbols; what is no symbolic size is returned as it is."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression.xreplace({symbol: symbols.get(symbol, UNKNOWN) for symbol in expression.free_symbols}))
