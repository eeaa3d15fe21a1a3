"""Rotary position embeddings of normalised queries and keys, as Inductor's post-grad graphs spell them in aten.

    y = x * cos + cat(-x2, x1) * sin                          Hugging Face's `rotate_half`
    y = cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)         vLLM, Hugging Face GPT-OSS

x1 and x2 are the halves of x, by slices or splits. Where x is cast to float32 first, or multiplied by angles in
float32, y is cast back. Queries and keys are raised together, since they share their angles: two tensors count as a
layer's queries and keys if they are rotated by the same cosines and sines and neither is computed from the other.

Queries and keys without a norm before them aren't raised here; if the keys are cached,
`fuseplan.rules.parts.cached_rotary` raises both.
"""

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fuseplan.graph.canonical import CanonicalGraph, is_dialect
from fuseplan.graph.canonical.unraised import Unraised, only_reader
from fuseplan.graph.facts import (
    LOW_PRECISION,
    MULS,
    RESHAPES,
    Call,
    aten,
    convert_element_type,
    dtype_name,
    dtype_of,
    equal_shape,
    equal_size,
    is_call,
    other_operand,
    tensor_of,
)
from fuseplan.graph.legality import Contraction, is_convex
from fuseplan.graph.ops import RotaryRounding
from fuseplan.graph.reach import path_between
from fuseplan.graph.surgery import sort_topologically
from fuseplan.record import Reason
from fuseplan.rules.parts.halves import SPLITS, Half, half_of, is_last, width_of
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.rotary.angles import spread
from fuseplan.rules.parts.rotary.op import rotary_embedding

VIEWS = (
    *RESHAPES, *SPLITS, aten.expand.default, aten.permute.default, aten.slice.Tensor, aten.unsqueeze.default,
    convert_element_type, operator.getitem,
)  # fmt: skip
"""Ops that models apply to cosines and sines once for the queries and again for the keys."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotation:
    """A tensor that is rotated.

    Attributes:
        root: the negation or subtraction that the search started from.
        x: the tensor to rotate, in its dtype before any cast.
        cos: broadcasts to x, or to its half.
        sin: broadcasts to x, or to its half.
        y: the result, in x's dtype.
        rounding: where it rounds.
        interior: the nodes between x, exclusive, and y, inclusive.
    """

    root: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    y: fx.Node
    rounding: RotaryRounding
    interior: tuple[fx.Node, ...]

    @property
    def angles(self) -> Hashable:
        """A key that a layer's queries and keys have in common."""
        return _identity(self.cos), _identity(self.sin), self.rounding, dtype_of(self.x)


def raise_rotary_embeddings(canonical: CanonicalGraph) -> None:
    """Raises every rotary embedding of normalised queries and keys, both as one op."""
    found: list[Rotation] = []
    for root, read in read_rotations(canonical):
        if isinstance(read, Rotation):
            found.append(read)
        elif is_normed(root):
            _tell(canonical, root, read)
    angles = {rotation.angles for rotation in found if is_normed(rotation.x)}
    found = [rotation for rotation in found if rotation.angles in angles]
    if not found:
        return
    sort_topologically(canonical.graph)
    single = {*found}
    for q, k in _pairs(canonical, found):
        single -= {q, k}
        cos, sin = (spread(canonical, angle, q.x, q.interior) for angle in (q.cos, q.sin))
        canonical.raise_op(rotary_embedding, (q.x, k.x, cos, sin, q.rounding.value), (q.y, k.y))
    for rotation in found:
        if rotation in single and is_normed(rotation.x):
            detail = "no other tensor is rotated by the same angles, as queries and keys of a layer are"
            _tell(canonical, rotation.root, Unraised(Reason.OP, detail, rotation.root))


def read_rotations(canonical: CanonicalGraph) -> Iterator[tuple[fx.Node, Rotation | Unraised]]:
    """(root, rotation) of each rotated tensor in graph order, or (root, error) of a lookalike."""
    for root in canonical.calls(aten.neg.default, aten.sub.Tensor):
        try:
            rotation = _read(root)
            if rotation is not None:
                yield root, _checked(canonical, rotation)
        except Unraised as refused:
            yield root, refused


def _tell(canonical: CanonicalGraph, root: fx.Node, refused: Unraised) -> None:
    refused.tell(canonical, rotary_embedding, "rotary embedding", at=[root], place=root)


def _pairs(canonical: CanonicalGraph, found: Sequence[Rotation]) -> list[tuple[Rotation, Rotation]]:
    """Pairs (queries, keys): a rotation and the next one in graph order with the same angles that can share its op."""
    waiting = sorted(found, key=lambda each: each.y)
    pairs: list[tuple[Rotation, Rotation]] = []
    while waiting:
        first = waiting.pop(0)
        second = next((each for each in waiting if each.angles == first.angles and _is_legal(first, each)), None)
        if second is not None:
            waiting.remove(second)
            pairs.append((second, first) if _are_keys(first, second) else (first, second))
    regions = [{*q.interior, *k.interior} for q, k in pairs]
    cyclic = {index for cycle in Contraction(canonical.graph).cycles(regions) for index in cycle}
    return [pair for index, pair in enumerate(pairs) if index not in cyclic]


