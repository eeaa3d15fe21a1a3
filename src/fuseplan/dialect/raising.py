"""Raising a post-grad graph into the dialect, on a copy: stage by stage, each part by its own spellings."""

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.engines import (
    NAMESPACES,
    arguments_of,
    engine_op,
    engine_op_name,
    is_engines,
    merge_equal_results,
)
from fuseplan.graph.canonical.noops import eliminate_noops
from fuseplan.graph.facts import RESHAPES, aten, equal_size, is_call, targets_of, tensor_of
from fuseplan.graph.ops import ops
from fuseplan.graph.surgery import erase_dead, sort_topologically
from fuseplan.rules.parts import OPAQUE, PARTS, Core, Part, RowEpilogue, Stage, part_at

NO_GROUPS: Mapping[object, str] = {}

RAISING = {stage: [(part, read) for part in PARTS for when, read in part.raising if when is stage] for stage in Stage}
"""The readers of each stage, in order of the parts' names."""
ENGINE_OPS = {name: read for part in PARTS for name, read in part.engine_ops.items()}
ROW_EPILOGUES = tuple(op.overload for part in PARTS if isinstance(part, RowEpilogue) for op in part.ops)


def canonicalize(
    graph: fx.Graph, *, see_through_noops: bool = True, engine_groups: Mapping[object, str] = NO_GROUPS,
    asked: Collection[Part] = (),
) -> CanonicalGraph:  # fmt: skip
    """The graph in the dialect.

    Args:
        graph: a functional post-grad graph with fake tensors in `meta["val"]`; it is not changed.
        see_through_noops: `PassConfig.eliminate_noops`.
        engine_groups: the engine's identifiers of groups, with the names of the process groups behind them.
        asked: the opt-in parts to raise.

    Returns:
        A raised copy, topologically sorted, that knows the original of each of its values.
    """
    alike = functools.partial(
        canonicalize, see_through_noops=see_through_noops, engine_groups=engine_groups, asked=asked
    )
    canonical = CanonicalGraph.copy_of(graph, alike)
    of_no_part: dict[Stage, Callable[[CanonicalGraph], None]] = {
        Stage.ENGINES: functools.partial(_raise_engine_ops, groups=engine_groups),
        Stage.RESHAPES: _sink_reshapes,
        **({Stage.NOOPS: eliminate_noops} if see_through_noops else {}),
    }
    for stage in Stage:
        if stage in of_no_part:
            of_no_part[stage](canonical)
        for part, raise_part in RAISING[stage]:
            if not part.opt_in or part in asked:
                raise_part(canonical)
    sort_topologically(canonical.graph)
    return canonical


def _raise_engine_ops(canonical: CanonicalGraph, groups: Mapping[object, str]) -> None:
    """Raises an engine's ops, called directly or under `auto_functionalized`.

    Args:
        canonical: the graph.
        groups: the engine's identifiers of groups (`"tp:0"`, the handle of a shared-memory communicator), with the
            names of the process groups behind them.
    """
    for node in canonical.calls(*filter(is_engines, targets_of(canonical.graph))):
        op = engine_op(node)
        if op is None or op.namespace not in NAMESPACES:
            continue
        read = ENGINE_OPS.get(engine_op_name(node))
        if read is not None:
            merge_equal_results(canonical, node)
            read(canonical, node, arguments_of(node, op), groups)


def _sink_reshapes(canonical: CanonicalGraph) -> None:
    """`epilogue(reshape(y))` -> `reshape(epilogue(y))`, where the reshape keeps the last dimension and y is the result
    of one of the epilogue's cores.

    Such epilogues work on each row alone, so this is exact.
    """
    for node in canonical.calls(*ROW_EPILOGUES):
        reshape, part = node.args[0], part_at(node)
        assert isinstance(part, RowEpilogue)
        if not is_call(reshape, *RESHAPES) or not _is_result(reshape.args[0], part.cores):
            continue
        inner = reshape.args[0]
        before, after = tensor_of(inner), tensor_of(reshape)
        if before is None or after is None or not before.dim() or not equal_size(before.shape[-1], after.shape[-1]):
            continue
        op = ops.of(node.target)
        assert op is not None
        fakes = op.fake(before, *(tensor_of(arg) if isinstance(arg, fx.Node) else arg for arg in node.args[1:]))
        moved = canonical.insert_before(node, node.target, (inner, *node.args[1:]), fakes)
        moved.meta |= {key: node.meta[key] for key in (OPAQUE,) if key in node.meta}
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
        # One unknown size may be inferred; several are read off the moved reshape.
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


def _is_result(node: object, cores: frozenset[str]) -> bool:
    """Whether a node is the result of a core, its residual aside."""
    if is_call(node, operator.getitem):
        node = node.args[0] if node.args[1] == 0 else None
    part = part_at(node)
    return isinstance(part, Core) and part.name in cores
