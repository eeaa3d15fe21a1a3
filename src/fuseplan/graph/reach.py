"""The nodes near a node: reached through ops that only move or cast elements, or are elementwise."""

import functools
import operator
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import fx

from fuseplan.graph.facts import RESHAPES, aten, equal_shape, is_functionalized, tensor_of

LIMIT = 6
"""Ops between two nodes up to which they count as near each other."""

MOVES = (
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.copy.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
)
"""Ops without torch's tags for it that move elements, or combine equal ones."""


STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)


def is_thin(node: fx.Node) -> bool:
    """Whether a node computes each element of its result from few elements of its inputs, without mixing rows: a view,
    a move, a cast, pointwise arithmetic, an all-reduce, an op that was in place, or a custom op that keeps the shape
    of its one tensor.
    """
    if node.op != "call_function":
        return False
    kind = _kind(node.target)
    if kind is not None:
        return kind
    tensors = [value for source in node.all_input_nodes if (value := tensor_of(source)) is not None]
    return len(tensors) == 1 and equal_shape(tensors[0], tensor_of(node))


def _kind(target: Any) -> bool | None:
    """Whether a function is thin wherever it is called; None where that depends on its arguments."""
    if isinstance(target, torch._ops.OpOverload):
        return _kind_of_op(target)
    return target is operator.getitem or is_functionalized(target)


@functools.lru_cache(maxsize=4096)
def _kind_of_op(target: torch._ops.OpOverload) -> bool | None:
    if target.is_view or torch.Tag.pointwise in target.tags or target in MOVES:
        return True
    return False if target.namespace in ("aten", "prims", "_c10d_functional") else None


def is_view(node: fx.Node) -> bool:
    """Whether a node only arranges the elements of its first input."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def stays_inside(value: fx.Node) -> bool:
    """Whether only ops that write to nothing read a value and its views, and the graph doesn't return it. Results of
    such ops are either declared views or have memory of their own.
    """
    stack, seen = [value], {value}
    while stack:
        for user in stack.pop().users:
            target = user.target
            if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
                return False
            if user not in seen and (target.is_view or target in RESHAPES):
                seen.add(user)
                stack.append(user)
    return True


def strided_reader(node: fx.Node) -> fx.Node | None:
    """The first node that reads a value, or a view of it, by strides of its own; its result depends on how the value
    lies in memory.
    """
    stack, seen = [*node.users], set[fx.Node]()
    while stack:
        user = stack.pop()
        if user.target in STRIDED:
            return user
        if user not in seen and (is_view(user) or user.target in RESHAPES):
            seen.add(user)
            stack.extend(user.users)
    return None


def path_between(
    start: fx.Node, is_goal: Callable[[fx.Node], bool], towards: Literal["inputs", "users"], limit: int = LIMIT
) -> tuple[list[fx.Node], fx.Node] | None:
    """The shortest way from a node to one that is a goal, through thin nodes.

    Args:
        start: the first node on the way; a goal itself, or thin.
        is_goal: whether a node ends the search.
        towards: the direction.
        limit: the most nodes on the way.

    Returns:
        (the thin nodes on the way in its order, the goal), or None.
    """
    before: dict[fx.Node, fx.Node | None] = {start: None}
    queue = deque([(start, 0)])
    while queue:
        node, length = queue.popleft()
        if is_goal(node):
            return _way_to(node, before), node
        if length < limit and is_thin(node):
            neighbours: Iterable[fx.Node] = node.all_input_nodes if towards == "inputs" else node.users
            for each in neighbours:
                if each not in before and each.op == "call_function":
                    before[each] = node
                    queue.append((each, length + 1))
    return None


def _way_to(goal: fx.Node, before: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    way: list[fx.Node] = []
    node = before[goal]
    while node is not None:
        way.append(node)
        node = before[node]
    return way[::-1]
