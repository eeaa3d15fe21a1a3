"""Shared by quantisations to fp4: numbers as e2m1 codes, packed two to a byte with the first in its low half.

    size = bits of |x|, float32
    code = 7 where |x| >= 6;  bits(|x| + 2^22) - bits(2^22) where |x| < 1;  else (size - 126 * 2^23 + 2^21 - 1 +
           ((size >> 22) & 1)) >> 22;  | 8 where x is negative
    byte = code[0::2] | code[1::2] << 4

This rounds to nearest, ties to even. There is no code for NaN, which becomes 2, 3 or 4, depending on its bits. In
graphs, torchao's `f32_to_f4_unpacked` and `pack_uint4` do the same, in the same integer ops.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import Call, aten, equal_size, is_call, tensor_of
from fuseplan.graph.ops import DialectOp
from fuseplan.record import Reason
from fuseplan.rules.parts.codes import GroupCodes
from fuseplan.rules.parts.fp8 import number_of, reordered
from fuseplan.rules.parts.microscaled import behind
from fuseplan.rules.parts.patterns import F32, U8, Pattern, all_fit, bits_of

MOST = 6.0
_SIGN, _DIGITS, _SIGN_OF_CODE = 0x80000000, 22, 8
_LIFT = -(126 << 23) + (1 << 21) - 1
"""Turns a float32 exponent into a code's, and adds half a unit of the code, less one of float32, for rounding."""
_SMALLEST = 2.0**22
"""Added to a number below 1, so that the sum's last bits count halves."""
_SMALLEST_BITS = 149 << 23
_SATURATED = 7
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, MOST)


def e2m1(x: Tensor) -> Tensor:
    """Codes of numbers, in the low half of a byte each.

    Args:
        x: float32, or float64, which is rounded to float32.

    Returns:
        The same shape, uint8.
    """
    bits = x.float().view(torch.int32)
    size = bits & 0x7FFFFFFF
    magnitude = size.view(torch.float32)
    small = (magnitude + _SMALLEST).view(torch.int32) - _SMALLEST_BITS
    normal = ((size + _LIFT + ((size >> _DIGITS) & 1)) >> _DIGITS) & 0xFF
    code = torch.where(magnitude >= MOST, _SATURATED, torch.where(magnitude < 1, small, normal))
    return (code | ((bits >> 28) & _SIGN_OF_CODE)).to(torch.uint8)


def packed(codes: Tensor) -> Tensor:
    """Two codes a byte: [..., n] to [..., n / 2], contiguous.

    Raises:
        RuntimeError: n is odd.
    """
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.bitwise_or(first, second << 4)


def numbers_of(pairs: Tensor) -> Tensor:
    """The numbers that packed codes encode: [..., n] bytes to [..., 2 n] in float64."""
    codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).long()
    sizes = torch.tensor(_NUMBERS, dtype=torch.float64, device=pairs.device)[codes & 7]
    return torch.where(codes >= _SIGN_OF_CODE, -sizes, sizes)


_SIZE = (aten.bitwise_xor.Tensor, "bits", "sign")
_IS_SMALL = (
    aten.logical_and.default, (aten.logical_not.default, "saturates"), (aten.lt.Scalar, "magnitude", 1)
)  # fmt: skip
_IS_NORMAL = (aten.logical_not.default, (aten.logical_or.default, "saturates", "is_small"))
_ODD = (aten.bitwise_and.Scalar, (aten.__rshift__.Scalar, "size", _DIGITS), 1)
_NORMAL = (U8, (aten.__rshift__.Scalar, (aten.add.Tensor, (aten.add.Tensor, "size", _LIFT), _ODD), _DIGITS))
_SMALL = (U8, (aten.sub.Tensor, bits_of((aten.add.Tensor, "magnitude", _SMALLEST)), _SMALLEST_BITS))
_CODE = (aten.where.self, _IS_NORMAL, _NORMAL, (aten.where.self, "is_small", _SMALL, _SATURATED))
_SIGN_BIT = (aten.bitwise_and.Scalar, (U8, (aten.__rshift__.Scalar, "sign", 28)), _SIGN_OF_CODE)
_CODES: tuple[Pattern, dict[str, Pattern]] = (
    (aten.bitwise_or.Tensor, _CODE, _SIGN_BIT),
    {
        "is_small": _IS_SMALL,
        "saturates": (aten.ge.Scalar, "magnitude", MOST),
        "magnitude": (aten.view.dtype, "size", F32),
        "size": _SIZE,
        "sign": (aten.bitwise_and.Scalar, "bits", _SIGN),
        "bits": bits_of("scaled"),
    },
)


