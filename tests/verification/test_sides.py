"""Two sides of somebody's replacement: what is computed of them exactly, and what is told of them."""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.verification import sides
from fuseplan.verification.foreign import _differing, _draw_of, _largest, _like
from fuseplan.verification.sides import Side, run_exactly, run_node, sides_of
from fuseplan.verification.telling import told, vanished
from tests.verification import others
from tests.verification.made import spec

aten = torch.ops.aten
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def side(*calls: tuple[Any, tuple[Any, ...]], **inputs: Tensor) -> Side:
    """Calls one after the other; a name stands for an input, an index for what a call yields."""
    graph = fx.Graph()
    placed: dict[Any, fx.Node] = {}
    for name, value in inputs.items():
        placed[name] = graph.placeholder(name)
        placed[name].meta["val"] = value
    values: dict[Any, Any] = {**inputs}
    for number, (target, args) in enumerate(calls):
        known = [(placed[each], values[each]) if isinstance(each, str) else (each, each) for each in args]
        node = graph.call_function(target, tuple(node for node, _ in known))
        node.meta["val"] = values[f"{number}"] = target(*(value for _, value in known))
        placed[f"{number}"] = node
    names = {placed[name]: name for name in inputs}
    return Side(names=names, nodes=tuple(placed[f"{n}"] for n in range(len(calls))), outputs=(node,))


X = torch.tensor([[1.0, 1 / 3, -7.1]])


