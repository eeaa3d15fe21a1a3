"""Functional all-reduces, and what may be moved from behind them to before them."""

import operator
from collections.abc import Iterator

import torch
from torch import fx

from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import ops
from fuseplan.graph.facts import RESHAPES, aten, is_call
from fuseplan.record import Reason

functional_all_reduce = torch.ops._c10d_functional.all_reduce.default
OTHER_COLLECTIVES: dict[object, str | None] = {
    torch.ops._c10d_functional.all_reduce_coalesced.default: "let an all_reduce of its own reduce each tensor",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: None,
    torch.ops._c10d_functional.reduce_scatter_tensor_coalesced.default: None,
}
"""What else reduces over ranks, and what mends that where it isn't another way to split a model."""
wait_tensor = torch.ops._c10d_functional.wait_tensor.default

ELEMENTWISE_VIEWS = (
    *RESHAPES,
    aten.slice.Tensor,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
"""Ops that only choose and arrange elements: view(all_reduce(x)) == all_reduce(view(x)), bit for bit.

A cast is not among them: a sum of rounded values is not the rounded sum. (It is exact for max and min, and for a
single rank, neither of which is raised.)
"""


def raise_all_reduces(canonical: CanonicalGraph) -> None:
    """`wait_tensor(_c10d_functional.all_reduce(x, "sum", group))` -> `all_reduce(x, group)`."""
    for reduction in canonical.calls(*OTHER_COLLECTIVES):
        for result in dict.fromkeys(_results(reduction)):
            canonical.refuse(
                ops.all_reduce, [result], Reason.OP, f"no all_reduce, but {reduction.target}", node=result,
                place=result, expected=ops.all_reduce.name, found=str(reduction.target),
                mend=OTHER_COLLECTIVES[reduction.target],
            )  # fmt: skip
    for wait in canonical.calls(wait_tensor):
        started = wait.args[0]
        if not is_call(started, functional_all_reduce):
            continue
        x, reduce_op, group_name = started.args
        if str(reduce_op).lower() != "sum":
            canonical.refuse(
                ops.all_reduce, [wait], Reason.ATTRIBUTE,
                f"all_reduce not recognised: it reduces by {reduce_op!r}, and fused ops sum", node=wait, place=wait,
                expected="reduce op sum", found=f"reduce op {reduce_op}",
                mend="sum, and divide before" if str(reduce_op).lower() == "avg" else None,
            )  # fmt: skip
        elif len(started.users) > 1:
            detail = f"all_reduce not recognised: it is waited for {len(started.users)} times"
            canonical.refuse(ops.all_reduce, [wait], Reason.USERS, detail, node=wait, place=wait)
        elif isinstance(group_name, str):
            canonical.raise_op(ops.all_reduce, (x, group_name), (wait,))


def _results(collective: fx.Node) -> Iterator[fx.Node]:
    """What other ops read of a collective: behind its wait, which torch 2.15 has one of for several tensors."""
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

    Only where nothing else reads the reduced value. A hoisted slice also makes the message smaller.
    """
    for found in canonical.calls(ops.all_reduce.overload):
        reduce: fx.Node = found
        while (view := _only_view(reduce)) is not None:
            x, group_name = reduce.args
            moved = canonical.insert_before(view, view.target, (x, *view.args[1:]), view.meta["val"])
            moved.kwargs = view.kwargs
            hoisted = canonical.insert_before(view, ops.all_reduce.overload, (moved, group_name), view.meta["val"])
            canonical.replace(view, hoisted)
            reduce = hoisted


def _only_view(reduce: fx.Node) -> fx.Node | None:
    if len(reduce.users) != 1:
        return None
    (user,) = reduce.users
    return user if is_call(user, *ELEMENTWISE_VIEWS) else None
