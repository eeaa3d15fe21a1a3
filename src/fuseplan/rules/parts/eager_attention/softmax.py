"""A softmax over the last dimension, as post-grad graphs spell it; on CUDA by torch's prim for online softmax."""

from dataclasses import dataclass

from torch import Tensor, fx

from fuseplan.graph.facts import Call, aten, is_call, is_item, tensor_of


@dataclass(frozen=True)
class Softmax:
    """A softmax over the last dimension.

    Attributes:
        source: its input.
        result: its result.
        inside: its nodes.
    """

    source: fx.Node
    result: fx.Node
    inside: tuple[fx.Node, ...]


def softmax_of(exp: Call) -> Softmax | None:
    """The softmax that an exponential belongs to, if any."""
    centred = exp.args[0]
    if not is_call(centred, aten.sub.Tensor) or len(centred.args) != 2 or centred.kwargs:
        return None
    source, top = centred.args
    if not isinstance(source, fx.Node) or not isinstance(top, fx.Node):
        return None
    value = tensor_of(source)
    if value is None or not value.dim():
        return None
    if is_item(top) and getattr(top.args[0].target, "__name__", "") == "prepare_softmax_online.default":
        together = top.args[0]
        totals = [user for user in together.users if is_item(user) and user.args[1] == 1]
        is_last = together.args[0] is source and together.args[1] % value.dim() == value.dim() - 1
        inside = [exp, centred, top, together]
    else:
        totals = [user for user in exp.users if is_call(user, aten.sum.dim_IntList) and keeps_last(user, value)]
        is_last = is_call(top, aten.amax.default) and top.args[0] is source and keeps_last(top, value)
        inside = [exp, centred, top]
    for total in totals:
        for user in total.users:
            if is_last and is_call(user, aten.div.Tensor) and user.args == (exp, total) and not user.kwargs:
                return Softmax(source, user, (*inside, total, user))
    return None


def keeps_last(reduction: Call, value: Tensor) -> bool:
    """Whether a reduction is over the last dimension alone and keeps it."""
    dims = reduction.args[1:2] or ([],)
    return (
        [dim % value.dim() for dim in dims[0]] == [value.dim() - 1] and reduction.args[2:] == (True,)
        and not reduction.kwargs
    )  # fmt: skip


def maximum_of(node: object, of: fx.Node) -> list[fx.Node]:
    """The nodes of a maximum over the last dimension; none where the node isn't one."""
    value = tensor_of(of)
    if value is None:
        return []
    if is_call(node, aten.amax.default):
        return [node] if node.args[0] is of and keeps_last(node, value) else []
    if not is_item(node) or node.args[1] != 0 or not is_call(node.args[0], aten.max.dim):
        return []
    reduction = node.args[0]
    is_last = reduction.args[1] % value.dim() == value.dim() - 1 and reduction.args[2:] == (True,)
    return [node, reduction] if reduction.args[0] is of and is_last else []