@pytest.mark.parametrize("dtype", FLOATS)
def test_torchs_ops_are_run_in_float64_without_casts_on_the_way(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    cast = torch.ops.prims.convert_element_type.default
    computed = side((aten.mul.Tensor, ("x", "x")), (cast, ("0", torch.bfloat16)), (aten.exp.default, ("1",)), x=x)
    (exact,) = computed.run({"x": x}, {}, call=run_exactly)
    assert torch.equal(exact, (x.double() * x.double()).exp())
    (own,) = computed.run({"x": x}, {}, call=run_node)
    assert torch.equal(own, (x * x).bfloat16().exp())
    if dtype.itemsize == 2:
        reading = side((aten.mul.Tensor, ("x", "x")), (aten.view.dtype, ("0", torch.int16)), x=x)
        (bits,) = reading.run({"x": x}, {}, call=run_exactly)
        assert torch.equal(bits, (x * x).view(torch.int16)), "what reads bits reads those of the graph"


def widened(name: str, kernel: Callable[[Tensor], Any]) -> Any:
    return others.op(f"{name}(Tensor x) -> Tensor", kernel, torch.empty_like)


def only_of_bfloat16(x: Tensor) -> Tensor:
    if x.dtype is not torch.bfloat16:
        raise RuntimeError("not implemented for Double")
    return x * 3


def of_other_bits(x: Tensor) -> Tensor:
    return x * 3 if x.dtype is torch.bfloat16 else x * 5


def thrice(x: Tensor) -> Tensor:
    return x * 3


@pytest.mark.parametrize(
    ("kernel", "is_torchs", "is_exact"),
    [(only_of_bfloat16, False, False), (only_of_bfloat16, True, False), (of_other_bits, False, False),
     (thrice, False, True)],
)  # fmt: skip
def test_an_op_that_takes_no_float64_rounds_as_it_does(
    kernel: Callable[[Tensor], Tensor], is_torchs: bool, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_torchs:
        monkeypatch.setattr(sides, "TORCHS", ("aten", "prims", "made_up"))
    x = X.bfloat16()
    computed = side((aten.exp.default, ("x",)), (widened(kernel.__name__, kernel), ("0",)), x=x)
    (exact,) = computed.run({"x": x}, {}, call=run_exactly)
    assert torch.equal(exact, (x.double().exp() if is_exact else x.double().exp().bfloat16()) * 3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_near_is_so_by_the_precision_of_its_values(dtype: torch.dtype) -> None:
    narrow, eps = torch.tensor([1.0, -64.0, 0.0], dtype=dtype), torch.finfo(dtype).eps
    for units, is_near in ((7, True), (9, False)):
        wide = narrow.double() + torch.tensor([0.0, 0.0, units * 64 * eps])
        assert sides._is_rounding(wide, narrow) is is_near
        assert sides._is_rounding(narrow.double() - wide + narrow.double(), narrow) is is_near
        assert sides._is_near([narrow.double(), wide], (narrow, narrow)) is is_near
    assert not sides._is_near([narrow], (narrow, narrow))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("wide", "is_rounding"),
    [([INF, 1.0, NAN], True), ([1e300, 1.0, 1.0], True), ([1.0, INF, 1.0], False), ([1.0, 1.1, 1.0], False)],
    ids=["as it", "where float64 doesn't overflow", "where float64 does", "too far off beside it"],
)
def test_what_overflows_is_near_what_overflows_too(wide: list[float], is_rounding: bool) -> None:
    assert sides._is_rounding(torch.tensor(wide).double(), torch.tensor([INF, 1.0, NAN])) is is_rounding


@pytest.mark.parametrize(
    ("wide", "narrow", "is_rounding"),
    [
        (torch.empty(0, 3).double(), torch.empty(0, 3), True), (torch.ones(2).int(), torch.full((2,), 4).int(), True),
        (7, 8, True), (torch.ones(3).double(), torch.ones(2), False), (7, torch.ones(2), False),
    ],
)  # fmt: skip
def test_only_floats_of_one_shape_can_be_far(wide: Any, narrow: Any, is_rounding: bool) -> None:
    assert sides._is_rounding(wide, narrow) is is_rounding


def test_a_copy_of_what_is_written_lies_as_far_into_its_memory_as_in_the_graph() -> None:
    memory = torch.arange(20.0)
    own = memory.as_strided((3, 2), (4, 1), 5)
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = own
    found = sides._placed(node, own.as_strided((3, 2), (4, 1), 2))
    assert (found.storage_offset(), found.stride()) == (5, (4, 1))
    assert found.tolist() == memory.as_strided((3, 2), (4, 1), 2).tolist()
    assert found.data_ptr() != own.data_ptr()
    assert sides._placed(node, 7) == 7
    nothing = torch.empty(0)
    assert sides._placed(node, nothing) is nothing
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    whole = mode.from_tensor(torch.empty(6, 5), symbolic_context=context)
    node.meta["val"] = whole[1:]
    assert sides._placed(node, own) is own, "how far isn't known"


def test_sides_are_told_apart_by_what_they_call_and_yield() -> None:
    x, add = torch.ones(2, 3), aten.add.Tensor
    made = [
        side((aten.mul.Tensor, ("x", factor)), *further, x=x, y=x).text({})
        for factor, *further in (
            (2, (add, ("0", "y"))), (2, (add, ("0", "y"))), (3, (add, ("0", "y"))), (2, (add, ("0", "x"))),
            (2, (add, ("y", "0"))), (2,),
        )
    ]  # fmt: skip
    assert made[0] == made[1] == "aten.mul.Tensor ('x', 2) {}\naten.add.Tensor ('%0', 'y') {}\n['%1']"
    assert len({*made}) == 5


def scaled(schema: str) -> Any:
    return others.op(schema, lambda x, *rest, **named: x * 1, lambda x, *rest, **named: torch.empty_like(x))


def told_side(schema: str, *args: Any) -> Side:
    return side((scaled(schema), ("x", *args)), x=torch.ones(2, 3))


def test_arguments_that_nothing_passes_on_are_named_those_that_matter_first() -> None:
    before = told_side("told_all(Tensor x, int size=4, bool flag=False, float eps=0.5, bool on=False, bool off=True, "
                       "int _hidden=9) -> Tensor", 4, True, 0.25, False, False, 8)  # fmt: skip
    nothing = told_side("told_none(Tensor x) -> Tensor")
    assert vanished(before, nothing) == [
        "flag=True of made_up.told_all", "eps=0.25 of made_up.told_all", "off=False of made_up.told_all",
        "size=4 of made_up.told_all", "on=False of made_up.told_all",
    ]  # fmt: skip
    assert vanished(nothing, before) == []
    assert vanished(before, before) == []


def test_an_argument_that_has_another_value_there_says_which() -> None:
    before = told_side("told_eps(Tensor x, float eps, bool flag) -> Tensor", 0.25, True)
    after = told_side("told_eps(Tensor x, float eps, bool flag) -> Tensor", 0.5, False)
    assert vanished(before, after) == [
        "flag=True of made_up.told_eps (there it is False)", "eps=0.25 of made_up.told_eps (there it is 0.5)",
    ]  # fmt: skip
    usual = told_side("told_usual(Tensor x, bool flag=False) -> Tensor")
    assert vanished(before, usual)[0] == "flag=True of made_up.told_eps (there it is False)"


def test_a_number_that_is_passed_on_by_another_name_is_not_gone() -> None:
    before = told_side("told_by_name(Tensor x, float eps, int group) -> Tensor", 0.25, 1)
    after = told_side("told_otherwise(Tensor x, float epsilon, bool one) -> Tensor", 0.25, True)
    assert vanished(before, after) == ["group=1 of made_up.told_by_name"], "True is another one than 1"


def test_torchs_own_arguments_are_nobodys_options() -> None:
    before = side((aten.sum.dim_IntList, ("x", [0], True)), x=X)
    assert vanished(before, told_side("told_none(Tensor x) -> Tensor")) == []


@pytest.mark.parametrize(
    ("pattern", "place", "end"),
    [
        (None, None, ""), ("p", None, "; pattern p, replacement unknown"),
        (None, "f (a.py:3)", "; replacement f (a.py:3)"), ("p", "f (a.py:3)", "; pattern p, replacement f (a.py:3)"),
    ],
)  # fmt: skip
def test_what_stands_for_what_is_told_in_one_clause(pattern: str | None, place: str | None, end: str) -> None:
    match: Any = SimpleNamespace(entry=SimpleNamespace(pattern_name=pattern), written_at=place)
    before = side((aten.mul.Tensor, ("x", 2)), (aten.mul.Tensor, ("0", 3)), (aten.relu.default, ("1",)), x=X.bfloat16())
    after = told_side("told_call(Tensor x, int size, bool _hidden=True) -> Tensor", 4)
    text = told(match, before, after, {})
    assert text == f"made_up.told_call(x: float32[2, 3], size=4) replaces aten.mul.Tensor, aten.relu{end}"
    assert told(match, after, before, {}).startswith(
        "aten.mul.Tensor, aten.relu replaces made_up.told_call(x: float32[2, 3], size=4); "
        "it drops size=4 of made_up.told_call"
    )
    empty = Side(names={}, nodes=(), outputs=())
    assert told(match, empty, empty, {}) == f"nothing replaces nothing{end}"


@pytest.mark.parametrize(
    ("shape", "dtype", "draw"),
    [
        ((), torch.bfloat16, "draw_positive"), ((1, 1), torch.bfloat16, "draw_positive"),
        ((5, 1), torch.float32, "draw_positive"), ((5, 1), torch.bfloat16, "draw_activations"),
        ((5, 2), torch.float32, "draw_activations"), ((64,), torch.float32, "draw_near_one"),
        ((1, 64), torch.float32, "draw_activations"),
    ],
)  # fmt: skip
def test_arguments_are_drawn_as_what_they_are_likely_to_be(shape: tuple[int, ...], dtype: Any, draw: str) -> None:
    assert _draw_of(spec(*shape, dtype=dtype)).__name__ == draw


def test_exact_values_are_wide_where_results_are_floats() -> None:
    exact = torch.tensor([1 / 3], dtype=torch.float64)
    assert _like(exact, X).dtype is torch.float64
    assert _like(exact.float(), X.double()).dtype is torch.float64
    assert _like(exact, X.to(others.FP8)).dtype is others.FP8
    assert _like(exact, X.int()).dtype is torch.int32


def test_elements_differ_by_their_bits() -> None:
    nan = float("nan")
    left, right = torch.tensor([[1.0, -0.0, nan], [2.0, 3.0, nan]]), torch.tensor([[1.5, 0.0, nan], [2.0, -3.1, 4.0]])
    assert _differing(left, right) == 4
    assert _differing(left[:, :0], right[:, :0]) == _differing(left, left) == 0
    assert _differing(left.t(), right.t()) == 4
    assert _differing(left.to(others.FP8), right.to(others.FP8)) == 4


def test_the_largest_differences_are_of_what_is_finite() -> None:
    own = torch.tensor([1.0, 100.0, float("inf"), 0.0, float("nan")])
    got = torch.tensor([1.5, 102.0, 3.0, 1.0, 1.0])
    assert _largest(got, own) == "; the largest differences from the graph's own are 2 and 0.5 of the value"
    assert _largest(own[2:3], own[2:3]) == ""


def test_a_side_is_run_in_order_with_values_for_symbols() -> None:
    graph = fx.Graph()
    x, size = graph.placeholder("x"), graph.placeholder("size")
    x.meta["val"], size.meta["val"] = X, 7
    first = graph.call_function(aten.mul.Tensor, (x, size))
    second = graph.call_function(aten.cat.default, ([first, x],), {"dim": 1})
    computed = Side(names={x: "x"}, nodes=(first, second), outputs=((first, [x]), second, None, size))
    seen: list[Any] = []

    def call(node: fx.Node, given: Any) -> Any:
        seen.append(node)
        args, kwargs = given(lambda source, value: value if source is not x else value + 1)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    (inner, (own,)), whole, nothing, number = computed.run({"x": X}, {}, call=call)
    assert seen == [first, second]
    assert torch.equal(inner, (X + 1) * 7)
    assert own is X
    assert torch.equal(whole, torch.cat([(X + 1) * 7, X + 1], 1))
    assert (nothing, number) == (None, 7)


def test_calls_are_by_name_those_that_are_functionalised_too() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    fused = others.op("called_into(Tensor! result, Tensor x, int size=3) -> ()", None, lambda result, x, size=3: None)
    wrapper = torch.ops.higher_order.auto_functionalized
    direct = graph.call_function(fused, (x, x), {"size": 4})
    wrapped = graph.call_function(wrapper, (fused,), {"result": x, "x": x})
    item = graph.call_function(operator.getitem, (wrapped, 1))
    calls = Side(names={x: "x"}, nodes=(direct, wrapped, item), outputs=(item,)).calls
    assert calls == [(fused, {"result": x, "x": x, "size": 4}, direct), (fused, {"result": x, "x": x}, wrapped)]


def replacing(
    known: dict[str, fx.Node], replaced: fx.Graph, *arguments: Any, names: dict[fx.Node, str] | None = None
) -> Any:
    """A match of relu(x + y), by what is given."""
    x, y = known.values()
    (total,) = x.users
    (relu,) = total.users
    return SimpleNamespace(
        arguments=list(arguments), variables={x: "a", y: "b"} if names is None else names, consumed=(total, relu),
        outputs=[relu], replacement=SimpleNamespace(graph=replaced),
    )  # fmt: skip


def of_graph() -> dict[str, fx.Node]:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["val"] = X
    graph.call_function(aten.relu.default, (graph.call_function(aten.add.Tensor, (x, y)),))
    return {"x": x, "y": y}


def replacement(count: int = 2, *, several: bool = False) -> fx.Graph:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"p{index}") for index in range(count)]
    node = graph.call_function(aten.sub.Tensor, tuple(inputs[:2]), {"alpha": inputs[-1]} if count > 2 else {})
    node.meta["val"] = "promised"
    graph.output((node, inputs[0]) if several else node)
    return graph


