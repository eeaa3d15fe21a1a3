"""How rows of tensors follow the tokens of a graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.graph.facts import hint
from fuseplan.planner.rows import Rows


class Symbols:
    """Fake tensors, some of whose sizes are symbols: a negative size is symbolic, and was its absolute value."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.graph = fx.Graph()

    def value(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        dynamic = [DimDynamic.DYNAMIC if size < 0 else DimDynamic.STATIC for size in sizes]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dynamic)
        tensor = torch.empty([abs(size) for size in sizes], dtype=dtype)
        return self.mode.from_tensor(tensor, symbolic_context=context, source=None)

    def input(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        node = self.graph.placeholder(f"a{len(self.graph.nodes)}")
        node.meta["val"] = self.value(*sizes, dtype=dtype)
        value: Tensor = node.meta["val"]
        return value


INTEGER = torch.int64


def test_a_symbolic_size_has_the_hint_it_was_traced_with() -> None:
    value = Symbols().value(-6, 3)
    assert [hint(size) for size in (*value.shape, 5)] == [6, 3, 5]


@pytest.mark.parametrize(
    ("inputs", "traced", "dynamic"),
    [
        ([], 1, False),
        ([((4, 8), torch.float32)], 1, False),  # may be a weight
        ([((4, 8), torch.float32), ((2, 3), INTEGER)], 6, False),  # token ids: all dimensions count
        ([((), INTEGER), ((5,), INTEGER)], 5, False),  # a scalar is no token ids
        ([((-9,), torch.float32)], 9, True),
        ([((4, 8), torch.float32), ((-5, 8), torch.float32)], 5, True),
        ([((2, 3), INTEGER), ((-5, 8), torch.float32)], 5, True),
        ([((-7, 8), torch.float32), ((-2, -3), INTEGER)], 6, True),
        ([((4, -8), torch.float32)], 1, False),  # the last dimension isn't leading
        ([((-3, -5, 8), torch.float32), ((-7, 8), torch.float32)], 15, True),
    ],
)
def test_tokens_are_read_off_the_inputs(
    inputs: list[tuple[tuple[int, ...], torch.dtype]], traced: int, dynamic: bool
) -> None:
    symbols = Symbols()
    for sizes, dtype in inputs:
        symbols.input(*sizes, dtype=dtype)
    symbols.graph.placeholder("not_a_tensor").meta["val"] = 3
    rows = Rows.of(symbols.graph)
    assert (rows.traced, rows.is_dynamic) == (traced, dynamic)


def test_rows_follow_the_tokens_where_they_share_a_symbol() -> None:
    symbols = Symbols()
    x = symbols.input(-6, 8)
    rows = Rows.of(symbols.graph)
    assert rows.at(x, 12) == 12
    assert rows.at(x.new_empty(x.shape[0], 3, 8), 12) == 36
    assert rows.at(x.new_empty(x.shape[0] + 6, 8), 12) == 24
    assert rows.at(x.new_empty(5, 8), 12) == 5
    assert rows.at(x.new_empty(0, 8), 12) == 1
    assert rows.at(x.new_empty(8), 12) == 1
    assert rows.at(symbols.value(-9, 8), 12) == 9
    # Known by its sizes from then on.
    assert rows.at(x.new_empty(x.shape[0], 3, 5), 60) == 180
    assert rows.at(x.new_empty(2 * x.shape[0], 8), 1) == 2
    assert Rows(rows.tokens, 6000).at(x, 1) == 1


def test_rows_of_a_static_graph_stay() -> None:
    symbols = Symbols()
    x = symbols.input(6, 2, 8)
    rows = Rows.of(symbols.graph)
    assert rows.tokens is None
    assert [rows.at(x, tokens) for tokens in (1, 100)] == [12, 12]
    assert rows.at(x.new_empty(0, 8), 5) == 1
