"""RMSNorm, with and without a residual add, as Inductor's post-grad graphs spell it in aten.

    x32    = convert(x, float32)                    absent in float32 models
    normed = x32 * rsqrt(mean(x32 ** 2, -1) + eps)
    y      = weight * convert(normed, dtype)        `llama`
           | convert(normed * weight, dtype)        `gpt_oss`
           | convert(normed * (1 + weight), dtype)  `gemma`

and before it, with a residual add, `x = a + residual` in the activation dtype, or `x32 = convert(a) +
convert(residual)` with `residual_out = convert(x32, dtype)` in vLLM's form.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import Rounding, ops
from fuseplan.graph.facts import (
    ADDS,
    MULS,
    aten,
    convert_element_type,
    dtype_of,
    equal_shape,
    equal_size,
    is_call,
    tensor_of,
)
from fuseplan.graph.legality import is_convex
from fuseplan.record import Reason

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """An RMSNorm found in aten.

    Attributes:
        total: what is normalised, in the dtype of the arithmetic.
        weight: [hidden].
        eps: added to the mean square.
        rounding: the convention, as if there were no residual.
        y: the result.
        interior: every node from `total`, exclusive, to `y`.
        rounded_to: what the normalised value is rounded to before the weight, None where it isn't.
    """

    total: fx.Node
    weight: fx.Node
    eps: float
    rounding: Rounding
    y: fx.Node
    interior: tuple[fx.Node, ...]
    rounded_to: torch.dtype | None = None


class _NotANorm(Exception):
    """Ends the reading of a candidate; carries why, and the node that was in the way."""

    def __init__(
        self, reason: Reason, detail: str, node: fx.Node, mend: str | None = None, *, expected: str = ""
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.node, self.mend = reason, detail, node, mend
        self.expected = expected or None
        self.found = str(node.target) if expected and node.op == "call_function" else None


DYNAMIC_EPSILON = (
    "dynamic=True makes Python floats dynamic: mark sizes with torch._dynamo.mark_dynamic instead, or set "
    "torch._dynamo.config.specialize_float = True"
)


def raise_rms_norms(canonical: CanonicalGraph) -> None:
    """Raises every RMSNorm, and the residual add before it where there is one."""
    for rsqrt in canonical.calls(aten.rsqrt.default):
        try:
            mean_square = _mean_square(rsqrt)
            if mean_square is not None:
                _raise(canonical, _read_norm(rsqrt, *mean_square))
        except _NotANorm as refused:
            canonical.refuse(
                ops.rms_norm, [rsqrt, *_normalised(rsqrt)], refused.reason,
                f"RMSNorm not recognised: {refused.detail}", node=refused.node, place=rsqrt, found=refused.found,
                expected=refused.expected, mend=refused.mend,
            )  # fmt: skip


def _normalised(rsqrt: fx.Node) -> list[fx.Node]:
    """What `rsqrt(mean(total ** 2) + eps)` normalises, and what that was cast from."""
    node: object = rsqrt
    for _ in range(4):
        node = node.args[0] if isinstance(node, fx.Node) and node.args else None
    if not isinstance(node, fx.Node):
        return []
    return [node, node.args[0]] if is_call(node, convert_element_type) else [node]


def _mean_square(rsqrt: fx.Node) -> tuple[fx.Node, float, tuple[fx.Node, ...]] | None:
    """(total, eps, interior) of `rsqrt(mean(total ** 2, -1) + eps)`, or None."""
    add = rsqrt.args[0]
    if not is_call(add, *ADDS):
        return None
    mean, eps = add.args
    if not is_call(mean, aten.mean.dim):
        return None
    if isinstance(eps, fx.Node):
        raise _NotANorm(
            Reason.ATTRIBUTE, "epsilon is a value of the graph, and the op takes a constant", eps, DYNAMIC_EPSILON
        )
    square, dims, keepdim = (*mean.args, None, None)[:3]
    value = tensor_of(square)
    power = is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
    product = is_call(square, *MULS) and square.args[0] is square.args[1]
    if value is None or not keepdim or not (power or product):
        return None
    if list(dims) not in ([-1], [value.dim() - 1]):
        raise _NotANorm(Reason.LAYOUT, f"the mean is over dimensions {list(dims)}, not over the last alone", mean)
    return square.args[0], float(eps), (square, mean, add, rsqrt)


def _read_norm(rsqrt: fx.Node, total: fx.Node, eps: float, interior: tuple[fx.Node, ...]) -> _Norm:
    normed = _only_user(rsqrt, MULS, "the reciprocal root is multiplied to the input")
    if total not in normed.args:
        raise _NotANorm(Reason.OP, "the reciprocal root is multiplied to something else than the input", normed)
    user = _single_user(normed, "the normalised value")
    if is_call(user, convert_element_type):
        product = _only_user(user, MULS, "the normalised value is multiplied by a weight")
        weight = _weight(_other(product, user), total, product)
        return _Norm(
            total=total, weight=weight, eps=eps, rounding=Rounding.LLAMA, y=product,
            interior=(*interior, normed, user, product), rounded_to=dtype_of(user),
        )  # fmt: skip
    if not is_call(user, *MULS):
        raise _NotANorm(
            Reason.OP, f"expected that the normalised value is multiplied by a weight, found {user.target}", user,
            expected=str(aten.mul.Tensor),
        )  # fmt: skip
    factor, adds_one = _strip_weight(_other(user, normed))
    weight = _weight(factor, total, user)
    y: fx.Node = user
    tail: tuple[fx.Node, ...] = (normed, user)
    if _input_dtype(total) in LOW_PRECISION:
        y = _single_user(user, "the weighted value")
        if not is_call(y, convert_element_type):
            raise _NotANorm(Reason.DTYPE, f"the weighted value stays in {dtype_of(user)}", y)
        tail = (*tail, y)
    rounding = Rounding.GEMMA if adds_one else Rounding.GPT_OSS
    if dtype_of(y) is dtype_of(total) and not adds_one:
        rounding = Rounding.LLAMA  # nothing is cast anywhere: the conventions are one, and have one spelling
    return _Norm(total=total, weight=weight, eps=eps, rounding=rounding, y=y, interior=(*interior, *tail))


def _strip_weight(factor: object) -> tuple[object, bool]:
    """(weight, whether 1 is added) of `convert(weight)` or `1 + convert(weight)`."""
    adds_one = False
    if is_call(factor, *ADDS) and isinstance(factor.args[1], (int, float)) and factor.args[1] == 1:
        factor, adds_one = factor.args[0], True
    if is_call(factor, convert_element_type) and dtype_of(factor.args[0]) in LOW_PRECISION:
        factor = factor.args[0]
    return factor, adds_one


def _weight(node: object, total: fx.Node, product: fx.Node) -> fx.Node:
    weight, normalised = tensor_of(node), tensor_of(total)
    if (
        weight is None
        or normalised is None
        or weight.dim() != 1
        or not equal_size(weight.shape[0], normalised.shape[-1])
    ):
        raise _NotANorm(Reason.OP, "the factor is not a weight of one dimension", product)
    assert isinstance(node, fx.Node)
    return node


def _input_dtype(total: fx.Node) -> torch.dtype | None:
    """The dtype of what was cast to `total`, looking through an addition of casts."""
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
            raise _NotANorm(Reason.DTYPE, f"{dtype_of(x)} input, {dtype} normalised value", total)
        if is_call(x, aten.add.Tensor) and _raise_with_residual(canonical, norm, x, x.args, x, norm.rounding):
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
        raise _NotANorm(Reason.DTYPE, f"{dtype_of(total)} input, {dtype} result", total)


def _raise_plain(canonical: CanonicalGraph, norm: _Norm, x: fx.Node) -> None:
    if not is_convex({*norm.interior}, (x, norm.weight)):
        raise _NotANorm(Reason.CYCLE, "the weight depends on the norm", norm.weight)
    canonical.raise_op(ops.rms_norm, (x, norm.weight, norm.eps, norm.rounding.value), (norm.y,))


def _raise_wide_sum(canonical: CanonicalGraph, norm: _Norm, total: fx.Node) -> None:
    """vLLM's form: the sum stays in float32, and is rounded for the residual stream alone or not at all."""
    dtype = norm.rounded_to or dtype_of(norm.y)
    narrow = [node.args[0] if is_call(node, convert_element_type) else node for node in total.args]
    if dtype not in [dtype_of(node) for node in narrow] or norm.rounding.adds_one:
        found = " and ".join(str(dtype_of(node)).removeprefix("torch.") for node in narrow)
        wanted = str(dtype).removeprefix("torch.")
        mend = f"reduce, cast and add in {wanted}"
        raise _NotANorm(Reason.DTYPE, f"it norms a float32 sum of {found}; both must be {wanted}", total, mend)
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
    else:
        raise _NotANorm(Reason.USERS, "the unrounded sum has other users", others[0] if others else total)
    if not _raise_with_residual(canonical, norm, total, narrow, residual_out, rounding):
        raise _NotANorm(Reason.OP, "no convention fits this sum", total)


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
    x, residual = (left, right) if canonical.depth[left] > canonical.depth[right] else (right, left)
    if dtype_of(x) is not dtype_of(residual):
        x, residual = (left, right) if dtype_of(left) is (norm.rounded_to or dtype_of(norm.y)) else (right, left)
        if rounding.rounds_residual or dtype_of(residual) is not torch.float32:
            return False
    region = {*norm.interior, norm.total, total, *([residual_out] if residual_out else [])}
    if canonical.region[total] != canonical.region[norm.y] or not is_convex(region, (x, residual, norm.weight)):
        return False
    args = (x, residual, norm.weight, norm.eps, rounding.value)
    if residual_out is total and all(user in region for node in (total, norm.total) for user in node.users):
        residual_out = None
    canonical.raise_op(ops.fused_add_rms_norm, args, (norm.y, residual_out))
    return True


def _check_interior(canonical: CanonicalGraph, norm: _Norm) -> None:
    inside = {*norm.interior}
    for node in norm.interior[:-1]:
        for user in node.users:
            if user not in inside:
                raise _NotANorm(Reason.USERS, f"{node.name}, a value inside it, has other users", user)
    for node in norm.interior:
        if canonical.region[node] != canonical.region[norm.interior[0]]:
            raise _NotANorm(Reason.MUTATION, "an in-place op stands inside it", node)


def _single_user(node: fx.Node, what: str) -> fx.Node:
    if len(node.users) != 1:
        raise _NotANorm(Reason.USERS, f"{what} has {len(node.users)} users, expected 1", node)
    (user,) = node.users
    return user


def _only_user(node: fx.Node, targets: tuple[object, ...], what: str) -> fx.Node:
    user = _single_user(node, node.name)
    if not is_call(user, *targets):
        raise _NotANorm(
            Reason.OP, f"expected that {what}, found {user.target}", user, expected=" or ".join(map(str, targets[:1]))
        )
    return user


def _other(product: fx.Node, operand: fx.Node) -> object:
    left, right = product.args
    return right if left is operand else left
