"""The arguments that a fused op will be called with, at every size."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.dialect.raising import canonicalize
from fuseplan.errors import FuseplanWarning
from fuseplan.graph.facts import aten
from fuseplan.providers import provider_of
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification import specs, variants
from fuseplan.verification.memory import make_arguments
from fuseplan.verification.specs import (
    SMALL,
    UNKNOWN,
    Case,
    Sizes,
    _arguments,
    _rows_of,
    case_of,
    cases_of,
    concrete,
    possible,
    spec_of,
)
from tests.helpers import HIDDEN, llama, post_grad, randn
from tests.interpreted import no_code
from tests.verification.made import spec

WEIGHT = torch.ones(2, HIDDEN).bfloat16()


def inner(x: Tensor, count: Tensor) -> Tensor:
    """All rows but the first ones and the last one."""
    return torch.nn.functional.pad(llama(x[4:-1], None, WEIGHT[0])[0], (0, 16))


def behind(x: Tensor, count: Tensor) -> Tensor:
    """Rows from one on that depends on data."""
    first = count.item()
    torch._check(first >= 0)
    torch._check(first <= x.shape[0])
    return torch.nn.functional.pad(llama(x[first:], None, WEIGHT[0])[0], (0, 16))


@pytest.mark.parametrize("function", [inner, behind])
def test_a_slice_is_checked_where_it_has_rows(function: Any) -> None:
    """It would have less than none at a token, or from the 16th on."""
    reports: list[Any] = []
    config = PassConfig(policy="ordered(act_padding)")
    x, count = randn(9, HIDDEN), torch.tensor(3)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    with no_code(), torch.inference_mode(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = fuseplan.compile(function, config=config, on_report=reports.append)
        assert torch.equal(compiled(x, count), function(x, count))
    assert [each.fused["act_padding"] for each in reports] == [1]
    assert not reports[0].warnings


def test_where_no_size_can_be_the_last_one_says_so() -> None:
    cases = [Case(tokens=5 + rows, arguments={"x": spec(rows, 8, stride=(8, 1))}) for rows in (-3, -2, 3)]
    assert possible(cases) == (cases[2],)
    assert possible(cases[:2]) == (cases[1],)
    assert possible([]) == ()


def two_lengths(tokens: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return tokens + 1, torch.nn.functional.pad(llama(x, None, weight)[0], (0, 16))


def test_a_kernel_that_is_wrong_at_another_length_of_a_second_input_is_refused() -> None:
    def wrong(x: Tensor, *rest: Any) -> Tensor:
        y: Tensor = ops.rms_norm_pad.reference(x, *rest)
        return y * 2 if x.shape[0] > 100 else y

    reports: list[Any] = []
    torch._dynamo.reset()
    provider = provider_of("wrong_when_long", {ops.rms_norm_pad: wrong}, cost=0.0)
    compiled = fuseplan.compile(
        two_lengths, providers=[provider], on_report=reports.append, dynamic=True,
        config=PassConfig(force=("act_padding:wrong_when_long",)),
    )  # fmt: skip
    inputs = [(torch.arange(6), randn(length, HIDDEN), WEIGHT[0]) for length in (5, 200)]
    with no_code(), torch.inference_mode():
        with pytest.warns(FuseplanWarning, match="wrong_when_long's rms_norm_pad failed verification"):
            compiled(*inputs[0])
        for each in inputs:
            torch.testing.assert_close(compiled(*each), two_lengths(*each), rtol=2**-6, atol=2**-6)
    assert [each.fused["act_padding"] for each in reports] == [0]


def test_strides_and_alignment_are_those_of_the_graph() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = llama(x[:, 1 : HIDDEN + 1], residual, weight[1])
        return torch.nn.functional.pad(y, (0, 16)), total

    canonical = canonicalize(post_grad(function, randn(3, 2 * HIDDEN), randn(3, HIDDEN, seed=1), WEIGHT))
    manager = PostGradPassManager(PassConfig(), rules=BUILT_IN_RULES)
    (match,) = manager.analyze(canonical.original, canonical).matches.candidates
    (case,) = cases_of(match, Sizes(canonical.graph), (1, 8192))
    x, weight = case.arguments["x"], case.arguments["weight"]
    assert (x.stride, x.misalignment) == ((2 * HIDDEN, 1), 2)
    assert weight.misalignment == HIDDEN * 2 % 128
    made = make_arguments(case.arguments, ops.fused_add_rms_norm.draw, 0)
    assert made["x"].tensor.stride() == x.stride
    assert made["x"].tensor.data_ptr() % 4 == 2


def test_an_argument_is_as_far_from_a_border_as_in_memory() -> None:
    memory = torch.zeros(4, 100, dtype=torch.bfloat16)
    found = spec_of(memory[1:, 5:], {}, "x", "y")
    assert (found.shape, found.stride, found.misalignment, found.same_as) == ((3, 95), (100, 1), 210 - 128, "x")
    assert spec_of(memory, {}, "x", "x") == spec(4, 100, dtype=torch.bfloat16)


# Values for the symbols of a graph, and arguments of a match with them, on inputs that are written.

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
    for tokens, shape in ((8, (2, 4)), (33, (3, 11)), (64, (8, 8)), (36, (6, 6)), (8192, (64, 128)),
                          (257, (traced[first], 257 // traced[first]))):  # fmt: skip
        assert sizes.varied(tokens) == dict(zip((first, last), shape, strict=True)), "no divisor: as traced"
    assert sizes.varied(24) == traced
    assert [*sizes.varied(24, traced=False).values()] == [4, 6]
    assert sizes.tokens((1, 8193)) == (1, 7, 24, 33, 257, 389, 769, 1127, 8191, 8193)
    assert sizes.tokens((1, 8192), traced=False) == (1, 7, 33, 257, 389, 769, 1127, 8192)


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


def test_sizes_keep_their_bounds(inputs: Inputs) -> None:
    (symbol,) = inputs.add(6, dtype=TOKENS)
    sizes = inputs.sizes
    odd = [8191, 1127, 769, 389, 257, 33, 7]
    assert sizes._steps(symbol, 2**17) == [*odd, 2]
    assert sizes._steps(symbol, 389) == [*odd[3:], 2]
    for lower, upper, steps, divisors in (
        (33, 389, [389, 257, 33], []), (34, 388, [388, 257, 34], []), (1, 8192, [8192, *odd, 1], [6, 4, 3, 2, 1]),
        (0, 8193, [*odd, 1], [6, 4, 3, 2, 1]), (2, 4, [4, 2], [4, 3, 2]),
    ):  # fmt: skip
        inputs.environment.var_to_range[symbol] = ValueRanges(lower, upper)
        inputs.environment._update_version_counter()
        assert (sizes._steps(symbol, 2**17), sizes._divisors(symbol, 36)) == (steps, divisors), (lower, upper)


def test_what_the_graph_demands_of_a_size_is_kept(inputs: Inputs) -> None:
    inputs.add(6, dtype=TOKENS)
    value, other = inputs.fake(8, 8, static=1), inputs.fake(12, 8, static=1)
    for each in (value, other):
        inputs.put(each)
    assert value.shape[0] % 4 == 0
    assert value.shape[0] < other.shape[0]
    symbol, larger = (each.shape[0].node.expr for each in (value, other))
    sizes = inputs.sizes
    assert {each: len(guards) for each, guards in sizes._guards.items()} == {symbol: 2, larger: 1}
    for tokens in (1, 7, 33, 1127):
        values = sizes.varied(tokens)
        assert values[symbol] % 4 == 0
        assert values[symbol] < values[larger]


def match_of(inputs: Inputs, *, runs_reference: bool = False, **values: Any) -> Any:
    anchor = inputs.graph.call_function(aten.relu.default, ())
    return SimpleNamespace(
        values=values, runs_reference=runs_reference, rule=SimpleNamespace(op="op"), provider="p", anchor=anchor
    )


def test_cases_are_at_every_size_and_of_torchs_ops_at_small_ones(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "is_inlined", lambda op, provider: (op, provider) == ("inlined", "p"))
    inputs.add(6, dtype=TOKENS)
    x, sizes = inputs.put(inputs.fake(5, 8, static=1)), inputs.sizes
    match = match_of(inputs, x=x)

    def found(span: tuple[int, int], **how: bool) -> dict[int, int]:
        return {case.tokens: case.arguments["x"].shape[0] for case in cases_of(match, sizes, span, **how)}

    assert found((1, 64)) == {1: 8191, 6: 5, 7: 8191, 33: 1127, 64: 1127}
    assert found((6, 7), traced=False) == {6: 8191, 7: 8191}
    assert [case.symbols for case in cases_of(match, sizes, (1, 8))] == [sizes.varied(tokens) for tokens in (1, 6, 8)]
    for match.runs_reference, match.rule.op in ((True, "op"), (False, "inlined")):
        assert found((1, SMALL)) == {1: 5, 6: 5, 7: 5, 33: 5, SMALL: 5}
        assert found((1, SMALL + 1)) == {1: 5, 6: 5, 7: 5, 33: 5}
        assert found((SMALL + 1, 8192)) == {SMALL + 1: 5}


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
    del number.meta["val"]
    assert _arguments({"size": number}, {}) == {"size": None}


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
    assert variants.with_further_code(match, cases[:1], sizes, (1, 8), needs) == ()
    assert variants.with_further_code(match, cases, sizes, (1, 8), needs) == (7,)
    assert asked == [1, 2, 0, 1, 2, 3, 4]
