"""Sizes that are rounded to multiples, in several spellings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.graph.sizes import equal_rounded

Size = Callable[[Any], Any]


@pytest.fixture
def rows() -> Any:
    """A size that isn't known."""
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode.from_tensor(torch.empty(6, 8), symbolic_context=context).shape[0]


EQUAL: list[tuple[Size, Size]] = [
    (lambda s: -4 * (s // -4), lambda s: (s + 3) // 4 * 4),
    (lambda s: (s + 3) // 4 * 4, lambda s: torch.sym_max(1, (s + 3) // 4 * 4)),
    (lambda s: s + 3 - (s + 3 - (s + 3) // 4 * 4), lambda s: -(-s // 4) * 4),
    (lambda s: s, lambda s: s),
]
OTHER: list[tuple[Size, Size]] = [
    (lambda s: s // 4 * 4, lambda s: (s + 3) // 4 * 4),
    (lambda s: (s + 4) // 4 * 4, lambda s: (s + 3) // 4 * 4),
    (lambda s: s + (s + 3) // 4, lambda s: (s + 3) // 4 * 4),
    (lambda s: (s + 7) // 8 * 8, lambda s: (s + 3) // 4 * 4),
    (lambda s: s * s, lambda s: s * s * s),
    (lambda s: torch.sym_max(1, s // 4 * 4), lambda s: s // 4 * 4),
    (lambda s: 8, lambda s: (s + 3) // 4 * 4),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_what_is_equal_for_every_size(left: Size, right: Size, rows: Any) -> None:
    assert equal_rounded([2, left(rows)], [2, right(rows)], 4)
    assert equal_rounded([right(rows)], [left(rows)], 4)


@pytest.mark.parametrize(("left", "right"), OTHER)
def test_what_is_equal_for_some_or_none(left: Size, right: Size, rows: Any) -> None:
    assert not equal_rounded([left(rows)], [right(rows)], 4)


def test_as_many_sizes_on_both_sides(rows: Any) -> None:
    assert not equal_rounded([rows, rows], [rows], 4)
