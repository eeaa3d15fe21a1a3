"""What is seen of a kernel that does what a function of its arguments doesn't do, and of results of another kind."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseplan.dialect import ops
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.verification.check import (
    CheckResult,
    Trial,
    _compared,
    _MisbehavedError,
    _on_copies,
    _Watched,
    call_without_data,
    repeated,
)
from fuseplan.verification.memory import Guarded, SeeingMode, make_arguments
from fuseplan.verification.specs import Case, TensorSpec
from tests.verification.fused_norm import AddNormRelu, provider, reference, right
from tests.verification.made import spec

CPU = torch.device("cpu")
RULE: Any = AddNormRelu()


def normed(rows: int = 3, width: int = 16) -> Case:
    x, weight = spec(rows, width, dtype=torch.bfloat16), spec(width, dtype=torch.bfloat16)
    arguments = {"x": x, "residual": x, "weight": weight, "eps": 1e-5, "rounding": "llama"}
    return Case(tokens=rows, arguments=arguments)


ONES = torch.ones(2, 3)


def compared(*actual: Tensor | None, **op: Any) -> CheckResult:
    """Of results that are ones; one unit in the last place is allowed where the unfused ops are exact."""
    rule: Any = SimpleNamespace(op=SimpleNamespace(**{"error_factor": 2.0, "packed": (), **op}))
    own = [ONES if each is None or each.is_floating_point() else torch.full_like(each, 0x11) for each in actual]
    exact = [each.double() if each.is_floating_point() else each for each in own]
    return _compared(rule, actual, own, exact, "so ")


def test_the_worst_result_is_told_and_the_first_that_is_wrong() -> None:
    unit = torch.finfo(torch.float32).eps
    assert compared(ONES, ONES, None) == CheckResult(wrong=None, worst=0.0)
    assert compared(ONES, ONES + unit, None) == CheckResult(wrong=None, worst=1.0), "just allowed"
    found = compared(ONES, ONES + 3 * unit, ONES + 5 * unit)
    assert found.worst == 3.0
    assert str(found.wrong).startswith("so result 1: element [0, 0] is 1 where 1 is exact")
    found = compared(ONES * float("nan"), ONES)
    assert (found.worst, found.wrong is None) == (None, False)


FLAT = "with strides (16, 1)"
OWN = f"bfloat16[3, 16] {FLAT}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: y, None),
        (lambda y: y.half(), f"result 1 is float16[3, 16] {FLAT}, and the unfused ops yield {OWN}"),
        (lambda y: y[:2].clone(), f"result 1 is bfloat16[2, 16] {FLAT}, and the unfused ops yield {OWN}"),
        (
            lambda y: y.t().contiguous().t(),
            f"result 1 is bfloat16[3, 16] with strides (1, 3), and its fake implementation yields {OWN}",
        ),
    ],
)
def test_results_are_of_the_kind_that_both_sides_promise(change: Callable[[Tensor], Tensor], says: str | None) -> None:
    def kernel(*given: Any) -> tuple[Tensor, Tensor]:
        y, total = reference(*given)
        return y, change(total)

    assert trial(kernel).run().wrong == says


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
    for kind in (tuple, list):
        result, _ = watched(lambda x, y, size, kind=kind: kind((x + y, x - y)), returns=2)
        assert isinstance(result, kind)


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
        assert [each.tolist() for each in _on_copies(op, kernel)(x, y)] == [[2.0, 2.0], [1.0, 1.0]]
        assert y.tolist() == [0.0, 0.0]


def test_what_is_summed_over_ranks_differs_among_them(one_rank: str) -> None:
    reduce = next(rule for rule in BUILT_IN_RULES if rule.op.name == "all_reduce_rms_norm")
    arguments = {"x": spec(3, 16), "weight": spec(16), "eps": 1e-5, "rounding": "llama", "group_name": one_rank}
    case = Case(tokens=3, arguments=arguments)

    def drawn(rank: int | None) -> Trial:
        made = Trial(reduce, "torch", case, seed=5, unfused=None, rank=rank)
        made.draw()
        made.expect()
        assert made.run().wrong is None
        return made

    alone, first, second, again = (drawn(rank).inputs for rank in (None, 0, 1, 1))
    assert torch.equal(second["x"], again["x"])
    assert len({str(each["x"].tolist()) for each in (alone, first, second)}) == 3
    assert all(torch.equal(alone["weight"], each["weight"]) for each in (first, second))


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


def test_what_a_kernel_launches_is_looked_at_without_data() -> None:
    seen: list[Any] = []

    def kernel(*given: Any) -> Any:
        seen.append([each.shape if isinstance(each, Tensor) else each for each in given])
        return right(*given)

    case = normed()
    same = {**case.arguments, "residual": replace(case.arguments["x"], same_as="x")}
    call_without_data(RULE, provider(kernel).name, replace(case, arguments=same))
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
    assert made.run(fixed(None)) == CheckResult(wrong=KINDS.format(1, "Tensor", 2))
    made = trial(lambda x, *rest: tuple(each.float() for each in reference(x, *rest)))
    assert "and the unfused ops yield bfloat16" in str(made.run(fixed(None)).wrong)


def test_ops_of_our_own_are_run_with_a_mode_in_force_inside() -> None:
    seen: list[Any] = []

    class Seeing(SeeingMode):
        """Notes what is run."""

        def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append(func)
            return func(*args, **kwargs)

    with Seeing():
        padded = ops.pad.overload(ONES, right=2), ops.pad.overload(ONES, 2), torch.ops.aten.relu.default(ONES)
    assert [tuple(each.shape) for each in padded] == [(2, 5), (2, 5), (2, 3)]
    assert torch.ops.aten.relu.default in seen
    assert len(seen) > 2
    assert ops.pad.overload not in seen
