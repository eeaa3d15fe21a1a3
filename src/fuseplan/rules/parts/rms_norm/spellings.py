"""RMSNorm, with and without a residual add, as Inductor's post-grad graphs spell it in aten.

    x32    = convert(x, float32)                    absent in float32 models
    normed = x32 * rsqrt(mean(x32 ** 2, -1) + eps)
    y      = weight * convert(normed, dtype)        `llama`
           | convert(normed * weight, dtype)        `gpt_oss`
           | convert(normed * (1 + weight), dtype)  `gemma`
           | convert(normed, dtype)                 no weight

and before it, with a residual add, `x = a + residual` in the activation dtype, or `x32 = convert(a) +
convert(residual)` with `residual_out = convert(x32, dtype)` in vLLM's form.

The root may be a power of -0.5. A norm without a weight gets a weight of ones, by which every convention multiplies
exactly; a graph gets one such value, where a fusion needs it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised, only_reader, read_elsewhere
from fuseplan.graph.facts import (
    ADDS,
    LOW_PRECISION,
    MULS,
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
from fuseplan.graph.legality import is_convex
from fuseplan.graph.ops import Rounding, ops
from fuseplan.graph.reach import path_between
from fuseplan.record import Reason
from fuseplan.rules.parts.rms_norm.mean_square import MeanSquare, mean_squares
from fuseplan.rules.parts.rms_norm.op import fused_add_rms_norm, rms_norm


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """An RMSNorm found in aten.

    Attributes:
        total: the tensor to normalise, in the dtype of the arithmetic.
        weight: [hidden]; None: no weight.
        eps: added to the mean square.
        rounding: the convention, as if there were no residual.
        y: the result.
        interior: every node from `total`, exclusive, to `y`.
        rounded_to: the dtype that the normalised value is rounded to before the weight; None: it isn't rounded.
    """

    total: fx.Node
    weight: fx.Node | None
    eps: float
    rounding: Rounding
    y: fx.Node
    interior: tuple[fx.Node, ...]
    rounded_to: torch.dtype | None = None


def raise_rms_norms(canonical: CanonicalGraph) -> None:
    """Raises every RMSNorm, and the residual add before it where there is one."""
    _merge_equal_casts(canonical)
    for root, found in mean_squares(canonical.graph):
        try:
            if found.lacks_epsilon:
                _read_norm(root, found)
                canonical.dynamic_epsilons += [canonical.origin[each] for each in (found.dynamic_eps,) if each]
            if found.deviations:
                raise found.deviation
            _raise(canonical, _read_norm(root, found))
        except Unraised as refused:
            refused.tell(canonical, rms_norm, "RMSNorm", at=[root, *found.normalised], place=root)


def _merge_equal_casts(canonical: CanonicalGraph) -> None:
    """Merges equal casts: a model that writes `x.float()` twice means one value."""
    first: dict[tuple[object, ...], fx.Node] = {}
    for cast in canonical.calls(convert_element_type):
        known = first.setdefault((*cast.args, canonical.region[cast]), cast)
        if known is not cast:
            canonical.replace(cast, known)


def _read_norm(rsqrt: fx.Node, mean_square: MeanSquare) -> _Norm:
    total, eps, interior = mean_square.total, mean_square.eps, mean_square.interior
    normed = _only_user(rsqrt, MULS, "the reciprocal root is multiplied by the input")
    if total not in normed.args:
        raise Unraised(Reason.OP, "the reciprocal root is multiplied by something other than the input", normed)
    unweighted = _unweighted(normed, total)
    if unweighted is not None:
        rounding = Rounding.LLAMA if unweighted is normed else Rounding.GPT_OSS
        inside = (*interior, *((normed,) if unweighted is normed else (normed, unweighted)))
        return _Norm(total=total, weight=None, eps=eps, rounding=rounding, y=unweighted, interior=inside)
    user = only_reader(normed, "the normalised value")
    if is_call(user, convert_element_type):
        product = _only_user(user, MULS, "the normalised value is multiplied by a weight")
        weight = _weight(other_operand(product, user), total, product)
        return _Norm(
            total=total, weight=weight, eps=eps, rounding=Rounding.LLAMA, y=product,
            interior=(*interior, normed, user, product), rounded_to=dtype_of(user),
        )  # fmt: skip
    if not is_call(user, *MULS):
        raise Unraised(
            Reason.OP, f"expected that the normalised value is multiplied by a weight, found {user.target}", user,
            expected=aten.mul.Tensor,
        )  # fmt: skip
    factor, adds_one = _strip_weight(other_operand(user, normed))
    weight = _weight(factor, total, user)
    y: fx.Node = user
    tail: tuple[fx.Node, ...] = (normed, user)
    if _input_dtype(total) in LOW_PRECISION:
        y = only_reader(user, "the weighted value")
        if not is_call(y, convert_element_type):
            raise Unraised(Reason.DTYPE, f"the weighted value stays in {dtype_of(user)}", y)
        tail = (*tail, y)
    rounding = Rounding.GEMMA if adds_one else Rounding.GPT_OSS
    if dtype_of(y) is dtype_of(total) and not adds_one:
        rounding = Rounding.LLAMA  # without casts, all conventions are the same and have one spelling
    return _Norm(total=total, weight=weight, eps=eps, rounding=rounding, y=y, interior=(*interior, *tail))


def _unweighted(normed: fx.Node, total: fx.Node) -> fx.Node | None:
    """The normalised value in the dtype of the input, if it isn't multiplied by a weight."""
    y = normed
    if _input_dtype(total) in LOW_PRECISION:
        y = next(iter(normed.users))
        if len(normed.users) != 1 or not is_call(y, convert_element_type):
            return None
    products = [user for user in y.users if is_call(user, *MULS)]
    factors = [_strip_weight(other_operand(product, y))[0] for product in products]
    return None if any(_is_weight(factor, total) for factor in factors) else y


