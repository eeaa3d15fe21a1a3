"""How many rows a graph has, of which rules for few rows are on by default."""

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.planner.rows import Rows, most_rows
from tests.cached import BATCH, arguments, attending, layer, visible
from tests.helpers import post_grad


@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_count_where_attention_is_compiled_by_itself(tokens: int) -> None:
    """Its only input of integers holds positions, and nothing is multiplied by a weight."""
    graph = post_grad(attending(layer(read=lambda cache: cache)), *arguments(tokens), visible(5, tokens))
    assert most_rows(graph, None) == BATCH * tokens
    assert most_rows(graph, 1) == BATCH * tokens


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_tokens_are_those_of_the_first_symbolic_integers(order: tuple[int, ...]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(value: torch.Tensor, *dynamic: int) -> torch.Tensor:
        kinds = [DimDynamic.DUCK if dim in dynamic else DimDynamic.STATIC for dim in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    inputs = [
        fake(torch.zeros(7, 64)), fake(torch.zeros(12, 64), 0), fake(torch.zeros(3, dtype=torch.int64)),
        fake(torch.zeros(5, 6, dtype=torch.int64), 0, 1),
    ]  # fmt: skip
    for left, traced, is_dynamic in ((4, 30, True), (3, 12, True), (1, 1, False)):
        graph = fx.Graph()
        for index in order:
            if index < left:
                graph.placeholder(f"input_{index}").meta["val"] = inputs[index]
        rows = Rows.of(graph)
        assert (rows.traced, rows.is_dynamic) == (traced, is_dynamic)
        assert rows.at_each(inputs[0], (1, 100)) == (7, 7)
        if is_dynamic:
            assert rows.at_each(inputs[1], (traced, 2 * traced)) == ((12, 24) if left == 3 else (12, 12))
    graph = fx.Graph()
    for index in (0, 2):
        graph.placeholder(f"input_{index}").meta["val"] = inputs[index]
    assert (Rows.of(graph).traced, Rows.of(graph).is_dynamic) == (3, False)


@pytest.mark.parametrize("first", [0, 1])
def test_symbols_of_another_input_stand_for_those_of_the_tokens_by_guards(first: int) -> None:
    """[B, S] and [C, T, 64], of which B * S is known to be C * T."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def fake(value: torch.Tensor) -> torch.Tensor:
        kinds = [DimDynamic.DYNAMIC if dim < 2 else DimDynamic.STATIC for dim in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    inputs = [fake(torch.zeros(3, 5, dtype=torch.int64)), fake(torch.zeros(3, 5, 64))]
    graph = fx.Graph()
    for index in (first, 1 - first):
        graph.placeholder(f"input_{index}").meta["val"] = inputs[index]
    assert Rows.of(graph).at_each(inputs[1], (30, 90)) == (15, 15)
    assert bool(inputs[0].numel() == inputs[1].numel() // 64)
    rows = Rows.of(graph)
    for value in (inputs[0].view(-1, 1), inputs[1].view(-1, 64), inputs[1]):
        assert rows.at_each(value, (30, 90)) == (30, 90)
        assert rows.most(value, 90) == 90
    assert [rows.sized(each.view(-1), 91).numel() for each in inputs] == [91, 91 * 64]
    assert rows.sized(inputs[1], 90).numel() == 90 * 64


def test_guards_that_say_no_symbol_are_left_alone() -> None:
    environment = ShapeEnv()
    value = FakeTensorMode(shape_env=environment).from_tensor(
        torch.zeros(4, 6, 8, dtype=torch.int64),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3),
    )
    a, b, c = value.shape
    assert bool(a % 4 == 0)
    assert bool(b == c - 2)
    assert bool(a * a + a == 2 * c + a)
    graph = fx.Graph()
    graph.placeholder("x").meta["val"] = value
    assert len(environment.guards) >= 2
    assert not Rows.of(graph).equal
    assert Rows.of(graph).at_each(value, (384,)) == (2 * 4 * 6,)
