"""What quantisations to fp8 share that stand in graphs as ops of vLLM's: see `fuseplan.graph.canonical.engines`.

What rounds where is read off vLLM 0.22 to 0.33, `csrc/quantization/w8a8/fp8/common.cu` and `per_token_group_quant.cu`.
Of rows with NaN nothing is promised: these kernels leave NaN out of the largest and make the largest code of it.
Inductor sees into none of these ops, so that each is a kernel of its own.
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
    """What raises an op of vLLM's to a dialect op, or says why it doesn't.

    Args:
        op: the dialect op.
        title: its name, for a person.
        read: raises a call of these arguments by name; it raises `Unraised` where the op doesn't compute that.
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
    """Puts a dialect op in the place of a call whose results lie as the op's do.

    Args:
        canonical: the graph.
        node: the call.
        op: what computes the same.
        args: its arguments, of which the first is what is quantised.
        results: what the call writes, in the op's order; None for what isn't read.

    Raises:
        Unraised: shapes, dtypes or strides of the results are others than the op's.
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
    """Whether two tensors have one dtype, shape and strides, which may be a column's of scales."""
    lies_so = equal_rounded(value.stride(), like.stride(), ALIGNED_ROWS)
    return value.dtype is like.dtype and equal_shape(value, like) and lies_so


def check_rows(node: fx.Node, x: fx.Node, codes: object) -> None:
    """That rows of a dtype that ops take are made codes in float8_e4m3fn.

    Raises:
        Unraised: they aren't.
    """
    if dtype_of(x) not in (torch.float32, *LOW_PRECISION):
        raise Unraised(Reason.DTYPE, f"what is quantised is {dtype_name(x)}", node)
    if dtype_of(codes) is torch.float8_e4m3fnuz:
        detail = "vLLM's kernels take 224 for the largest of float8_e4m3fnuz, and the op takes 240"
        raise Unraised(Reason.DTYPE, detail, node)
    if dtype_of(codes) is not CODES:
        raise Unraised(Reason.DTYPE, f"codes are in {dtype_name(codes)}, and the op's in float8_e4m3fn", node)


def one_number(canonical: CanonicalGraph, node: fx.Node, scale: fx.Node, x: fx.Node, what: str) -> fx.Node:
    """A tensor of one float32 element beside x, of no more than one dimension.

    Raises:
        Unraised: it is something else.
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
