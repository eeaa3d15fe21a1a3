"""What is seen of a kernel that does what a function of its arguments doesn't do, and of results of another kind."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification import check
from fuseplan.verification.check import (
    Finding,
    Trial,
    _compared,
    _fresh,
    _MisbehavedError,
    _of_another_kind,
    _of_other_kinds,
    _on_copies,
    _summed,
    _Watched,
    call_without_data,
    repeated,
)
from fuseplan.verification.compare import compare
from fuseplan.verification.memory import Guarded, Poisoned, SeeingMode, make_arguments
from fuseplan.verification.specs import Case, TensorSpec
from tests.verification.fused_norm import AddNormRelu, add_norm_relu, provider, reference, right
from tests.verification.made import spec

CPU = torch.device("cpu")
RULE: Any = AddNormRelu()


def normed(rows: int = 3, width: int = 16) -> Case:
    x, weight = spec(rows, width, dtype=torch.bfloat16), spec(width, dtype=torch.bfloat16)
    arguments = {"x": x, "residual": x, "weight": weight, "eps": 1e-5, "rounding": "llama"}
    return Case(tokens=rows, arguments=arguments)


def rule_of(factor: float = 2.0, packed: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(op=SimpleNamespace(error_factor=factor, packed=packed))


ONES = torch.ones(2, 3)


def above(units: float, value: Tensor = ONES) -> Tensor:
    """That many units in the last place above what is exact."""
    return value + units * torch.finfo(value.dtype).eps


def test_the_worst_result_is_told_and_the_first_that_is_wrong() -> None:
    """One unit in the last place is allowed where the unfused ops are exact."""
    exact = [ONES.double()] * 3
    assert _compared(rule_of(), [ONES, ONES, ONES], [ONES] * 3, exact, "") == Finding(wrong=None, worst=0.0)
    for place in range(3):
        actual: list[Any] = [ONES] * 3
        actual[place] = above(1)
        assert _compared(rule_of(), actual, [ONES] * 3, exact, "") == Finding(wrong=None, worst=1.0), "just allowed"
        actual[place] = above(2)
        found = _compared(rule_of(), actual, [ONES] * 3, exact, "so ")
        assert found.worst == 2.0
        assert str(found.wrong).startswith(f"so result {place}: element [0, 0] is 1 where 1 is exact")
        actual[place] = None
        assert _compared(rule_of(), actual, [ONES] * 3, exact, "") == Finding(wrong=None, worst=0.0)
    found = _compared(rule_of(), [ONES, above(3), above(5)], [ONES] * 3, exact, "")
    assert (found.worst, "result 1" in str(found.wrong)) == (3.0, True)
    assert _compared(rule_of(), [None] * 3, [ONES] * 3, exact, "") == Finding(wrong=None, worst=0.0)
    found = _compared(rule_of(), [ONES * float("nan"), ONES, ONES], [ONES] * 3, exact, "")
    assert (found.worst, found.wrong is None) == (None, False)


def test_packed_results_are_compared_as_codes() -> None:
    codes = torch.full((2, 4), 0x11, dtype=torch.uint8)
    moved = codes + 0x10
    for packed, wrong in (((0,), False), ((1,), True), ((), True)):
        found = _compared(rule_of(packed=packed), [moved], [codes], [codes], "")
        assert (found.wrong is not None) is wrong
    assert _compared(rule_of(packed=(1,)), [codes, moved], [codes] * 2, [codes] * 2, "").worst == 1.0


def test_results_are_of_the_dtypes_and_shapes_of_the_graphs() -> None:
    same = "result 1 is {} and not float32[2, 3] with strides (3, 1)"
    assert _of_other_kinds([ONES, None, ONES.t().contiguous().t()], [ONES] * 3) is None
    for other, text in ((ONES.half(), "float16[2, 3]"), (ONES[:1], "float32[1, 3]")):
        assert _of_other_kinds([ONES, other], [ONES] * 2) == same.format(f"{text} with strides (3, 1)")


FLAT = "with strides (16, 1)"
OWN = f"bfloat16[3, 16] {FLAT}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: y, None),
        (lambda y: y.half(), f"result 1 is float16[3, 16] {FLAT}, and the unfused ops yield {OWN}"),
        (lambda y: y[:2], f"result 1 is bfloat16[2, 16] {FLAT}, and the unfused ops yield {OWN}"),
        (
            lambda y: y.t().contiguous().t(),
            f"result 1 is bfloat16[3, 16] with strides (1, 3), and its fake implementation yields {OWN}",
        ),
    ],
)
def test_results_are_of_the_kind_that_both_sides_promise(change: Callable[[Tensor], Tensor], says: str | None) -> None:
    inputs, _ = _fresh(RULE, normed(), 0)
    expected = list(reference(*inputs.values()))
    assert _of_another_kind(RULE, inputs, [expected[0], change(expected[1])], expected) == says


def test_a_fake_may_promise_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = _fresh(RULE, normed(), 0)
    own = list(reference(*inputs.values()))
    for promised in (own[1].half(), own[1][:2]):
        monkeypatch.setattr(check, "_fake", lambda rule, inputs, last=promised: [own[0], last])
        assert "and its fake implementation yields" in str(_of_another_kind(RULE, inputs, own, own))
    empty = [torch.empty(0, 3), torch.empty(3, 0).t()]
    monkeypatch.setattr(check, "_fake", lambda rule, inputs: empty[:1])
    assert _of_another_kind(RULE, inputs, empty[1:], empty[1:]) is None, "where nothing is, nothing lies"


def guarded(**arguments: TensorSpec) -> dict[str, Guarded]:
    return make_arguments(arguments, ops.rms_norm.draw, 0)


def watched(kernel: Callable[..., Any], *, writes: tuple[str, ...] = (), returns: int = 1) -> Any:
    """A call of a kernel of (x, y, size), and what it misbehaves in."""
    op: Any = SimpleNamespace(
        arguments=("x", "y", "size"), writes=writes,
        overload=SimpleNamespace(_schema=SimpleNamespace(returns=[None] * (returns + len(writes)))),
    )  # fmt: skip
    given = guarded(x=spec(2, 4), y=spec(2, 4))
    call = _Watched(op, kernel, [*given.values()])
    return call(given["x"].tensor, given["y"].tensor, 7), given


def misbehaved(kernel: Callable[..., Any], **how: Any) -> str:
    with pytest.raises(_MisbehavedError) as caught:
        watched(kernel, **how)
    return str(caught.value)


def test_a_function_of_its_arguments_is_left_alone() -> None:
    result, given = watched(lambda x, y, size: x + y + size)
    assert torch.equal(result, given["x"].tensor + given["y"].tensor + 7)
    result, _ = watched(lambda x, y, size: (x + y, x - y), returns=2)
    assert isinstance(result, tuple)
    result, _ = watched(lambda x, y, size: [x + y, x - y], returns=2)
    assert isinstance(result, list)


KINDS = "the kernel yields {} values ({}) where the schema has {} tensors"
SHARED = "result {} of the kernel shares memory with {}; each result must be a new tensor"
WRITTEN = "the kernel writes to its argument {}, and its schema says that it doesn't"


def past_the_end(y: Tensor) -> Tensor:
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(0.0)
    return y


@pytest.mark.parametrize(
    ("kernel", "returns", "says"),
    [
        (lambda x, y, size: (x + y, x - y), 1, KINDS.format(2, "Tensor, Tensor", 1)),
        (lambda x, y, size: x + y, 2, KINDS.format(1, "Tensor", 2)),
        (lambda x, y, size: None, 1, KINDS.format(1, "NoneType", 1)),
        (lambda x, y, size: (x + y, 3), 2, KINDS.format(2, "Tensor, int", 2)),
        (lambda x, y, size: x[1:], 1, SHARED.format(0, "an argument")),
        (lambda x, y, size: (x + 1, y), 2, SHARED.format(1, "an argument")),
        (lambda x, y, size: (z := x + 1, z[1:]), 2, SHARED.format(1, "result 0")),
        (lambda x, y, size: x.add_(1) + y, 1, WRITTEN.format("x")),
        (lambda x, y, size: y.add_(1) + x, 1, WRITTEN.format("y")),
        (lambda x, y, size: x + past_the_end(y), 1, "the kernel writes beyond the end of its argument y"),
    ],
)
def test_what_a_kernel_does_besides_is_named(kernel: Callable[..., Any], returns: int, says: str) -> None:
    assert misbehaved(kernel, returns=returns) == says


def test_a_write_to_what_is_no_argument_is_seen_too() -> None:
    own = guarded(x=spec(2, 4), other=spec(2, 4))
    op: Any = SimpleNamespace(arguments=("x",), writes=(), overload=ops.pad.overload)
    call = _Watched(op, lambda x: (own["other"].tensor.add_(1), x + 1)[1], [*own.values()])
    with pytest.raises(_MisbehavedError, match=r"^the kernel writes to an argument, and its schema says"):
        call(own["x"].tensor)


def test_what_is_written_by_its_schema_is_written_to_a_copy_and_yielded() -> None:
    def kernel(x: Tensor, y: Tensor, size: int) -> Tensor:
        result = x + y
        y.fill_(size)
        return result

    (result, written), given = watched(kernel, writes=("y",))
    assert torch.equal(result, given["x"].tensor + given["y"].tensor)
    assert torch.equal(written, torch.full((2, 4), 7.0))
    assert given["y"].is_untouched
    assert "the kernel writes to its argument y" in misbehaved(kernel)

    beyond = misbehaved(lambda x, y, size: kernel(x, past_the_end(y), size), writes=("y",))
    assert beyond == "the kernel writes beyond the elements of its argument y"
    shared = misbehaved(lambda x, y, size: y.add_(1), writes=("y",))
    assert shared == SHARED.format(0, "an argument")


def test_a_kernel_on_copies_yields_what_it_writes() -> None:
    x, y = torch.ones(2), torch.zeros(2)

    def into(x: Tensor, y: Tensor) -> Any:
        y.add_(x)
        return x * 2

    op: Any = SimpleNamespace(arguments=("x", "y"), writes=("y",))
    for kernel in (into, lambda x, y: (into(x, y),)):
        results = _on_copies(op, kernel)(x, y)
        assert [each.tolist() for each in results] == [[2.0, 2.0], [1.0, 1.0]]
        assert y.tolist() == [0.0, 0.0]
    op.writes = ()
    assert _on_copies(op, into) is into


def test_what_is_summed_over_ranks_differs_among_them(one_rank: str) -> None:
    reduce = next(rule for rule in BUILT_IN_RULES if rule.op.name == "all_reduce_rms_norm")
    assert _summed(reduce) == ["x"]
    assert _summed(RULE) == []
    arguments = {"x": spec(3, 16), "weight": spec(16), "eps": 1e-5, "rounding": "llama", "group_name": one_rank}
    case = Case(tokens=3, arguments=arguments)
    alone, first, second, again = (_fresh(reduce, case, 5, rank)[0] for rank in (None, 0, 1, 1))
    assert torch.equal(second["x"], again["x"])
    assert len({str(each["x"].tolist()) for each in (alone, first, second)}) == 3
    assert torch.equal(first["x"], _fresh(reduce, case, 6)[0]["x"])
    assert all(torch.equal(alone["weight"], each["weight"]) for each in (first, second))
    inputs, buffers = _fresh(reduce, case, 5)
    assert [each.tensor.shape for each in buffers] == [(3, 16), (16,)]
    assert inputs["eps"] == 1e-5


def test_arguments_that_are_one_tensor_are_guarded_once_each() -> None:
    case = normed()
    same = {**case.arguments, "residual": replace(case.arguments["x"], same_as="x")}
    inputs, _ = _fresh(RULE, Case(tokens=3, arguments=same), 0)
    assert inputs["x"] is inputs["residual"]


@pytest.mark.parametrize("other", [1, 2, 3, 4])
@pytest.mark.parametrize("result", [0, 1])
def test_equal_arguments_give_equal_bits_every_time(other: int, result: int) -> None:
    calls: list[Tensor] = []

    def racing(x: Tensor, *rest: Any) -> Any:
        calls.append(x.clone())
        results = reference(x, *rest)
        results[result].view(torch.int16)[-1, -1] ^= len(calls) == other
        return results

    assert repeated(RULE, provider(racing).name, normed(), seed=0) is (other == 4)
    assert len(calls) == 3
    assert all(torch.equal(each, calls[0]) for each in calls)
    calls.clear()
    assert repeated(RULE, provider(racing).name, normed(), seed=0, times=2) is (other > 2)
    assert len(calls) == 2


@pytest.mark.parametrize(("rank", "met"), [(None, ["loopback", "Loopback"]), (0, ["Gathered"]), (1, ["Gathered"])])
def test_all_reduces_are_of_all_ranks_where_they_check_together(
    rank: int | None, met: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    def entering(name: str) -> Any:
        @contextlib.contextmanager
        def enter() -> Iterator[None]:
            entered.append(name)
            yield

        return enter

    for name in ("Gathered", "Loopback", "loopback"):
        monkeypatch.setattr(check, name, entering(name))
    with check._meeting(rank):
        assert sorted(entered) == sorted(met)


def test_what_a_kernel_launches_is_looked_at_without_data() -> None:
    seen: list[Any] = []

    def kernel(*given: Any) -> Any:
        seen.append([each.shape if isinstance(each, Tensor) else each for each in given])
        return right(*given)

    call_without_data(RULE, provider(kernel).name, normed())
    assert seen == [[(3, 16), (3, 16), (16,), 1e-5, "llama"]]


def trial(kernel: Callable[..., Any] = right, **unfused: Any) -> Trial:

    def named(*given: Any) -> Any:
        return kernel(*given)

    made = Trial(RULE, provider(named).name, normed(), seed=1, unfused=unfused or None, rank=None)
    made.draw()
    made.expect()
    return made


def fixed(results: Any) -> Any:
    """A region that yields what is given."""

    def evaluate(arguments: Any, symbols: Any) -> Any:
        assert set(arguments) == {"x", "residual", "weight", "eps", "rounding"}
        return results

    return SimpleNamespace(evaluate=evaluate)


def test_no_mode_sees_what_compares_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is thousands of ops, each of which would come by Python."""
    modes = list[int]()

    def compared(*given: Any, **more: Any) -> Any:
        modes.append(torch._C._len_torch_dispatch_stack())
        return compare(*given, **more)

    monkeypatch.setattr(check, "compare", compared)
    tried = trial()
    assert tried.run(fixed(tried.expected)).wrong is None
    assert modes == [0] * (2 * len(tried.expected))


