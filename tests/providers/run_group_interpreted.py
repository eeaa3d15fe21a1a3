"""Runs fp8 by groups behind fuseplan's Triton kernels by Triton's interpreter and prints, as one JSON object, by case:
whether it makes of the kernels' rows what the reference makes of them, bit for bit.
"""

import functools
import json
import sys
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseplan.dialect import Rounding
from fuseplan.providers.triton import activation, norm
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.providers.triton.epilogues.group_fp8_quant import power_of_two_from
from fuseplan.providers.triton.launching import Norm
from fuseplan.providers.triton.rows import e4m3_of, e5m2_of
from fuseplan.rules.parts.dynamic_fp8 import reference as row_reference
from fuseplan.rules.parts.group_fp8 import reference
from fuseplan.rules.parts.mx_fp4 import reference as mx_fp4_reference
from fuseplan.rules.parts.mx_fp8 import reference as mx_reference
from fuseplan.rules.parts.nv_fp4 import reference as nv_reference
from fuseplan.rules.parts.static_fp8 import reference as static_reference
from tests.providers.epilogues import OWN, own
from tests.providers.run_interpreted import prepare
from tests.rules.parts.microscaling import ties

FN, E5M2, LEAST = torch.float8_e4m3fn, torch.float8_e5m2, 1e-10
ROUNDINGS = ("divide", "multiply", "divide_by_rounded", "divide_rounded")
REFERENCES: dict[str, Any] = {
    "static_fp8_quant": static_reference,
    "dynamic_fp8_quant": row_reference,
    "group_fp8_quant": reference,
    "mx_fp8_quant": mx_reference,
    "mx_fp4_quant": mx_fp4_reference,
    "nv_fp4_quant": nv_reference,
}


def activations(rows: int, width: int, seed: int) -> Tensor:
    """Rows of unlike magnitude, the last of them zeros."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 3, rows)[:, None]).bfloat16()


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether shapes, dtypes and bits are equal, NaN being NaN whatever its bits are."""
    if (got.shape, got.dtype, got.stride()) != (wanted.shape, wanted.dtype, wanted.stride()):
        return False
    nan = wanted.float().isnan()
    return torch.equal(got.float().isnan(), nan) and torch.equal(got.float()[~nan], wanted.float()[~nan])


def all_same(got: Any, wanted: Any) -> bool:
    return all(map(same, got, wanted if isinstance(wanted, tuple) else (wanted,)))


def how_of(width: int, rounding: Rounding = Rounding.LLAMA) -> Norm:
    return Norm(weight=activations(1, width, 9)[0], eps=1e-5, rounding=rounding)


def normed(x: Tensor, suffix: str, given: dict[str, Any]) -> bool:
    """Behind residual add and RMSNorm."""
    residual, how = x.flip(0).contiguous(), how_of(x.shape[-1])
    y, _ = norm.launch(x, residual, how, epilogue_of(None)())
    *got, _ = norm.launch(x, residual, how, epilogue_of(suffix)(**given))
    return all_same(got, REFERENCES[suffix](y, *given.values()))


def activated(x: Tensor, suffix: str, given: dict[str, Any]) -> bool:
    """Behind SiLU-and-mul."""
    up = x.flip(1).contiguous()
    (y,) = activation.launch(x, up, "llama", epilogue_of(None)())
    got = activation.launch(x, up, "llama", epilogue_of(suffix)(**given))
    return all_same(got, REFERENCES[suffix](y, *given.values()))


def multiplied(x: Tensor, suffix: str, given: dict[str, Any]) -> bool:
    """Behind 64 times x, exactly: SiLU of that much is the identity."""
    gate = torch.full_like(x, 64.0)
    y, got = gate * x, activation.launch(gate, x, "llama", epilogue_of(suffix)(**given))
    wanted = REFERENCES[suffix](y, *given.values())
    if "fp4" in suffix:  # which has no NaN: what it makes of one's bits differs by device
        of_nan = y.isnan().unflatten(-1, (-1, 2)).any(-1)
        if suffix.startswith("nv"):
            scales = nv_reference(y, *{**given, "layout": "rows"}.values())[1]
            of_nan |= scales.float().isnan().repeat_interleave(8, -1)
        got[0][of_nan] = wanted[0][of_nan]
    return all_same(got, wanted)