def test_both_sides_are_of_the_same_variables() -> None:
    known = of_graph()
    x, y = known.values()
    before, after = sides_of(replacing(known, replacement(3), y, x, 2))
    assert before.names == {y: "b", x: "a"}
    assert [str(each.target) for each in before.nodes] == ["aten.add.Tensor", "aten.relu.default"]
    assert before.outputs == (before.nodes[1],)
    assert list(after.names.values()) == ["b", "a"]
    assert [node.meta["val"] is X for node in after.names] == [True, True]
    (call,) = after.nodes
    assert (call.args, call.kwargs) == ((*after.names,), {"alpha": 2})
    assert call.meta["val"] == "promised"
    assert after.outputs == (call,)
    arguments = {"a": torch.tensor(1.0), "b": torch.tensor(5.0)}
    assert before.run(arguments, {}, call=run_node) == [torch.tensor(6.0)]
    assert after.run(arguments, {}, call=run_node) == [torch.tensor(3.0)]
    _, several = sides_of(replacing(known, replacement(several=True), x, y))
    assert several.outputs == (several.nodes[0], next(iter(several.names)))
    _, twice = sides_of(replacing(known, replacement(), x, x))
    assert list(twice.names.values()) == ["a"]
    assert twice.nodes[0].args == (*twice.names, *twice.names)
    alike, _ = sides_of(replacing(known, replacement(), x, y, names={x: "a", y: "a"}))
    assert list(alike.names.values()) == ["a", "a (y)"]
    unnamed, _ = sides_of(replacing(known, replacement(1), x, names={}))
    assert list(unnamed.names.values()) == ["x", "y"], "what the replacement doesn't read stands last"


def test_a_replacement_is_a_function_of_its_arguments_alone() -> None:
    known = of_graph()
    with pytest.raises(ValueError, match=r"^its replacement has 2 inputs and is called with 1$"):
        sides_of(replacing(known, replacement(), known["x"]))
    holding = replacement()
    with holding.inserting_before(holding.output_node()):
        holding.create_node("get_attr", "weight")
    with pytest.raises(ValueError, match=r"^its replacement holds weight, which isn't an argument$"):
        sides_of(replacing(known, holding, *known.values()))


def test_what_is_given_is_in_the_dtype_of_the_graph_and_else_as_it_is() -> None:
    node = of_graph()["x"]
    assert sides._as_in_the_graph(node, X) is X
    assert sides._as_in_the_graph(node, X.double()).dtype is torch.float32
    assert sides._as_in_the_graph(node, 7) == 7
    node.meta["val"] = X.to(torch.bfloat16)
    assert torch.equal(sides._as_in_the_graph(node, X.double()), X.to(torch.bfloat16))
    del node.meta["val"]
    assert sides._as_in_the_graph(node, X) is X
    assert sides._placed(node, X) is X
