"""Microscaled formats as torchao spells them, and what is quantised to them in tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fuseplan
from tests.helpers import all_reduce, llama, randn
from tests.rules.planning import compiled_and_eager

SCALINGS = ("floor", "ceil", "even", "rceil")
WIDTH, GROUP = 128, 32
FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NV_GROUP, LEAST = 16, 2.0**-6
W = 1 + randn(WIDTH, seed=9) / 10
CONFIG = fuseplan.PassConfig(policy="ordered(allreduce_rms_quant, norm_quant, act_quant)")
Convert = Callable[[Tensor], Tensor]


def rounded_up(groups: Tensor, largest: Tensor, most: float) -> tuple[Tensor, Tensor]:
    wanted = largest / most
    finite = (torch.ceil(torch.log2(wanted)).clamp(-127, 127) + 127).to(torch.uint8)
    exponent = torch.where(wanted.isnan(), 255, torch.where(wanted.isinf(), 254, finite))
    inverse = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent.float()))
    factor = torch.where(exponent == 255, wanted, torch.where(exponent == 254, 2.0**-127, inverse))
    return (groups * factor).clamp(-most, most), exponent


def scaled(x: Tensor, scaling: str, *, most: float, top: int, half: int, size: int) -> tuple[Tensor, Tensor]:
    """(scaled groups, exponents)"""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    largest = groups.abs().amax(-1).unsqueeze(-1).float()
    groups = groups.float()
    if scaling == "rceil":
        result, exponent = rounded_up(groups, largest, most)
    else:
        if scaling == "even":
            is_nan = largest.isnan()
            largest = ((largest.view(torch.int32) + half) & 0xFF800000).view(torch.float32)
            largest[is_nan] = float("nan")
        bits = largest.view(torch.int32)
        power = (torch.bitwise_right_shift(bits, 23) & 255) - 127
        if scaling == "ceil":
            power = power + ((bits & 0x7FFFFF) > 0)
        exponent = ((power - top).clamp(-127, 128) + 127).to(torch.uint8)
        exponent = torch.where(largest.isnan(), 255, exponent)
        scale = torch.bitwise_left_shift(exponent.to(torch.int32), 23).view(torch.float32)
        result = groups / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return result, exponent.view(torch.float8_e8m0fnu).squeeze(-1)


def e2m1(x: Tensor) -> Tensor:
    """As torchao's `f32_to_f4_unpacked`."""
    bits = x.view(torch.int32)
    sign = bits & 0x80000000
    size = bits ^ sign
    magnitude = size.view(torch.float32)
    saturates = magnitude >= 6.0
    is_small = torch.logical_and(torch.logical_not(saturates), magnitude < 1)
    is_normal = torch.logical_not(torch.logical_or(saturates, is_small))
    small = ((magnitude + torch.tensor(2.0**22)).view(torch.int32) - (149 << 23)).to(torch.uint8)
    odd = (size >> 22) & 1
    normal = ((size + (-(126 << 23) + (1 << 21) - 1) + odd) >> 22).to(torch.uint8)
    code = torch.where(is_small, small, torch.full_like(size, 7, dtype=torch.uint8))
    code = torch.where(is_normal, normal, code)
    return code | ((sign >> 28).to(torch.uint8) & 8)


