"""fp8 quantisation by one given scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import ORDER_KEEPING, equal_shape, is_call, item, tensor_of
from fuseplan.graph.ops import QuantRounding, compute_dtype, define, draw_positive
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Stage, sample_of
from fuseplan.rules.parts.codes import CODE_BYTES, Codes, quantisation
from fuseplan.rules.parts.fp8 import Scaling, apply_scale, scalings
from fuseplan.rules.parts.fp8_engines import CODES, check_rows, engine_reader, one_number, raise_call
from fuseplan.rules.parts.fp8_scales import is_computed, is_given, one_of_all
from fuseplan.rules.parts.traffic import Region


def reference(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    """q = clamp(x / scale, -fp8_max, fp8_max).to(fp8)

    Args:
        x: [..., hidden].
        scale: one element, in float32 or, by `divide_rounded`, in x's dtype.
        dtype: one of `FP8_DTYPES`.
        rounding: one of `QuantRounding`.

    Returns:
        [..., hidden] in `dtype`, contiguous.

    Raises:
        ValueError: `rounding` isn't one of `QuantRounding`.
    """
    wide = compute_dtype(x.dtype)
    return apply_scale(x.to(wide), scale.to(wide), x.dtype, dtype, QuantRounding(rounding))


def fake(x: Tensor, scale: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    """Shape and dtype of `reference`."""
    return x.new_empty(x.shape, dtype=dtype)


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """(scale, dtype, rounding)"""
    return torch.tensor([0.02], device=device), torch.float8_e4m3fn, QuantRounding.DIVIDE.value


static_scaled_fp8_quant = define(
    "static_scaled_fp8_quant",
    "(Tensor x, Tensor scale, ScalarType dtype, str rounding) -> Tensor",
    reference=reference,
    fake=fake,
    samples=[sample_of(shape, _sample_arguments) for shape in ((7, 320), (2, 3, 64))],
    draws={"scale": draw_positive},
)


def raise_static(canonical: CanonicalGraph) -> None:
    """Raises every quantisation by a given scale, and records why lookalikes aren't quantisations."""
    for cast, found in scalings(canonical):
        try:
            if isinstance(found, Unraised):
                raise found
            if is_given(found):
                _raise(canonical, found)
        except Unraised as refused:
            if cast in canonical.unraised:  # a closer lookalike recorded it
                continue
            refused.tell(canonical, static_scaled_fp8_quant, "fp8 quantisation", at=[cast], place=cast)
    canonical.merge_equal(static_scaled_fp8_quant)


def _raise(canonical: CanonicalGraph, scaling: Scaling) -> None:
    node = scaling.scale
    if is_computed(scaling):
        raise one_of_all(node)
    if not scaling.is_clamped:
        raise scaling.unclamped
    scale, x, codes = tensor_of(node), tensor_of(scaling.x), tensor_of(scaling.cast)
    assert scale is not None and x is not None and codes is not None
    if not equal_shape(x, codes):
        detail = f"the scale has the shape {[*scale.shape]}, which makes {[*codes.shape]} of {[*x.shape]}"
        raise Unraised(Reason.SIZE, detail, node, "scale.reshape(1)")
    if scale.device != x.device:
        detail = f"the scale is on {scale.device}, and the tensor it scales on {x.device}"
        raise Unraised(Reason.LAYOUT, detail, node, f"move the scale to {x.device}")
    while is_call(node, *ORDER_KEEPING) and scale is not None and scale.dim() > 1:
        node = node.args[0]
        scale = tensor_of(node)
    assert scale is not None
    if scale.dim() > 1:
        detail = f"the scale has the shape {[*scale.shape]}, and the op takes one number"
        raise Unraised(Reason.SIZE, detail, node, "scale.reshape(1)")
    args = (scaling.x, node, scaling.dtype, scaling.rounding.value)
    canonical.raise_op(static_scaled_fp8_quant, args, (scaling.cast,))


def _read_static(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any]) -> None:
    """`_C::static_scaled_fp8_quant(result!, input, scale, group_shape)`: by the reciprocal of the scale."""
    x, codes = values["input"], item(node, 1)
    check_rows(node, x, values["result"])
    scale = one_number(canonical, node, values["scale"], x, "the scale")
    args = (x, scale, CODES, QuantRounding.MULTIPLY.value)
    raise_call(canonical, node, static_scaled_fp8_quant, args, (codes,))


def _refuse_whole(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any]) -> None:
    """`_C::dynamic_scaled_fp8_quant(result!, input, scale!)`"""
    raise one_of_all(node)


@dataclass(frozen=True, kw_only=True)
class StaticFp8(Codes):
    """The quantisation at a site."""

    name, eager_kernels = "static_fp8_quant", 5

    def result_bytes(self, region: Region) -> int:
        """Bytes of the codes."""
        return region.tokens * region.width * CODE_BYTES


PART = quantisation(
    static_scaled_fp8_quant, StaticFp8, Stage.EPILOGUES, raise_static, _sample_arguments,
    engine_ops={
        "_C::static_scaled_fp8_quant": engine_reader(static_scaled_fp8_quant, "fp8 quantisation", _read_static),
        "_C::dynamic_scaled_fp8_quant": engine_reader(static_scaled_fp8_quant, "fp8 quantisation", _refuse_whole),
    },
)  # fmt: skip
