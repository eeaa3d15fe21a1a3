"""Two sides of somebody's replacement: what is computed of them exactly, and what is told of them."""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.verification import sides
from fuseplan.verification.foreign import _differing, _draw_of, _largest
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
    op = others.op(f"{kernel.__name__}(Tensor x) -> Tensor", kernel, torch.empty_like)
    computed = side((aten.exp.default, ("x",)), (op, ("0",)), x=x)
    (exact,) = computed.run({"x": x}, {}, call=run_exactly)
    assert torch.equal(exact, (x.double().exp() if is_exact else x.double().exp().bfloat16()) * 3)


INF, NAN = float("inf"), float("nan")
ROUNDED: list[tuple[Any, Any, bool]] = [
    *((torch.tensor([1.0, 64 + off * torch.finfo(dtype).eps], dtype=torch.float64), torch.tensor([1.0, 64.0]).to(dtype),
       abs(off) < 512) for dtype in FLOATS for off in (510, 514, -510, -514)),
    # What overflows is near what overflows too.
    (torch.tensor([INF, NAN]).double(), torch.tensor([INF, NAN]), True),
    (torch.tensor([1e300, 1.0]).double(), torch.tensor([INF, 1.0]), True),
    (torch.tensor([INF, 1.0]).double(), torch.tensor([1.0, 1.0]), False),
    (torch.tensor([INF, 1.1]).double(), torch.tensor([INF, 1.0]), False),
    # Only floats of one shape can be far.
    (torch.empty(0, 3).double(), torch.empty(0, 3), True),
    (torch.ones(2).int(), torch.full((2,), 4).int(), True),
    (7, 8, True),
    (torch.ones(3).double(), torch.ones(2), False),
    (7, torch.ones(2), False),
    # All of several values count.
    ([torch.ones(2).double(), torch.ones(2).double()], (torch.ones(2), torch.ones(2)), True),
    ([torch.ones(2).double(), torch.zeros(2).double()], (torch.ones(2), torch.ones(2)), False),
    ([torch.ones(2)], (torch.ones(2), torch.ones(2)), False),
]  # fmt: skip


@pytest.mark.parametrize(("wide", "narrow", "is_near"), ROUNDED)
def test_what_is_near_is_so_by_the_precision_of_its_values(wide: Any, narrow: Any, is_near: bool) -> None:
    assert sides._is_near(wide, narrow) is is_near


def test_what_has_no_elements_has_no_place_in_memory() -> None:
    (node,) = side((aten.exp.default, ("x",)), x=X).names
    assert sides._placed(node, nothing := torch.empty(0)) is nothing


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
    torchs = side((aten.sum.dim_IntList, ("x", [0], True)), x=X)
    assert vanished(nothing, before) == vanished(before, before) == vanished(torchs, nothing) == []


def test_an_argument_that_has_another_value_there_says_which() -> None:
    before = told_side("told_eps(Tensor x, float eps, bool flag) -> Tensor", 0.25, True)
    after = told_side("told_eps(Tensor x, float eps, bool flag) -> Tensor", 0.5, False)
    assert vanished(before, after) == [
        "flag=True of made_up.told_eps (there it is False)", "eps=0.25 of made_up.told_eps (there it is 0.5)",
    ]  # fmt: skip
    usual = told_side("told_usual(Tensor x, bool flag=False) -> Tensor")
    assert vanished(before, usual)[0] == "flag=True of made_up.told_eps (there it is False)"
    by_another_name = told_side("told_otherwise(Tensor x, float epsilon, int flag) -> Tensor", 0.25, 1)
    assert vanished(before, by_another_name) == ["flag=True of made_up.told_eps (there it is 1)"]


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
    torchs, other = "aten.mul.Tensor, aten.relu", "made_up.told_call(x: float32[2, 3], size=4)"
    assert told(match, before, after, {}) == f"{other} replaces {torchs}{end}"
    dropped = f"{torchs} replaces {other}; it drops size=4 of made_up.told_call{end}"
    assert told(match, after, before, {}) == dropped
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


