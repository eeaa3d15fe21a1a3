"""Values for the symbols of a graph, and arguments of a match with them, on inputs that are written."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

from fuseplan.graph.facts import aten
from fuseplan.verification import specs, variants
from fuseplan.verification.specs import (
    SMALL,
    UNKNOWN,
    Case,
    Sizes,
    _arguments,
    _rows_of,
    _traced_symbols,
    case_of,
    cases_of,
    concrete,
    undrawn,
)
from tests.verification.made import spec

TOKENS = torch.int64


class Inputs:
    """Placeholders of a graph, with sizes that are symbols, each its own."""

    def __init__(self) -> None:
        self.environment = ShapeEnv()
        self.mode, self.graph = FakeTensorMode(shape_env=self.environment), fx.Graph()

    def fake(self, *shape: int, dtype: torch.dtype = torch.float32, static: int = 0) -> Any:
        """The last sizes are static, as many as that."""
        kinds = [DimDynamic.DYNAMIC] * (len(shape) - static) + [DimDynamic.STATIC] * static
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=kinds)
        return self.mode.from_tensor(torch.empty(shape, dtype=dtype), symbolic_context=context)

    def put(self, value: Any) -> fx.Node:
        made = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        made.meta["val"] = value
        return made

    def add(self, *shape: int, **how: Any) -> list[Any]:
        """The symbols of a further input."""
        value = self.fake(*shape, **how)
        self.put(value)
        return [size.node.expr for size in value.shape if isinstance(size, torch.SymInt)]

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.graph)


def by_name(*symbols: Any) -> list[Any]:
    """The last one is what varies with tokens where several do."""
    return sorted(symbols, key=str)


@pytest.fixture
def inputs() -> Inputs:
    return Inputs()


def test_the_last_symbol_of_tokens_varies_and_is_never_none(inputs: Inputs) -> None:
    first, last = by_name(*inputs.add(4, 6, dtype=TOKENS))
    (other,) = inputs.add(5, 8, static=1)
    sizes = inputs.sizes
    traced = sizes.at(24)
    assert sorted(traced[each] for each in (first, last)) == [4, 6]
    assert traced[other] == 5
    for tokens in (1, 3, 4, 24, 25, 600):
        assert sizes.at(tokens) == {first: traced[first], last: max(1, tokens // traced[first]), other: 5}
    assert sizes.at(1)[last] == 1


def test_tokens_may_be_all_but_some_of_a_size(inputs: Inputs) -> None:
    whole = inputs.fake(9, 8, static=1)
    inputs.put(whole[1:])
    (symbol,) = whole.shape[0].node.expr.free_symbols
    sizes = inputs.sizes
    assert (sizes.rows.traced, sizes.at(7)) == (8, {symbol: 7})


def test_other_symbols_that_no_input_shows_are_some_number(inputs: Inputs) -> None:
    whole, unseen = inputs.fake(9, 8, static=1), inputs.fake(3)
    inputs.put(torch.empty_strided((unseen.shape[0], whole.shape[0], 8), (8, 8, 1), device="meta"))
    first, last = by_name(*(each.shape[0].node.expr for each in (unseen, whole)))
    sizes = inputs.sizes
    del sizes._traced[first]
    assert sizes.at(320)[last] == 320 // UNKNOWN


def test_a_graph_of_one_size_has_none(inputs: Inputs) -> None:
    inputs.put(torch.empty(3, 8))
    sizes = inputs.sizes
    assert (sizes.tokens((1, 64)), sizes.tokens((1, 64), traced=False)) == ((), ())
    assert sizes.at(7) == sizes.varied(7) == sizes.varied(7, traced=False) == {}


def test_sizes_are_both_ends_and_what_lies_between(inputs: Inputs) -> None:
    inputs.add(20, dtype=TOKENS)
    sizes = inputs.sizes
    assert sizes.tokens((1, 64)) == (1, 7, 20, 33, 64)
    assert sizes.tokens((1, 64), traced=False) == (1, 7, 33, 64)
    assert sizes.tokens((7, 33)) == (7, 20, 33)
    assert sizes.tokens((8, 34)) == (8, 20, 34), "one below the end has what the end has"
    assert sizes.tokens((2, 21)) == (2, 7, 21)
    assert sizes.tokens((21, 21)) == (21,)
    assert sizes.tokens((21, 32)) == (21, 32)


def test_batch_and_length_vary_together_and_no_token_is_lost(inputs: Inputs) -> None:
    first, last = by_name(*inputs.add(4, 6, dtype=TOKENS))
    sizes = inputs.sizes
    traced = sizes.at(24)

    def shape(tokens: int, **how: bool) -> tuple[int, int]:
        values = sizes.varied(tokens, **how)
        return values[first], values[last]

    found = {tokens: shape(tokens) for tokens in (8, 33, 64, 36, 8192)}
    assert found == {8: (2, 4), 33: (3, 11), 64: (8, 8), 36: (6, 6), 8192: (64, 128)}
    assert sizes.varied(24) == traced
    assert shape(24, traced=False) == (4, 6)
    assert shape(48, traced=False) == (6, 8)
    assert shape(257) == (traced[first], 257 // traced[first]), "no divisor: as traced"
    assert sizes.tokens((1, 8193)) == (1, 7, 24, 33, 257, 389, 769, 1127, 8191, 8193)
    assert sizes.tokens((1, 8192)) == (1, 7, 24, 33, 257, 389, 769, 1127, 8192)
    assert sizes.tokens((1, 8192), traced=False) == (1, 7, 33, 257, 389, 769, 1127, 8192)
    assert sizes.varied(33) is sizes.varied(33)


def test_a_second_length_is_long_where_tokens_are_few(inputs: Inputs) -> None:
    (own,) = inputs.add(6, dtype=TOKENS)
    (other,) = inputs.add(5, 8, static=1)
    sizes = inputs.sizes
    found = {tokens: sizes.varied(tokens) for tokens in sizes.tokens((1, 8192))}
    assert all(values[own] == tokens for tokens, values in found.items())
    assert {tokens: values[other] for tokens, values in found.items()} == {
        1: 8191, 6: 5, 7: 8191, 33: 1127, 257: 389, 389: 257, 769: 33, 1127: 33, 8192: 7,
    }  # fmt: skip
    assert sizes.varied(6, traced=False)[other] == 8191
    varying = [each for each in sizes.at(1) if len({sizes.at(tokens)[each] for tokens in found}) > 1]
    assert len(varying) == 1, "what is measured and priced varies in tokens alone"
    assert sizes.varied(0)[other] == 8191


def test_each_of_several_lengths_is_long_at_some_number_of_tokens(inputs: Inputs) -> None:
    (own,) = inputs.add(6, dtype=TOKENS)
    first, second = by_name(*inputs.add(5, 8, static=1), *inputs.add(9, 8, static=1))
    sizes = inputs.sizes
    found = {tokens: sizes.varied(tokens) for tokens in (1, 7, 8, 33, 34)}
    assert {tokens: (values[first], values[second]) for tokens, values in found.items()} == {
        1: (8191, 7), 7: (2, 8191), 8: (8191, 2), 33: (1127, 2), 34: (2, 1127),
    }  # fmt: skip
    assert [values[own] for values in found.values()] == [*found]


def test_batch_and_length_take_nothing_from_a_second_length(inputs: Inputs) -> None:
    first, last = by_name(*inputs.add(4, 6, dtype=TOKENS))
    (other,) = inputs.add(5, 8, static=1)
    values = inputs.sizes.varied(64)
    assert (values[first], values[last], values[other]) == (8, 8, 1127)
    values = inputs.sizes.varied(1)
    assert (values[first] * values[last], values[other]) == (values[first], 8191)


def test_steps_keep_the_bounds_of_a_size(inputs: Inputs) -> None:
    (symbol,) = inputs.add(6, dtype=TOKENS)
    odd = [8191, 1127, 769, 389, 257, 33, 7]
    sizes = inputs.sizes
    assert sizes._steps(symbol, 2**17) == [*odd, 2]
    assert sizes._steps(symbol, 389) == [*odd[3:], 2]
    assert sizes._steps(symbol, 1) == []
    for lower, upper, found in (
        (33, 389, [389, 257, 33]), (34, 388, [388, 257, 34]), (1, 8192, [8192, *odd, 1]), (0, 8193, [*odd, 1]),
        (2, 8191, [*odd, 2]),
    ):  # fmt: skip
        inputs.environment.var_to_range[symbol] = ValueRanges(lower, upper)
        inputs.environment._update_version_counter()
        assert sizes._steps(symbol, 2**17) == found, (lower, upper)


def test_divisors_come_from_the_most_square_on(inputs: Inputs) -> None:
    (symbol,) = inputs.add(6, dtype=TOKENS)
    sizes = inputs.sizes
    inputs.environment.var_to_range[symbol] = ValueRanges(1, 100)
    assert sizes._divisors(symbol, 36) == [6, 4, 3, 2, 1]
    assert sizes._divisors(symbol, 7) == [1]
    inputs.environment.var_to_range[symbol] = ValueRanges(2, 4)
    assert sizes._divisors(symbol, 36) == [4, 3, 2]
    assert sizes._divisors(symbol, 35) == []


def test_what_the_graph_demands_of_a_size_is_kept(inputs: Inputs) -> None:
    (own,) = inputs.add(6, dtype=TOKENS)
    value, other = inputs.fake(8, 8, static=1), inputs.fake(12, 8, static=1)
    for each in (value, other):
        inputs.put(each)
    assert value.shape[0] % 4 == 0
    assert value.shape[0] < other.shape[0]
    symbol, larger = (each.shape[0].node.expr for each in (value, other))
    sizes = inputs.sizes
    assert {each: len(guards) for each, guards in sizes._guards.items()} == {symbol: 2, larger: 1}
    for tried, is_allowed in (({symbol: 4, larger: 5}, True), ({symbol: 4, larger: 4}, False),
                              ({symbol: 5, larger: 9}, False), ({symbol: 4}, True)):  # fmt: skip
        assert sizes._is_allowed(symbol, tried) is is_allowed
    assert sizes._is_allowed(larger, {symbol: 5, larger: 9}), "that is the other one's"
    assert sizes._is_allowed(own, {})
    for tokens in (1, 7, 33, 1127):
        values = sizes.varied(tokens)
        assert values[symbol] % 4 == 0
        assert values[symbol] < values[larger]


def test_symbols_are_read_off_tensors_and_numbers(inputs: Inputs) -> None:
    rows, other = inputs.fake(6, 8, static=1), inputs.fake(9)
    inputs.put(rows)
    inputs.put(other.shape[0])
    inputs.put(7)
    inputs.put(inputs.fake(5)[1:])
    assert _traced_symbols(inputs.graph) == (
        {rows.shape[0].node.expr: 6, other.shape[0].node.expr: 9}, {rows.shape[0].node.expr},
    )  # fmt: skip


def match_of(inputs: Inputs, *, runs_reference: bool = False, **values: Any) -> Any:
    anchor = inputs.graph.call_function(aten.relu.default, ())
    return SimpleNamespace(
        values=values, runs_reference=runs_reference, rule=SimpleNamespace(op="op"), provider="p", anchor=anchor
    )


def test_cases_are_at_every_size_and_of_torchs_ops_at_small_ones(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inlined: list[Any] = []
    monkeypatch.setattr(specs, "is_inlined", lambda op, provider: inlined == [op, provider])
    inputs.add(6, dtype=TOKENS)
    value = inputs.fake(5, 8, static=1)
    x, sizes = inputs.put(value), inputs.sizes
    match = match_of(inputs, x=x)

    def found(span: tuple[int, int], **how: bool) -> dict[int, int]:
        return {case.tokens: case.arguments["x"].shape[0] for case in cases_of(match, sizes, span, **how)}

    assert found((1, 64)) == {1: 8191, 6: 5, 7: 8191, 33: 1127, 64: 1127}
    assert found((6, 7), traced=False) == {6: 8191, 7: 8191}
    assert found((6, 7)) == {6: 5, 7: 8191}
    assert [case.symbols for case in cases_of(match, sizes, (1, 64))] == [
        sizes.varied(tokens) for tokens in (1, 6, 7, 33, 64)
    ]
    for reference in (True, False):
        match.runs_reference, inlined[:] = reference, [] if reference else ["op", "p"]
        assert found((1, SMALL)) == {1: 5, 6: 5, 7: 5, 33: 5, SMALL: 5}
        assert found((1, SMALL + 1)) == {1: 5, 6: 5, 7: 5, 33: 5}
        assert found((SMALL, 8192)) == {SMALL: 5}
        assert found((SMALL + 1, 8192)) == {SMALL + 1: 5}
        assert found((6, 7), traced=False) == {6: 5, 7: 5}


def test_a_graph_of_one_size_has_the_rows_of_the_result(inputs: Inputs) -> None:
    match = match_of(inputs, runs_reference=True, eps=0.5)
    sizes = Sizes(fx.Graph())
    for value, rows in ((torch.empty(3, 4, 8), 12), (torch.empty(8), 1), (None, 1), ((torch.empty(3, 8),), 1)):
        match.anchor.meta["val"] = value
        assert _rows_of(match) == rows
        assert cases_of(match, sizes, (1, 64)) == (Case(tokens=rows, arguments={"eps": 0.5}),)


def test_arguments_are_as_in_the_graph_and_equal_ones_stay_equal(inputs: Inputs) -> None:
    value = inputs.fake(6, 8, static=1)
    rows = value.shape[0].node.expr
    x, number, plain = inputs.put(value), inputs.put(value.shape[0]), inputs.put("text")
    full = inputs.graph.call_function(aten.full.default, ([2], 0.25))
    full.meta["val"] = torch.empty(2, dtype=torch.float16)
    given = {"x": x, "same": x, "size": number, "twice": value.shape[0] * 2, "plain": plain, "eps": 1e-5, "full": full}
    assert _arguments(given, {rows: 7}) == {
        "x": spec(7, 8), "same": spec(7, 8, same_as="x"), "size": 7, "twice": 14, "plain": "text", "eps": 1e-5,
        "full": spec(2, dtype=torch.float16, fill=0.25),
    }  # fmt: skip
    assert [concrete(value.shape[0], known) for known in ({rows: 9}, {})] == [9, UNKNOWN]
    assert concrete("x", {}) == "x"
    sizes = inputs.sizes
    case = case_of(match_of(inputs, x=x), sizes, 33)
    assert (case.tokens, case.symbols, case.arguments["x"].shape) == (33, {rows: 33}, (33, 8))
    del number.meta["val"]
    assert _arguments({"size": number}, {}) == {"size": None}


def test_arguments_of_whatever_content_lie_as_those_that_are_drawn() -> None:
    x = spec(3, 4, dtype=torch.bfloat16, stride=(1, 3), device="meta")
    made = undrawn(Case(tokens=3, arguments={"x": x, "y": replace(x, same_as="x"), "eps": 0.5}))
    assert (made["x"].shape, made["x"].stride(), made["x"].dtype, made["x"].device.type) == (
        (3, 4), (1, 3), torch.bfloat16, "meta",
    )  # fmt: skip
    assert made["y"] is made["x"]
    assert made["eps"] == 0.5
    assert [*made] == ["x", "y", "eps"]


def test_a_tensor_reaches_from_its_first_element_to_its_last() -> None:
    for shape, stride, extent in (
        ((2, 3), (8, 2), 13), ((4, 3), (0, 1), 3), ((), (), 1), ((0, 3), (3, 1), 0), ((1, 5), (100, 2), 9),
    ):  # fmt: skip
        assert spec(*shape, stride=stride).extent == extent


@pytest.mark.parametrize("count", [1, 2, 3])
def test_further_code_is_asked_about_where_there_are_several_sizes(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    inputs.add(6, dtype=TOKENS)
    match, sizes = match_of(inputs, size=3), inputs.sizes
    match.rule = SimpleNamespace(op=SimpleNamespace(name="op"))
    monkeypatch.setattr(variants, "registered_kernel", lambda name, provider: lambda size: None)
    cases = [case_of(match, sizes, tokens) for tokens in (1, 4, 5)[:count]]
    asked: list[None] = []

    def needs(call: Any, mode: Any) -> frozenset[object]:
        """Other code from the third call on."""
        asked.append(None)
        return frozenset({len(asked) > 2})

    found = variants.with_further_code(match, cases, sizes, (1, 4), needs)
    assert found == {1: (), 2: (1,), 3: ()}[count]
    assert len(asked) == (0 if count == 1 else count + 4)


def test_no_code_is_asked_about_at_sizes_that_no_call_has(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    value = inputs.fake(9, 8, static=1)
    inputs.put(value)
    match, sizes = match_of(inputs, x=inputs.graph.call_function(aten.slice.Tensor, ())), inputs.sizes
    match.values["x"].meta["val"] = value[4:]
    match.rule = SimpleNamespace(op=SimpleNamespace(name="op"))
    asked: list[int] = []
    monkeypatch.setattr(variants, "registered_kernel", lambda name, provider: lambda x: asked.append(x.shape[0]))

    def needs(call: Any, mode: Any) -> frozenset[object]:
        call()
        return frozenset({asked[-1] > 2})

    cases = [case_of(match, sizes, tokens) for tokens in (5, 6)]
    assert variants.with_further_code(match, cases, sizes, (1, 8), needs) == (7,)
    assert asked == [1, 2, 0, 1, 2, 3, 4]
