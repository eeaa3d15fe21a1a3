"""MXFP8: fp8 codes of groups of a row whose scales are powers of two, kept as their exponents in bytes (E8M0).

    exponent, scaled = those of `microscaled`
    q = convert(scaled, fp8)

as torchao's `to_mx` leaves them, whose conversion to fp8 saturates.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import Call, aten, convert_element_type, dtype_of, is_call
from fuseplan.graph.ops import Decoded, MxScaling, Sample, compute_dtype, define, random_tensor
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Kind, RowEpilogue, Stage, rows_of
from fuseplan.rules.parts.codes import GroupCodes
from fuseplan.rules.parts.microscaled import (
    GROUP,
    Format,
    behind,
    decoded,
    is_power,
    raise_scaled,
    read,
    scaled_groups,
    spellings,
    tell_formats,
)

E4M3 = Format(most=448.0, digits=3)


def reference(x: Tensor, group_size: int, dtype: torch.dtype, scaling: str) -> tuple[Tensor, Tensor]:
    """exponent = the biased one of a power of two by each group's largest element;  q = clamp(x / 2^exponent).to(fp8)

    Args:
        x: [..., hidden].
        group_size: elements of a group; it divides hidden.
        dtype: float8_e4m3fn.
        scaling: one of `MxScaling`.

    Returns:
        (q, exponent): [..., hidden] in `dtype`, [..., hidden / group_size] in uint8: 127 for a scale of 1. Both are
        contiguous. A group with NaN has the exponent 255.

    Raises:
        ValueError: `scaling` isn't one of `MxScaling`.
        RuntimeError: `group_size` doesn't divide hidden.
    """
    groups = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size))
    scaled, exponent = scaled_groups(groups, E4M3, scaling)
    return scaled.clamp(-E4M3.most, E4M3.most).to(dtype).flatten(-2).contiguous(), exponent


def fake(x: Tensor, group_size: int, dtype: torch.dtype, scaling: str) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    exponent = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=dtype), exponent


def decode(codes: Tensor, exponents: Tensor, group_size: int, dtype: torch.dtype, scaling: str) -> Decoded:
    """What both stand for."""
    return decoded(exponents, Tensor.double, E4M3.most)


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """All but x."""
    return GROUP, torch.float8_e4m3fn, MxScaling.FLOOR.value


def _sample(shape: tuple[int, ...], scaling: MxScaling) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return random_tensor(shape, torch.bfloat16, device, generator), GROUP, torch.float8_e4m3fn, scaling.value

    return Sample(name=f"{rows_of(shape)}-{scaling.value}", make=make)


per_token_mx_fp8_quant = define(
    "per_token_mx_fp8_quant",
    "(Tensor x, int group_size, ScalarType dtype, str scaling) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[*(_sample((7, 320), each) for each in MxScaling), _sample((2, 3, 64), MxScaling.EVEN)],
    decode=decode,
)

SPELLINGS = spellings(E4M3)


def raise_mx(canonical: CanonicalGraph) -> None:
    """Raises every quantisation to MXFP8."""
    for cast in _casts(canonical):
        how = read(cast.args[0], SPELLINGS)
        if how is None:
            _tell_other_exponents(canonical, cast)
            continue
        try:
            raise_scaled(canonical, cast, cast.all_input_nodes[0], per_token_mx_fp8_quant, how, torch.float8_e4m3fn)
        except Unraised as refused:
            refused.tell(canonical, per_token_mx_fp8_quant, "MXFP8 quantisation", at=[cast], place=cast)
    canonical.merge_equal(per_token_mx_fp8_quant)
    tell_formats(canonical, per_token_mx_fp8_quant, "float8_e4m3fn", TOPS, LARGEST)


def _tell_other_exponents(canonical: CanonicalGraph, cast: Call) -> None:
    """Notes codes by powers of two that are kept as bytes, where these are computed as compressed-tensors does."""
    quotient = next((node for node in behind(cast) if is_call(node, aten.div.Tensor)), None)
    power = next((node for node in behind(quotient.args[1]) if is_power(node)), None) if quotient is not None else None
    if quotient is None or power is None or not any(dtype_of(node) is torch.uint8 for node in behind(power)):
        return
    scalings = ", ".join(MxScaling)
    near = Unraised(
        Reason.OP, f"exponents are computed in another way than by any scaling of the op ({scalings})", power
    )
    near.tell(canonical, per_token_mx_fp8_quant, "MXFP8 quantisation", at=[quotient, cast], place=cast)


TOPS = {4: "MXFP6 (e3m2)", 15: "MXFP8 in float8_e5m2"}
LARGEST = {7.5: "MXFP6 (e2m3)", 28.0: "MXFP6 (e3m2)", 57344.0: "MXFP8 in float8_e5m2"}
"""What formats that no op has subtract from the largest element's exponent, or divide it by."""


def _casts(canonical: CanonicalGraph) -> Iterator[Call]:
    return (cast for cast in canonical.calls(convert_element_type) if cast.args[1] is torch.float8_e4m3fn)


class MxFp8(GroupCodes):
    """It at a site."""

    name, eager_kernels, scale_bytes = "mx_fp8_quant", 31, 1


PART = RowEpilogue(
    name="mx_fp8_quant",
    kind=Kind.QUANTISATION,
    suffix="mx_fp8_quant",
    ops=(per_token_mx_fp8_quant,),
    parameters=("int group_size", "ScalarType dtype", "str scaling"),
    results=2,
    sample=_sample_arguments,
    unit=GROUP,
    cores=frozenset({"rms_norm", "silu_and_mul"}),
    raising=((Stage.MICROSCALED_EPILOGUES, raise_mx),),
    traffic=MxFp8,
    tail=MxFp8.of,
)
