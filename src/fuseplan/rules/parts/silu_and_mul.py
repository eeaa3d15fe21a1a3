"""SiLU-and-mul, the gated activation of Llama-style MLPs."""

from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised, only_reader
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
from fuseplan.graph.ops import ActivationRounding, Sample, compute_dtype, define, empty, random_tensor
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Core, Reported, Stage, rows_of
from fuseplan.rules.parts.traffic import Middle


def reference(gate: Tensor, up: Tensor, rounding: str) -> Tensor:
    """y = silu(gate) * up

    Args:
        gate: [..., intermediate].
        up: [..., intermediate], gate's dtype.
        rounding: one of `ActivationRounding`.

    Returns:
        [..., intermediate] in gate's dtype, contiguous.

    Raises:
        ValueError: `rounding` isn't one of `ActivationRounding`.
    """
    wide = compute_dtype(gate.dtype)
    activated = torch.nn.functional.silu(gate.to(wide))
    if ActivationRounding(rounding) is ActivationRounding.LLAMA:
        activated = activated.to(gate.dtype).to(wide)
    return (activated * up.to(wide)).to(gate.dtype).contiguous()


def fake(gate: Tensor, up: Tensor, rounding: str) -> Tensor:
    """Shape and dtype of `reference`."""
    return empty(gate, gate.shape)


def _samples() -> list[Sample]:
    def sample(shape: tuple[int, ...], dtype: torch.dtype, rounding: ActivationRounding) -> Sample:
        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            gate, up = (random_tensor(shape, dtype, device, generator) for _ in range(2))
            return gate, up, rounding.value

        name = f"{rows_of(shape)}-{str(dtype).removeprefix('torch.')}-{rounding}"
        return Sample(name=name, make=make, width=shape[-1])

    return [
        sample((1, 64), torch.float32, ActivationRounding.LLAMA),
        sample((7, 320), torch.bfloat16, ActivationRounding.LLAMA),
        sample((2, 5, 96), torch.float16, ActivationRounding.FP32),
        sample((3, 128), torch.bfloat16, ActivationRounding.FP32),
    ]


silu_and_mul = define(
    "silu_and_mul",
    "(Tensor gate, Tensor up, str rounding) -> Tensor",
    reference=reference,
    fake=fake,
    samples=_samples(),
)


def raise_silu_and_mul(canonical: CanonicalGraph) -> None:
    """Raises every gated SiLU, as Inductor's post-grad graphs spell it in aten.

    g32 = convert(gate, float32)                        absent in float32 models
    act = g32 / (exp(-g32) + 1)  |  g32 * sigmoid(g32)
    y   = convert(act, dtype) * up                      `llama`
        | convert(act * convert(up, float32), dtype)    `fp32`
    """
    for root in canonical.calls(aten.exp.default, aten.sigmoid.default):
        activated = _silu_of_exp(root) if is_call(root, aten.exp.default) else _silu_of_sigmoid(root)
        if activated is None:
            continue
        try:
            _raise(canonical, root, *activated)
        except Unraised as refused:
            refused.tell(canonical, silu_and_mul, "SiLU-and-mul", at=[activated[1]], place=activated[1])


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
        raise Unraised(Reason.OP, f"the sigmoid's input is scaled by {scaled.args[1]}", scaled)
    gate = wide.args[0] if is_call(wide, convert_element_type) else wide
    assert isinstance(gate, fx.Node)
    dtype = dtype_of(gate)
    if dtype_of(wide) in LOW_PRECISION:
        detail = f"SiLU is computed in {dtype_name(wide)}, and the op computes it in float32"
        raise Unraised(Reason.DTYPE, detail, root)
    value, product = activated, only_reader(activated, "SiLU's result")
    rounding = ActivationRounding.LLAMA
    if is_call(product, convert_element_type) and dtype_of(product) is dtype:
        value, product = product, only_reader(product, "SiLU's result")
    elif wide is not gate:
        rounding = ActivationRounding.FP32
    if not is_call(product, *MULS):
        raise Unraised(Reason.OP, f"SiLU's result isn't multiplied, but goes into {product.target}", product)
    up = product.args[1] if product.args[0] is value else product.args[0]
    y = product
    if rounding is ActivationRounding.FP32:
        converted = only_reader(product, "the product")
        if not is_call(converted, convert_element_type) or not is_call(up, convert_element_type):
            detail = f"the product stays in {dtype_name(product)}, and the gate is {dtype_name(gate)}"
            raise Unraised(Reason.DTYPE, detail, product)
        y, up = converted, up.args[0]
    if not isinstance(up, fx.Node) or not equal_shape(tensor_of(up), tensor_of(gate)):
        raise Unraised(Reason.SIZE, "SiLU's result is multiplied by another shape", product)
    if dtype_of(up) is not dtype or dtype_of(y) is not dtype:
        detail = f"gate, up and result are {', '.join(map(dtype_name, (gate, up, y)))}"
        raise Unraised(Reason.DTYPE, detail, product)
    if not is_convex({activated, value, product, y}, (gate, up)):
        raise Unraised(Reason.CYCLE, "the other factor depends on SiLU's result", product)
    canonical.raise_op(silu_and_mul, (gate, up, rounding.value), (y,))


def _single_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


PART = Core(
    name="silu_and_mul",
    ops=(silu_and_mul,),
    raising=((Stage.CORES, raise_silu_and_mul),),
    reported=Reported.NEVER,  # a SiLU without a product is an ordinary activation
    traffic=Middle(name="silu_and_mul", inputs=2, eager_kernels=7),
    result="activation",
)
