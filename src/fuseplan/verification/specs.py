"""Arguments for checks of a fused op: the arguments of a match, at several numbers of tokens."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseplan.dialect import is_inlined
from fuseplan.graph.facts import fill_of, hint, tensor_of
from fuseplan.matching import Match
from fuseplan.planner.rows import Rows

ODD_SIZES = (1, 7, 33, 257, 389, 769, 1127, 8191)
"""Numbers of tokens that no tile divides, used where they are in the range: kernels forget their last, partial tile."""

SPAN = 8192
"""The most tokens up to which the end of a range of sizes is tried as well."""

SMALL = 64
"""The largest sizes at which torch's own ops are run: they are right by definition, so only their calls are checked."""

ALIGNMENT = 128
"""The modulus of pointers' alignment in bytes; the widest load of any kernel divides it."""

MOST_TOGETHER = 2**17
"""The largest product of a number of tokens and independent sizes up to which these sizes are varied as well."""

UNKNOWN = 16
"""The value of a size that depends on data, such as the number of tokens of an expert; 0 where it can't be as large."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor argument.

    Attributes:
        dtype: dtype of its elements.
        shape: in elements.
        stride: in elements.
        misalignment: bytes from a multiple of `ALIGNMENT` to its first element.
        device: its device.
        same_as: an earlier argument that is the same tensor, if any.
        fill: the value of all elements of a constant; None: they are drawn.
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
        """Elements from the first to the last in memory, inclusive."""
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
        """The device of its tensors."""
        devices = (value.device for value in self.arguments.values() if isinstance(value, TensorSpec))
        return next(devices, torch.device("cpu"))

    @property
    def is_possible(self) -> bool:
        """Whether a call can have it: a slice that leaves out some rows has less than none of few."""
        specs = (value for value in self.arguments.values() if isinstance(value, TensorSpec))
        return all(size >= 0 for spec in specs for size in spec.shape)


def possible(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Those that a call can have; the last one where there are none, which then says what is wrong."""
    every = tuple(cases)
    return tuple(case for case in every if case.is_possible) or every[-1:]


def undrawn(case: Case) -> dict[str, Any]:
    """Arguments with any content; in a mode for tensors without data, such tensors."""
    made: dict[str, Any] = {}
    for name, value in case.arguments.items():
        if not isinstance(value, TensorSpec):
            made[name] = value
        elif value.same_as is not None:
            made[name] = made[value.same_as]
        else:
            made[name] = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
    return made


class Sizes:
    """Values for the symbols of a graph.

    Args:
        graph: the graph whose inputs have the symbols.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.rows = Rows.of(graph)
        self._traced, self._sizes = _traced_symbols(graph)
        self._varied: dict[int, dict[Any, int]] = {}
        self._factors = sorted(self.rows.tokens.free_symbols, key=str) if self.rows.is_dynamic else []

    def tokens(self, span: tuple[int, int], *, traced: bool = True) -> tuple[int, ...]:
        """The numbers of tokens at which a kernel is checked: both ends of the range, odd sizes in it, and the traced
        size; none for a graph with a single size.

        Args:
            span: the range.
            traced: whether to include the traced size, which may differ between ranks.
        """
        if not self.rows.is_dynamic:
            return ()
        first, last = span
        sizes = (*ODD_SIZES, self.rows.traced) if traced else ODD_SIZES
        # The end is large and has a partial tile one below it: one of the two is enough.
        inside = (size for size in sizes if first <= size <= last and size != last - 1)
        return tuple(sorted({first, last, *inside}))

    def at(self, tokens: int) -> dict[Any, int]:
        """The value of each symbol: the last factor of the tokens varies, all others are as traced."""
        return self._with_last(dict(self._traced), tokens)

    def varied(self, tokens: int, *, traced: bool = True) -> dict[Any, int]:
        """The value of each symbol, with all input sizes varied that the graph's guards leave free, the independent
        ones smaller for more tokens: [B, S] as B * S in several ways, and a second input's own length from long to
        short.

        Args:
            tokens: the number of tokens.
            traced: whether the other sizes stay as traced at the traced number of tokens.
        """
        if not self.rows.is_dynamic or (traced and tokens == self.rows.traced):
            return self.at(tokens)
        if tokens not in self._varied:
            self._varied[tokens] = self._vary(tokens)
        return self._varied[tokens]

    def _vary(self, tokens: int) -> dict[Any, int]:
        values, left = self.at(tokens), MOST_TOGETHER // max(1, tokens)
        others = sorted(self._sizes - {self._factors[-1]}, key=str)
        first = bisect.bisect_left(ODD_SIZES, tokens)  # each symbol comes first, and is long, at some number of tokens
        for symbol in (others[(first + place) % len(others)] for place in range(len(others))):
            is_factor = symbol in self._factors
            whole = self._with_last({**values, symbol: 1}, tokens)[self._factors[-1]]
            sizes = self._divisors(symbol, whole) if is_factor else self._steps(symbol, left)
            tried = (self._with_last({**values, symbol: size}, tokens) for size in sizes)
            values = next((each for each in tried if self._is_allowed(symbol, each)), values)
            left //= 1 if is_factor else max(1, values[symbol])
        return values

    def _with_last(self, values: dict[Any, int], tokens: int) -> dict[Any, int]:
        if self._factors:
            last = self._factors[-1]
            others = self.rows.tokens.xreplace({each: values.get(each, UNKNOWN) for each in self._factors[:-1]})
            values[last] = max(1, tokens // max(1, int(others.xreplace({last: 1}))))
        return values

    def _steps(self, symbol: Any, most: int) -> list[int]:
        """The values to try for a size, the largest first."""
        found = ShapeEnv.bound_sympy(self.rows.environment, symbol)
        sizes = {*ODD_SIZES, *(int(end) for end in (found.lower, found.upper) if end.is_Integer and 0 < end <= SPAN)}
        return sorted((size for size in sizes if found.lower <= size <= min(found.upper, most)), reverse=True)

    def _divisors(self, symbol: Any, whole: int) -> list[int]:
        """The values to try for a size that is a factor of `whole`, so that no token is lost."""
        found = ShapeEnv.bound_sympy(self.rows.environment, symbol)
        sizes = (size for size in range(math.isqrt(whole), 0, -1) if whole % size == 0)
        return [size for size in sizes if found.lower <= size <= found.upper]

    def _is_allowed(self, symbol: Any, values: Mapping[Any, int]) -> bool:
        return not any(guard.xreplace(values) == sympy.false for guard in self._guards.get(symbol, ()))

    @cached_property
    def _guards(self) -> dict[Any, list[Any]]:
        """The graph's guards, by symbol."""
        environment, found = self.rows.environment, dict[Any, list[Any]]()
        for guard in environment.guards:
            demanded = ShapeEnv.replace(environment, guard.expr)
            for symbol in demanded.free_symbols:
                found.setdefault(symbol, []).append(demanded)
        return found


