"""How Triton kernels round and divide on NVIDIA's GPUs, in ways of their own, over all bits. Skipped elsewhere."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fuseplan.providers.triton.rows import quantized, rounded  # noqa: E402

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