def _strip_weight(factor: object) -> tuple[object, bool]:
    """(weight, whether 1 is added) of `convert(weight)` or `1 + convert(weight)`.

    A sum in low precision is rounded before the product, so it counts as a weight itself.
    """
    adds_one = False
    if (
        is_call(factor, *ADDS)
        and isinstance(factor.args[1], (int, float))
        and factor.args[1] == 1
        and dtype_of(factor) not in LOW_PRECISION
        and not factor.kwargs
    ):
        factor, adds_one = factor.args[0], True
    if is_call(factor, convert_element_type) and dtype_of(factor.args[0]) in LOW_PRECISION:
        factor = factor.args[0]
    return factor, adds_one


def _weight(node: object, total: fx.Node, product: fx.Node) -> fx.Node:
    if not _is_weight(node, total):
        raise Unraised(Reason.OP, "the factor is not a weight of one dimension", product)
    assert isinstance(node, fx.Node)
    return node


def _is_weight(node: object, total: fx.Node) -> bool:
    weight, normalised = tensor_of(node), tensor_of(total)
    return (
        weight is not None
        and normalised is not None
        and weight.dim() == 1
        and equal_size(weight.shape[0], normalised.shape[-1])
    )


def _weight_of(canonical: CanonicalGraph, norm: _Norm) -> fx.Node:
    if norm.weight is not None:
        return norm.weight
    y = tensor_of(norm.y)
    assert y is not None
    width: object = y.shape[-1]
    if isinstance(width, torch.SymInt):
        detail = "it has no weight, and rows whose width isn't known when the graph is compiled"
        raise Unraised(Reason.SIZE, detail, norm.y, "leave the width out of mark_dynamic")
    return canonical.constant(1, y.shape[-1:], like=y)


def _input_dtype(total: fx.Node) -> torch.dtype | None:
    """The dtype that `total` was cast from, looking through an addition of casts."""
    for node in (total, *(total.args if is_call(total, aten.add.Tensor) else ())):
        if is_call(node, convert_element_type) and dtype_of(node.args[0]) in LOW_PRECISION:
            return dtype_of(node.args[0])
    return dtype_of(total)


def _raise(canonical: CanonicalGraph, norm: _Norm) -> None:
    _check_interior(canonical, norm)
    total = norm.total
    dtype = norm.rounded_to or dtype_of(norm.y)
    if is_call(total, convert_element_type) and dtype_of(total.args[0]) in LOW_PRECISION:
        x = total.args[0]
        if dtype_of(x) is not dtype:
            raise Unraised(Reason.DTYPE, f"{dtype_of(x)} input, {dtype} normalised value", total)
        addends = _addends(x)
        if addends and _raise_with_residual(canonical, norm, x, addends, x, norm.rounding):
            return
        _raise_plain(canonical, norm, x)
    elif is_call(total, aten.add.Tensor) and dtype in LOW_PRECISION:
        _raise_wide_sum(canonical, norm, total)
    elif dtype_of(total) is dtype:
        if is_call(total, aten.add.Tensor) and _raise_with_residual(
            canonical, norm, total, total.args, total, norm.rounding
        ):
            return
        _raise_plain(canonical, norm, total)
    else:
        raise Unraised(Reason.DTYPE, f"{dtype_of(total)} input, {dtype} result", total)


def _addends(x: fx.Node) -> Sequence[object]:
    """The addends of a sum in low precision, or of a float32 sum rounded to it, which is bit for bit the same."""
    if is_call(x, aten.add.Tensor):
        return x.args
    if is_call(x, convert_element_type) and is_call(x.args[0], aten.add.Tensor) and not x.args[0].kwargs:
        narrow = [each.args[0] if is_call(each, convert_element_type) else each for each in x.args[0].args]
        if all(dtype_of(each) is dtype_of(x) for each in narrow):
            return narrow
    return ()


def _raise_plain(canonical: CanonicalGraph, norm: _Norm, x: fx.Node) -> None:
    weight = _weight_of(canonical, norm)
    if not is_convex({*norm.interior}, (x, weight)):
        raise Unraised(Reason.CYCLE, "the weight depends on the norm", weight)
    canonical.raise_op(rms_norm, (x, weight, norm.eps, norm.rounding.value), (norm.y,))


