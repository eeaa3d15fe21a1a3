"""Memory layouts of scales in graphs: copies of a matrix [rows, groups] column by column, padded or packed.

columns  permute(clone(permute(s)))
aligned  slice(slice_scatter(t, copy(slice(t), s))), t = permute(empty), as DeepGEMM's helper in plain torch
packed   the same of the bytes (view(s, int32) >> 23) in zeros, viewed as int32
swizzled view(permute(view(permute(view(z, [R, 128, C, 4]), [0, 2, 1, 3]), [R * C, 4, 32, 4]), [0, 2, 1, 3])), z = s in
         zeros, as torchao's `to_blocked`
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fuseplan.graph.facts import (
    ORDER_KEEPING,
    RESHAPES,
    Call,
    aten,
    convert_element_type,
    equal_shape,
    equal_size,
    equal_sizes,
    fill_of,
    is_call,
    tensor_of,
)
from fuseplan.graph.ops import PACKED, SWIZZLED_ROWS, TILE_GROUPS, TILE_ROWS, ScaleLayout, empty_scales
from fuseplan.rules.parts.fp8 import Scaling

NEW = (aten.empty.memory_format, aten.full.default)


def layout_of(scale: fx.Node, scaling: Scaling, rows: fx.Node, groups: Any) -> tuple[ScaleLayout, fx.Node]:
    """The layout of the scales that are results, beside those that scale x, and the node that holds them in it.

    Args:
        scale: the node that holds the scales in rows.
        scaling: the scaling by them.
        rows: the rows that they scale.
        groups: number of groups of a row.
    """
    x = tensor_of(rows)
    assert x is not None
    views = list(_views_ahead(scale))
    inside = {scaling.factor, *scaling.factor.users, *_back(scaling.factor, scale)}
    starts = {user for view in views for user in view.users} - {*views, *inside}
    if len(starts) != 1:
        return ScaleLayout.ROWS, scale
    (start,) = starts
    for layout, read in (
        (ScaleLayout.COLUMNS, _columns),
        (ScaleLayout.ALIGNED, _aligned),
        (ScaleLayout.PACKED, _packed),
    ):
        last = read(start)
        if last is not None and _lies(last, empty_scales(x, groups, torch.float32, layout)):
            return layout, last
    return ScaleLayout.ROWS, scale


def swizzled(scale: fx.Node, rows: fx.Node, groups: Any) -> fx.Node | None:
    """The node that holds scales in the layout `ScaleLayout.SWIZZLED`, given the node that holds them in rows."""
    x, value = tensor_of(rows), tensor_of(scale)
    assert x is not None and value is not None
    wanted = empty_scales(x, groups, value.dtype, ScaleLayout.SWIZZLED)
    down, along = wanted.shape[0] // SWIZZLED_ROWS, wanted.shape[1] // (TILE_ROWS // SWIZZLED_ROWS * TILE_GROUPS)
    views = list(_views_ahead(scale))
    starts = {user for view in views for user in view.users} - set(views)
    starts -= {user for user in starts if is_call(user, convert_element_type)}  # towards the factor of the groups
    if len(starts) != 1:
        return None
    (start,) = starts
    node = start if is_call(start, aten.permute.default) else None
    if node is None:
        whole = _in_zeros(start, groups)
        padded = tensor_of(whole)
        if padded is None or not equal_sizes(padded.shape, (down * TILE_ROWS, along * TILE_GROUPS)):
            return None
        node = _only(_only(whole, *RESHAPES), aten.permute.default)
    for shape in (
        (down, TILE_ROWS, along, TILE_GROUPS),
        (down * along, TILE_ROWS // SWIZZLED_ROWS, SWIZZLED_ROWS, TILE_GROUPS),
    ):
        tiles = tensor_of(node.args[0]) if node is not None else None
        if tiles is None or node is None or list(node.args[1]) != [0, 2, 1, 3] or not equal_sizes(tiles.shape, shape):
            return None
        view = _only(node, *RESHAPES)
        node = _only(view, aten.permute.default)
    # The result may be flat, or keep a dimension for tiles, as in `to_blocked`.
    last: fx.Node | None = view
    while last is not None and not equal_shape(tensor_of(last), wanted):
        last = _only(last, *ORDER_KEEPING)
    return last or view


def _in_zeros(start: fx.Node, groups: Any) -> fx.Node | None:
    """New memory of zeros, behind a copy into its first rows and columns, or behind a single scatter into these."""
    source = tensor_of(start.args[1]) if len(start.args) > 1 else None
    if source is None or source.dim() != 2 or not equal_size(source.shape[1], groups):
        return None
    if not is_call(start, aten.slice_scatter.default):
        return _written(start)
    whole, _, *place = start.args
    return start if _is_first(place) and _is_zeros(whole) else None


def _is_zeros(node: object) -> bool:
    return is_call(node, aten.full.default) and fill_of(node) == 0


def _views_ahead(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and all views of it that keep the order of its elements."""
    yield node
    for user in node.users:
        if is_call(user, *ORDER_KEEPING):
            yield from _views_ahead(user)


