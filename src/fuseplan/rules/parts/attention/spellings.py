"""Attention by one of torch's kernels over keys and values whose heads are repeated, as grouped-query models spell it.

heads  = reshape([clone](expand(unsqueeze(x, heads + 1))))    repeat_kv, repeat_interleave, stack
       | expand(x) | repeat(x)                                one head for all queries
       , before or after heads and tokens are transposed
y      = getitem(_scaled_dot_product_*_attention(q, heads, heads, ...), 0)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph, is_dialect
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import RESHAPES, Call, aten, equal_size, equal_sizes, is_call, item, tensor_of
from fuseplan.record import Reason
from fuseplan.rules.parts.attention.kernels import KERNELS
from fuseplan.rules.parts.attention.op import attention, repeat_heads

HEADS = 1
"""The dimension of heads in the inputs of an attention op."""

BY_TARGET: dict[Any, str] = {kernel.target: kernel.name for kernel in KERNELS.values()}


@dataclass(frozen=True)
class Repeated:
    """A tensor whose heads are copies.

    Attributes:
        node: the tensor.
        source: the tensor without copies.
        groups: copies of each head, next to each other.
        tiled: whether the whole sequence of heads is repeated `groups` times instead.
        outer: the ops between the copies and `node`, the nearest to `node` first.
    """

    node: fx.Node
    source: fx.Node
    groups: int
    tiled: bool = False
    outer: tuple[Call, ...] = ()


def raise_attention(canonical: CanonicalGraph) -> None:
    """Raises every attention whose keys and values have repeated heads; others have nothing to fuse."""
    for node in canonical.calls(*BY_TARGET):
        arguments = _arguments(node)
        sides = [repeated(arguments[name]) for name in ("key", "value")]
        result = item(node, 0)
        if not any(sides) or result is None or not result.users:
            continue
        try:
            _raise(canonical, node, result, arguments, sides)
        except Unraised as refused:
            refused.tell(canonical, attention, "attention", at=[node], place=node)


def _arguments(node: Call) -> dict[str, Any]:
    """All arguments of an attention op by the names in its schema, defaults included."""
    found = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = given
    return found


def _raise(
    canonical: CanonicalGraph, node: Call, result: fx.Node, arguments: dict[str, Any], sides: Sequence[Repeated | None]
) -> None:
    key, value = sides
    if key is None or value is None:
        name, other = ("value", "keys") if value is None else ("key", "values")
        at = arguments[name]
        raise Unraised(
            Reason.OP, f"the heads of the {other} are repeated, and those of the {name}s are not", at,
            expected=repeat_heads.name,
        )  # fmt: skip
    check_sides(key, value)
    _check_flags(canonical, node, arguments)
    q, groups = _shape_of(arguments["query"], node), key.groups
    heads = _source_heads(key)
    if not (isinstance(q[HEADS], int) and isinstance(heads, int) and isinstance(q[-1], int)):
        raise Unraised(Reason.SIZE, "numbers of heads or their size aren't known when the graph is compiled", node)
    if q[HEADS] % (heads * groups):
        raise Unraised(Reason.SIZE, f"{q[HEADS]} query heads don't divide by {heads * groups} heads of keys", node)
    scale = arguments["scale"]
    distinct = {each.node: each for each in sides if each is not None}
    placed = {each.node: _raise_repeat(canonical, each) for each in distinct.values()}
    mask = arguments.get("attn_bias", arguments.get("attn_mask"))
    canonical.raise_op(
        attention,
        (
            arguments["query"], placed[key.node], placed[value.node], mask,
            1 / math.sqrt(q[-1]) if scale is None else scale, arguments["is_causal"], BY_TARGET[node.target],
        ),
        (result,),
    )  # fmt: skip


def check_sides(key: Repeated, value: Repeated) -> None:
    """Refuses keys and values that aren't shared in the same way.

    Raises:
        Unraised: they aren't.
    """
    for side in (key, value):
        if side.tiled:
            raise Unraised(
                Reason.ATTRIBUTE, f"all heads are repeated after each other, {side.groups} times; grouped queries "
                "share the head of their neighbours", side.node,
                "repeat each head next to itself, as repeat_interleave does",
            )  # fmt: skip
    if key.groups != value.groups or _source_heads(key) != _source_heads(value):
        raise Unraised(
            Reason.ATTRIBUTE, f"keys have {_source_heads(key)} heads, {key.groups} times each, and values "
            f"{_source_heads(value)}, {value.groups} times", value.node,
        )  # fmt: skip


def _check_flags(canonical: CanonicalGraph, node: Call, arguments: dict[str, Any]) -> None:
    """Refuses arguments and results that a fused op doesn't support.

    Raises:
        Unraised: the graph uses one.
    """
    if arguments["dropout_p"]:
        raise Unraised(
            Reason.ATTRIBUTE, f"it drops {arguments['dropout_p']:g} of the weights", node, "call model.eval()"
        )
    if arguments.get("return_debug_mask"):
        raise Unraised(Reason.ATTRIBUTE, "its debug mask is asked for", node, "don't ask for return_debug_mask")
    for user in node.users:
        if user.args[1] != 0 and user.users:
            name = node.target._schema.returns[int(user.args[1])].name  # type: ignore[union-attr,arg-type]
            reader = next(iter(user.users))
            raise Unraised(
                Reason.USERS, f"its {name or user.args[1]} is read by {reader.target} ({reader.name}), too", reader,
                "read the output of attention alone",
            )  # fmt: skip
    mask = tensor_of(arguments.get("attn_bias", arguments.get("attn_mask")))
    if mask is not None and not mask.dtype.is_floating_point:
        raise Unraised(Reason.DTYPE, f"its mask is {mask.dtype}, and kernels add one of floats", node)


def _shape_of(node: object, place: fx.Node) -> Sequence[Any]:
    value = tensor_of(node)
    if value is None or value.dim() != 4:
        raise Unraised(Reason.SIZE, "its queries don't have 4 dimensions", place)
    return value.shape


def _source_heads(side: Repeated) -> Any:
    value = tensor_of(side.node)
    assert value is not None
    heads = value.shape[HEADS]
    return heads // side.groups if isinstance(heads, int) else heads


# Repeated heads.


def repeated(node: object) -> Repeated | None:
    """The copies in a tensor of keys or values; None where its heads aren't copies."""
    if not isinstance(node, fx.Node) or _dim(node) != 4:
        return None
    if is_dialect(node, repeat_heads):  # another attention reads it as well
        return Repeated(node, node.args[0], node.args[1])
    outer: list[Call] = []
    inner, heads = node, HEADS
    while (moved := _moved(inner, heads)) is not None:
        assert is_call(inner, *_OUTER)
        outer.append(inner)
        inner, heads = inner.args[0], moved
        if not isinstance(inner, fx.Node) or _dim(inner) != 4:
            return None
    found = _merged(inner, heads) or _broadcast(inner, heads)
    if found is None or found[1] == 1:
        return None
    source, groups, tiled = found
    return Repeated(node, source, groups, tiled, tuple(outer))


