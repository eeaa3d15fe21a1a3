"""vLLM's ops, which its graphs have in the place of aten's and of functional collectives.

What rounds where is read off vLLM 0.32: `vllm/ir/ops/layernorm.py` for `vllm_ir`, and
`csrc/layernorm_kernels.cu` for `_C`, which rounds the sum and the normalised value to the activation dtype. Under
`auto_functionalized` what an op writes to comes after what it returns.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fuseplan.canonical.view import CanonicalGraph
from fuseplan.dialect import DialectOp, Rounding, ops
from fuseplan.graph.facts import dtype_name, dtype_of, is_call, item, tensor_of
from fuseplan.record import Reason

NAMESPACES = frozenset({"vllm", "vllm_ir", "_C"})
COLLECTIVES = frozenset({"vllm::all_reduce", "_C::shm_allreduce"})
"""What may not be run by one rank alone."""


def raise_vllm(canonical: CanonicalGraph, groups: Mapping[object, str]) -> None:
    """Raises vLLM's all-reduces and norms, called as they are or under `auto_functionalized`.

    Args:
        canonical: the graph.
        groups: what vLLM calls its groups (`"tp:0"`, the handle of a shared-memory communicator), and the names of the
            process groups behind them.
    """
    for node in list(canonical.graph.nodes):
        op = engine_op(node)
        if op is None or op.namespace not in NAMESPACES:
            continue
        raising = _RAISING.get(op.name().removesuffix(".default"))
        if raising is not None:
            _merge_equal_results(canonical, node)
            raising(canonical, node, _arguments(node, op), groups)


def _merge_equal_results(canonical: CanonicalGraph, node: fx.Node) -> None:
    """A result that is taken twice is one value."""
    first: dict[object, fx.Node] = {}
    for user in list(node.users):
        if is_call(user, operator.getitem):
            known = first.setdefault(user.args[1], user)
            if known is not user:
                canonical.replace(user, known)


def engine_op(node: fx.Node) -> OpOverload | None:
    """The custom op that a node calls, itself or under `auto_functionalized`."""
    target: object = node.target
    if isinstance(target, HigherOrderOperator) and target.name() == "auto_functionalized" and node.args:
        target = node.args[0]
    return target if isinstance(target, OpOverload) else None


def _arguments(node: fx.Node, op: OpOverload) -> dict[str, Any]:
    """By the names in the op's schema, defaults included."""
    schema = op._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    if node.target is op:
        values |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return values | node.kwargs


def _all_reduce(
    canonical: CanonicalGraph,
    node: fx.Node,
    x: fx.Node,
    name: object,
    result: fx.Node | None,
    groups: Mapping[object, str],
) -> None:
    if result is None:
        return
    group_name = groups.get(name)
    if group_name is None:
        known = ", ".join(sorted(map(str, groups))) or "none"
        canonical.refuse(
            ops.all_reduce, [result], Reason.GROUP,
            f"all_reduce not recognised: vLLM's group {name!r} is not among those of this process ({known})",
            node=node, place=node,
        )  # fmt: skip
        return
    canonical.raise_op(ops.all_reduce, (x, group_name), (result,))