def cases() -> dict[str, bool]:
    """By kernel, shape, group size and rounding."""
    found = {}
    for width, group in ((2880, 64), (7168, 128), (128, 128), (64, 64), (1024, 512), (2880, 32)):
        for rows, ue8m0, kernel in product((1, 3, 9) if width <= 2880 else (2,), (False, True), (normed, activated)):
            rounding = {2: "divide_rounded", 3: "multiply", 9: "divide_by_rounded"}.get(rows, "divide")
            given = own("group_fp8_quant", group_size=group, ue8m0=ue8m0, quant_rounding=rounding)
            name = f"{kernel.__name__} {rows}x{width} {group} {ue8m0} {rounding}"
            found[name] = kernel(activations(rows, width, width + rows), "group_fp8_quant", given)
    return found


def layouts() -> dict[str, bool]:
    """By layout: rows that fill columns and that don't, groups that fill words and that don't."""
    found = {}
    shapes = ((1, 320), (3, 256), (4, 320), (9, 448))
    for layout, (rows, width), kernel in product(("columns", "aligned", "packed"), shapes, (normed, activated)):
        given = own("group_fp8_quant", ue8m0=True, layout=layout)
        name = f"{kernel.__name__} {layout} {rows}x{width}"
        found[name] = kernel(activations(rows, width, rows), "group_fp8_quant", given)
    return found


def odd_rows(*edges: float) -> Tensor:
    """Groups of random numbers, of zeros, and with a number at an edge."""
    odd = activations(len(edges), 96, 4)
    odd[:, 32:] = 0.0
    odd[:, 40] = torch.tensor(edges).bfloat16()
    return odd


def microscaled() -> dict[str, bool]:
    """By scaling: random rows, each magnitude, powers of two, zeros, infinity and NaN, to fp8 of both kinds and to fp4,
    exponents in rows and in tiles, of which a few rows and many fill some; many for one scaling alone, unless all are
    asked for.
    """
    found = {}
    odd = odd_rows(0.0, torch.inf, torch.nan, 448.0, 449.0, 2.0**-133, 2.0**-126, 3.3e38, 1.0, 0.998046875, 480.0)
    scales = torch.exp2(torch.linspace(-132, 120, 64))[:, None] * torch.linspace(0.5, 1.0, 64).repeat(2)
    magnitudes = scales.bfloat16().view(4, -1)  # each row is a program, whose width hardly matters to the interpreter
    ones = {"random": activations(3, 2880, 3), "odd": odd, "magnitudes": magnitudes, "ties": ties()}
    tiled = {"one": activations(1, 160, 3), "many": activations(130, 96, 3), "odd": odd}
    codes_in = ((8, FN, "rows"), (8, E5M2, "rows"), (8, FN, "swizzled"), (4, None, "rows"), (4, None, "swizzled"))
    for scaling, (bits, dtype, layout) in product(("floor", "ceil", "even", "rceil"), codes_in):
        suffix = f"mx_fp{bits}_quant"
        given = own(suffix, scaling=scaling, layout=layout, **({"dtype": dtype} if bits == 8 else {}))
        for kind, x in (ones if layout == "rows" else tiled).items():
            if kind == "many" and scaling != ("even" if bits == 8 else "floor") and "all" not in sys.argv:
                continue
            found[f"{scaling} {bits} {dtype} {layout} {kind}"] = multiplied(x, suffix, given)
        found[f"{scaling} {bits} {dtype} {layout} normed"] = normed(activations(5, 96, 1), suffix, given)
    return found


def by_scales() -> dict[str, bool]:
    """NVFP4 by a global scale and without one, by a least scale that fp8 holds as a normal number and one that it
    doesn't: random rows, rows of any magnitude, zeros, infinity and NaN.
    """
    found = {}
    scales = torch.exp2(torch.linspace(-14, 12, 96))[:, None] * torch.linspace(0.5, 1.0, 16).repeat(4)
    kinds = {
        "random": activations(3, 2880, 3), "ties": ties(), "one": activations(1, 4112, 3),
        "odd": odd_rows(0.0, torch.inf, torch.nan, 2688.0, 2.0**-133, 3.3e38, 1.0, -6.0),
        "magnitudes": scales.bfloat16().view(4, -1),
    }  # fmt: skip
    tiles = {"many": activations(130, 80, 3)}  # of scales, which lie in tiles of 128 rows where they are swizzled
    cases = *product((None, 0.02, 3.0), (2.0**-6, 0.001), ("rows",)), (0.02, 2.0**-6, "swizzled")
    for whole, least, layout in cases:
        scale = None if whole is None else torch.tensor(whole)
        given = own("nv_fp4_quant", global_scale=scale, min_scale=least, layout=layout)
        for kind, x in (kinds | tiles if layout == "swizzled" else kinds).items():
            found[f"{whole} {least} {layout} {kind}"] = multiplied(x, "nv_fp4_quant", given)
        found[f"{whole} {least} {layout} normed"] = normed(activations(5, 96, 1), "nv_fp4_quant", given)
    return found


