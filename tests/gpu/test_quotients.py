"""How Triton kernels round and divide on NVIDIA's GPUs, in ways of their own, over all bits. Skipped elsewhere."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fuseplan.providers.triton.rows import dynamic_scale, quantized, quotient, reciprocal_root, rounded  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs an NVIDIA GPU"),
]
COUNT, BLOCK = 2**24, 1024
HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    y_ptr, scale_ptr, code_ptr, DTYPE: tl.constexpr, MOST: tl.constexpr, OVERFLOWS: tl.constexpr,
    UNDERFLOWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, scale = tl.load(y_ptr + at).to(tl.float32), tl.load(scale_ptr + at)
    code: tl.constexpr = code_ptr.dtype.element_ty
    tl.store(code_ptr + at, quantized(y, scale, code, MOST, False, False, DTYPE, OVERFLOWS, UNDERFLOWS, True))


@triton.jit
def _round(x_ptr, y_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, rounded(tl.load(x_ptr + at), DTYPE, True))


@triton.jit
def _count_wrong(wrong_ptr, SIGNIFICANDS: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = (at | 0x3F800000).to(tl.float32, bitcast=True)
    wrong = tl.zeros([BLOCK], tl.int32)
    for significand in range(SIGNIFICANDS):
        y = (tl.zeros([BLOCK], tl.int32) + (significand << SHIFT) + 0x3F800000).to(tl.float32, bitcast=True)
        wrong += (quotient(y, scale, DTYPE, False, False, True) != tl.div_rn(y, scale)).to(tl.int32)
    tl.atomic_add(wrong_ptr, tl.sum(wrong))


@triton.jit
def _scale(y_ptr, scale_ptr, MOST: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    y = tl.load(y_ptr + row[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
    infinity = float("inf")
    tl.store(scale_ptr + row, dynamic_scale(y, 0.0, infinity, scale_ptr, MOST, False, False, False, True))


@triton.jit
def _root(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, reciprocal_root(tl.load(x_ptr + at), True))


def bits(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of all exponents and significands, infinities and NaN, each of its bits at random."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(size)
    return torch.randint(limits.min, limits.max + 1, (count,), generator=generator, device="cuda").to(size).view(dtype)


def same(codes: Tensor, wanted: Tensor) -> Tensor:
    """Which are equal, with their sign, or both not a number."""
    return (codes.view(torch.uint8) == wanted.view(torch.uint8)) | (codes.float().isnan() & wanted.float().isnan())


@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("underflows", [True, False])
@pytest.mark.parametrize("overflows", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alike", [True, False], ids=["of like size", "of any size"])
def test_codes_are_those_of_the_nearest_quotient(
    code: torch.dtype, overflows: bool, underflows: bool, dtype: torch.dtype, alike: bool
) -> None:
    most = torch.finfo(code).max
    y = bits(COUNT, dtype, 0)
    scale = bits(COUNT, torch.float32, 1).abs()
    if alike:
        # Quotients from the smallest code to the largest.
        exponent = torch.randint(-20, 10, (COUNT,), generator=torch.Generator("cuda").manual_seed(2), device="cuda")
        significand = (scale.view(torch.int32) & 0x7FFFFF | 0x3F800000).view(torch.float32)
        scale = torch.ldexp(y.float().abs().nan_to_num(1.0, 1.0).clamp(min=1e-30) * significand, exponent)
    if not overflows:
        least = y.float().abs() / most
        scale = torch.where(scale < least, least, scale)
    if not underflows:
        scale = scale.clamp(min=2.0**-85)
    codes = torch.empty(COUNT, dtype=code, device="cuda")
    _quantize[(COUNT // BLOCK,)](y, scale, codes, HALVES[dtype], most, overflows, underflows, BLOCK)
    wanted = (y.float() / scale).clamp(-most, most).to(code)
    wrong = ~same(codes, wanted)
    assert not wrong.any(), [each[wrong][:8].tolist() for each in (y, scale, codes.float(), wanted.float())]


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_are_rounded_to_the_nearest(dtype: torch.dtype, block: int) -> None:
    x = bits(COUNT, torch.float32, 0)
    y = torch.empty_like(x)
    _round[(COUNT // block,)](x, y, HALVES[dtype], block)
    wanted = x.to(dtype).float()
    assert torch.equal(y.isnan(), wanted.isnan())
    torch.testing.assert_close(y.nan_to_num(0.0), wanted.nan_to_num(0.0), rtol=0, atol=0)
    assert torch.equal(y.signbit()[~y.isnan()], wanted.signbit()[~y.isnan()])


@pytest.mark.parametrize(("dtype", "significands", "shift"), [(tl.bfloat16, 128, 16), (tl.float16, 1024, 13)], ids=str)
def test_quotients_of_all_significands_are_the_nearest(dtype: tl.dtype, significands: int, shift: int) -> None:
    wrong = torch.zeros(1, dtype=torch.int32, device="cuda")
    _count_wrong[(2**23 // BLOCK,)](wrong, significands, shift, dtype, BLOCK)
    assert not wrong.item()


@pytest.mark.parametrize("most", [448.0, 57344.0])
@pytest.mark.parametrize("group", [1, 2, 16, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_scales_of_all_numbers_are_the_nearest(dtype: torch.dtype, group: int, most: float) -> None:
    """Each number among zeros, and among any others."""
    every = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)
    alone = torch.zeros(2**16, group, device="cuda", dtype=dtype)
    at = torch.arange(2**16, device="cuda")
    alone[at, at % group] = every
    for y in (alone, bits(2**16 * group, dtype, 0).view(-1, group)):
        scale = torch.empty(2**16, device="cuda")
        _scale[(2**11,)](y, scale, most, group)
        wanted = (y.float().abs().amax(-1).double() / most).float()
        torch.testing.assert_close(scale, wanted, rtol=0, atol=0, equal_nan=True)


def test_reciprocal_roots_are_off_by_less_than_a_unit_in_the_last_place() -> None:
    x = bits(COUNT, torch.float32, 0).abs()
    x[:2] = torch.tensor([0.0, float("inf")])
    y = torch.empty_like(x)
    _root[(COUNT // BLOCK,)](x, y, BLOCK)
    assert y[:2].tolist() == [float("inf"), 0.0]
    torch.testing.assert_close(
        y[2:].double(), x[2:].double().rsqrt(), rtol=0.7 * torch.finfo(x.dtype).eps, atol=0, equal_nan=True
    )
