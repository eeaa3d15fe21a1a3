"""RMSNorm in vLLM's graphs: see `fuseplan.graph.canonical.engines`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.engines import read_at
from fuseplan.graph.facts import dtype_name, dtype_of, item
from fuseplan.graph.ops import DialectOp, Rounding
from fuseplan.record import Reason
from fuseplan.rules.parts.rms_norm.op import fused_add_rms_norm, rms_norm


def _ir_norm(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]) -> None:
    """`vllm_ir::rms_norm(x, weight, epsilon, variance_size)`."""
    convention = _convention(canonical, rms_norm, node, values, Rounding.LLAMA, Rounding.GPT_OSS)
    if convention is not None:
        args = (values["x"], values["weight"], values["epsilon"], convention.value)
        canonical.raise_op(rms_norm, args, (node,))


def _ir_add_norm(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """`vllm_ir::fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size)`: it norms the unrounded sum."""
    convention = _convention(canonical, fused_add_rms_norm, node, values, Rounding.VLLM, Rounding.FP32)
    results = (item(node, 0), item(node, 1))
    if convention is not None and results[0] is not None:
        args = (values["x"], values["x_residual"], values["weight"], values["epsilon"], convention.value)
        canonical.raise_op(fused_add_rms_norm, args, results)


def _convention(
    canonical: CanonicalGraph, op: DialectOp, node: fx.Node, values: Mapping[str, Any], narrow: Rounding, wide: Rounding
) -> Rounding | None:
    """The rounding of a `vllm_ir` norm: it multiplies in the weight's dtype, then rounds to the activation's."""
    if values.get("variance_size") is not None:
        detail = f"the variance is taken over the first {values['variance_size']} elements"
        canonical.refuse(
            op, read_at(node), Reason.ATTRIBUTE, f"RMSNorm not recognised: {detail}", node=node, place=node
        )
        return None
    if _lacks_weight(canonical, op, node, values):
        return None
    x, weight = dtype_of(values["x"]), dtype_of(values["weight"])
    if weight is x:
        return narrow
    if weight is torch.float32:
        return wide
    detail = f"the weight is {dtype_name(values['weight'])} and x is {dtype_name(values['x'])}"
    canonical.refuse(op, read_at(node), Reason.DTYPE, f"RMSNorm not recognised: {detail}", node=node, place=node)
    return None


def _lacks_weight(canonical: CanonicalGraph, op: DialectOp, node: fx.Node, values: Mapping[str, Any]) -> bool:
    """Whether a norm has no weight, by its argument."""
    if values["weight"] is not None:
        return False
    canonical.refuse(op, read_at(node), Reason.OP, "RMSNorm not recognised: it has no weight", node=node, place=node)
    return True


def _c_norm(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]) -> None:
    """`_C::rms_norm(result!, input, weight, epsilon)`, `_C::fused_add_rms_norm(input!, residual!, weight, epsilon)`."""
    adds = "residual" in values
    op, results = (fused_add_rms_norm, (item(node, 1), item(node, 2))) if adds else (rms_norm, (item(node, 1),))
    if results[0] is not None and not _lacks_weight(canonical, op, node, values):
        added = (values["residual"],) if adds else ()
        args = (values["input"], *added, values["weight"], values["epsilon"], Rounding.GPT_OSS.value)
        canonical.raise_op(op, args, results)


ENGINE_OPS = {
    "vllm_ir::rms_norm": _ir_norm,
    "vllm_ir::fused_add_rms_norm": _ir_add_norm,
    "_C::rms_norm": _c_norm,
    "_C::fused_add_rms_norm": _c_norm,
}