_OUTER = (aten.permute.default, aten.clone.default, aten.slice.Tensor)


def _moved(node: fx.Node, heads: int) -> int | None:
    """The dimension of heads before an op between copies and attention; None where such an op isn't supported there."""
    if is_call(node, aten.permute.default):
        return int(node.args[1][heads]) % 4
    if is_call(node, aten.clone.default):
        return heads
    if is_call(node, aten.slice.Tensor) and len(node.args) > 1 and node.args[1] % 4 != heads:
        return heads
    return None


def _merged(node: fx.Node, heads: int) -> tuple[fx.Node, int, bool] | None:
    """(source, groups, tiled) of a reshape that merges the dimension of copies into that of heads."""
    if not is_call(node, *RESHAPES):
        return None
    inner = node.args[0]
    if is_call(inner, aten.clone.default):
        inner = inner.args[0]
    if not is_call(inner, aten.expand.default) or not is_call(inner.args[0], aten.unsqueeze.default):
        return None
    source, place = inner.args[0].args[:2]
    wide, before, after = tensor_of(inner), tensor_of(source), tensor_of(node)
    if wide is None or before is None or after is None or before.dim() != 4 or wide.dim() != 5 or after.dim() != 4:
        return None
    place %= 5
    groups = wide.shape[place]
    if place not in (heads, heads + 1) or not isinstance(groups, int):
        return None
    others = [size for dim, size in enumerate(wide.shape) if dim != place]
    if not equal_sizes(others, before.shape) or not equal_sizes(after.shape, _with_heads(before, heads, groups)):
        return None
    return source, groups, place == heads and not equal_size(before.shape[heads], 1)


def _broadcast(node: fx.Node, heads: int) -> tuple[fx.Node, int, bool] | None:
    """(source, groups, tiled) of an expansion, or a `repeat`, of heads alone."""
    if not is_call(node, aten.expand.default, aten.repeat.default):
        return None
    source = node.args[0]
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None or before.dim() != 4 or not isinstance(before.shape[heads], int):
        return None
    count = after.shape[heads]
    groups = count // before.shape[heads] if isinstance(count, int) else 1
    if not equal_sizes(after.shape, _with_heads(before, heads, groups)):
        return None
    return source, groups, before.shape[heads] != 1


def _with_heads(value: Tensor, heads: int, groups: int) -> list[Any]:
    sizes: list[Any] = list(value.shape)
    sizes[heads] = sizes[heads] * groups
    return sizes


def _dim(node: object) -> int | None:
    value = tensor_of(node)
    return value.dim() if value is not None else None


def _raise_repeat(canonical: CanonicalGraph, side: Repeated) -> fx.Node:
    """The dialect op that replaces the copies."""
    if is_dialect(side.node, repeat_heads):
        return side.node
    return canonical.raise_op(repeat_heads, (unrepeated(canonical, side), side.groups), (side.node,))


def unrepeated(canonical: CanonicalGraph, side: Repeated) -> fx.Node:
    """The tensor without copies, behind the ops that stood between the copies and attention."""
    source = side.source
    for op in reversed(side.outer):
        if is_call(op, aten.clone.default):
            continue  # only the layout differs, and readers go by the shape
        value = tensor_of(source)
        assert value is not None
        with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
            assert callable(op.target)
            moved = op.target(value, *op.args[1:])
        source = canonical.insert_before(side.node, op.target, (source, *op.args[1:]), moved)
    return source
