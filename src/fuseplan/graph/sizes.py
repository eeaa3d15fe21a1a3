"""Sizes that are rounded to multiples, which torch's symbolic shapes don't know to be equal in every spelling.

-4 * (s // -4) == 4 * ((s + 3) // 4) == max(1, 4 * ((s + 3) // 4)), of s > 0
"""

from collections.abc import Sequence
from typing import Any

import torch

from fuseplan.graph.facts import equal_size


def equal_rounded(left: Sequence[object], right: Sequence[object], step: int) -> bool:
    """Whether sizes are equal for each positive value of their symbols, some of them rounded to multiples of `step`;
    adds no guard.
    """
    return len(left) == len(right) and all(_equal(a, b, step) for a, b in zip(left, right, strict=True))


def _equal(left: object, right: object, step: int) -> bool:
    if equal_size(left, right):
        return True
    both = [size.node.expr for size in (left, right) if isinstance(size, torch.SymInt)]
    symbols = {symbol for each in both for symbol in each.free_symbols}
    if len(both) < 2 or len(symbols) != 1:
        return False
    (symbol,) = symbols
    values = [_values(each, symbol, step) for each in both]
    return values[0] is not None and values[0] == values[1]


def _values(size: Any, symbol: Any, step: int) -> list[int] | None:
    """A size at the first 2 * step values of its symbol, which determine all others; None where they don't.

    They do for a sum of multiples of the symbol and of rounded quotients of such sums by `step`: when the symbol grows
    by `step`, the size grows by a constant.
    """
    if type(size).__name__ == "Max" and len(size.args) == 2 and size.args[0] == 1:
        inner = _values(size.args[1], symbol, step)
        grows = inner is not None and min(inner) >= 1 and all(a <= b for a, b in zip(inner, inner[step:], strict=False))
        return inner if grows else None
    for term in size.as_coefficients_dict():
        is_quotient = type(term).__name__ == "FloorDiv" and abs(term.args[1]) == step
        if not _is_plain(term, symbol) and not (is_quotient and _is_sum(term.args[0], symbol)):
            return None
    return [int(size.subs(symbol, value)) for value in range(1, 2 * step + 1)]


def _is_sum(size: Any, symbol: Any) -> bool:
    return all(_is_plain(term, symbol) for term in size.as_coefficients_dict())


def _is_plain(term: Any, symbol: Any) -> bool:
    return bool(term in (1, symbol))
