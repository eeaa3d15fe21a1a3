"""Matches of other people's passes as questions, on graphs that are written: what is asked, and what runs of it say."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fuseplan.caching.fingerprint import pass_content
from fuseplan.graph.facts import aten
from fuseplan.matching import ExternalMatch, ExternalPass
from fuseplan.matching.external import find_external
from fuseplan.record import Verification
from fuseplan.verification.foreign import Foreign, _Trial
from fuseplan.verification.replaced import Replaced, Result, _arguments, _results, unverifiable
from fuseplan.verification.sides import Side
from fuseplan.verification.specs import Sizes
from tests.helpers import HIDDEN, written
from tests.verification import others
from tests.verification.made import spec

SPAN = 1, 64
X, Y, W = torch.zeros(5, HIDDEN), torch.zeros(5, HIDDEN), torch.ones(HIDDEN)
_numbers = itertools.count()


def op(kernel: Callable[..., Any], schema: str = "(Tensor x, Tensor y) -> Tensor", fake: Any = None) -> Any:
    return others.op(f"asked_{next(_numbers)}{schema}", kernel, fake or (lambda x, *_: torch.empty_like(x)))


def matched(
    function: Callable[..., Any], external: ExternalPass, *, dynamic: bool = True, **inputs: Tensor
) -> tuple[ExternalMatch, fx.Graph]:
    graph = written(function, inputs or {"x": X, "y": Y}, dynamic=dynamic)
    (match,) = find_external(graph, [external]).candidates
    return match, graph


def asked(
    function: Callable[..., Any], external: ExternalPass, *, dynamic: bool = True, span: tuple[int, int] = SPAN,
    **inputs: Tensor,
) -> Replaced:  # fmt: skip
    match, graph = matched(function, external, dynamic=dynamic, **inputs)
    return Replaced.of(match, Sizes(graph), span)


def of_two(search: Callable[..., Any], fused: Callable[..., Any]) -> ExternalPass:
    """A pass on two tensors of the same shape."""
    return others.replacing(f"two_{next(_numbers)}", search, fused, torch.empty(4, HIDDEN), -torch.empty(4, HIDDEN))


def add_relu(x: Any, y: Any) -> Any:
    return aten.neg.default(aten.relu.default(aten.add.Tensor(x, y)))


def add_relu_pass(kernel: Callable[..., Any] = others.add_relu_eager) -> ExternalPass:
    fused = op(kernel)
    return of_two(lambda x, y: torch.relu(x + y), lambda x, y: fused(x, y))  # noqa: PLW0108 - named arguments


def node(value: Any, target: Any = None) -> fx.Node:
    graph = fx.Graph()
    made = graph.placeholder("x") if target is None else graph.call_function(target, ([2], 0.25))
    made.meta["val"] = value
    return made


CLAMPED = of_two(lambda x, y: torch.relu(x + y), lambda x, y: (x + y).clamp_min(0.0))


def test_a_question_has_the_results_that_are_read_and_arguments_at_every_size() -> None:
    question = asked(add_relu, add_relu_pass())
    (result,) = question.results
    assert (result.output, result.item, result.node.target) == (0, None, aten.relu.default)
    assert result.promise is not None
    assert (tuple(result.promise.shape)[1:], result.promise.dtype) == ((HIDDEN,), torch.float32)
    assert [case.tokens for case in question.cases] == [1, 5, 7, 33, 64]
    assert [case.arguments for case in question.cases] == [
        {"x": spec(case.tokens, HIDDEN), "y": spec(case.tokens, HIDDEN)} for case in question.cases
    ]
    assert [[*case.symbols.values()] for case in question.cases] == [[case.tokens] for case in question.cases]
    assert question.signature == f"{question.match.owner.name}(x:float32[?x{HIDDEN}], y:float32[?x{HIDDEN}])"
    assert {name: node.op for name, node in question.kept.items()} == {"x": "placeholder", "y": "placeholder"}


def test_a_graph_of_one_size_is_asked_about_at_that() -> None:
    question = asked(add_relu, add_relu_pass(), dynamic=False)
    (case,) = question.cases
    assert (case.tokens, case.symbols) == (5, {})
    cube = torch.zeros(3, 4, HIDDEN)
    (case,) = asked(add_relu, add_relu_pass(), dynamic=False, x=cube, y=cube).cases
    assert (case.tokens, case.arguments["x"].shape) == (12, (3, 4, HIDDEN))


@pytest.mark.parametrize(
    ("is_own", "span", "tokens"),
    [
        (False, (1, 65), [1, 5, 7, 33]), (False, (64, 8192), [64]), (False, (70, 8192), [70]),
        (True, (70, 8192), [70, 257, 389, 769, 1127, 8192]),
    ],
)  # fmt: skip
def test_torchs_own_ops_are_run_at_small_sizes_alone(is_own: bool, span: tuple[int, int], tokens: list[int]) -> None:
    assert [case.tokens for case in asked(add_relu, add_relu_pass() if is_own else CLAMPED, span=span).cases] == tokens


SPLIT = op(
    lambda x: (x * 0.5, x * 2.0), "(Tensor x) -> (Tensor, Tensor)", lambda x: (torch.empty_like(x), x.new_empty(3))
)  # fmt: skip


def results_of(function: Callable[..., Any], outputs: Sequence[Any], made: Sequence[Any]) -> tuple[Result, ...]:
    """Of a match whose outputs are the nodes that call some functions, by one that makes nodes or nests of them."""
    graph = written(function, {"x": X})
    called = {each: graph.find_nodes(op="call_function", target=each)[0] for each in (SPLIT, *outputs) if each}
    found = [called[each] if each else None for each in outputs]
    match: Any = SimpleNamespace(outputs=found, consumed=[*called.values()])
    return _results(match, SimpleNamespace(outputs=made))  # type: ignore[arg-type]


ONE, TWO, THREE = (node(torch.empty(size, device="meta")) for size in (1, 2, 3))


@pytest.mark.parametrize("read", [(0,), (1,), (1, 0)])
def test_items_are_results_each_by_itself(read: Sequence[int]) -> None:
    def function(x: Any) -> Any:
        values = SPLIT(x)
        return tuple(aten.neg.default(values[index]) for index in read)

    for made in ([ONE, TWO], [(ONE, TWO)], [[ONE, TWO]]):
        found = results_of(function, [SPLIT], made)
        assert [(each.output, each.item, each.node.args[1]) for each in found] == [(0, at, at) for at in read]
        assert [each.promise is (ONE, TWO)[at].meta["val"] for each, at in zip(found, read, strict=True)]
        assert [each.of([("a", "b")]) for each in found] == ["ab"[at] for at in read]
    assert [each.promise for each in results_of(function, [SPLIT], [ONE])] == [None] * len(read)
    assert [each.output for each in results_of(function, [None, SPLIT], [THREE, (ONE, TWO)])] == [1] * len(read)


def test_a_tensor_is_a_result_and_promised_as_one() -> None:
    relu, sin = aten.relu.default, aten.sin.default

    def function(x: Any) -> Any:
        first = relu(SPLIT(x)[0])
        return aten.neg.default(first), aten.neg.default(sin(first))

    (result,) = results_of(function, [relu], [TWO])
    assert (result.output, result.item, result.node.target, result.promise) == (0, None, relu, TWO.meta["val"])
    assert result.of(["a"]) == "a"
    first, second = results_of(function, [sin, None, relu], [ONE, TWO, THREE])
    assert (first.output, first.node.target, first.promise) == (0, sin, ONE.meta["val"])
    assert (second.output, second.node.target, second.promise) == (2, relu, THREE.meta["val"])
    assert results_of(function, [relu], [ONE, TWO])[0].promise is None
    with pytest.raises(ValueError, match=r"^its pattern has 2 results, and its replacement 1$"):
        results_of(function, [relu, sin], [ONE])


def test_what_is_no_tensor_and_is_read_whole_can_not_be_asked_about() -> None:
    """An op with two results, which is returned whole, too."""
    external = of_two(lambda x, y: SPLIT(x + y)[0], lambda x, y: x + y)
    match, graph = matched(lambda x, y: aten.neg.default(SPLIT(aten.add.Tensor(x, y))[0]), external)
    (call,) = graph.find_nodes(op="call_function", target=SPLIT)
    graph.output_node().args = ((graph.output_node().args[0], call),)
    match.found.output_nodes = lambda: [call]  # type: ignore[method-assign]
    outcome = Stub("always").verify(match, Sizes(graph), SPAN)
    assert str(outcome.detail).startswith("not verified: its result for asked_")
    assert str(outcome.detail).endswith(" isn't a tensor")


def test_arguments_are_tensors_and_numbers() -> None:
    nodes = {node(torch.zeros(2, 3)): "x", node(7): "size", node(0.5): "eps", node(True): "flag",
             node(torch.ones(2), aten.full.default): "full"}  # fmt: skip
    side = Side(names=nodes, nodes=(), outputs=())
    assert _arguments(side, {}) == {"x": spec(2, 3), "size": 7, "eps": 0.5, "flag": True, "full": spec(2, fill=0.25)}
    for value, kind in ((None, "NoneType"), ("text", "str"), ((torch.ones(1),), "tuple")):
        with pytest.raises(ValueError, match=f"^its argument z is a {kind}$"):
            _arguments(Side(names={node(value): "z"}, nodes=(), outputs=()), {})


def kept(function: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    """Of a sum of x and sin(y)."""
    question = asked(lambda x, y: function(x, aten.sin.default(y)), add_relu_pass(), x=X, y=Y)
    return {name: (each.op, str(each.target)) for name, each in question.kept.items()}


COS = "call_function", "aten.cos.default"


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (add_relu, {}),
        (lambda x, z: (add_relu(x, z), aten.cos.default(z)), {"y": COS}),
        (lambda x, z: (add_relu(x, z), z), {"y": ("output", "output")}),
        (lambda x, z: (view := aten.view.default(z, [-1]), add_relu(x, z), aten.cos.default(view))[1:], {"y": COS}),
        (lambda x, z: (aten.cos.default(z), add_relu(x, z)), {}),
        (lambda x, z: (add_relu(x, z), aten.cos.default(x)), {"x": COS}),
    ],
    ids=["nobody", "a later op", "the caller", "through a view", "an earlier op", "of an input"],
)
def test_what_is_read_later_is_kept_also_through_views(function: Any, found: dict[str, tuple[str, str]]) -> None:
    assert kept(function) == {"x": ("placeholder", "x"), **found}


def test_a_question_is_known_by_all_that_an_outcome_depends_on() -> None:
    external = add_relu_pass()
    question = asked(add_relu, external)
    assert asked(add_relu, external).key("content") == question.key("content")
    result, first = question.results[0], question.cases[0]
    half = replace(first, arguments={**first.arguments, "x": spec(1, HIDDEN, dtype=torch.float16)})
    changes: list[dict[str, Any]] = [
        {"results": (replace(result, output=1),)}, {"results": (replace(result, item=0),)}, {"free": frozenset({0})},
        {"kept": {}}, {"cases": question.cases[1:]}, {"cases": (*question.cases, replace(first, tokens=2))},
        {"cases": (half, *question.cases[1:])}, {"after": question.before}, {"before": question.after}, {},
    ]  # fmt: skip
    keys = [replace(question, **each).key("content") for each in changes]
    assert len({question.key("another"), *keys}) == len(changes) + 1


def ungraphed(*calls: tuple[Any, tuple[Any, ...]], consumed: Sequence[fx.Node] = ()) -> ExternalMatch:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target, args in calls:
        graph.call_function(target, (x, *args))
    match: Any = SimpleNamespace(consumed=consumed, replacement=SimpleNamespace(graph=graph))
    return match  # type: ignore[no-any-return]


functional = torch.ops._c10d_functional


def test_what_one_process_can_not_run_alone_is_named() -> None:
    attention = aten._scaled_dot_product_flash_attention.default
    grouped = others.op("grouped_1(Tensor x, str group_name) -> Tensor", None, lambda x, _: torch.empty_like(x))
    meets, draws = "{} is a collective", "{} draws random numbers"
    for target, args, says in (
        (aten.relu.default, (), None), (functional.all_reduce.default, ("sum", "0"), None),
        (functional.wait_tensor.default, (), None), (functional.all_reduce.default, ("max", "0"), meets),
        (functional.all_gather_into_tensor.default, (2, "0"), meets), (grouped, ("0",), meets),
        (aten.bernoulli.default, (), draws), (attention, (1, 2, 0.5), draws), (attention, (1, 2, 0.0), None),
    ):  # fmt: skip
        replacing = ungraphed((target, args))
        replaced = ungraphed(consumed=replacing.replacement.graph.find_nodes(op="call_function", target=target))
        assert unverifiable(replacing) == unverifiable(replaced) == (says and says.format(target))
    wrapped = ungraphed()
    wrapped.replacement.graph.call_function(torch.ops.higher_order.auto_functionalized, (grouped,), {"x": 1})
    assert unverifiable(wrapped) == meets.format(grouped)


def test_what_lies_on_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Tensor):
        device = torch.device("cuda", 1)

    call = node([torch.empty(2), torch.empty(2).as_subclass(Elsewhere), 7], aten.full.default)
    for is_there, why in ((False, "there is no cuda:1 here"), (True, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert unverifiable(ungraphed(consumed=[call])) == why


def tried(question: Replaced, *, thorough: bool = False, tokens: int = 5) -> tuple[str | None, float]:
    (case,) = [case for case in question.cases if case.tokens == tokens]
    trial = _Trial(question, case, 3)
    trial.expect()
    return trial.run(thorough=thorough)


def kernels(first: Callable[..., Any], second: Callable[..., Any]) -> Replaced:
    """Two results, relu of a sum and a difference, by an op each."""
    wanted, made = ([op(each) for each in both] for both in ((added, subtracted), (first, second)))
    external = of_two(
        lambda x, y: tuple(each(x, y) for each in wanted), lambda x, y: tuple(each(x, y) for each in made)
    )  # fmt: skip
    return asked(lambda x, y: tuple(aten.alias.default(each(x, y)) for each in wanted), external)


def added(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


def subtracted(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def nudged(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: torch.nextafter(kernel(x, y), torch.tensor(float("inf")))


def test_the_worst_of_all_results_counts() -> None:
    right = tried(kernels(added, subtracted))[1]
    found = [tried(kernels(*each))[1] for each in ((nudged(added), subtracted), (added, nudged(subtracted)))]
    assert all(right < share <= 1 for share in found)
    both = kernels(nudged(added), nudged(subtracted))
    assert tried(both) == (None, max(found))
    assert tried(replace(both, results=())) == (None, 0.0), "what nobody reads can't be wrong"


def test_a_result_that_is_off_is_named_by_its_place() -> None:
    wrong, share = tried(kernels(added, lambda x, y: x - y + 1))
    assert wrong is not None
    assert wrong.startswith("result 1 (asked_")
    assert "; the largest differences from the graph's own are 1 and " in wrong
    assert share == 0.0


FLAT, TURNED = "with strides (64, 1)", "with strides (1, 5)"
OWN = f"and the graph's own value is float32[5, 64] {FLAT}"


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (lambda x, y: added(x, y).half(), f"is float16[5, 64] {FLAT}, {OWN}"),
        (lambda x, y: added(x, y)[:3], f"is float32[3, 64] {FLAT}, {OWN}"),
        (
            lambda x, y: added(x, y).t().contiguous().t(),
            f"is float32[5, 64] {TURNED}, and its fake implementation yields float32[5, 64] {FLAT}",
        ),
    ],
)
def test_results_are_of_the_kind_of_the_graphs_and_of_what_was_promised(kernel: Any, says: str) -> None:
    question = asked(add_relu, add_relu_pass(kernel))
    assert tried(question) == (f"result 0 (relu_default) {says}", 0.0)
    unpromised = [replace(each, promise=None) for each in question.results]
    free = replace(question, results=tuple(unpromised), free=frozenset({0}))
    assert (tried(free)[0] is None) is ("its fake implementation" in says)


def test_what_is_no_tensor_is_no_result() -> None:
    question = asked(add_relu, add_relu_pass())
    trial = _Trial(question, question.cases[1], 3)
    trial.expect()
    assert trial._kind([[X]]) == "result 0 (relu_default) is a list and no tensor"
    trial.expected = [torch.empty(0, HIDDEN)]
    assert trial._kind([torch.empty(HIDDEN, 0).t()]) is None, "what is empty has no strides"


def writing(kernel: Callable[..., Any], later: bool = True) -> Replaced:
    """Of a sum whose second operand is an intermediate value that is read later, or isn't."""

    def function(x: Any, y: Any) -> Any:
        z = aten.sin.default(y)
        result = add_relu(x, z)
        return (result, aten.cos.default(z)) if later else result

    return asked(function, add_relu_pass(kernel))


