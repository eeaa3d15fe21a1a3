"""Shared by the microscaled formats (MX): a power of two as the scale of each group, stored as its exponent in a byte.

    a = amax(|x|) of a group, float32;  b = its bits
    power = ((b >> 23) & 255) - 127 [+ 1 where a is no power of two, `ceil`]
    exponent = clamp(power - top, -127, 128) + 127; 255 of NaN
    scaled = x / max(2^(exponent - 127), 2^-126)                             `even` rounds b before

    d = a / most;  exponent = clamp(ceil(log2(d)), -127, 127) + 127; 254 of infinity, 255 of NaN      `rceil`
    scaled = clamp(x * (2^(127 - exponent), 1 where exponent is 0), -most, most)

as torchao's `to_mx` leaves them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import Call, aten, convert_element_type, dtype_of, equal_shape, is_call, tensor_of
from fuseplan.graph.ops import Decoded, DialectOp, MxScaling, ScaleLayout, in_rows, lay_out
from fuseplan.record import Reason
from fuseplan.rules.parts.fp8 import number_of, raise_computed, reordered, source_of, uncast
from fuseplan.rules.parts.fp8_scales import rounded_by_log2, rows_in_groups
from fuseplan.rules.parts.patterns import F32, I32, U8, Found, Pattern, all_fit, bits_of
from fuseplan.rules.parts.scale_layouts import swizzled

BIAS, NAN, INFINITE, DIGITS = 127, 255, 254, 23
GROUP = 32


@dataclass(frozen=True, kw_only=True)
class Format:
    """The number format of a code.

    Attributes:
        most: its largest value.
        digits: bits of its mantissa; float32 has DIGITS.
    """

    most: float
    digits: int

    @property
    def top(self) -> int:
        """floor(log2(most))"""
        return math.frexp(self.most)[1] - 1

    @property
    def half(self) -> int:
        """Half a unit in the last place of a code, in units of float32's last place."""
        return 1 << (DIGITS - self.digits - 1)


