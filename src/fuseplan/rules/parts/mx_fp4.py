"""MXFP4: e2m1 codes, two a byte, of groups of a row, with powers of two as scales, stored as exponents in bytes.

    exponent, scaled = see `microscaled`
    byte = e2m1(scaled)[0::2] | e2m1(scaled)[1::2] << 4

as in torchao's `to_mx`; see `fp4` for the conversion.
"""

from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.ops import (
    Decoded,
    MxScaling,
    Sample,
    ScaleLayout,
    compute_dtype,
    define,
    empty_scales,
)
from fuseplan.rules.parts.base import Stage, sample_of
from fuseplan.rules.parts.codes import quantisation
from fuseplan.rules.parts.fp4 import MOST, Fp4Codes, e2m1, numbers_of, packed, packings, tell_simulated
from fuseplan.rules.parts.microscaled import (
    GROUP,
    Format,
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

E2M1 = Format(most=MOST, digits=1)


def reference(x: Tensor, group_size: int, scaling: str, layout: str) -> tuple[Tensor, Tensor]:
    """exponent = biased power of two from each group's largest element;  q = e2m1(x / 2^exponent), packed

    Args:
        x: [..., hidden].
        group_size: elements of a group; it divides hidden.
        scaling: one of `MxScaling`.
        layout: layout of the exponents, `ScaleLayout.ROWS` or `ScaleLayout.SWIZZLED`.

    Returns:
        (q, exponent): [..., hidden / 2] in uint8, with the code of the first of two elements in the low half, and
        [..., hidden / group_size] in uint8, in the shape that `layout` gives it; 127 stands for a scale of 1. Both are
        contiguous. A group with NaN has the exponent 255 and meaningless codes.

    Raises:
        ValueError: `scaling` isn't one of `MxScaling`, or `layout` isn't supported.
        RuntimeError: `group_size` doesn't divide hidden, or hidden is odd.
    """
    groups = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size))
    scaled, exponent = scaled_groups(groups, E2M1, scaling)
    return packed(e2m1(scaled).flatten(-2)), laid_out(exponent, layout)


def fake(x: Tensor, group_size: int, scaling: str, layout: str) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    *rows, hidden = x.shape
    codes = x.new_empty((*rows, hidden // 2), dtype=torch.uint8)
    return codes, empty_scales(x, hidden // group_size, torch.uint8, layout)


def decode(codes: Tensor, exponents: Tensor, group_size: int, scaling: str, layout: str) -> Decoded:
    """The numbers that codes and exponents encode."""
    rows, groups = codes.numel() // codes.shape[-1], 2 * codes.shape[-1] // group_size
    return decoded(exponents, rows, groups, layout, numbers_of, E2M1.most)


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """All arguments except x."""
    return GROUP, MxScaling.FLOOR.value, ScaleLayout.ROWS.value


def _sample(shape: tuple[int, ...], scaling: MxScaling, layout: ScaleLayout = ScaleLayout.ROWS) -> Sample:
    own = GROUP, scaling.value, layout.value
    return sample_of(shape, lambda device: own, f"-{scaling.value}-{layout.value}")


per_token_mx_fp4_quant = define(
    "per_token_mx_fp4_quant",
    "(Tensor x, int group_size, str scaling, str layout) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[
        *(_sample((7, 320), each) for each in MxScaling),
        _sample((2, 3, 64), MxScaling.EVEN, ScaleLayout.SWIZZLED),
    ],
    packed=(0,),
    decode=decode,
)

SPELLINGS = spellings(E2M1)


def raise_mx(canonical: CanonicalGraph) -> None:
    """Raises every quantisation to MXFP4."""
    for codes, scaled in packings(canonical):
        how = read(scaled, SPELLINGS)
        if how is None:
            continue
        try:
            raise_scaled(canonical, codes, scaled, per_token_mx_fp4_quant, how)
        except Unraised as refused:
            refused.tell(canonical, per_token_mx_fp4_quant, "MXFP4 quantisation", at=[product_of(scaled)], place=codes)
    canonical.merge_equal(per_token_mx_fp4_quant)
    tell_formats(canonical, per_token_mx_fp4_quant, "e2m1, two a byte", TOPS, LARGEST)
    tell_simulated(canonical, per_token_mx_fp4_quant, "MXFP4", is_power)


TOPS = {2: "MXFP6 (e2m3), or e2m1 that is converted in another way"}
LARGEST = {MOST: "e2m1 that is converted in another way"}
"""MXFP4 and similar formats, by the number subtracted from the largest element's exponent, and by its divisor."""


class MxFp4(Fp4Codes):
    """The quantisation at a site."""

    name, eager_kernels, scale_bytes = "mx_fp4_quant", 49, 1


PART = quantisation(per_token_mx_fp4_quant, MxFp4, Stage.MICROSCALED_EPILOGUES, raise_mx, _sample_arguments, unit=GROUP)
