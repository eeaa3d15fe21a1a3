"""MXFP8: fp8 codes of groups of a row whose scales are powers of two, kept as their exponents in bytes (E8M0).

    a = amax(|x|) of a group, float32;  b = its bits
    exponent = clamp(((b >> 23) & 255) - 127 [+ 1 where a is no power of two, `ceil`] - 8, -127, 128) + 127; 255 of NaN
    q = convert(x / max(2^(exponent - 127), 2^-126), fp8)                    `even` rounds b before

    d = a / fp8_max;  exponent = clamp(ceil(log2(d)), -127, 127) + 127; 254 of infinity, 255 of NaN      `rceil`
    q = convert(clamp(x * (2^(127 - exponent), 1 where exponent is 0), -fp8_max, fp8_max), fp8)

as torchao's `to_mx` leaves them, whose conversion to fp8 saturates.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import (
    Call,
    aten,
    convert_element_type,
    dtype_of,
    equal_shape,
    fill_of,
    is_call,
    tensor_of,
)
from fuseplan.graph.ops import MxScaling, Sample, compute_dtype, define, random_tensor
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Kind, RowEpilogue, Stage, rows_of
from fuseplan.rules.parts.fp8 import (
    GroupCodes,
    number_of,
    raise_computed,
    reordered,
    source_of,
    uncast,
)
from fuseplan.rules.parts.fp8_scales import rounded_by_log2, rows_in_groups

BIAS, NAN, INFINITE, DIGITS = 127, 255, 254, 23
CODE_DIGITS = 3
"""Of the mantissa of float8_e4m3fn, as DIGITS are of float32's."""
_HALF = 1 << (DIGITS - CODE_DIGITS - 1)


def top_exponent(dtype: torch.dtype) -> int:
    """floor(log2(fp8_max))"""
    return math.frexp(torch.finfo(dtype).max)[1] - 1


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
    groups, how = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size)), MxScaling(scaling)
    largest, most = groups.abs().amax(-1, keepdim=True).float(), torch.finfo(dtype).max
    if how is MxScaling.RCEIL:
        wanted = largest / most
        mantissa, power = torch.frexp(wanted)
        power = torch.where(wanted > 0, power - (mantissa == 0.5).int(), -BIAS).clamp(-BIAS, BIAS)
        exponent = torch.where(wanted.isinf(), INFINITE, power + BIAS)
        inverse = torch.exp2((BIAS - exponent).float())
        scaled = groups * torch.where(wanted.isnan(), wanted, torch.where(exponent == 0, 1.0, inverse))
    else:
        bits = largest.view(torch.int32)
        if how is MxScaling.EVEN:
            bits = bits + _HALF
        exponent = (bits >> DIGITS) & 0xFF
        if how is MxScaling.CEIL:
            exponent = exponent + ((bits & ((1 << DIGITS) - 1)) > 0)
        exponent = torch.where(largest.isnan(), NAN, (exponent - top_exponent(dtype)).clamp(min=0))
        scaled = groups / (exponent.int() << DIGITS).view(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    codes = scaled.clamp(-most, most).to(dtype).flatten(-2).contiguous()
    return codes, torch.where(largest.isnan(), NAN, exponent).to(torch.uint8).squeeze(-1).contiguous()


def fake(x: Tensor, group_size: int, dtype: torch.dtype, scaling: str) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    exponent = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=dtype), exponent


GROUP = 32


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
)

Pattern = Any
"""What `_fits` compares a value with: the name of a value, which is the same one wherever it stands; a number; or an
op, or a dtype to which is cast, with patterns of its arguments.
"""
_U8, _I32, _F32 = torch.uint8, torch.int32, torch.float32


def _bits(value: Pattern) -> Pattern:
    return (aten.view.dtype, value, _I32)


def _power(value: Pattern) -> Pattern:
    shifted = (aten.bitwise_right_shift.Tensor_Scalar, _bits(value), DIGITS)
    return (aten.sub.Tensor, (aten.bitwise_and.Scalar, shifted, 0xFF), BIAS)


def _kept(value: Pattern, low: int, high: int) -> Pattern:
    bounded = (aten.clamp_max.default, (aten.clamp_min.default, value, low), high)
    return (_U8, (aten.add.Tensor, bounded, BIAS))


def _exponent(of: str, power: Pattern) -> Pattern:
    top = top_exponent(torch.float8_e4m3fn)
    return (aten.where.self, (aten.isnan.default, of), NAN, _kept((aten.sub.Tensor, power, top), -BIAS, BIAS + 1))


