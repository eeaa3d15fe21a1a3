"""Padding of the last dimension, and reshapes that stand between a norm and what follows it."""

import operator
from typing import Any

import torch
from torch import fx

from fuseplan.canonical.view import CanonicalGraph, is_dialect
from fuseplan.dialect import ops
from fuseplan.graph.facts import RESHAPES, aten, equal_size, is_call, tensor_of
from fuseplan.graph.surgery import erase_dead
from fuseplan.record import Reason


def raise_pads(canonical: CanonicalGraph) -> None:
    """`constant_pad_nd(x, [0, n], 0)` -> `pad(x, n)`."""
    for node in canonical.calls(aten.constant_pad_nd.default):
        x, amounts, value = (*node.args, 0.0)[:3]
        if (
            value == 0
            and list(amounts[:1]) == [0]
            and isinstance(amounts[1], int)
            and amounts[1] > 0
            and not any(amounts[2:])
        ):
            canonical.raise_op(ops.pad, (x, amounts[1]), (node,))
        else:
            canonical.refuse(
                ops.pad, [node], Reason.ATTRIBUTE,
                f"pad not recognised: it pads {list(amounts)} with {value}; fused ops append zeros to each row",
                node=node, place=node, expected="[0, n] with 0", found=f"{list(amounts)} with {value}",
            )  # fmt: skip


EPILOGUES = (ops.pad, ops.static_scaled_fp8_quant, ops.dynamic_per_token_scaled_fp8_quant)


def sink_reshapes(canonical: CanonicalGraph) -> None:
    """`epilogue(reshape(y))` -> `reshape(epilogue(y))`, where the reshape keeps the last dimension and y is a norm.

    Padding and quantisation work on each row alone, so this is exact.
    """
    for node in canonical.calls(*(op.overload for op in EPILOGUES)):
        reshape = node.args[0]
        if not is_call(reshape, *RESHAPES) or not _is_norm(reshape.args[0]):
            continue
        inner = reshape.args[0]
        before, after = tensor_of(inner), tensor_of(reshape)
        if before is None or after is None or not before.dim() or not equal_size(before.shape[-1], after.shape[-1]):
            continue
        op = ops.of(node.target)
        assert op is not None
        fakes = op.fake(before, *(tensor_of(arg) if isinstance(arg, fx.Node) else arg for arg in node.args[1:]))
        moved = canonical.insert_before(node, node.target, (inner, *node.args[1:]), fakes)
        canonical.interior[moved] = canonical.claims([node, *node.users] if isinstance(fakes, tuple) else [node])
        if isinstance(fakes, torch.Tensor):
            _reshape_like(canonical, moved, node)
            continue
        for old in sorted(node.users):
            index = old.args[1]
            assert isinstance(index, int)
            _reshape_like(canonical, canonical.insert_before(node, operator.getitem, (moved, index), fakes[index]), old)
        erase_dead(canonical.graph, [node])


def _reshape_like(canonical: CanonicalGraph, moved: fx.Node, old: fx.Node) -> None:
    """Replaces `old` by `moved` in old's shape."""
    value = tensor_of(old)
    assert value is not None
    sizes: list[Any] = list(value.shape)
    symbolic = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    for dim in symbolic:
        # One unknown size may be inferred; more are read off the reshape that is being moved.
        sizes[dim] = -1 if len(symbolic) == 1 else _size_of(canonical, old, moved, dim)
    canonical.replace(old, canonical.insert_before(old, aten.reshape.default, (moved, sizes), value))


def _size_of(canonical: CanonicalGraph, old: fx.Node, moved: fx.Node, dim: int) -> fx.Node:
    """A size of `old`, of which the epilogue may have changed the last."""
    value, wide = tensor_of(old), tensor_of(moved)
    assert value is not None and wide is not None
    if dim == value.dim() - 1:
        return canonical.insert_before(old, aten.sym_size.int, (moved, wide.dim() - 1), value.shape[dim])
    epilogue = old.args[0] if is_call(old, operator.getitem) else old
    assert isinstance(epilogue, fx.Node)
    return canonical.insert_before(old, aten.sym_size.int, (epilogue.args[0], dim), value.shape[dim])


def _is_norm(node: object) -> bool:
    if is_call(node, operator.getitem):
        return node.args[1] == 0 and is_dialect(node.args[0], ops.fused_add_rms_norm)
    return is_dialect(node, ops.rms_norm)