def test_writes_to_what_is_read_later_are_wrong() -> None:
    def writes(x: Tensor, y: Tensor) -> Tensor:
        result = added(x, y)
        y.add_(1)
        return result

    assert tried(writing(writes))[0] == "it writes to its argument y, which cos_default reads later"
    assert tried(writing(writes, later=False))[0] is None
    returned = asked(lambda x, y: (z := aten.sin.default(y), add_relu(x, z), z)[1:], add_relu_pass(writes))
    assert tried(returned)[0] == "it writes to its argument y, which the graph returns"
    assert tried(asked(add_relu, add_relu_pass(writes)))[0] == "it writes to its argument y, which the caller has"

    def beyond(x: Tensor, y: Tensor) -> Tensor:
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(0.0)
        return added(x, y)

    assert tried(writing(beyond, later=False))[0] == "it writes beyond the elements of its argument y"


def test_what_both_leave_in_an_argument_is_compared() -> None:
    question = writing(added)
    trial = _Trial(question, question.cases[1], 3)
    trial.expect()
    trial.given["x"].tensor.add_(1.0)
    for added_there, wrong in ((1.0, False), (2.0, True), (0.0, True)):
        made = {"size": 5, **trial.fresh()}
        trial.given["size"] = 5
        made["x"].tensor.add_(added_there)
        found = trial._written(made)
        assert (found is not None) is wrong
        assert not wrong or str(found).startswith("the value left in its argument x: element [")


