"""How many rows a graph has, of which rules for few rows are on by default."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.planner.rows import Rows, most_rows
from tests.cached import BATCH, arguments, attending, layer, visible
from tests.helpers import post_grad, written

aten = torch.ops.aten


@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_count_where_attention_is_compiled_by_itself(tokens: int) -> None:
    """Its only input of integers holds positions, and nothing is multiplied by a weight."""
    graph = post_grad(attending(layer(read=lambda cache: cache)), *arguments(tokens), visible(5, tokens))
    assert most_rows(graph, None) == BATCH * tokens
    assert most_rows(graph, 1) == BATCH * tokens


def faking(kind: DimDynamic = DimDynamic.DUCK) -> Callable[..., torch.Tensor]:
    """Makes fake tensors of one graph, some of whose sizes are symbols; unless another kind of symbol is asked for,
    equal sizes are the same one.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(value: torch.Tensor, *dynamic: int) -> torch.Tensor:
        kinds = [kind if dim in dynamic else DimDynamic.STATIC for dim in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    return fake


def rows_of(*inputs: torch.Tensor) -> Rows:
    """The rows of a graph with these inputs."""
    graph = fx.Graph()
    for index, value in enumerate(inputs):
        graph.placeholder(f"input_{index}").meta["val"] = value
    return Rows.of(graph)


def batch() -> tuple[Rows, torch.Tensor]:
    """Of 5 x 6 tokens, both sizes symbols, and their hidden states."""
    fake = faking()
    return rows_of(fake(torch.zeros(5, 6, dtype=torch.int64), 0, 1)), fake(torch.zeros(5, 6, 64), 0, 1)


def test_rows_are_all_dimensions_but_the_last_and_follow_the_tokens() -> None:
    rows, hidden = batch()
    heads = hidden.view(*hidden.shape[:2], 4, 16)
    assert (rows.at_each(hidden, (0, 30, 60)), rows.at(heads, 60)) == ((1, 30, 60), 240)
    assert [rows.at(torch.zeros(shape), 60) for shape in ((3, 4, 8), (0, 8), (8,))] == [12, 1, 1]


def test_of_a_size_at_other_tokens_the_last_symbol_varies() -> None:
    rows, hidden = batch()
    first, last = map(str, hidden.shape[:2])
    sized = rows.sized(hidden.half(), 60)
    assert sized.shape == ((5, 12, 64) if first < last else (10, 6, 64))
    assert (sized.dtype, sized.device.type) == (torch.float16, "meta")
    assert Rows(None, 1).sized(torch.zeros(3, 4), 60).shape == (3, 4)


@pytest.mark.parametrize(
    ("sizes", "at_most_100", "of_at_most_64", "unlimited"),
    [
        (lambda b, s: (b, s), 100, 100, math.inf),
        (lambda b, s: (2 * s, b), 200, 200, math.inf),
        (lambda b, s: (s,), 50, 50, 64),  # a size that is a symbol is 2 or more
        (lambda b, s: (b, s, s), math.inf, math.inf, math.inf),
        (lambda b, s: (s // 2,), math.inf, 32, 32),
        (lambda b, s: (3, 4), 12, 12, 12),
    ],
)
def test_the_most_rows_are_limited_by_tokens_and_by_guards(
    sizes: Any, at_most_100: float, of_at_most_64: float, unlimited: float
) -> None:
    rows, hidden = batch()
    given = sizes(*hidden.shape[:2])
    assert rows.most_of(given, 100) == at_most_100
    assert rows.most_of(hidden.shape[1:2], 1) == 1
    torch._check(hidden.shape[1] <= 64)
    assert (rows.most_of(given, 100), rows.most_of(given, None)) == (of_at_most_64, unlimited)
    assert (rows.most_tokens, Rows(None, 7).most_tokens) == (math.inf, 7)
    torch._check(hidden.shape[0] <= 8)
    assert (rows.most_tokens, rows.most(hidden, None)) == (512, 512)


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (lambda x, w, b: aten.mm.default(aten.relu.default(x), aten.t.default(w)), 7),
        (lambda x, w, b: aten.addmm.default(b, aten.relu.default(x), aten.t.default(w)), 7),
        (lambda x, w, b: aten.mm.default(x, aten.relu.default(aten.t.default(w))), 1),
        (lambda x, w, b: aten.mm.default(aten.t.default(w), x), 64),
        (lambda x, w, b: aten.relu.default(x), 1),
    ],
)
def test_rows_of_products_with_inputs_are_tokens(product: Any, expected: int) -> None:
    """A weight is an input, or a view of one."""
    given = {"x": torch.ones(7, 64), "w": torch.ones(7, 64), "b": torch.ones(7)}
    assert most_rows(written(product, given), None) == expected


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_tokens_are_those_of_the_first_symbolic_integers(order: tuple[int, ...]) -> None:
    fake = faking()
    inputs = [
        fake(torch.zeros(7, 64)), fake(torch.zeros(12, 64), 0), fake(torch.zeros(3, dtype=torch.int64)),
        fake(torch.zeros(5, 6, dtype=torch.int64), 0, 1),
    ]  # fmt: skip
    for left, traced, is_dynamic in ((4, 30, True), (3, 12, True), (1, 1, False)):
        rows = rows_of(*(inputs[index] for index in order if index < left))
        assert (rows.traced, rows.is_dynamic) == (traced, is_dynamic)
        assert rows.at_each(inputs[0], (1, 100)) == (7, 7)
        if is_dynamic:
            assert rows.at_each(inputs[1], (traced, 2 * traced)) == ((12, 24) if left == 3 else (12, 12))


@pytest.mark.parametrize("first", [0, 1])
def test_symbols_of_another_input_stand_for_those_of_the_tokens_by_guards(first: int) -> None:
    """[B, S] and [C, T, 64], of which B * S is known to be C * T."""
    fake = faking(DimDynamic.DYNAMIC)
    inputs = [fake(torch.zeros(3, 5, dtype=torch.int64), 0, 1), fake(torch.zeros(3, 5, 64), 0, 1)]
    in_order = inputs[first], inputs[1 - first]
    assert rows_of(*in_order).at_each(inputs[1], (30, 90)) == (15, 15)
    assert bool(inputs[0].numel() == inputs[1].numel() // 64)
    rows = rows_of(*in_order)
    for value in (inputs[0].view(-1, 1), inputs[1].view(-1, 64), inputs[1]):
        assert rows.at_each(value, (30, 90)) == (30, 90)
        assert rows.most(value, 90) == 90
    assert [rows.sized(each.view(-1), 91).numel() for each in inputs] == [91, 91 * 64]
    assert rows.sized(inputs[1], 90).numel() == 90 * 64


def test_guards_that_say_no_symbol_are_left_alone() -> None:
    value = faking(DimDynamic.DYNAMIC)(torch.zeros(4, 6, 8, dtype=torch.int64), 0, 1, 2)
    a, b, c = value.shape
    assert bool(a % 4 == 0)
    assert bool(b == c - 2)
    assert bool(a * a + a == 2 * c + a)
    assert rows_of(value).at_each(value, (384,)) == (2 * 4 * 6,)