def test_the_graph_is_held_against_the_same_values() -> None:
    made = trial()
    found = made.run()
    assert (found.wrong, found.worst is not None) == (None, True)
    own: Any = made.expected
    assert made.run(fixed(own)) == found
    assert made.run(fixed([own[0], None])) == found
    read = made.run(fixed([own[0] + 1, own[1]]))
    assert str(read.wrong).startswith("the unfused ops don't compute what the graph does: result 0: element")
    assert read.worst == found.worst
    read = made.run(fixed([own[0].float(), own[1]]))
    assert str(read.wrong).startswith("the unfused ops don't compute what the graph does: result 0 is float32[3, 16]")
    turned = fixed([own[0].t().contiguous().t(), own[1]])
    read = made.run(turned)
    assert "result 0 is bfloat16[3, 16] with strides (16, 1), and the graph's own value is" in str(read.wrong)
    assert made.run(turned, free={0}) == found
    assert made.run(turned, free={1}).wrong is not None


def test_a_wrong_kernel_is_not_told_as_the_graph_read_wrong() -> None:
    made = trial(lambda x, *rest: tuple(each + 1 for each in reference(x, *rest)))
    found = made.run(fixed(None))
    assert str(found.wrong).startswith("result 0: element")
    assert found.worst is not None
    assert found.worst > 1
    made = trial(lambda x, *rest: reference(x, *rest)[0])
    assert made.run(fixed(None)) == Finding(wrong=KINDS.format(1, "Tensor", 2))
    made = trial(lambda x, *rest: tuple(each.float() for each in reference(x, *rest)))
    assert "and the unfused ops yield bfloat16" in str(made.run(fixed(None)).wrong)