def _back(node: fx.Node, first: fx.Node) -> Iterator[fx.Node]:
    """The nodes from one node back to another."""
    while node is not first and node.all_input_nodes:
        yield node
        node = node.all_input_nodes[0]


def _lies(node: fx.Node, like: torch.Tensor) -> bool:
    value = tensor_of(node)
    assert value is not None
    return equal_shape(value, like) and equal_sizes(value.stride(), like.stride())


def _only(node: fx.Node | None, *targets: Any) -> Call | None:
    """The only user of a node, if it calls one of the ops."""
    user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
    return user if is_call(user, *targets) else None


def _last(node: fx.Node) -> Any:
    value = tensor_of(node)
    assert value is not None
    return value.shape[-1]


def _swaps(node: object) -> bool:
    """Whether it transposes the last two dimensions."""
    if not is_call(node, aten.permute.default):
        return False
    order = list(range(len(node.args[1])))
    return list(node.args[1]) == [*order[:-2], *reversed(order[-2:])]


def _columns(start: fx.Node) -> fx.Node | None:
    """Finds the copy by the strides of a view of it: the clone itself may have been removed."""
    if not _swaps(start):
        return None
    clone = _only(start, aten.clone.default)
    last = _only(start if clone is None else clone, aten.permute.default)
    return last if _swaps(last) else None


def _aligned(start: fx.Node) -> fx.Node | None:
    """`start` copies into memory in column layout, or into its first rows."""
    moved = _written(start)
    return _first_rows(moved) if moved is not None else None


def _written(copy: fx.Node | None) -> fx.Node | None:
    """The whole of the new memory behind a copy into its first rows and columns."""
    if not is_call(copy, aten.copy.default) or not _is_new(copy.args[0]):
        return None
    whole: fx.Node = copy
    while (scatter := _only(whole, aten.slice_scatter.default)) is not None:
        _, source, *place = scatter.args
        if source is not whole or not _is_first(place) or not _is_new(scatter.args[0]):
            return None
        whole = scatter
    return whole


def _is_new(node: object) -> bool:
    """Whether it is new memory, uninitialised or of zeros, or a part of it that starts at the first row."""
    while (
        is_call(node, *ORDER_KEEPING) or _swaps(node)
        or (is_call(node, aten.slice.Tensor) and _is_first(node.args[1:]))
    ):  # fmt: skip
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return is_call(node, *NEW) and fill_of(node) in (None, 0)


def _is_first(place: Sequence[Any]) -> bool:
    """Whether a slice (dim, start, end, step) starts at the first element and has no gaps."""
    given = dict(zip(("dim", "start", "end", "step"), place, strict=False))
    return given.get("start") == 0 and given.get("step", 1) == 1


def _first_rows(node: fx.Node) -> fx.Node | None:
    """A value's first rows, without further dimensions of one element; their number is checked later."""
    part = _only(node, aten.slice.Tensor)
    if part is not None and not _is_first(part.args[1:]):
        return None
    rows = node if part is None else part
    squeezed = _only(rows, aten.squeeze.dim, aten.squeeze.dims)
    return rows if squeezed is None else squeezed


def _packed(start: fx.Node) -> fx.Node | None:
    """`start` views float32 as integers; the exponents are then stored as bytes."""
    if not is_call(start, aten.view.dtype) or start.args[1] is not torch.int32:
        return None
    shifted = _only(start, aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar)
    narrow = _only(shifted, convert_element_type)
    if shifted is None or shifted.args[1] != 23 or narrow is None or narrow.args[1] is not torch.uint8:
        return None
    node = narrow
    while (view := _only(node, aten.expand.default, *ORDER_KEEPING)) is not None:
        node = view
    whole = _written(_only(node, aten.copy.default))
    if whole is None:
        return None
    words = whole
    while (view := _only(words, aten.view.dtype, *ORDER_KEEPING)) is not None:
        words = view
    moved = _only(words, aten.copy.default)
    if moved is None or moved.args[1] is not words or not _is_new(moved.args[0]):
        return None
    return _first_rows(moved) if equal_size(_last(whole), PACKED * _last(words)) else None
