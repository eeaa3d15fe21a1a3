"""How values lie in memory: strides, aliasing, and which nodes of a graph depend on them."""

import functools
import itertools
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fuseplan.graph.facts import (
    FUNCTIONAL,
    aten,
    equal_size,
    exact,
    is_call,
    is_dense,
    is_mutation,
    is_torchs,
    targets_of,
    tensor_of,
)
from fuseplan.graph.ops import ALIGNED_ROWS
from fuseplan.graph.ops.fakes import slice_of
from fuseplan.graph.sizes import equal_rounded

FRESH = (aten.addmm.default, aten.baddbmm.default, aten.bmm.default, aten.mm.default)
"""Ops whose results are row-major whatever the strides of their arguments are."""

BY_LAYOUT = (
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten.sym_storage_offset.default,
    aten.sym_stride.int,
    aten.view.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    torch.ops.prims.as_strided.default,
    torch.ops.prims.view_of_dtype.default,
)
"""Ops of torch whose result or legality depends on strides. One that may copy instead is an `aten.reshape`."""

WRITTEN_LATER = (
    torch.ops.aten._unsafe_index_put.default,
    aten.copy.default,
    aten.diagonal_scatter.default,
    aten.index_put.default,
    aten.scatter.reduce,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.as_strided_scatter.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_reduce_coalesced.default,
)
"""Ops that Inductor may run in the memory of their first argument, whose layout is then the result's."""

READ_ONLY = ("cond", "flex_attention", "invoke_subgraph")
"""Higher-order ops that don't write to their arguments: a body that would is functionalised."""


def computed(target: Any, args: Any, kwargs: Any) -> Any:
    """A function's result, on fake tensors where its arguments are fake."""
    if target is operator.getitem:
        return target(*args)
    if target is aten.slice.Tensor and not kwargs and (part := slice_of(*args)) is not None:
        return part
    tensors = pytree.tree_leaves((args, kwargs))
    # Not the fake mode of a user who explains a model under one.
    mode = next((each.fake_mode for each in tensors if isinstance(each, FakeTensor)), None) or detect_fake_mode()
    with mode if mode is not None else torch.no_grad():
        return target(*args, **kwargs)


def storage_of(value: Tensor) -> int:
    """Equal for tensors that share memory; Inductor uses it, too."""
    return int(value.untyped_storage()._cdata)


def layout_of(value: Tensor) -> tuple[Any, ...]:
    """Sizes, strides and offset, to be compared and hashed: symbolic ones by their expressions, which adds no guard."""
    return tuple(map(exact, (*value.shape, *value.stride(), value.storage_offset())))


def is_view_of(view: Tensor, base: Tensor, other: Tensor) -> bool:
    """Whether one fake tensor is a view of a second one's memory, and of a third one's would have the same layout."""
    return (
        storage_of(view) == storage_of(base) and type(other) is FakeTensor
        and view.dtype is base.dtype is other.dtype and layout_of(base) == layout_of(other)
    )  # fmt: skip


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape have equal strides and offsets for every value of their symbols, dimensions of
    one element aside; adds no guard.
    """
    dims = zip(left.shape, left.stride(), right.stride(), strict=True)
    return equal_size(left.storage_offset(), right.storage_offset()) and all(
        equal_rounded([a], [b], ALIGNED_ROWS) or equal_size(size, 1) for size, a, b in dims
    )


def memory_order(value: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor that fills its memory, the outermost in memory first; None where it has, or may have,
    gaps or overlaps.
    """
    if is_dense(value):
        return tuple(range(value.dim()))
    # torch takes a size that may be 0, as far as is known, to be at least 1 in strides.
    left, order, plain, at_least = list(range(value.dim())), list[int](), 1, 1
    while left:
        ones = [dim for dim in left if equal_size(value.shape[dim], 1)]
        fitting = [dim for dim in left if dim not in ones and _is_one_of(value.stride(dim), plain, at_least)]
        if not fitting and len(ones) < len(left):
            return None
        dim = fitting[-1] if fitting else ones[-1]
        left.remove(dim)
        order.insert(0, dim)
        plain, at_least = plain * value.shape[dim], at_least * torch.sym_max(value.shape[dim], 1)
    return tuple(order)


def _is_one_of(stride: Any, *expected: Any) -> bool:
    return any(equal_size(stride, each) for each in expected)