def packed(codes: Tensor) -> Tensor:
    """As its `pack_uint4`."""
    flat = codes.contiguous().view(-1)
    return (flat[::2] | flat[1::2] << 4).view(*codes.shape[:-1], codes.shape[-1] // 2)


def mx_fp4(
    x: Tensor, scaling: str, *, top: int = 2, most: float = 6.0, size: int = GROUP, half: int = 1 << 21,
    convert: Convert = e2m1, pack: Convert = packed,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups, exponent = scaled(x, scaling, most=most, top=top, half=half, size=size)
    return pack(convert(groups.reshape(x.shape))), exponent


def mx_fp8(
    x: Tensor, scaling: str, *, top: int | None = None, size: int = GROUP, code: torch.dtype = FP8,
    clamped: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    own, half = (8, 1 << 19) if code is FP8 else (15, 1 << 20)
    most = torch.finfo(code).max
    groups, exponent = scaled(x, scaling, most=most, top=own if top is None else top, half=half, size=size)
    if clamped is None:
        clamped = code is E5M2
    groups = groups.clamp(-most, most) if clamped and scaling != "rceil" else groups
    return groups.to(code).reshape(x.shape), exponent


def nv_fp4(
    x: Tensor, whole: Tensor | None = None, *, least: float = LEAST, size: int = NV_GROUP, limit: float = 6.0,
    convert: Convert = e2m1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(codes, scales) as torchao's `nvfp4_quantize` computes them."""
    groups = x.float().reshape(*x.shape[:-1], -1, size)
    wanted = groups.abs().amax(-1) / limit
    if whole is None:
        scale = wanted.clamp(least, 448.0).to(FP8)
        factor = 1.0 / scale.float()
    else:
        scale = (wanted / whole).clamp(least, 448.0).to(FP8)
        factor = (1.0 / whole) / scale.float()
    return packed(convert((groups * factor.unsqueeze(-1)).clamp(-limit, limit).view(x.shape))), scale


def to_blocked(scale: Tensor, *, flat: bool = False) -> Tensor:
    """As torchao's, compiled; flat, as it is itself, or as its callers view it."""
    rows, groups = scale.shape
    down, along = (rows + 127) // 128, (groups + 3) // 4
    padded = torch.zeros((128 * down, 4 * along), dtype=scale.dtype)
    padded[:rows, :groups] = scale
    tiles = padded.view(down, 128, along, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4).transpose(1, 2)
    blocked = tiles.reshape(-1, 32, 16).flatten()
    return blocked if flat else blocked.view(32 * down, 16 * along)


def bits(value: Tensor) -> Tensor:
    """NaN being one NaN."""
    if value.dtype in (torch.float8_e8m0fnu, torch.uint8):
        return value.view(torch.uint8)
    return value.float().nan_to_num(nan=1e9)


def inputs() -> dict[str, Tensor]:
    """Random rows, odd ones, powers of two and near them, and numbers that float32 hardly holds."""
    x = randn(6, WIDTH, dtype=torch.float32)
    odd = x.clone()
    odd[0, 3], odd[1, 100], odd[2, 0], odd[3] = torch.inf, torch.nan, -torch.inf, 0.0
    odd[4], odd[5] = 3.3e38, 1e-40
    exponents = (
        torch.exp2(torch.arange(-64.0, 64.0)).repeat(6, 1) * torch.tensor([1.0, 1.75, 1.875, 448, 1.5, 1e-18])[:, None]
    )
    return {"random": x, "odd": odd, "exponents": exponents, "tiny": x * 1e-38, "ties": ties()}


def ties() -> Tensor:
    """What lies halfway between codes in e2m1, just above and just below, of both signs, in groups of largest 6."""
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([halves, halves * (1 + 2**-7), halves * (1 - 2**-7), torch.tensor([6.0, 0.0])])
    group = torch.cat([near, -near])[:GROUP]
    group[-1] = 6.0
    powers = torch.exp2(torch.tensor([-20.0, -1.0, 0.0, 1.0, 3.0, 40.0]))
    return (group.repeat(WIDTH // GROUP) * powers[:, None]).contiguous()


def cores(quantised: Callable[[Tensor, str], tuple[Tensor, ...]]) -> dict[str, Callable[..., Any]]:
    """Each core with a quantisation behind it: a norm, one of a sum, one of a reduced sum, and an activation."""

    def norm(x: Tensor, r: Tensor, group: str) -> Any:
        return quantised(llama(x, None, W)[0], "floor")

    def add_norm(x: Tensor, r: Tensor, group: str) -> Any:
        y, total = llama(x, r, W)
        return *quantised(y, "even"), total * 2

    def reduced(x: Tensor, r: Tensor, group: str) -> Any:
        y, total = llama(all_reduce(x, group), r, W)
        return *quantised(y, "ceil"), total * 2

    def activated(x: Tensor, r: Tensor, group: str) -> Any:
        return quantised(F.silu(x) * r, "rceil")

    return {"norm": norm, "add_norm": add_norm, "reduced": reduced, "activated": activated}


RULES = {"norm": "norm_quant", "add_norm": "norm_quant", "reduced": "allreduce_rms_quant", "activated": "act_quant"}
"""The rule that fuses each core."""


def check_fused(function: Callable[..., Any], given: tuple[Tensor, ...], group: str, rule: str) -> None:
    """One fusion, by this rule, and the same bits. Code is made of matrices; other graphs are interpreted."""
    report, pairs = compiled_and_eager(
        lambda *x: function(*x, group), *given, policy=CONFIG.policy, coded=given[0].dim() == 2
    )
    assert {name: count for name, count in report.fused.items() if count} == {rule: 1}
    assert all(torch.equal(bits(got), bits(wanted)) for got, wanted in pairs)
