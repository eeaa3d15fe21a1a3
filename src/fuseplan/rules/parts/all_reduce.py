"""All-reduce as one op: the functional collective and its wait."""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fuseplan.devices.hardware import ONE_SHOT, TORCH
from fuseplan.graph.canonical import CanonicalGraph, is_dialect
from fuseplan.graph.facts import ADDS, MULS, RESHAPES, aten, equal_shape, is_call, item, tensor_of
from fuseplan.graph.ops import Sample, define, empty, random_tensor
from fuseplan.record import Reason
from fuseplan.rules.parts.base import REDUCER, Blame, EngineReader, Prologue, Stage, reducer_of, rows_of, takes_residual
from fuseplan.rules.parts.views import MOVERS, SCALES


def reference(x: Tensor, group_name: str) -> Tensor:
    """y = sum over the ranks of the group of x, in x's dtype

    Equals `wait_tensor(_c10d_functional.all_reduce(x, "sum", group_name))`.

    Args:
        x: any shape and dtype that the group's backend reduces; equal shapes on all ranks.
        group_name: the name of a process group (`ProcessGroup.group_name`).

    Returns:
        x's shape and dtype, contiguous, a new tensor.

    Raises:
        RuntimeError: no such process group.
    """
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
    result: Tensor = torch.ops._c10d_functional.wait_tensor(reduced)
    return result


def fake(x: Tensor, group_name: str) -> Tensor:
    """Shape and dtype of `reference`."""
    return empty(x, x.shape)


def world_group_name() -> str:
    """The name of the default process group."""
    assert dist.group.WORLD is not None, "samples of collectives need an initialised process group"
    return dist.group.WORLD.group_name


def _sample(shape: tuple[int, ...], dtype: torch.dtype) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, dtype, device, generator), world_group_name()

    return Sample(name=f"{rows_of(shape)}-{str(dtype).removeprefix('torch.')}", make=make)


NAME = "all_reduce"
all_reduce = define(
    NAME,
    "(Tensor x, str group_name) -> Tensor",
    reference=reference,
    fake=fake,
    samples=[_sample((7, 320), torch.bfloat16), _sample((1, 64), torch.float32)],
    collective=True,
)

functional_all_reduce = torch.ops._c10d_functional.all_reduce.default
OTHER_COLLECTIVES: dict[object, str | None] = {
    torch.ops._c10d_functional.all_reduce_coalesced.default: "let an all_reduce of its own reduce each tensor",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: None,
    torch.ops._c10d_functional.reduce_scatter_tensor_coalesced.default: None,
}
"""Other collectives that reduce over ranks, each with a fix; None where it is a different way to split a model."""
wait_tensor = torch.ops._c10d_functional.wait_tensor.default

ELEMENTWISE_VIEWS = (
    *RESHAPES,
    aten.slice.Tensor,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
"""Ops that only select and rearrange elements: view(all_reduce(x)) == all_reduce(view(x)), bit for bit.

Casts aren't among them: a sum of rounded values is not the rounded sum. (Casts would be exact for max and min, and for
a single rank, but those aren't raised.)
"""


def raise_all_reduces(canonical: CanonicalGraph) -> None:
    """`wait_tensor(_c10d_functional.all_reduce(x, "sum", group))` -> `all_reduce(x, group)`."""
    for reduction in canonical.calls(*OTHER_COLLECTIVES):
        for result in dict.fromkeys(_results(reduction)):
            canonical.refuse(
                all_reduce, [result], Reason.OP, f"no all_reduce, but {reduction.target}", node=result,
                place=result, expected=all_reduce.name, found=str(reduction.target),
                fix=OTHER_COLLECTIVES[reduction.target],
            )  # fmt: skip
    for wait in canonical.calls(wait_tensor):
        started = wait.args[0]
        if not is_call(started, functional_all_reduce):
            continue
        x, reduce_op, group_name = started.args
        if str(reduce_op).lower() != "sum":
            canonical.refuse(
                all_reduce, [wait], Reason.ATTRIBUTE,
                f"all_reduce not recognised: it reduces by {reduce_op!r}, and fused ops sum", node=wait, place=wait,
                expected="reduce op sum", found=f"reduce op {reduce_op}",
                fix="sum, and divide before" if str(reduce_op).lower() == "avg" else None,
            )  # fmt: skip
        elif len(started.users) > 1:
            detail = f"all_reduce not recognised: it is waited for {len(started.users)} times"
            canonical.refuse(all_reduce, [wait], Reason.USERS, detail, node=wait, place=wait)
        elif isinstance(group_name, str):
            canonical.raise_op(all_reduce, (x, group_name), (wait,))


def _results(collective: fx.Node) -> Iterator[fx.Node]:
    """The results of a collective behind its wait; in torch 2.15 several tensors share one wait."""
    behind = [
        user
        for user in collective.users
        if is_call(user, operator.getitem) or str(user.target).startswith("_c10d_functional.wait_tensor")
    ]
    if not behind:
        yield collective
    for user in behind:
        yield from _results(user)


def hoist_views(canonical: CanonicalGraph) -> None:
    """`view(all_reduce(x))` -> `all_reduce(view(x))`, so that a norm behind the view meets the all-reduce.

    Done only where nothing else reads the reduced value. A hoisted slice also makes the message smaller.
    """
    for found in canonical.calls(all_reduce.overload):
        reduce: fx.Node = found
        while (view := _only_view(reduce)) is not None:
            x, group_name = reduce.args
            moved = canonical.insert_before(view, view.target, (x, *view.args[1:]), view.meta["val"])
            moved.kwargs = view.kwargs
            hoisted = canonical.insert_before(view, all_reduce.overload, (moved, group_name), view.meta["val"])
            hoisted.meta[REDUCER] = reducer_of(reduce)
            canonical.replace(view, hoisted)
            reduce = hoisted


def _only_view(reduce: fx.Node) -> fx.Node | None:
    if len(reduce.users) != 1:
        return None
    (user,) = reduce.users
    return user if is_call(user, *ELEMENTWISE_VIEWS) else None


def _engine(data: str, group: str, result_of: Callable[[fx.Node], fx.Node | None], reducer: str) -> EngineReader:
    """A reader that raises an engine's all-reduce.

    Args:
        data: the argument with the tensor to reduce.
        group: the argument with the engine's group.
        result_of: finds the node that holds the result of a call.
        reducer: the library of the all-reduce.
    """

    def read(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]) -> None:
        result, group_name = result_of(node), groups.get(values[group])
        if result is None:
            return
        if group_name is None:
            known = ", ".join(sorted(map(str, groups))) or "none"
            canonical.refuse(
                all_reduce, [result], Reason.GROUP,
                f"all_reduce not recognised: vLLM's group {values[group]!r} is not among those of this process "
                f"({known})", node=node, place=node,
            )  # fmt: skip
            return
        canonical.raise_op(all_reduce, (values[data], group_name), (result,)).meta[REDUCER] = reducer

    return read