BF16 = torch.bfloat16


def scaled(weight_of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: (x.float() * weight_of(w).float()).to(x.dtype)


def weighted(
    weight_of: Callable[[Tensor], Tensor], *, width: int = HIDDEN, wide: torch.dtype = torch.float32,
    span: tuple[int, int] = SPAN, seen: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Replaced:  # fmt: skip
    """x * w, of a wide w, by a kernel that takes it for something."""
    x, w = torch.zeros(5, width, dtype=BF16), torch.ones(width, dtype=wide)
    fake = lambda x, w: torch.empty_like(x)  # noqa: E731
    wanted, fused = op(scaled(seen), fake=fake), op(scaled(weight_of), fake=fake)
    external = others.replacing(
        f"weighted_{next(_numbers)}", lambda x, w: wanted(x, w), lambda x, w: fused(x, w), x, w  # noqa: PLW0108
    )  # fmt: skip
    return asked(lambda x, w: aten.neg.default(wanted(x, w)), external, span=span, x=x, w=w)


def test_an_argument_that_is_taken_for_a_narrower_one_is_named_where_it_is_looked_for() -> None:
    taken = weighted(lambda weight: weight.to(BF16))
    wrong, worst = tried(taken, thorough=True)
    assert wrong is not None
    assert wrong.startswith("it takes its argument w, float32, for bfloat16: rounding it to bfloat16 changes ")
    assert wrong.endswith(" elements of the graph's results, and none of its own")
    assert 0 < worst <= 1
    assert tried(taken) == (None, worst)
    assert tried(weighted(lambda weight: weight), thorough=True)[0] is None
    # Nothing narrower is there that it could be taken for, or the graph takes it for that, too.
    assert tried(weighted(lambda weight: weight, wide=BF16), thorough=True)[0] is None
    both = weighted(lambda weight: weight.to(BF16), seen=lambda weight: weight.to(BF16))
    assert tried(both, thorough=True)[0] is None


@pytest.mark.parametrize(("span", "tokens"), [((1, 64), (1, 5, 7, 33, 64)), ((70, 8192), (70, 257))])
def test_arguments_are_rounded_at_the_largest_size_up_to_300_tokens(
    span: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    question = weighted(lambda weight: weight.to(BF16), span=span)
    outcome = Verification(rule="rule", op="op", provider="external", signature="s")
    found = Foreign("always", 60.0)._run(question, 3, outcome)
    assert (found.passed, found.tokens) == (False, tokens)
    assert str(found.detail).startswith(f"at {tokens[-1]} tokens: it takes its argument w, float32, for bfloat16")


@pytest.mark.parametrize("width", [1, 4, 64])
def test_it_is_drawn_until_enough_elements_have_changed(width: int) -> None:
    wrong, _ = tried(weighted(lambda weight: weight.to(BF16), width=width), thorough=True, tokens=1)
    assert (wrong is None) is (width == 1)


class Stub(Foreign):
    """Whose runs are counted, and come to what is given."""

    def __init__(self, mode: str, **found: Any) -> None:
        super().__init__(mode, 60.0)
        self.found, self.seeds = found, list[int]()

    def _run(self, question: Replaced, seed: int, outcome: Verification) -> Verification:
        self.seeds.append(seed)
        return replace(outcome, worst=0.5, time_ns=5, **self.found)


@pytest.mark.parametrize(
    ("passed", "detail", "transient", "settled"),
    [(True, None, False, True), (False, "wrong", False, True), (False, "late", True, False),
     (True, "not verified: why", False, False), (True, None, True, False)],
)  # fmt: skip
@pytest.mark.parametrize("uuid", ["1", None])
@pytest.mark.parametrize("mode", ["first-use", "always"])
def test_what_is_settled_is_kept_for_others_where_the_pass_has_a_name(
    passed: bool, detail: str | None, transient: bool, settled: bool, uuid: str | None, mode: str, cold: Path
) -> None:
    fused = op(added)
    external = others.replacing("kept", lambda x, y: torch.relu(x + y), lambda x, y: fused(x, y), X, Y.neg(), uuid=uuid)  # noqa: PLW0108
    match, graph = matched(add_relu, external)
    found: dict[str, Any] = {"passed": passed, "detail": detail, "transient": transient}
    first = Stub(mode, **found)
    one, two = (first.verify(match, Sizes(graph), SPAN) for _ in range(2))
    signature = f"kept(x:float32[?x{HIDDEN}], y:float32[?x{HIDDEN}])"
    assert one == Verification(
        rule="kept", op=" ".join(match.emits), provider="external", signature=signature, worst=0.5, time_ns=5, **found
    )
    known = replace(one, from_cache=True, time_ns=0)
    assert two == (known if mode == "first-use" else one)
    assert len(set(first.seeds)) == 1
    is_kept = uuid is not None and settled
    assert len(list(cold.glob("*.json"))) == is_kept
    second = Stub(mode, **found)
    third = second.verify(match, Sizes(graph), SPAN)
    assert third == (known if is_kept and mode == "first-use" else one)
    assert second.seeds in ([], first.seeds[:1])
    assert (second.verify(match, Sizes(graph), SPAN) == known) is (mode == "first-use")


def test_another_pass_of_the_same_content_is_another() -> None:
    """Whose owner says no version: it is known as long as it lives."""
    fused = op(added)
    made = [
        others.replacing("same", lambda x, y: torch.relu(x + y), lambda x, y: fused(x, y), X, Y.neg())  # noqa: PLW0108
        for _ in range(2)
    ]
    assert pass_content(made[0]).key is None
    checks = Stub("first-use")
    for external in (*made, made[0]):
        match, graph = matched(add_relu, external)
        checks.verify(match, Sizes(graph), SPAN)
    assert len(checks.seeds) == 2