_IS_BETWEEN = (aten.gt.Scalar, (aten.bitwise_and.Scalar, _bits("largest"), (1 << DIGITS) - 1), 0)
_ROUNDED = (
    aten.index_put.default,
    (
        aten.view.dtype,
        (aten.bitwise_and.Scalar, (aten.add.Tensor, _bits("largest"), _HALF), 0x1FF << DIGITS),
        _F32,
    ),
    [(aten.isnan.default, "largest")],
    math.nan,
)  # fmt: skip
_SHIFTED = (aten.bitwise_left_shift.Tensor_Scalar, (_I32, "exponent"), DIGITS)
_SCALE = (aten.clamp_min.default, (aten.view.dtype, _SHIFTED, _F32), torch.finfo(torch.float32).tiny)
_WANTED = (aten.div.Tensor, "largest", torch.finfo(torch.float8_e4m3fn).max)
_UP = _kept((aten.ceil.default, (aten.log2.default, "wanted")), -BIAS, BIAS)
_FINITE = (aten.where.self, (aten.isinf.default, "wanted"), INFINITE, _UP)
_INVERSE = (aten.exp2.default, (aten.sub.Tensor, BIAS, (_F32, "exponent")))
_NOT_SMALLEST = (aten.where.self, (aten.eq.Scalar, "exponent", 0), 1.0, _INVERSE)
_NOT_INFINITE = (aten.where.self, (aten.eq.Scalar, "exponent", INFINITE), 2.0**-BIAS, _NOT_SMALLEST)
_FACTOR = (aten.where.self, (aten.eq.Scalar, "exponent", NAN), "wanted", _NOT_INFINITE)
_MOST = torch.finfo(torch.float8_e4m3fn).max
_DIVIDED = (aten.div.Tensor, "x", _SCALE)
_CLAMPED = (aten.clamp_max.default, (aten.clamp_min.default, (aten.mul.Tensor, "x", _FACTOR), -_MOST), _MOST)
SPELLINGS: dict[MxScaling, tuple[Pattern, dict[str, Pattern]]] = {
    MxScaling.FLOOR: (_DIVIDED, {"exponent": _exponent("largest", _power("largest"))}),
    MxScaling.CEIL: (
        _DIVIDED, {"exponent": _exponent("largest", (aten.add.Tensor, _power("largest"), _IS_BETWEEN))}
    ),
    MxScaling.EVEN: (_DIVIDED, {"exponent": _exponent("rounded", _power("rounded")), "rounded": _ROUNDED}),
    MxScaling.RCEIL: (
        _CLAMPED,
        {"exponent": (aten.where.self, (aten.isnan.default, "wanted"), NAN, _FINITE), "wanted": _WANTED},
    ),
}  # fmt: skip
"""By scaling: what is cast, and the values that it names, in an order in which each is known before it is read."""


def _fits(value: object, pattern: Pattern, found: dict[str, fx.Node]) -> bool:
    if isinstance(pattern, str):
        return isinstance(value, fx.Node) and found.setdefault(pattern, value) is value
    if isinstance(pattern, list):
        return isinstance(value, (list, tuple)) and len(value) == 1 and _fits(value[0], pattern[0], found)
    if not isinstance(pattern, tuple):
        return value is pattern or _is_number(value, pattern)
    target, *arguments = pattern
    if isinstance(target, torch.dtype):
        is_cast = is_call(value, convert_element_type) and value.args[1] is target
        return is_cast and isinstance(value, fx.Node) and _fits(value.args[0], arguments[0], found)
    value = value if is_call(value, target) else reordered(value)
    if not is_call(value, target) or len(value.args) != len(arguments) or value.kwargs:
        return False
    return all(_fits(each, wanted, found) for each, wanted in zip(value.args, arguments, strict=True))


def _is_number(value: object, wanted: object) -> bool:
    if is_call(value, aten.scalar_tensor.default):
        value = value.args[0]
    number = fill_of(value) if isinstance(value, fx.Node) else value
    if isinstance(wanted, float) and math.isnan(wanted):
        return isinstance(number, float) and math.isnan(number)
    return isinstance(number, (int, float)) and isinstance(wanted, (int, float)) and number == wanted


def _read(cast: Call) -> tuple[MxScaling, dict[str, fx.Node]] | None:
    read = None
    for scaling, (codes, values) in SPELLINGS.items():
        found: dict[str, fx.Node] = {}
        if _fits(cast.args[0], codes, found) and all(
            name in found and _fits(found[name], pattern, found) for name, pattern in values.items()
        ):
            read = scaling, found
            if _magnitudes(found) is not None:  # what is rounded before it is read fits as what isn't, too
                break
    return read