def _traced_symbols(graph: fx.Graph) -> tuple[dict[Any, int], set[Any]]:
    """(traced values of symbols, the symbols that are sizes of inputs)."""
    values, found = dict[Any, int](), set[Any]()
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                values[size.node.expr] = hint(size)
                found |= {size.node.expr} if isinstance(value, Tensor) else set()
    return values, found


def cases_of(match: Match, sizes: Sizes, span: tuple[int, int], *, traced: bool = True) -> tuple[Case, ...]:
    """The arguments of a match, the smallest size first; for torch's own ops only small sizes. Sizes that no call
    can have are left out.

    Args:
        match: a match of a rule.
        sizes: sizes of its graph.
        span: first and last number of tokens.
        traced: as for `Sizes.tokens`.
    """
    tokens_of = sizes.tokens(span, traced=traced) or (_rows_of(match),)
    if match.runs_reference or is_inlined(match.rule.op, match.provider):
        small = (tokens for tokens in tokens_of if tokens <= max(SMALL, tokens_of[0]))
        return possible(_case(match, tokens, sizes.at(tokens)) for tokens in small)
    return possible(case_of(match, sizes, tokens, traced=traced) for tokens in tokens_of)


def case_of(match: Match, sizes: Sizes, tokens: int, *, traced: bool = True) -> Case:
    """The arguments of a match at a number of tokens, with other sizes varied."""
    return _case(match, tokens, sizes.varied(tokens, traced=traced))


def _case(match: Match, tokens: int, symbols: Mapping[Any, int]) -> Case:
    case = Case(tokens=tokens, arguments=_arguments(match.values, symbols), symbols=symbols)
    if case.is_possible or symbols.keys() >= (asked := _symbols(match.values)):
        return case
    least = {**dict.fromkeys(asked, 0), **symbols}
    return Case(tokens=tokens, arguments=_arguments(match.values, least), symbols=least)


def _symbols(values: Mapping[str, Any]) -> set[Any]:
    """Those of the sizes of arguments."""
    tensors = (tensor_of(value) for value in values.values() if isinstance(value, fx.Node))
    sizes: list[Any] = [size for tensor in tensors if tensor is not None for size in tensor.shape]
    return set[Any]().union(*(size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)))


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
    """The spec of a tensor of the graph, with values for its symbols.

    Args:
        tensor: a fake tensor.
        symbols: the values of symbolic sizes.
        first: the first argument that is the same tensor.
        name: the name of this argument.
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
    """A size with values for its symbols; any other value is returned as it is."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression.xreplace({symbol: symbols.get(symbol, UNKNOWN) for symbol in expression.free_symbols}))
