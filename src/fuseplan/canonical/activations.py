"""SiLU-and-mul as Inductor's post-grad graphs spell it in aten.

g32 = convert(gate, float32)                        absent in float32 models
act = g32 / (exp(-g32) + 1)  |  g32 * sigmoid(g32)
y   = convert(act, dtype) * up                      `llama`
    | convert(act * convert(up, float32), dtype)    `fp32`
"""

from torch import fx

from fuseplan.canonical.unraised import Unraised, only_reader
from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import ActivationRounding, ops
from fuseplan.graph.facts import (
    ADDS,
    LOW_PRECISION,
    MULS,
    aten,
    convert_element_type,
    dtype_name,
    dtype_of,
    equal_shape,
    is_call,
    tensor_of,
)
from fuseplan.graph.legality import is_convex
from fuseplan.record import Reason


def raise_silu_and_mul(canonical: CanonicalGraph) -> None:
    """Raises every gated SiLU."""
    for root in canonical.calls(aten.exp.default, aten.sigmoid.default):
        activated = _silu_of_exp(root) if is_call(root, aten.exp.default) else _silu_of_sigmoid(root)
        if activated is None:
            continue
        try:
            _raise(canonical, root, *activated)
        except Unraised as refused:
            refused.tell(canonical, ops.silu_and_mul, "SiLU-and-mul", at=[activated[1]], place=activated[1])


def _silu_of_exp(exp: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(wide, activated) of `wide / (exp(-wide) + 1)`."""
    negated = exp.args[0]
    plus_one = _single_user(exp)
    if not is_call(negated, aten.neg.default) or not is_call(plus_one, *ADDS):
        return None
    if plus_one.args[1] != 1 or plus_one.kwargs:
        return None
    quotient = _single_user(plus_one)
    wide = negated.args[0]
    if not is_call(quotient, aten.div.Tensor) or quotient.args != (wide, plus_one) or len(negated.users) > 1:
        return None
    return wide, quotient


def _silu_of_sigmoid(sigmoid: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(wide, activated) of `wide * sigmoid(wide)`, or of `wide * sigmoid(1.702 * wide)`, which is no SiLU."""
    inner, product = sigmoid.args[0], _single_user(sigmoid)
    wide = inner.args[0] if is_call(inner, *MULS) and not isinstance(inner.args[1], fx.Node) else inner
    if not is_call(product, *MULS) or wide not in product.args or not isinstance(wide, fx.Node):
        return None
    return wide, product


def _raise(canonical: CanonicalGraph, root: fx.Node, wide: fx.Node, activated: fx.Node) -> None:
    scaled = root.args[0]
    if is_call(scaled, *MULS) and scaled is not wide:
        raise Unraised(Reason.OP, f"what the sigmoid takes is scaled by {scaled.args[1]}", scaled)
    gate = wide.args[0] if is_call(wide, convert_element_type) else wide
    assert isinstance(gate, fx.Node)
    dtype = dtype_of(gate)
    if dtype_of(wide) in LOW_PRECISION:
        detail = f"SiLU is computed in {dtype_name(wide)}, and the op computes it in float32"
        raise Unraised(Reason.DTYPE, detail, root)
    value, product = activated, only_reader(activated, "what SiLU yields")
    rounding = ActivationRounding.LLAMA
    if is_call(product, convert_element_type) and dtype_of(product) is dtype:
        value, product = product, only_reader(product, "what SiLU yields")
    elif wide is not gate:
        rounding = ActivationRounding.FP32
    if not is_call(product, *MULS):
        raise Unraised(Reason.OP, f"what SiLU yields isn't multiplied, but goes into {product.target}", product)
    up = product.args[1] if product.args[0] is value else product.args[0]
    y = product
    if rounding is ActivationRounding.FP32:
        converted = only_reader(product, "the product")
        if not is_call(converted, convert_element_type) or not is_call(up, convert_element_type):
            detail = f"the product stays in {dtype_name(product)}, and the gate is {dtype_name(gate)}"
            raise Unraised(Reason.DTYPE, detail, product)
        y, up = converted, up.args[0]
    if not isinstance(up, fx.Node) or not equal_shape(tensor_of(up), tensor_of(gate)):
        raise Unraised(Reason.SIZE, "what SiLU yields is multiplied by another shape", product)
    if dtype_of(up) is not dtype or dtype_of(y) is not dtype:
        detail = f"gate, up and result are {', '.join(map(dtype_name, (gate, up, y)))}"
        raise Unraised(Reason.DTYPE, detail, product)
    if not is_convex({activated, value, product, y}, (gate, up)):
        raise Unraised(Reason.CYCLE, "what is multiplied depends on what SiLU yields", product)
    canonical.raise_op(ops.silu_and_mul, (gate, up, rounding.value), (y,))


def _single_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