@triton.jit
def _held(x_ptr, y_ptr, code_ptr, SIZE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    held, code = e4m3_of(tl.load(x_ptr + at))
    tl.store(y_ptr + at, held)
    tl.store(code_ptr + at, code.to(tl.uint8))


def all_scales() -> bool:
    """Whether numbers from 0 to 448 are held in fp8 as torch holds them: those that fp8 has, halfway between two, and
    what is next to these.
    """
    codes = torch.arange(0, 127, dtype=torch.uint8).view(FN).float()
    halves = (codes[1:] + codes[:-1]) / 2
    above, below = (torch.nextafter(halves, torch.full((), end)) for end in (1e3, -1.0))
    x = torch.nn.functional.pad(torch.cat([codes, halves, above, below, torch.tensor([torch.nan])]), (0, 6))
    y, code = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8)
    _held[(2,)](x, y, code, SIZE=256)
    wanted = x.to(FN)
    return torch.equal(code, wanted.view(torch.uint8)) and same(y, wanted.float())


def not_finite() -> dict[str, bool]:
    """Zeros, infinity and NaN; scales that are powers of two; a least scale, before and behind the rounding to them."""
    found = {}
    x = activations(5, 192, 1)
    x[0, 1], x[1, 70], x[2], x[3, 64:128] = float("inf"), float("nan"), 0.0, 0.0
    x[4] = 448 * 2.0**20
    for ue8m0, min_power in ((False, 0.0), (True, 0.0), (True, 0.3)):
        leasts = (LEAST, 0.3) if not min_power else (0.0,)
        for rounding, least, kernel in product(ROUNDINGS[: 2 if ue8m0 else 4], leasts, (normed, activated)):
            zero = 2.0**-7 if rounding == "divide_rounded" else 0.0
            given = own(
                "group_fp8_quant", min_scale=0.0 if zero else least, ue8m0=ue8m0, quant_rounding=rounding,
                min_power=min_power, zero_scale=zero,
            )  # fmt: skip
            name = f"{kernel.__name__} {ue8m0} {rounding} {least} {min_power}"
            found[name] = kernel(x, "group_fp8_quant", given)
    return found


def wider() -> dict[str, bool]:
    """Codes in e5m2, which has infinity, by each scale: random rows, zeros, infinity, NaN, and what is beyond its
    largest by a given scale.
    """
    found = {}
    x = activations(6, 192, 5)
    x[0, 1], x[1, 70], x[2], x[3] = torch.inf, torch.nan, 0.0, x[3] * 1e30
    for rounding, suffix in product(ROUNDINGS, ("static_fp8_quant", "dynamic_fp8_quant", "group_fp8_quant")):
        given = own(suffix, dtype=E5M2, quant_rounding=rounding)
        if "scale" in given and rounding == "divide_rounded":
            given["scale"] = given["scale"].bfloat16()
        found[f"{suffix} {rounding}"] = multiplied(x, suffix, given)
    return found


@triton.jit
def _narrowed(x_ptr, y_ptr, SIZE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + at, e5m2_of(tl.load(x_ptr + at)))


