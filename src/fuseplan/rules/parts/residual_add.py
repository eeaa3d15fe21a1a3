"""The residual add before a norm.

Norms have it built in, as in `fused_add_rms_norm`, since one convention covers the rounding of both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fuseplan.graph.facts import aten, convert_element_type, dtype_name, equal_shape, is_call, tensor_of
from fuseplan.graph.ops import Rounding
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Prologue


def reference(x: Tensor, residual: Tensor, rounding: Rounding, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """residual_out = x + residual

    Args:
        x: [..., hidden].
        residual: [..., hidden], x's dtype, or float32 under `vllm_fp32_residual`.
        rounding: says whether the sum is rounded before it is read, and for the residual stream.
        wide: the dtype of arithmetic.

    Returns:
        (sum, residual_out): the sum in `wide` for the norm, and the sum to yield.
    """
    total = x.to(wide) + residual.to(wide)
    residual_out = total.to(x.dtype) if rounding.rounds_residual else total
    return residual_out.to(wide) if rounding.rounds_sum else total, residual_out


def _without(way: Sequence[fx.Node], goal: fx.Node) -> list[fx.Node]:
    """The obstacles without a residual add that has `goal` as one addend, and without the casts around it."""
    read = {goal, *(node for node in way if is_call(node, convert_element_type) and node.args[0] is goal)}
    adds = {node for node in way if _is_residual_add(node) and not read.isdisjoint(node.all_input_nodes)}
    around = {node for node in way if is_call(node, convert_element_type) and (node.args[0] in adds or node in read)}
    return [node for node in way if node not in adds and not (adds and node in around)]


def _is_residual_add(node: fx.Node) -> bool:
    if not is_call(node, aten.add.Tensor) or len(node.all_input_nodes) != 2 or node.kwargs:
        return False
    return all(equal_shape(tensor_of(source), tensor_of(node)) for source in node.all_input_nodes)


def _unfit(add: fx.Node) -> tuple[Reason, str] | None:
    """Why an addition isn't a residual add that the rule would take along; None where no reason is known."""
    left, right = add.args
    if add.kwargs:
        return Reason.ATTRIBUTE, f": it adds {add.kwargs['alpha']} times one of the two"
    if not equal_shape(tensor_of(left), tensor_of(right)):
        values = [value for each in add.args if (value := tensor_of(each)) is not None]
        if min(value.dim() for value in values) <= 1:
            return Reason.OP, ": it adds a bias"
        shapes = " and ".join(str([*value.shape]) for value in values)
        return Reason.SIZE, f": it adds {shapes}, and a residual has the shape of the sum"
    narrow = [each.args[0] if is_call(each, convert_element_type) else each for each in add.args]
    dtypes = [*map(dtype_name, narrow)]
    return None if dtypes[0] == dtypes[1] else (Reason.DTYPE, f": it adds {dtypes[0]} and {dtypes[1]}")


def _blame(node: fx.Node) -> tuple[Reason, str] | None:
    return _unfit(node) if is_call(node, aten.add.Tensor) and len(node.all_input_nodes) == 2 else None


PART = Prologue(name="residual_add", ops=(), parameters=("Tensor residual",), without=_without, blame=_blame)