def _one_shot_all_reduce(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """`symm_mem::one_shot_all_reduce(input, reduce_op, group_name)`, the only one of them that is out of place."""
    if str(values["reduce_op"]).lower() == "sum":
        canonical.raise_op(all_reduce, (values["input"], values["group_name"]), (node,)).meta[REDUCER] = ONE_SHOT


def _sums_two(node: fx.Node) -> bool:
    """Whether an op adds two all-reduces over one group."""
    reduced = [each for each in node.all_input_nodes if is_dialect(each, all_reduce)]
    return is_call(node, *ADDS) and len(reduced) == 2 and reduced[0].args[1] == reduced[1].args[1] and not node.kwargs


def _hint(node: fx.Node, goal: fx.Node, consumer: fx.Node) -> str | None:
    """Advice to move an op before the all-reduce: a sum over ranks is linear, and commutes with views."""
    if is_call(node, *MOVERS):
        return f"do it before {NAME}"
    if is_call(node, *SCALES):
        return _scaled(node)
    if is_call(node, *ADDS):
        return _added(node, goal, consumer)
    return None


def _scaled(node: fx.Node) -> str | None:
    if is_call(node, aten.neg.default):
        return f"negate before {NAME}"
    factor = node.args[1]
    if not isinstance(factor, fx.Node):
        return f"scale before {NAME}"
    return f"scale before {NAME}, if all ranks have the same factor" if is_call(node, *MULS) else None


def _added(node: fx.Node, goal: fx.Node, consumer: fx.Node) -> str | None:
    if _sums_two(node):
        return f"add before the {NAME}, once, instead of after both"
    left, right = node.args
    if node.kwargs:
        return f"scale before {NAME}" if right is goal else "scale the residual in an op of its own"
    other = right if left is goal else left
    if equal_shape(tensor_of(other), tensor_of(node)) or not isinstance(other, fx.Node):
        return "add it to the residual" if takes_residual(consumer) else None
    value = tensor_of(other)
    if value is not None and value.dim() <= 1:
        return f"add the bias before {NAME}, on one rank alone"
    return "expand the residual first" if equal_shape(tensor_of(goal), tensor_of(node)) else None


def _blame(node: fx.Node) -> tuple[Reason, str] | None:
    """The explanation for an addition of two all-reduces behind one of them."""
    groups = {str(each.args[1]) for each in node.all_input_nodes if is_dialect(each, all_reduce)}
    if is_call(node, *ADDS) and len(groups) > 1:
        return Reason.GROUP, f": it adds all_reduces over groups {' and '.join(map(repr, sorted(groups)))}"
    return (Reason.OP, ": it adds two all_reduces") if _sums_two(node) else None


def _twice(goal: fx.Node, node: fx.Node, after: str) -> Blame:
    """Blames the first of two all-reduces in a row: the second is next to the op that follows."""
    first, second = (str(each.args[1]) for each in (goal, node))
    if first == second:
        detail = f"the value reduced over group {first!r} is reduced once more before {after}"
        fix = "reduce once, and multiply by the number of ranks before"
        return Blame(reason=Reason.OP, found=NAME, detail=detail, fix=fix)
    detail = f"another all_reduce, over group {second!r}, stands between this one, over group {first!r}, and {after}"
    return Blame(reason=Reason.GROUP, found=f"all_reduce over group {second}", detail=detail)


def _added_twice(added: str) -> Blame:
    """The blame for a sum of two all-reduces."""
    return Blame(
        reason=Reason.OP, found=f"two of {NAME}", fix=f"add before the {NAME}, once, instead of after both",
        detail=f"{NAME} is added as the residual of {added}, whose other addend is reduced, too",
    )  # fmt: skip


PART = Prologue(
    name=NAME,
    ops=(all_reduce,),
    parameters=("str group_name",),
    sample=lambda: (world_group_name(),),
    raising=((Stage.COLLECTIVES, raise_all_reduces), (Stage.VIEWS, hoist_views)),
    engine_ops={
        # `vllm::all_reduce(tensor, group_name)`, out of place
        "vllm::all_reduce": _engine("tensor", "group_name", lambda node: node, "vllm"),
        # `_C::shm_allreduce(handle, data!)`, of the CPU backend
        "_C::shm_allreduce": _engine("data", "handle", lambda node: item(node, 1), TORCH),
        "symm_mem::one_shot_all_reduce": _one_shot_all_reduce,
    },
    hint=_hint,
    blame=_blame,
    twice=_twice,
    added_twice=_added_twice,
)