def _vllm_all_reduce(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """`vllm::all_reduce(tensor, group_name)`, out of place."""
    _all_reduce(canonical, node, values["tensor"], values["group_name"], node, groups)


def _shm_all_reduce(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """`_C::shm_allreduce(handle, data!)`, of the CPU backend."""
    _all_reduce(canonical, node, values["data"], values["handle"], item(node, 1), groups)


def _ir_norm(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]) -> None:
    """`vllm_ir::rms_norm(x, weight, epsilon, variance_size)`."""
    convention = _convention(canonical, ops.rms_norm, node, values, Rounding.LLAMA, Rounding.GPT_OSS)
    if convention is not None:
        args = (values["x"], values["weight"], values["epsilon"], convention.value)
        canonical.raise_op(ops.rms_norm, args, (node,))


def _ir_add_norm(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """`vllm_ir::fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size)`: it norms the unrounded sum."""
    convention = _convention(canonical, ops.fused_add_rms_norm, node, values, Rounding.VLLM, Rounding.FP32)
    results = (item(node, 0), item(node, 1))
    if convention is not None and results[0] is not None:
        args = (values["x"], values["x_residual"], values["weight"], values["epsilon"], convention.value)
        canonical.raise_op(ops.fused_add_rms_norm, args, results)


def _convention(
    canonical: CanonicalGraph, op: DialectOp, node: fx.Node, values: Mapping[str, Any], narrow: Rounding, wide: Rounding
) -> Rounding | None:
    """How a norm of `vllm_ir` rounds: it multiplies in the weight's dtype, and rounds to the activation's after it."""
    if values.get("variance_size") is not None:
        detail = f"the variance is taken over the first {values['variance_size']} elements"
        canonical.refuse(op, _read(node), Reason.ATTRIBUTE, f"RMSNorm not recognised: {detail}", node=node, place=node)
        return None
    if _lacks_weight(canonical, op, node, values):
        return None
    x, weight = dtype_of(values["x"]), dtype_of(values["weight"])
    if weight is x:
        return narrow
    if weight is torch.float32:
        return wide
    detail = f"the weight is {dtype_name(values['weight'])} and x is {dtype_name(values['x'])}"
    canonical.refuse(op, _read(node), Reason.DTYPE, f"RMSNorm not recognised: {detail}", node=node, place=node)
    return None


def _lacks_weight(canonical: CanonicalGraph, op: DialectOp, node: fx.Node, values: Mapping[str, Any]) -> bool:
    """Whether a norm only scales, which is told."""
    if values["weight"] is not None:
        return False
    canonical.refuse(op, _read(node), Reason.OP, "RMSNorm not recognised: it has no weight", node=node, place=node)
    return True


def _read(node: fx.Node) -> list[fx.Node]:
    """Where a search from a norm's neighbours comes to it."""
    return [node, *(user for user in node.users if user.target is not None)]


def _c_norm(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]) -> None:
    """`_C::rms_norm(result!, input, weight, epsilon)`."""
    result = item(node, 1)
    if result is not None and not _lacks_weight(canonical, ops.rms_norm, node, values):
        args = (values["input"], values["weight"], values["epsilon"], Rounding.LLAMA.value)
        canonical.raise_op(ops.rms_norm, args, (result,))


def _c_add_norm(
    canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
) -> None:
    """`_C::fused_add_rms_norm(input!, residual!, weight, epsilon)`."""
    results = (item(node, 1), item(node, 2))
    if results[0] is not None and not _lacks_weight(canonical, ops.fused_add_rms_norm, node, values):
        args = (values["input"], values["residual"], values["weight"], values["epsilon"], Rounding.LLAMA.value)
        canonical.raise_op(ops.fused_add_rms_norm, args, results)


def _rotary(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]) -> None:
    """`_C::rotary_embedding(positions, query!, key!, head_size, cos_sin_cache, is_neox, ...)`, which is refused: it has
    a table where the dialect has angles.
    """
    table = tensor_of(values["cos_sin_cache"])
    size, rotated = values["head_size"], None if table is None else table.shape[-1]
    reason, why = Reason.OP, "it looks its angles up itself"
    if not values["is_neox"]:
        reason, why = Reason.ATTRIBUTE, f"it rotates neighbours (interleaved), and {why[3:]}"
    elif rotated != size:
        reason, why = Reason.ATTRIBUTE, f"it rotates {rotated} of the {size} elements of a head, and {why[3:]}"
    canonical.refuse(
        ops.rotary_embedding, _read(node), reason, f"rotary embedding not recognised: {why}", node=node, place=node,
        mend="let vLLM write it in aten: custom_ops -rotary_embedding in its compilation config",
    )  # fmt: skip


_RAISING = {
    "vllm::all_reduce": _vllm_all_reduce,
    "_C::shm_allreduce": _shm_all_reduce,
    "vllm_ir::rms_norm": _ir_norm,
    "vllm_ir::fused_add_rms_norm": _ir_add_norm,
    "_C::rms_norm": _c_norm,
    "_C::fused_add_rms_norm": _c_add_norm,
    "_C::rotary_embedding": _rotary,
}
