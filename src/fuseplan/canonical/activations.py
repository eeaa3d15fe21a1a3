"""SiLU-and-mul as Inductor's post-grad graphs spell it in aten.

g32 = convert(gate, float32)                        absent in float32 models
act = g32 / (exp(-g32) + 1)  |  g32 * sigmoid(g32)
y   = convert(act, dtype) * up                      `llama`
    | convert(act * convert(up, float32), dtype)    `fp32`
"""

from torch import fx

from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import ActivationRounding, ops
from fuseplan.graph.facts import ADDS, MULS, aten, convert_element_type, dtype_of, equal_shape, is_call, tensor_of
from fuseplan.graph.legality import is_convex


def raise_silu_and_mul(canonical: CanonicalGraph) -> None:
    """Raises every gated SiLU."""
    for root in canonical.calls(aten.exp.default, aten.sigmoid.default):
        activated = _silu_of_exp(root) if is_call(root, aten.exp.default) else _silu_of_sigmoid(root)
        if activated is not None:
            _raise(canonical, *activated)


def _silu_of_exp(exp: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(wide, activated) of `wide / (exp(-wide) + 1)`."""
    negated = exp.args[0]
    plus_one = _single_user(exp)
    if not is_call(negated, aten.neg.default) or not is_call(plus_one, *ADDS) or plus_one.args[1] != 1:
        return None
    quotient = _single_user(plus_one)
    wide = negated.args[0]
    if not is_call(quotient, aten.div.Tensor) or quotient.args != (wide, plus_one) or len(negated.users) > 1:
        return None
    return wide, quotient


def _silu_of_sigmoid(sigmoid: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(wide, activated) of `wide * sigmoid(wide)`."""
    wide, product = sigmoid.args[0], _single_user(sigmoid)
    if not is_call(product, *MULS) or wide not in product.args or not isinstance(wide, fx.Node):
        return None
    return wide, product


def _raise(canonical: CanonicalGraph, wide: fx.Node, activated: fx.Node) -> None:
    gate = wide.args[0] if is_call(wide, convert_element_type) else wide
    assert isinstance(gate, fx.Node)
    dtype = dtype_of(gate)
    value, product = activated, _single_user(activated)
    rounding = ActivationRounding.LLAMA
    if is_call(product, convert_element_type) and dtype_of(product) is dtype:
        value, product = product, _single_user(product)
    elif wide is not gate:
        rounding = ActivationRounding.FP32
    if not is_call(product, *MULS):
        return
    up = product.args[1] if product.args[0] is value else product.args[0]
    y = product
    if rounding is ActivationRounding.FP32:
        converted = _single_user(product)
        if not is_call(converted, convert_element_type) or not is_call(up, convert_element_type):
            return
        y, up = converted, up.args[0]
    if not equal_shape(tensor_of(up), tensor_of(gate)) or dtype_of(up) is not dtype or dtype_of(y) is not dtype:
        return
    assert isinstance(up, fx.Node)
    if is_convex({activated, value, product, y}, (gate, up)):
        canonical.raise_op(ops.silu_and_mul, (gate, up, rounding.value), (y,))


def _single_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