def test_the_graph_may_round_elsewhere_than_the_kernel() -> None:
    roundings: list[str] = []

    def kernel(*given: Any) -> Any:
        roundings.append(given[-1])
        return right(*given)

    made = trial(kernel, rounding="fp32")
    assert made.run().wrong is None
    assert roundings == ["llama"]
    arguments = [made.inputs[name] for name in ("x", "residual", "weight", "eps")]
    expected = add_norm_relu.reference(*arguments, "fp32")
    assert all(torch.equal(a, b) for a, b in zip(made.expected, expected, strict=True))


@pytest.mark.parametrize("kwargs", [None, {"right": 2}])
def test_ops_of_our_own_are_run_with_a_mode_in_force_inside(kwargs: dict[str, Any] | None) -> None:
    seen: list[Any] = []

    class Seeing(SeeingMode):
        """Notes what is run."""

        def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append((func, kwargs))
            return func(*args, **kwargs)

    args = (ONES,) if kwargs else (ONES, 2)
    padded = Seeing().__torch_dispatch__(ops.pad.overload, (), args, kwargs)
    assert torch.equal(padded, torch.nn.functional.pad(ONES, (0, 2)))
    assert seen
    assert all(func is not ops.pad.overload for func, _ in seen)
    seen.clear()
    relu, summed = torch.ops.aten.relu.default, torch.ops.aten.sum.dim_IntList
    assert torch.equal(Seeing().__torch_dispatch__(relu, (), (ONES,), None), ONES)
    Seeing().__torch_dispatch__(summed, (), (ONES, [0]), {"keepdim": True})
    assert seen == [(relu, {}), (summed, {"keepdim": True})]
    with pytest.raises(NotImplementedError):
        SeeingMode().run(relu, (ONES,), {})
    with Poisoned():
        assert torch.empty(3).isnan().all()