def is_reordered(value: Tensor, promise: Tensor) -> bool:
    """Whether strides may come in another order than promised. Elementwise results then have another layout, too: that
    of the tensor without its gaps.
    """
    if same_layout(value, promise):
        return False
    order = memory_order(promise)
    strides: list[Any] = [value.stride(dim) for dim in order or () if not equal_size(value.shape[dim], 1)]
    falls = all(statically_known_true(a >= b) for a, b in itertools.pairwise(strides))
    return order is None or not falls


def carriers(node: fx.Node, skipped: Collection[fx.Node], *, reordered: bool) -> Iterator[fx.Node]:
    """The nodes whose layout follows from a node's: itself, views of it, and where strides change their order, also
    elementwise results.

    Args:
        node: the value.
        skipped: nodes that aren't looked at.
        reordered: whether strides may change their order.
    """
    stack, seen = [node], {node}
    while stack:
        carrier = stack.pop()
        yield carrier
        for user in carrier.users:
            if user not in seen and user not in skipped and _follows(user, reordered=reordered):
                seen.add(user)
                stack.append(user)


def _follows(user: fx.Node, *, reordered: bool) -> bool:
    if is_call(user, operator.getitem):
        return True
    target = user.target
    if not is_torchs(target) or target in BY_LAYOUT:
        return False
    holds_tensors = isinstance(user.meta.get("val"), (Tensor, list, tuple))
    return target.is_view or (reordered and holds_tensors and target not in FRESH)


def layout_reader(node: fx.Node, skipped: Collection[fx.Node], *, reordered: bool) -> fx.Node | None:
    """The first node found that can tell a value's layout, or its aliases; None where there is none. Ops of torch that
    only depend on elements can't; all others can.

    Args:
        node: the value.
        skipped: nodes that aren't looked at.
        reordered: whether strides may change their order, and not only have gaps.
    """
    for carrier in carriers(node, skipped, reordered=reordered):
        for user in carrier.users:
            if user not in skipped and _sees(user, carrier):
                return user
    return None


def _sees(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node's result depends on an argument's layout."""
    target = user.target
    if is_call(user, operator.getitem):
        return False
    if not is_torchs(target) or target in BY_LAYOUT:
        return True
    if is_mutation(user) or target in WRITTEN_LATER:
        return _writes(user, node)
    return _op_sees(target)


@functools.lru_cache(maxsize=4096)
def _op_sees(target: torch._ops.OpOverload) -> bool:
    # Tags such as `needs_exact_strides` aren't in every torch.
    if any(str(tag).startswith("Tag.needs_") for tag in target.tags):
        return True
    return not target.is_view and target not in FRESH and FUNCTIONAL.isdisjoint(target.tags)


def _writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node writes to an argument, or Inductor may make it do so."""
    target, kwargs = user.target, user.kwargs
    if isinstance(target, torch._ops.OpOverload):
        if target in (aten.copy_.default, *WRITTEN_LATER):
            first = user.args[0]
            return first is node or (isinstance(first, (list, tuple)) and node in first)
        return is_mutation(user)
    name = getattr(target, "__name__", "")
    if name == "auto_functionalized_v2":
        bases = kwargs.get("_all_bases", ())
        return isinstance(bases, (list, tuple)) and node in bases
    if name == "triton_kernel_wrapper_functional":
        given, cloned = kwargs.get("kwargs"), kwargs.get("tensors_to_clone")
        assert isinstance(given, dict) and isinstance(cloned, (list, tuple)), user.format_node()
        return any(given.get(argument) is node for argument in cloned)
    return user.op != "output" and target is not operator.getitem and name not in READ_ONLY


def _only_reads(target: Any) -> bool:
    """Whether a function writes to none of its arguments, whatever they are."""
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and target not in WRITTEN_LATER


def writers(graph: fx.Graph) -> dict[int, fx.Node]:
    """The storages that nodes of a graph write to, or may be made to write to, and the first node that does."""
    others = [target for target in targets_of(graph) if target is not operator.getitem and not _only_reads(target)]
    calls = [node for target in others for node in graph.find_nodes(op="call_function", target=target)]
    calls += [node for op in ("call_method", "call_module") for node in graph.find_nodes(op=op)]
    found: dict[int, fx.Node] = {}
    for user in sorted(calls):
        for node in user.all_input_nodes:
            value = tensor_of(node)
            if value is not None and _writes(user, node):
                found.setdefault(storage_of(value), user)
    return found