def _raise_wide_sum(canonical: CanonicalGraph, norm: _Norm, total: fx.Node) -> None:
    """vLLM's form: the sum stays in float32, and is rounded only for the residual stream or not at all."""
    dtype = norm.rounded_to or dtype_of(norm.y)
    narrow = [node.args[0] if is_call(node, convert_element_type) else node for node in total.args]
    if dtype not in [dtype_of(node) for node in narrow] or norm.rounding.adds_one:
        found = " and ".join(map(dtype_name, narrow))
        wanted = str(dtype).removeprefix("torch.")
        raise Unraised(Reason.DTYPE, f"it norms a float32 sum of {found}; both must be {wanted}", total)
    others = [user for user in total.users if user not in norm.interior]
    rounded = [user for user in others if is_call(user, convert_element_type) and dtype_of(user) is dtype]
    residual_out: fx.Node | None
    if all(dtype_of(node) is dtype for node in narrow) and rounded == others:
        for twin in rounded[1:]:
            canonical.replace(twin, rounded[0])
        residual_out = rounded[0] if rounded else None
        rounding = Rounding.VLLM if norm.rounding.rounds_normed else Rounding.FP32
    elif norm.rounding.rounds_normed:
        residual_out, rounding = total if others else None, Rounding.VLLM_FP32_RESIDUAL
    elif rounded != others:
        other = next(user for user in others if user not in rounded)
        raise read_elsewhere(other, total, "the unrounded sum")
    else:
        found = " and ".join(map(dtype_name, narrow))
        wanted = str(dtype).removeprefix("torch.")
        detail = f"it norms a float32 sum of {found}, and its weight multiplies unrounded values; both must be {wanted}"
        raise Unraised(Reason.DTYPE, detail, total)
    if not _raise_with_residual(canonical, norm, total, narrow, residual_out, rounding):
        raise Unraised(Reason.OP, "no convention fits this sum", total)


def _raise_with_residual(
    canonical: CanonicalGraph,
    norm: _Norm,
    total: fx.Node,
    addends: Iterable[object],
    residual_out: fx.Node | None,
    rounding: Rounding,
) -> bool:
    left, right = addends
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or total.kwargs:
        return False
    if not equal_shape(tensor_of(left), tensor_of(right)):
        return False
    x, residual = (left, right) if _is_output(canonical, left, right) else (right, left)
    if dtype_of(x) is not dtype_of(residual):
        x, residual = (left, right) if dtype_of(left) is (norm.rounded_to or dtype_of(norm.y)) else (right, left)
        if rounding.rounds_residual or dtype_of(residual) is not torch.float32:
            return False
    region = {*norm.interior, norm.total, total, *([residual_out] if residual_out else [])}
    weight = _weight_of(canonical, norm)
    if canonical.region[total] != canonical.region[norm.y] or not is_convex(region, (x, residual, weight)):
        return False
    args = (x, residual, weight, norm.eps, rounding.value)
    if residual_out is total and all(user in region for node in (total, norm.total) for user in node.users):
        residual_out = None
    canonical.raise_op(fused_add_rms_norm, args, (norm.y, residual_out))
    return True


def _is_output(canonical: CanonicalGraph, addend: fx.Node, other: fx.Node) -> bool:
    """Whether an addend is the block's output, and the other one the residual. The output is, in this order: an
    all-reduce read only by this sum; a value computed from an all-reduce and read only by this sum; an all-reduce that
    the other addend doesn't depend on; the deeper addend.
    """
    mine, others = _certainty(addend, other), _certainty(other, addend)
    return mine > others if mine != others else canonical.is_deeper(addend, other)


def _certainty(addend: fx.Node, other: fx.Node) -> int:
    reached = path_between(addend, _is_reduced, "inputs")
    if reached is None:
        return 0
    way, reduced = reached
    if all(len(node.users) == 1 for node in (*way, reduced)):
        return 2 if way else 3
    return 1 if not way and is_convex([reduced], [other]) else 0


def _is_reduced(node: fx.Node) -> bool:
    op = ops.of(node.target)
    return op is not None and op.collective


def _check_interior(canonical: CanonicalGraph, norm: _Norm) -> None:
    inside = {*norm.interior}
    for node in norm.interior[:-1]:
        for user in node.users:
            if user not in inside:
                raise read_elsewhere(user, node, f"{node.name}, a value inside it,")
    for node in norm.interior:
        if canonical.region[node] != canonical.region[norm.interior[0]]:
            raise Unraised(Reason.MUTATION, "an in-place op stands inside it", node)


def _only_user(node: fx.Node, targets: tuple[object, ...], what: str) -> fx.Node:
    user = only_reader(node, node.name)
    if not is_call(user, *targets):
        raise Unraised(Reason.OP, f"expected that {what}, found {user.target}", user, expected=targets[0])
    return user
