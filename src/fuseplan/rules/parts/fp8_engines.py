"""Shared by quantisations to fp8 that are vLLM ops in graphs: see `fuseplan.graph.canonical.engines`.

Their rounding is read off vLLM 0.22 to 0.33, `csrc/quantization/w8a8/fp8/common.cu` and `per_token_group_quant.cu`.
Nothing is promised for rows with NaN: these kernels ignore NaN in the largest element and turn it into the largest
code. All of these ops are opaque to Inductor, so each is a separate kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.engines import read_at
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import LOW_PRECISION, dtype_name, dtype_of, equal_shape, equal_size, tensor_of
from fuseplan.graph.ops import ALIGNED_ROWS, DialectOp
from fuseplan.graph.sizes import equal_rounded
from fuseplan.record import Reason
from fuseplan.rules.parts.base import OPAQUE, EngineReader

CODES = torch.float8_e4m3fn
Reader = Callable[[CanonicalGraph, fx.Node, Mapping[str, Any]], None]


def engine_reader(op: DialectOp, title: str, read: Reader) -> EngineReader:
    """A reader that raises a vLLM op to a dialect op, or records why it can't.

    Args:
        op: the dialect op.
        title: its name, for a person.
        read: raises a call, given its arguments by name, to the op; throws `Unraised` where the op computes something
            else.
    """

    def reads(
        canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any], groups: Mapping[object, str]
    ) -> None:
        try:
            read(canonical, node, values)
        except Unraised as refused:
            refused.tell(canonical, op, title, at=read_at(node), place=node)

    return reads


def raise_call(
    canonical: CanonicalGraph, node: fx.Node, op: DialectOp, args: Sequence[Any], results: Sequence[fx.Node | None]
) -> None:
    """Replaces a call by a dialect op whose results have the same layout.

    Args:
        canonical: the graph.
        node: the call.
        op: the dialect op that computes the same.
        args: its arguments; the first is the tensor to quantise.
        results: the results that the call writes, in the op's order; None for an unread one.

    Raises:
        Unraised: shapes, dtypes or strides of the results differ from the op's.
    """
    if results[0] is None:
        raise Unraised(Reason.DEAD, "the codes aren't read", node)
    fakes = op.fake(*(tensor_of(arg) if isinstance(arg, fx.Node) else arg for arg in args))
    for result, fake in zip(results, fakes if isinstance(fakes, tuple) else (fakes,), strict=True):
        value = tensor_of(result)
        if value is not None and not lies_as(value, fake):
            lies = f"{[*value.shape]} with strides {value.stride()}"
            detail = f"a result is {dtype_name(result)}{lies}, and the op's {fake.dtype}{[*fake.shape]}"
            raise Unraised(Reason.LAYOUT, detail, node)
    canonical.raise_op(op, args, results).meta[OPAQUE] = True


def lies_as(value: Tensor, like: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and strides; padded columns of scales count as the same."""
    lies_so = equal_rounded(value.stride(), like.stride(), ALIGNED_ROWS)
    return value.dtype is like.dtype and equal_shape(value, like) and lies_so


def check_rows(node: fx.Node, x: fx.Node, codes: object) -> None:
    """Checks that the rows have a dtype that ops take, and that their codes are in float8_e4m3fn.

    Raises:
        Unraised: they don't, or aren't.
    """
    if dtype_of(x) not in (torch.float32, *LOW_PRECISION):
        raise Unraised(Reason.DTYPE, f"the quantised tensor is {dtype_name(x)}", node)
    if dtype_of(codes) is torch.float8_e4m3fnuz:
        detail = "vLLM's kernels take 224 for the largest of float8_e4m3fnuz, and the op takes 240"
        raise Unraised(Reason.DTYPE, detail, node)
    if dtype_of(codes) is not CODES:
        raise Unraised(Reason.DTYPE, f"codes are in {dtype_name(codes)}, and the op's in float8_e4m3fn", node)


def one_number(canonical: CanonicalGraph, node: fx.Node, scale: fx.Node, x: fx.Node, what: str) -> fx.Node:
    """A scale as a tensor of one float32 element on x's device, with at most one dimension.

    Raises:
        Unraised: the scale is something else.
    """
    value, rows = tensor_of(scale), tensor_of(x)
    assert value is not None and rows is not None
    if value.dtype is not torch.float32 or not equal_size(value.numel(), 1) or value.device != rows.device:
        detail = f"{what} is {dtype_name(scale)}{[*value.shape]} on {value.device}, and the op takes one float32 number"
        raise Unraised(Reason.SIZE, detail, node)
    if value.dim() <= 1:
        return scale
    flat = value.new_empty(1)
    return canonical.insert_before(node, torch.ops.aten.reshape.default, (scale, [1]), flat)
