"""The deviation of a fused op's results, as a share of the allowed deviation.

    allowed = factor * max over the row of |reference - exact| + one unit in the last place of exact

Where a row is one element, such as the scale of a token, the reference may be exact by luck: there the largest relative
error of all rows counts. Codes of fp8 and fp4 may deviate by one step more than the reference's in that row; integers
and booleans not at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The worst element of one result.

    Attributes:
        share: its error over the allowed one; more than 1.0 is too much.
        text: its index, its value, and the right value.
    """

    share: float
    text: str


def compare(actual: Tensor, reference: Tensor, exact: Tensor, factor: float, *, is_packed: bool = False) -> Deviation:
    """The worst element of a result.

    Args:
        actual: a result of the fused op, [..., n].
        reference: the result of the unfused ops, in the same dtype and shape.
        exact: that result in float64 (in the dtype of `actual` where that is fp8 or no float).
        factor: the allowed multiple of the reference's own error.
        is_packed: whether bytes are two codes in e2m1 each. The elements are then codes, counted in steps from 0.
    """
    if is_packed:
        actual, reference, exact = (_steps(each) for each in (actual, reference, exact))
    if actual.numel() == 0:
        return Deviation(share=0.0, text="no elements")
    width = actual.shape[-1] if actual.dim() else 1
    flat = [each.reshape(-1, width) for each in (actual, reference, exact)]
    step = max(1, (BLOCK_ON_GPU if actual.is_cuda else BLOCK) // width)
    parts = zip(*(each.split(step) for each in flat), strict=True)
    blocks = [_block(got, wanted, true, factor, is_packed) for got, wanted, true in parts]
    worst = max(range(len(blocks)), key=lambda index: blocks[index].share)
    block = blocks[worst]
    place = torch.unravel_index(torch.tensor(worst * step * width + block.place), actual.shape)
    where = ", ".join(str(int(index)) for index in place)
    unit = " codes" if is_packed or actual.dtype in FP8 else ""
    off = f": off by {block.error:.3g}{unit}, allowed {block.allowed:.3g}" if math.isfinite(block.error) else ""
    wrong = sum(each.wrong for each in blocks)
    text = (
        f"element [{where}] is {block.actual:.6g} where {block.exact:.6g} is exact{off}; {wrong} of {actual.numel()} "
        "are wrong"
    )
    return Deviation(share=block.share, text=text)


ROUNDED_ALIKE = 2.0
"""The factor of ops that round where their references do. For ops that accumulate in another order, the reference may
be exact by luck in a row of few elements, and counts as half a unit off.
"""
BLOCK = 2**17
"""Elements compared at a time: few enough for a processor's cache to hold all intermediate values."""
BLOCK_ON_GPU = 2**23
"""Elements compared at a time on a GPU, where each of about a hundred steps costs a launch, and 64 MB in float64."""


@dataclass(frozen=True)
class _Block:
    share: float
    place: int
    wrong: int
    actual: float
    exact: float
    error: float
    allowed: float


def _block(actual: Tensor, reference: Tensor, exact: Tensor, factor: float, is_packed: bool) -> _Block:
    """The worst element of a block of rows."""
    if is_packed:
        own, error = (reference - exact).abs(), (actual - exact).abs().double()
        allowed = (own.amax(-1, keepdim=True) + 1).expand_as(own).double()
    elif actual.dtype in FP8:
        error, allowed = _codes(actual, reference, exact, factor)
    elif actual.dtype.is_floating_point:
        error, allowed = _floats(actual, reference, exact, factor)
    else:
        error, allowed = (actual != reference).double(), torch.full_like(actual, 0.5, dtype=torch.float64)
    share = _as_the_reference(actual, reference, error / allowed)
    place = int(share.argmax())
    at = [float(each.flatten()[place].double()) for each in (share, actual, exact, error, allowed)]
    return _Block(at[0], place, int((share > 1).sum()), *at[1:])


def _as_the_reference(actual: Tensor, reference: Tensor, share: Tensor) -> Tensor:
    """Where the reference overflows or yields NaN, so must the fused op; elsewhere it must not."""
    got, wanted = actual.float(), reference.float()
    finite = got.isfinite() & wanted.isfinite()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    infinite = torch.full_like(share, float("inf"))
    return torch.where(finite, share, torch.where(same, 0.0, infinite))


def _floats(actual: Tensor, reference: Tensor, exact: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    own = (reference.double() - exact).abs()
    own = torch.where(own.isfinite(), own, 0.0)
    if own.shape[-1:] == (1,):
        relative = (own / exact.abs()).nan_to_num(0.0, 0.0)
        row = relative.amax() * exact.abs()
    else:
        row = own.amax(-1, keepdim=True)
    unit = unit_in_the_last_place(exact, actual.dtype)
    if factor > ROUNDED_ALIKE:
        row = torch.maximum(row, unit / 2)
    return (actual.double() - exact).abs(), factor * row + unit


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, one after the other."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def unit_in_the_last_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of values of `dtype` at each element's magnitude: 2^floor(log2 |x|) * epsilon, and next to zero the
    smallest number.
    """
    finfo = torch.finfo(dtype)
    _, exponent = torch.frexp(exact)
    with torch.cuda.device_of(exact):  # torch's ldexp requires its tensors' device to be current
        spacing = torch.ldexp(torch.full_like(exact, finfo.eps), exponent - 1)
    spacing = torch.where(exact == 0, 0.0, spacing)  # frexp gives 0 the exponent of 0.5
    return spacing.clamp(min=finfo.smallest_normal * finfo.eps)


def _codes(actual: Tensor, reference: Tensor, exact: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Error and allowance in codes; the allowance is raised where the share of the value's error is the smaller one."""
    true, value = _ordinal(exact), exact.double()
    own = (_ordinal(reference) - true).abs()
    error = (_ordinal(actual) - true).abs().double()
    step = unit_in_the_last_place(value, exact.dtype)
    noise = ((reference.double() - value).abs() - step).nan_to_num(0.0, 0.0).amax(-1, keepdim=True)
    noise = torch.maximum(noise, noise.median(0).values).clamp(min=0.0)
    off = (actual.double() - value).abs()
    by_value = (error * (factor * noise + step) / off).nan_to_num(0.0, 0.0)
    return error, torch.maximum((own.amax(-1, keepdim=True) + 1).double(), by_value)


def _ordinal(codes: Tensor) -> Tensor:
    """fp8 codes as integers in the order of their values, with 0 for both zeros."""
    bits = codes.view(torch.uint8).int()
    magnitude = bits & 0x7F
    return torch.where(bits >= 0x80, -magnitude, magnitude)


def _steps(pairs: Tensor) -> Tensor:
    """[..., n] bytes as [..., 2 n] codes in e2m1, integers in the order of their values, with 0 for both zeros."""
    codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).int()
    magnitude = codes & 7
    return torch.where(codes >= 8, -magnitude, magnitude)


def described(tensors: Sequence[Tensor]) -> str:
    """Dtypes, shapes and strides, for a person."""
    parts = [
        f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)} with strides {tuple(each.stride())}"
        for each in tensors
    ]
    return "; ".join(parts)
