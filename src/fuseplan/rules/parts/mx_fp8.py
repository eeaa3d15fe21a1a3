"""MXFP8: fp8 codes of groups of a row, with powers of two as scales, stored as exponents in bytes (E8M0).

    exponent, scaled = see `microscaled`
    q = convert(scaled, fp8)

as in torchao's `to_mx`, where the conversion to fp8 saturates.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import Call, aten, convert_element_type, dtype_of, dtype_text, is_call
from fuseplan.graph.ops import (
    Decoded,
    MxScaling,
    Sample,
    ScaleLayout,
    compute_dtype,
    define,
    empty_scales,
)
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Stage, sample_of
from fuseplan.rules.parts.codes import GroupCodes, quantisation
from fuseplan.rules.parts.microscaled import (
    GROUP,
    Format,
    behind,
    decoded,
    is_power,
    laid_out,
    product_of,
    raise_scaled,
    read,
    scaled_groups,
    spellings,
    tell_formats,
)
from fuseplan.rules.parts.patterns import all_fit

FORMATS = {
    torch.float8_e4m3fn: Format(most=448.0, digits=3),
    torch.float8_e5m2: Format(most=57344.0, digits=2),
}
"""Formats by the dtype of codes."""


def reference(x: Tensor, group_size: int, dtype: torch.dtype, scaling: str, layout: str) -> tuple[Tensor, Tensor]:
    """exponent = biased power of two from each group's largest element;  q = clamp(x / 2^exponent).to(fp8)

    Args:
        x: [..., hidden].
        group_size: elements of a group; it divides hidden.
        dtype: float8_e4m3fn or float8_e5m2.
        scaling: one of `MxScaling`.
        layout: layout of the exponents, `ScaleLayout.ROWS` or `ScaleLayout.SWIZZLED`.

    Returns:
        (q, exponent): [..., hidden] in `dtype`, and [..., hidden / group_size] in uint8, in the shape that `layout`
        gives it; 127 stands for a scale of 1. Both are contiguous. A group with NaN has the exponent 255.

    Raises:
        ValueError: `scaling` isn't one of `MxScaling`, or `layout` isn't supported.
        RuntimeError: `group_size` doesn't divide hidden.
    """
    groups = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size))
    scaled, exponent = scaled_groups(groups, FORMATS[dtype], scaling)
    most = FORMATS[dtype].most
    return scaled.clamp(-most, most).to(dtype).flatten(-2).contiguous(), laid_out(exponent, layout)


def fake(x: Tensor, group_size: int, dtype: torch.dtype, scaling: str, layout: str) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    return x.new_empty(x.shape, dtype=dtype), empty_scales(x, x.shape[-1] // group_size, torch.uint8, layout)


def decode(
    codes: Tensor, exponents: Tensor, group_size: int, dtype: torch.dtype, scaling: str, layout: str
) -> Decoded:  # fmt: skip
    """The numbers that codes and exponents encode."""
    width = codes.shape[-1]
    return decoded(exponents, codes.numel() // width, width // group_size, layout, Tensor.double, FORMATS[dtype].most)


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """All arguments except x."""
    return GROUP, torch.float8_e4m3fn, MxScaling.FLOOR.value, ScaleLayout.ROWS.value


def _sample(
    shape: tuple[int, ...], scaling: MxScaling, layout: ScaleLayout = ScaleLayout.ROWS,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Sample:  # fmt: skip
    own = GROUP, dtype, scaling.value, layout.value
    return sample_of(shape, lambda device: own, f"-{dtype_text(dtype)}-{scaling.value}-{layout.value}")


per_token_mx_fp8_quant = define(
    "per_token_mx_fp8_quant",
    "(Tensor x, int group_size, ScalarType dtype, str scaling, str layout) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[
        *(_sample((7, 320), each, dtype=dtype) for each in MxScaling for dtype in FORMATS),
        _sample((2, 3, 64), MxScaling.EVEN, ScaleLayout.SWIZZLED),
    ],
    decode=decode,
)

SPELLINGS = {dtype: spellings(codes) for dtype, codes in FORMATS.items()}


def raise_mx(canonical: CanonicalGraph) -> None:
    """Raises every quantisation to MXFP8."""
    for cast in _casts(canonical):
        value, is_clamped = _unclamped(cast)
        how = read(value, SPELLINGS[cast.args[1]]) or read(cast.args[0], SPELLINGS[cast.args[1]])
        if how is None:
            _tell_other_exponents(canonical, cast)
            continue
        try:
            if cast.args[1] is torch.float8_e5m2 and not is_clamped and how[0] is not MxScaling.RCEIL:
                raise _beyond(cast)
            raise_scaled(canonical, cast, value, per_token_mx_fp8_quant, how, cast.args[1])
        except Unraised as refused:
            refused.tell(
                canonical, per_token_mx_fp8_quant, "MXFP8 quantisation", at=[product_of(value), cast], place=cast
            )
    canonical.merge_equal(per_token_mx_fp8_quant)
    tell_formats(canonical, per_token_mx_fp8_quant, "float8_e4m3fn or float8_e5m2", TOPS, LARGEST)


def _unclamped(cast: Call) -> tuple[fx.Node, bool]:
    """(x, whether it is clamped to the range of the codes), from the operand of a cast."""
    most = FORMATS[cast.args[1]].most
    found = all_fit(cast.args[0], (aten.clamp_max.default, (aten.clamp_min.default, "x", -most), most), {})
    return (found["x"], True) if found is not None else (cast.all_input_nodes[0], False)


def _beyond(cast: Call) -> Unraised:
    """The error for a missing clamp. Scaled values may be infinite or, by `floor`, up to 65536."""
    detail = (
        "the value cast isn't clamped: beyond the range of float8_e5m2, torch yields infinity, and its GPU kernels the "
        "largest code"
    )
    return Unraised(Reason.ROUNDING, detail, cast, "clamp it to +-57344")


def _tell_other_exponents(canonical: CanonicalGraph, cast: Call) -> None:
    """Records codes whose scales are stored as bytes but computed in compressed-tensors' way."""
    quotient = next((node for node in behind(cast) if is_call(node, aten.div.Tensor)), None)
    power = next((node for node in behind(quotient.args[1]) if is_power(node)), None) if quotient is not None else None
    if quotient is None or power is None or not any(dtype_of(node) is torch.uint8 for node in behind(power)):
        return
    scalings = ", ".join(MxScaling)
    near = Unraised(
        Reason.OP, f"exponents are computed in another way than by any scaling of the op ({scalings})", power
    )
    near.tell(canonical, per_token_mx_fp8_quant, "MXFP8 quantisation", at=[quotient, cast], place=cast)


TOPS = {4: "MXFP6 (e3m2)"}
LARGEST = {7.5: "MXFP6 (e2m3)", 28.0: "MXFP6 (e3m2)"}
"""Formats without an op, by the number that they subtract from the largest element's exponent, and by its divisor."""


def _casts(canonical: CanonicalGraph) -> Iterator[Call]:
    return (cast for cast in canonical.calls(convert_element_type) if cast.args[1] in FORMATS)


class MxFp8(GroupCodes):
    """The quantisation at a site."""

    name, eager_kernels, scale_bytes = "mx_fp8_quant", 31, 1


PART = quantisation(per_token_mx_fp8_quant, MxFp8, Stage.MICROSCALED_EPILOGUES, raise_mx, _sample_arguments, unit=GROUP)