def test_elements_differ_by_their_bits() -> None:
    left, right = torch.tensor([[1.0, -0.0, NAN], [2.0, 3.0, NAN]]), torch.tensor([[1.5, 0.0, NAN], [2.0, -3.1, 4.0]])
    assert _differing(left, left) == 0
    for dtype in (torch.float32, others.FP8):
        assert _differing(left.to(dtype), right.to(dtype)) == _differing(left.to(dtype).t(), right.to(dtype).t()) == 4


def test_the_largest_differences_are_of_what_is_finite() -> None:
    own = torch.tensor([1.0, 100.0, float("inf"), 0.0, float("nan")])
    got = torch.tensor([1.5, 102.0, 3.0, 1.0, 1.0])
    assert _largest(got, own) == "; the largest differences from the graph's own are 2 and 0.5 of the value"
    assert _largest(own[2:3], own[2:3]) == ""


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


def replacing(known: list[fx.Node], replaced: fx.Graph, *arguments: Any, **names: str) -> Any:
    """A match of relu(x + y), by what is given."""
    (total,) = known[0].users
    (relu,) = total.users
    return SimpleNamespace(
        arguments=list(arguments), variables={node: names[node.name] for node in known if node.name in names},
        consumed=(total, relu), outputs=[relu], replacement=SimpleNamespace(graph=replaced),
    )  # fmt: skip


def of_graph() -> list[fx.Node]:
    return [*side((aten.add.Tensor, ("x", "y")), (aten.relu.default, ("0",)), x=X, y=X).names]


def replacement(count: int = 2, *, several: bool = False) -> fx.Graph:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"p{index}") for index in range(count)]
    node = graph.call_function(aten.sub.Tensor, tuple(inputs[:2]), {"alpha": inputs[-1]} if count > 2 else {})
    node.meta["val"] = "promised"
    graph.output((node, inputs[0]) if several else node)
    return graph


def test_both_sides_are_of_the_same_variables() -> None:
    known = x, y = of_graph()
    before, after = sides_of(replacing(known, replacement(3), y, x, 2, x="a", y="b"))
    assert before.names == {y: "b", x: "a"}
    assert [str(each.target) for each in before.nodes] == ["aten.add.Tensor", "aten.relu.default"]
    assert before.outputs == (before.nodes[1],)
    assert list(after.names.values()) == ["b", "a"]
    assert [node.meta["val"] is X for node in after.names] == [True, True]
    (call,) = after.nodes
    assert (call.args, call.kwargs, call.meta["val"]) == ((*after.names,), {"alpha": 2}, "promised")
    assert after.outputs == (call,)
    arguments = {"a": torch.tensor(1.0), "b": torch.tensor(5.0)}
    assert before.run(arguments, {}, call=run_node) == [torch.tensor(6.0)]
    assert after.run(arguments, {}, call=run_node) == [torch.tensor(3.0)]
    _, several = sides_of(replacing(known, replacement(several=True), x, y))
    assert several.outputs == (several.nodes[0], next(iter(several.names)))
    _, twice = sides_of(replacing(known, replacement(), x, x, x="a"))
    assert list(twice.names.values()) == ["a"]
    assert twice.nodes[0].args == (*twice.names, *twice.names)
    for names, found in (({"x": "a", "y": "a"}, ["a", "a (y)"]), ({}, ["x", "y"])):
        alike, _ = sides_of(replacing(known, replacement(1), x, **names))
        assert list(alike.names.values()) == found, "what the replacement doesn't read stands last"


def test_a_replacement_is_a_function_of_its_arguments_alone() -> None:
    known = of_graph()
    with pytest.raises(ValueError, match=r"^its replacement has 2 inputs and is called with 1$"):
        sides_of(replacing(known, replacement(), known[0]))
    holding = replacement()
    with holding.inserting_before(holding.output_node()):
        holding.create_node("get_attr", "weight")
    with pytest.raises(ValueError, match=r"^its replacement holds weight, which isn't an argument$"):
        sides_of(replacing(known, holding, *known))