def _magnitudes(found: dict[str, fx.Node]) -> Call | None:
    """|x| in groups, of which the largest is of each."""
    amax = reordered(uncast(reordered(found["largest"])))
    magnitudes = amax.args[0] if is_call(amax, aten.amax.default) and list(amax.args[1]) == [-1] else None
    return magnitudes if is_call(magnitudes, aten.abs.default) else None


def raise_mx(canonical: CanonicalGraph) -> None:
    """Raises every quantisation to MXFP8."""
    for cast in _casts(canonical):
        read = _read(cast)
        if read is None:
            continue
        try:
            _raise(canonical, cast, *read)
        except Unraised as refused:
            refused.tell(canonical, per_token_mx_fp8_quant, "MXFP8 quantisation", at=[cast], place=cast)
    canonical.merge_equal(per_token_mx_fp8_quant)
    for node in (*canonical.calls(aten.view.dtype), *_casts(canonical)):
        other = _other_format(node)
        if other is not None:
            near = Unraised(Reason.DTYPE, f"the codes are {other}, and the ops' are float8_e4m3fn", node)
            near.tell(canonical, per_token_mx_fp8_quant, "microscaled quantisation", at=[node], place=node)


TOPS = {2: "MXFP4 or MXFP6 (e2m1, e2m3)", 4: "MXFP6 (e3m2)", 15: "MXFP8 in float8_e5m2"}
LARGEST = {6.0: "MXFP4 (e2m1)", 7.5: "MXFP6 (e2m3)", 28.0: "MXFP6 (e3m2)", 57344.0: "MXFP8 in float8_e5m2"}
"""What formats that no op has subtract from the largest element's exponent, or divide it by."""
MOST_STEPS = 12
"""From exponents to that."""


def _other_format(node: fx.Node) -> str | None:
    """The format whose scales a node yields as exponents, or, as NVFP4 has them, in fp8, where it is one of these."""
    is_exponent = is_call(node, aten.view.dtype) and node.args[1] is torch.float8_e8m0fnu
    if not is_exponent and not is_call(node, convert_element_type):
        return None
    value: object = node.args[0]
    for _ in range(MOST_STEPS):
        if not isinstance(value, fx.Node) or not value.args:
            break
        number: Any = number_of(value.args[1]) if len(value.args) > 1 else None
        if is_call(value, aten.div.Tensor) and number == 6.0 and not is_exponent:
            return "NVFP4" if is_call(reordered(value.args[0]), aten.amax.default) else None
        if is_exponent and is_call(value, aten.sub.Tensor) and number in TOPS:
            return TOPS[number]
        if is_exponent and is_call(value, aten.div.Tensor) and number in LARGEST:
            return LARGEST[number]
        value = value.args[2] if is_call(value, aten.where.self) else value.args[0]
    return None


def _casts(canonical: CanonicalGraph) -> Iterator[Call]:
    return (cast for cast in canonical.calls(convert_element_type) if cast.args[1] is torch.float8_e4m3fn)


def _raise(canonical: CanonicalGraph, cast: Call, scaling: MxScaling, found: dict[str, fx.Node]) -> None:
    x, magnitudes = uncast(found["x"]), _magnitudes(found)
    assert isinstance(x, fx.Node)
    value = tensor_of(magnitudes)
    if magnitudes is None or value is None or source_of(magnitudes.args[0]) is not source_of(x):
        detail = "the exponent isn't that of the largest of what it scales"
        raise Unraised(Reason.OP, detail, found["exponent"])
    _check_shapes(cast, value, found["exponent"])
    if scaling is MxScaling.RCEIL and dtype_of(source_of(x)) is torch.float32:
        raise rounded_by_log2(found["exponent"])
    size = value.shape[-1]
    rows, is_split = rows_in_groups(x, size)
    if not is_split:
        raise Unraised(Reason.SIZE, f"a row is one group of {size}", found["exponent"])
    args = (rows, int(size), torch.float8_e4m3fn, scaling.value)
    raise_computed(canonical, cast, found["exponent"], per_token_mx_fp8_quant, args)


def _check_shapes(cast: Call, groups: Tensor, exponent: fx.Node) -> None:
    """That each group [..., size] is scaled by the one number that is its own."""
    product = cast.args[0]
    while not is_call(product, aten.div.Tensor, aten.mul.Tensor):
        product = product.args[0]
    x, factor = map(tensor_of, product.args)
    assert x is not None and factor is not None
    if not equal_shape(x, groups) or not equal_shape(factor, groups[..., :1]):
        detail = f"the scale has the shape {[*factor.shape]}, and what it scales {[*x.shape]}"
        raise Unraised(Reason.SIZE, detail, exponent, "keep a scale for each group of what it scales")


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