def all_of_e5m2() -> bool:
    """Whether numbers are held in e5m2 as torch holds them: those that it has, halfway between two, what is next to
    these, what is beyond them, infinity and NaN.
    """
    codes = torch.arange(256, dtype=torch.uint8).view(E5M2).float()
    codes = codes[codes.isfinite()].sort().values
    halves = (codes[1:] + codes[:-1]) / 2
    above, below = (torch.nextafter(halves, torch.full((), end)) for end in (torch.inf, -torch.inf))
    ends = torch.tensor([6e4, 6.2e4, -7e4, 1e30, torch.inf, -torch.inf, 1e-30, -1e-30, 0.0, -0.0, torch.nan])
    x = torch.cat([codes, halves, above, below, ends])
    x = torch.nn.functional.pad(x, (0, -len(x) % 256))
    y = torch.empty(x.shape, dtype=torch.uint8)
    _narrowed[(len(x) // 256,)](x, y, SIZE=256)
    wanted = x.clamp(-57344, 57344).to(E5M2)
    return same(y.view(E5M2), wanted)


def by_row() -> dict[str, bool]:
    """A scale of a whole row, rounded or not, bounded or not; one row is of zeros."""
    found = {}
    x = activations(5, 96, 1)
    x[2] = 0.0  # as is its mirror, the residual
    scales = (LEAST, 0.0, 0.0, None), (0.0, 0.0, 2.0**-7, None), (0.0, 2.0**-8, 0.1, None), (LEAST, 0.0, 0.0, 1.5)
    for rounding, (least, most, zero, upper) in product(ROUNDINGS, scales):
        given = own(
            "dynamic_fp8_quant", min_scale=least, max_scale=most, zero_scale=zero, quant_rounding=rounding,
            scale_ub=None if upper is None else torch.tensor([upper]),
        )  # fmt: skip
        found[f"{rounding} {least} {most} {zero} {upper}"] = normed(x, "dynamic_fp8_quant", given)
    return found


def kept() -> dict[str, bool]:
    """By epilogue and rounding, with a residual and without one in turns: whether what is quantised is yielded as the
    norm's kernel yields it, and all else as without it, each in memory of its own.
    """
    found, x = {}, activations(5, 96, 1)
    quantised = {suffix: own(suffix) for suffix in OWN if suffix != "pad"}
    quantised["group_fp8_quant"] = own("group_fp8_quant", group_size=32, ue8m0=True, layout="columns")
    quantised["mx_fp8_quant"] = own("mx_fp8_quant", dtype=E5M2)
    for (first, (suffix, given)), (second, rounding) in product(enumerate(quantised.items()), enumerate(Rounding)):
        added = activations(5, 96, 2) if (first + second) % 2 else None
        launch = functools.partial(norm.launch, x, added, how_of(96, rounding))
        y, *total = launch(epilogue_of(None)())
        plain = launch(epilogue_of(suffix)(**given))
        got = launch(epilogue_of(suffix)(**given), keeps=True)
        wanted = (*plain[: len(plain) - len(total)], y, *total)
        apart = len({each.untyped_storage().data_ptr() for each in (*got, x)}) == len(got) + 1
        found[f"{suffix} {rounding}"] = apart and all_same(got, wanted) and len(got) == len(wanted)
    return found


@triton.jit
def _rounded_up(x_ptr, y_ptr, SIZE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, power_of_two_from(tl.load(x_ptr + at)))


def all_powers() -> bool:
    """Whether each power of two of float32 stays, and what lies a bit or a half above it goes up to the next one."""
    units = 2.0 ** torch.arange(-149, 127, dtype=torch.float64)
    above = torch.maximum(units * 2.0**-23, torch.tensor(2.0**-149))
    x = torch.cat([units, units + above, 1.5 * units]).float()
    wanted = 2.0 ** torch.frexp(x.double()).exponent.double()
    wanted = torch.where(x.double() * 2 == wanted, x.double(), wanted).float()
    padded = torch.cat([x, torch.tensor([0.0, torch.inf])])
    padded = torch.nn.functional.pad(padded, (0, 1024 - len(padded)))
    y = torch.empty_like(padded)
    _rounded_up[(1,)](padded, y, SIZE=1024)
    return torch.equal(y[: len(x)], wanted) and y[len(x) : len(x) + 2].tolist() == [0.0, torch.inf]


def main() -> None:
    prepare()
    if "all" in sys.argv:
        print(json.dumps(microscaled()))
        return
    found = {
        "cases": cases(),
        "by row": by_row(),
        "kept": kept(),
        "not finite": not_finite(),
        "powers": all_powers(),
        "layouts": layouts(),
        "microscaled": microscaled(),
        "by scales": by_scales(),
        "scales": all_scales(),
        "wider": wider(),
        "all of e5m2": all_of_e5m2(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