def packings(canonical: CanonicalGraph) -> list[tuple[fx.Node, fx.Node]]:
    """(bytes, the converted tensor) of each packing of two codes to a byte in a graph."""
    found = []
    for node in canonical.calls(aten.bitwise_or.Tensor):
        codes = _unpacked(node)
        named = all_fit(codes, *_CODES) if codes is not None else None
        if named is not None:
            found.append((_reshaped(node), named["scaled"]))
    return found


def _unpacked(node: Call) -> fx.Node | None:
    """codes of `codes[0::2] | codes[1::2] << 4`, along the last dimension."""
    low, high = node.args
    if not is_call(high, aten.__lshift__.Scalar):
        low, high = high, low
    if not is_call(high, aten.__lshift__.Scalar) or high.args[1] != 4:
        return None
    first, second = _every_second(low, 0), _every_second(high.args[0], 1)
    return first if first is not None and first is second else None


def _every_second(node: object, start: int) -> fx.Node | None:
    """codes of `codes[start::2]`."""
    if not is_call(node, aten.slice.Tensor) or len(node.args) != 5:
        return None
    codes, dim, first, end, step = node.args
    value = tensor_of(codes)
    assert value is not None
    # With an odd number of codes, the last one would be broadcast, or left without a partner.
    is_last = dim in (-1, value.dim() - 1) and equal_size(value.shape[-1] % 2, 0)
    return codes if is_last and _reaches(end, value, dim) and (first, step) == (start, 2) else None


def _reaches(end: object, value: Tensor, dim: int) -> bool:
    size = value.shape[dim]
    return isinstance(end, int) and (end == WHOLE or (isinstance(size, int) and end >= size))


WHOLE = 2**63 - 1
"""The end of a slice without an explicit end."""


def _reshaped(node: fx.Node) -> fx.Node:
    """The bytes in their shape in the graph: the reshape of the node, if that is its only reader."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    return user if reordered(user) is node else node


def tell_simulated(canonical: CanonicalGraph, op: DialectOp, title: str, is_scale: Callable[[fx.Node], bool]) -> None:
    """Records simulated quantisation, as in compressed-tensors: numbers rounded to e2m1 values and kept as numbers.

    Args:
        canonical: the graph.
        op: the op of the near miss.
        title: the name of the format.
        is_scale: whether a node among the inputs of the divisor identifies the format.
    """
    for node in canonical.calls(aten.index_put.default):
        quotient = _rounded_by_bounds(node)
        scales = list(filter(is_scale, behind(quotient.args[1]))) if quotient is not None else []
        if quotient is not None and scales:
            detail = "numbers are rounded to the values of e2m1 but stay numbers, and the op yields codes"
            near = Unraised(Reason.OP, detail, node)
            near.tell(canonical, op, f"{title} quantisation", at=[quotient, *scales], place=quotient)


def _rounded_by_bounds(node: Call) -> Call | None:
    """x / scale in a chain of comparisons with the midpoints between codes, of which the last is `x[x > 5] = 6`."""
    value, masks, number = node.args[:3]
    is_last = len(masks) == 1 and is_call(masks[0], aten.gt.Scalar) and masks[0].args == (value, 5.0)
    if not is_last or number_of(number) != MOST:
        return None
    for _ in range(MOST_STEPS):
        if is_call(value, aten.div.Tensor) or not isinstance(value, fx.Node) or not value.args:
            break
        value = value.args[0]
    return value if is_call(value, aten.div.Tensor) else None


MOST_STEPS = 20
"""The most ops from a rounded value back to its divisor."""


class Fp4Codes(GroupCodes):
    """Two codes a byte, at a site."""

    code_bits = 4