def scaled_groups(groups: Tensor, codes: Format, scaling: str) -> tuple[Tensor, Tensor]:
    """Groups scaled by their exponents, possibly beyond the range of the codes, and the exponents.

    Args:
        groups: [..., groups, size] in the dtype of arithmetic.
        codes: the format of the codes.
        scaling: one of `MxScaling`.

    Returns:
        (scaled, exponents): like `groups`, and [..., groups] in uint8: 127 for a scale of 1, 255 for a group with NaN.

    Raises:
        ValueError: `scaling` isn't one of `MxScaling`.
    """
    largest, how = groups.abs().amax(-1, keepdim=True).float(), MxScaling(scaling)
    if how is MxScaling.RCEIL:
        wanted = largest / codes.most
        mantissa, power = torch.frexp(wanted)
        power = torch.where(wanted > 0, power - (mantissa == 0.5).int(), -BIAS).clamp(-BIAS, BIAS)
        exponent = torch.where(wanted.isinf(), INFINITE, power + BIAS)
        inverse = torch.exp2((BIAS - exponent).float())
        scaled = groups * torch.where(wanted.isnan(), wanted, torch.where(exponent == 0, 1.0, inverse))
    else:
        bits = largest.view(torch.int32)
        if how is MxScaling.EVEN:
            bits = bits + codes.half
        exponent = (bits >> DIGITS) & 0xFF
        if how is MxScaling.CEIL:
            exponent = exponent + ((bits & ((1 << DIGITS) - 1)) > 0)
        exponent = torch.where(largest.isnan(), NAN, (exponent - codes.top).clamp(min=0))
        scaled = groups / (exponent.int() << DIGITS).view(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return scaled, torch.where(largest.isnan(), NAN, exponent).to(torch.uint8).squeeze(-1).contiguous()


def laid_out(exponents: Tensor, layout: str) -> Tensor:
    """Exponents in a layout.

    Raises:
        ValueError: it is neither `rows` nor `swizzled`.
    """
    if layout not in (ScaleLayout.ROWS, ScaleLayout.SWIZZLED):
        raise ValueError(f"exponents lie in 'rows' or 'swizzled', not in '{layout}'")
    return lay_out(exponents, layout)


def decoded(
    exponents: Tensor, rows: int, groups: int, layout: str, numbers: Callable[[Tensor], Tensor], most: float
) -> Decoded:
    """The scales that biased exponents encode, for this many rows of this many groups; see `Decoded`."""
    steps = in_rows(exponents, rows, groups, layout).int()
    scales = torch.where(steps == NAN, math.nan, torch.exp2((steps - BIAS).double()))
    return Decoded(numbers=numbers, scales=scales, steps=steps, most=most)


def _power(value: Pattern) -> Pattern:
    shifted = (aten.bitwise_right_shift.Tensor_Scalar, bits_of(value), DIGITS)
    return (aten.sub.Tensor, (aten.bitwise_and.Scalar, shifted, 0xFF), BIAS)


def _kept(value: Pattern, low: int, high: int) -> Pattern:
    bounded = (aten.clamp_max.default, (aten.clamp_min.default, value, low), high)
    return (U8, (aten.add.Tensor, bounded, BIAS))


def _exponent(of: str, power: Pattern, top: int) -> Pattern:
    return (aten.where.self, (aten.isnan.default, of), NAN, _kept((aten.sub.Tensor, power, top), -BIAS, BIAS + 1))


def _rounded(half: int) -> Pattern:
    bits = (aten.bitwise_and.Scalar, (aten.add.Tensor, bits_of("largest"), half), 0x1FF << DIGITS)
    return (aten.index_put.default, (aten.view.dtype, bits, F32), [(aten.isnan.default, "largest")], math.nan)


_IS_BETWEEN = (aten.gt.Scalar, (aten.bitwise_and.Scalar, bits_of("largest"), (1 << DIGITS) - 1), 0)
_SHIFTED = (aten.bitwise_left_shift.Tensor_Scalar, (I32, "exponent"), DIGITS)
_SCALE = (aten.clamp_min.default, (aten.view.dtype, _SHIFTED, F32), torch.finfo(torch.float32).tiny)
_UP = _kept((aten.ceil.default, (aten.log2.default, "wanted")), -BIAS, BIAS)
_FINITE = (aten.where.self, (aten.isinf.default, "wanted"), INFINITE, _UP)
_INVERSE = (aten.exp2.default, (aten.sub.Tensor, BIAS, (F32, "exponent")))
_NOT_SMALLEST = (aten.where.self, (aten.eq.Scalar, "exponent", 0), 1.0, _INVERSE)
_NOT_INFINITE = (aten.where.self, (aten.eq.Scalar, "exponent", INFINITE), 2.0**-BIAS, _NOT_SMALLEST)
_FACTOR = (aten.where.self, (aten.eq.Scalar, "exponent", NAN), "wanted", _NOT_INFINITE)
_DIVIDED = (aten.div.Tensor, "x", _SCALE)


def spellings(codes: Format) -> dict[MxScaling, tuple[Pattern, dict[str, Pattern]]]:
    """By scaling: the pattern of the scaled value, and the patterns of the values that it names."""
    above, power = (aten.add.Tensor, _power("largest"), _IS_BETWEEN), _power("largest")
    product = (aten.clamp_min.default, (aten.mul.Tensor, "x", _FACTOR), -codes.most)
    by_rounded = {"exponent": _exponent("rounded", _power("rounded"), codes.top), "rounded": _rounded(codes.half)}
    finite = (aten.where.self, (aten.isnan.default, "wanted"), NAN, _FINITE)
    wanted = (aten.div.Tensor, "largest", codes.most)
    return {
        MxScaling.FLOOR: (_DIVIDED, {"exponent": _exponent("largest", power, codes.top)}),
        MxScaling.CEIL: (_DIVIDED, {"exponent": _exponent("largest", above, codes.top)}),
        MxScaling.EVEN: (_DIVIDED, by_rounded),
        MxScaling.RCEIL: ((aten.clamp_max.default, product, codes.most), {"exponent": finite, "wanted": wanted}),
    }


Spellings = dict[MxScaling, tuple[Pattern, dict[str, Pattern]]]


def read(scaled: object, known: Spellings) -> tuple[MxScaling, Found] | None:
    """The scaling of a value, and its `x`, `exponent` and `largest`; None where no pattern matches."""
    result = None
    for scaling, (pattern, named) in known.items():
        found = all_fit(scaled, pattern, named)
        if found is not None:
            result = scaling, found
            if _magnitudes(found) is not None:  # `even`, with its rounding as `largest`, also fits `floor`
                break
    return result


def _magnitudes(found: Found) -> Call | None:
    """|x| in groups, whose amax is `largest`."""
    amax = reordered(uncast(reordered(found["largest"])))
    magnitudes = amax.args[0] if is_call(amax, aten.amax.default) and list(amax.args[1]) == [-1] else None
    return magnitudes if is_call(magnitudes, aten.abs.default) else None


def raise_scaled(
    canonical: CanonicalGraph, codes: fx.Node, scaled: fx.Node, op: DialectOp, how: tuple[MxScaling, Found],
    *between: Any,
) -> None:  # fmt: skip
    """Replaces codes and their exponents by an op `(x, group_size, *between, scaling, layout)`.

    Raises:
        Unraised: the op computes something else.
    """
    scaling, found = how
    if scaling is MxScaling.RCEIL and dtype_of(source_of(found["x"])) is torch.float32:
        raise rounded_by_log2(found["exponent"])
    if is_call(found["largest"], aten.index_put.default):
        detail = "the largest is rounded at another digit than the codes' last"
        raise Unraised(Reason.ROUNDING, detail, found["largest"])
    rows, size = rows_of_groups(scaled, found, found["exponent"])
    x = tensor_of(rows)
    assert x is not None
    laid_out = _swizzled(found["exponent"], rows, x.shape[-1] // size)
    layout = ScaleLayout.ROWS if laid_out is None else ScaleLayout.SWIZZLED
    args = (rows, size, *between, scaling.value, layout.value)
    raise_computed(canonical, codes, laid_out or found["exponent"], op, args)


def _swizzled(exponent: fx.Node, rows: fx.Node, groups: Any) -> fx.Node | None:
    """The node that holds exponents in tiles, where exponents have no other use except to scale groups."""
    scales = [user for user in exponent.users if is_call(user, aten.view.dtype)]
    rest = [user for user in exponent.users if not is_call(user, aten.view.dtype, convert_element_type, aten.eq.Scalar)]
    return swizzled(scales[0], rows, groups) if len(scales) == 1 and not rest else None


def rows_of_groups(scaled: fx.Node, found: Found, scale: fx.Node) -> tuple[fx.Node, int]:
    """(rows, elements of a group) of groups whose scales are each computed from the group's own amax.

    Args:
        scaled: the scaled groups.
        found: `x`, the tensor to scale, and `largest`.
        scale: the node that holds the scales.

    Raises:
        Unraised: the scales are computed from something else.
    """
    x, magnitudes = uncast(found["x"]), _magnitudes(found)
    assert isinstance(x, fx.Node)
    value = tensor_of(magnitudes)
    if magnitudes is None or value is None or source_of(magnitudes.args[0]) is not source_of(x):
        raise Unraised(Reason.OP, "the scale isn't computed from the largest element of its group", scale)
    _check_shapes(scaled, value, scale)
    size = value.shape[-1]
    rows, is_split = rows_in_groups(x, size)
    if not is_split:
        raise Unraised(Reason.SIZE, f"a row is one group of {size}", scale)
    return rows, int(size)


def _check_shapes(scaled: fx.Node, groups: Tensor, scale: fx.Node) -> None:
    """Checks that each group [..., size] has a scale of its own."""
    x, factor = map(tensor_of, product_of(scaled).args)
    assert x is not None and factor is not None
    if not equal_shape(x, groups) or not equal_shape(factor, groups[..., :1]):
        detail = f"the scale has the shape {[*factor.shape]}, and the groups it scales {[*x.shape]}"
        raise Unraised(Reason.SIZE, detail, scale, "keep one scale for each group")


def product_of(scaled: fx.Node) -> Call:
    """The division or multiplication that scales groups, from a value behind its clamps and views. Near misses are
    placed at it: a search from a core reaches it, but not the codes.
    """
    product: Any = scaled
    while not is_call(product, aten.div.Tensor, aten.mul.Tensor):
        product = product.args[0]
    return product


def products(scale: fx.Node) -> list[fx.Node]:
    """The divisions and multiplications of groups by values computed from their scales."""
    found, ahead, seen = list[fx.Node](), [scale], {scale}
    while ahead and len(seen) < MOST_STEPS**2:
        node = ahead.pop(0)
        for user in node.users:
            if is_call(user, aten.div.Tensor, aten.mul.Tensor) and not equal_shape(tensor_of(user), tensor_of(node)):
                found.append(user)
            elif user not in seen:
                seen.add(user)
                ahead.append(user)
    return found


def is_power(node: fx.Node) -> bool:
    """Whether it is a power of two with a computed exponent."""
    return is_call(node, aten.exp2.default) or (is_call(node, aten.pow.Scalar) and node.args[0] == 2)


def behind(value: object) -> Iterator[fx.Node]:
    """A node and some of the nodes it is computed from, the nearest first; nothing for a number."""
    ahead = [value] if isinstance(value, fx.Node) else []
    for _ in range(MOST_SEEN):
        if not ahead:
            break
        node = ahead.pop(0)
        yield node
        ahead += node.all_input_nodes


MOST_SEEN = 24
MOST_STEPS = 12
"""The most ops from exponents back to the constant that identifies their format."""


def format_of(exponents: fx.Node, tops: dict[int, str], largest: dict[float, str]) -> str | None:
    """The format identified by the constant subtracted from an exponent, or by the divisor of the largest element."""
    value: object = exponents.args[0]
    for _ in range(MOST_STEPS):
        if not isinstance(value, fx.Node) or not value.args:
            break
        number: Any = number_of(value.args[1]) if len(value.args) > 1 else None
        if is_call(value, aten.sub.Tensor) and number in tops:
            return tops[number]
        if is_call(value, aten.div.Tensor) and number in largest:
            return largest[number]
        value = value.args[2] if is_call(value, aten.where.self) else value.args[0]
    return None


def tell_formats(
    canonical: CanonicalGraph, op: DialectOp, takes: str, tops: dict[int, str], largest: dict[float, str]
) -> None:
    """Records exponents that weren't raised and whose format such a constant identifies.

    Args:
        canonical: the graph.
        op: the op of the near miss.
        takes: the codes of that op.
        tops: formats by the number subtracted from the largest element's exponent.
        largest: formats by the divisor of the largest element.
    """
    for node in canonical.calls(aten.view.dtype):
        other = format_of(node, tops, largest) if node.args[1] is torch.float8_e8m0fnu else None
        at = [*products(node.all_input_nodes[0]), node]
        if other is not None and not any(each in canonical.unraised for each in at):  # a closer lookalike recorded it
            near = Unraised(Reason.DTYPE, f"the codes are {other}, and the op's are {takes}", node)
            near.tell(canonical, op, "microscaled quantisation", at=at, place=node)