def _is_legal(first: Rotation, second: Rotation) -> bool:
    return is_convex({*first.interior, *second.interior}, (first.x, second.x, first.cos, first.sin))


def _are_keys(first: Rotation, second: Rotation) -> bool:
    """Whether the first rotation is of the keys: it has fewer heads, or it alone is written into a cache."""
    return _has_fewer_heads(first, second) or (
        _is_stored(first) and not _is_stored(second) and not _has_fewer_heads(second, first)
    )


def _is_stored(rotation: Rotation) -> bool:
    return any(is_call(user, aten.index_put.default) and user.args[2] is rotation.y for user in rotation.y.users)


def _has_fewer_heads(first: Rotation, second: Rotation) -> bool:
    left, right = tensor_of(first.x), tensor_of(second.x)
    assert left is not None and right is not None
    sizes = [(a, b) for a, b in zip(left.shape, right.shape, strict=False) if not equal_size(a, b)]
    return any(isinstance(a, int) and isinstance(b, int) and a < b for a, b in sizes)


def _identity(value: Any) -> Hashable:
    """A key that equal views of one node have in common."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    if is_call(value, *VIEWS):
        return (value.target, *map(_identity, value.args), *sorted(map(str, value.kwargs.items())))
    return value if isinstance(value, Hashable) else str(value)


def _checked(canonical: CanonicalGraph, rotation: Rotation) -> Rotation:
    """The rotation; raises where a detail that models vary makes it a different op."""
    x, cos, sin = map(tensor_of, (rotation.x, rotation.cos, rotation.sin))
    if x is None or cos is None or sin is None or not cos.dim():
        raise Unraised(Reason.OP, "its angles aren't tensors", rotation.root)
    if x.dim() < 3:
        raise Unraised(Reason.SIZE, f"x has {x.dim()} dimensions, and none for its heads", rotation.root)
    width = x.shape[-1]
    if not equal_shape(x, tensor_of(rotation.y)) or not equal_shape(cos, sin):
        raise Unraised(Reason.SIZE, "cosines and sines don't have one shape that broadcasts to x", rotation.root)
    if not equal_size(cos.shape[-1], width) and not equal_size(2 * cos.shape[-1], width):
        detail = f"{cos.shape[-1]} angles a head are given for its {width} dimensions"
        raise Unraised(Reason.SIZE, detail, rotation.root)
    if len({canonical.region[node] for node in rotation.interior}) > 1:
        raise Unraised(Reason.MUTATION, "an in-place op stands inside it", rotation.root)
    return rotation


# Reading one tensor's rotation.


def _read(root: Call) -> Rotation | None:
    """The rotation that a root is part of; None where the root doesn't look like part of one.

    Raises:
        Unraised: it looks like a rotation and isn't one.
    """
    return _read_rotated(root) if is_call(root, aten.neg.default) else _read_halves(root)


def _read_rotated(neg: Call) -> Rotation | None:
    """`x * cos + cat(-x2, x1) * sin`"""
    second = half_of(neg.args[0])
    if second is None or second.index != 1:
        return None
    if second.interleaved:
        raise _interleaved(neg)
    cat = _joined(neg)
    if cat is None or cat.args[0][0] is not neg:
        return None
    first = half_of(cat.args[0][1])
    if first is None or first.index != 0 or first.source is not second.source or first.interleaved:
        return None
    source = second.source
    _require_whole(source, neg)
    rotated = only_reader(cat, "the rotated half")
    total = only_reader(rotated, "its product with the sines") if is_call(rotated, *MULS) else rotated
    if not is_call(rotated, *MULS) or not is_call(total, aten.add.Tensor) or total.kwargs:
        raise Unraised(Reason.OP, "the rotated half isn't multiplied by sines and added", total)
    straight = total.args[1] if total.args[0] is rotated else total.args[0]
    if not is_call(straight, *MULS) or source not in straight.args:
        raise Unraised(Reason.OP, "the value added to the rotated half isn't x times cosines", total)
    only_reader(straight, "the product of x and the cosines")
    return _finish(
        neg,
        source,
        other_operand(straight, source),
        other_operand(rotated, cat),
        total,
        (straight, rotated),
        (neg, cat, total),
    )


def _read_halves(sub: Call) -> Rotation | None:
    """`cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`"""
    both = [(left, right) for left in _products(sub.args[0]) for right in _products(sub.args[1])]
    fitting = [each for each in both if _are_parts(*each)]
    if not fitting or sub.kwargs:
        return None
    left, right = min(fitting, key=lambda each: len(fitting) > 1 and not is_normed(each[0].part.source))
    if left.part.interleaved:
        raise _interleaved(sub)
    source = left.part.source
    _require_whole(source, sub)
    cat = _joined(sub)
    if cat is None or cat.args[0][0] is not sub:
        raise Unraised(Reason.OP, "the rotated halves aren't joined again, the first before the second", sub)
    add = cat.args[0][1]
    terms = add.args if is_call(add, aten.add.Tensor) and not add.kwargs else ()
    by_half = {each.part.index: each for term in terms for each in _products(term) if each.part.source is source}
    if set(by_half) != {0, 1}:
        raise Unraised(Reason.OP, "the second half isn't x2 times cosines plus x1 times sines", cat)
    same = [(by_half[1].factor, left.factor), (by_half[0].factor, right.factor)]
    if any(_identity(each) != _identity(other) for each, other in same):
        raise Unraised(Reason.OP, "the halves are rotated by different angles", cat)
    multiplied = (left.node, right.node, by_half[0].node, by_half[1].node)
    for node in (*multiplied, add):
        only_reader(node, f"{node.name}, a value inside it,")
    return _finish(sub, source, left.factor, right.factor, cat, multiplied, (sub, add, cat))


def _finish(
    root: fx.Node, source: fx.Node, cos: object, sin: object, result: fx.Node, products: Sequence[fx.Node],
    others: Sequence[fx.Node],
) -> Rotation:  # fmt: skip
    """The rotation, with its rounding read off the dtypes of x, the products and the result."""
    if not isinstance(cos, fx.Node) or not isinstance(sin, fx.Node):
        raise Unraised(Reason.OP, "its angles aren't tensors", root)
    is_cast = is_call(source, convert_element_type) and dtype_of(source.args[0]) in LOW_PRECISION
    x = source.args[0] if is_cast else source
    assert isinstance(x, fx.Node)
    dtype, computed = dtype_of(x), {dtype_of(each) for each in (*products, *others)}
    if computed == {dtype}:
        rounding, y, interior = RotaryRounding.PRODUCTS, result, (*products, *others)
    elif {dtype_of(each) for each in (*products, result)} == {torch.float32} and dtype in LOW_PRECISION:
        y = only_reader(result, "the rotated value")
        if not is_call(y, convert_element_type) or dtype_of(y) is not dtype:
            raise Unraised(Reason.DTYPE, f"x is {dtype_name(x)}, and the rotated value stays in float32", y)
        rounding, interior = RotaryRounding.FP32, (*products, *others, y)
    else:
        names = ", ".join(sorted({str(each).removeprefix("torch.") for each in computed}))
        raise Unraised(Reason.DTYPE, f"x is {dtype_name(x)}, and it is rotated in {names}", root)
    return Rotation(root=root, x=x, cos=cos, sin=sin, y=y, rounding=rounding, interior=interior)


@dataclass(frozen=True)
class _Product:
    """A part times cosines or sines."""

    node: fx.Node
    part: Half
    factor: object


def _products(node: object) -> list[_Product]:
    """The readings of a product as a half times a factor: two where the angles are halves of a tensor as well."""
    if not is_call(node, *MULS):
        return []
    readings = ((half_of(part), factor) for part, factor in (node.args, node.args[::-1]))
    return [_Product(node, part, factor) for part, factor in readings if part is not None]


def _are_parts(first: _Product, second: _Product) -> bool:
    """Whether two products have the two halves of one tensor as operands."""
    one, other = first.part, second.part
    return one.source is other.source and (one.index, other.index) == (0, 1) and one.interleaved is other.interleaved


def is_normed(node: fx.Node) -> bool:
    """Whether there is a norm nearby, towards the inputs."""
    return path_between(node, lambda node: is_dialect(node, rms_norm), "inputs") is not None


def _joined(part: fx.Node) -> Call | None:
    """The concatenation of two parts along the last dimension, if it is the only reader of the part."""
    (cat,) = part.users if len(part.users) == 1 else (None,)
    if not is_call(cat, aten.cat.default) or len(cat.args[0]) != 2:
        return None
    return cat if is_last(cat, (*cat.args, 0)[1]) else None


def _require_whole(source: fx.Node, root: fx.Node) -> None:
    """Raises where only a part of each head is rotated."""
    for node in _casts_and_parts(source):
        whole = node.args[0].args[0] if is_call(node, operator.getitem) else node.args[0]
        rotated, width = width_of(node), width_of(whole)
        if rotated != width:
            detail = f"it rotates {rotated} of a head's {width} dimensions (partial rotary), and the op rotates all"
            raise Unraised(Reason.ATTRIBUTE, detail, root)


def _casts_and_parts(node: object) -> Iterator[Call]:
    while True:
        if is_call(node, convert_element_type, aten.slice.Tensor):
            yield node
            node = node.args[0]
        elif is_call(node, operator.getitem) and is_call(node.args[0], *SPLITS):
            yield node
            node = node.args[0].args[0]
        else:
            return


def _interleaved(root: fx.Node) -> Unraised:
    detail = "it rotates neighbours against each other (interleaved, GPT-J), and the op rotates halves (GPT-NeoX)"
    return Unraised(Reason.ATTRIBUTE, detail, root)
