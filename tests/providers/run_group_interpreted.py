"""Runs fp8 by groups behind fuseplan's Triton kernels by Triton's interpreter and prints, as one JSON object, by case:
whether it makes of the kernels' rows what the reference makes of them, bit for bit.
"""

import functools
import json
import sys
from collections.abc import Sequence
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
from tests.providers.run_interpreted import prepare
from tests.rules.parts.microscaling import ties

FN, E5M2, LEAST = torch.float8_e4m3fn, torch.float8_e5m2, 1e-10


def arguments(
    group_size: int,
    min_scale: float,
    ue8m0: bool,
    rounding: str,
    *,
    min_power: float = 0.0,
    zero_scale: float = 0.0,
    layout: str = "rows",
) -> dict[str, Any]:
    """A fused op's own, in their order."""
    return {
        "group_size": group_size, "dtype": FN, "min_scale": min_scale, "max_scale": 0.0, "ue8m0": ue8m0,
        "min_power": min_power, "zero_scale": zero_scale, "scale_ub": None, "quant_rounding": rounding,
        "layout": layout,
    }  # fmt: skip


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


def normed(x: Tensor, own: dict[str, Any]) -> bool:
    """Behind residual add and RMSNorm."""
    residual, weight = x.flip(0).contiguous(), activations(1, x.shape[-1], 9)[0]
    how = Norm(weight=weight, eps=1e-5, rounding=Rounding.LLAMA)
    y, _ = norm.launch(x, residual, how, epilogue_of(None)())
    *got, _ = norm.launch(x, residual, how, epilogue_of("group_fp8_quant")(**own))
    return all(map(same, got, reference(y, *own.values())))


def activated(x: Tensor, own: dict[str, Any]) -> bool:
    """Behind SiLU-and-mul."""
    up = x.flip(1).contiguous()
    (y,) = activation.launch(x, up, "llama", epilogue_of(None)())
    got = activation.launch(x, up, "llama", epilogue_of("group_fp8_quant")(**own))
    return all(map(same, got, reference(y, *own.values())))


def cases() -> dict[str, bool]:
    """By kernel, shape, group size and rounding."""
    found = {}
    for width, group in ((2880, 64), (7168, 128), (128, 128), (64, 64), (1024, 512), (2880, 32)):
        for rows in (1, 3, 9) if width <= 2880 else (2,):
            for ue8m0 in (False, True):
                rounding = {2: "divide_rounded", 3: "multiply", 9: "divide_by_rounded"}.get(rows, "divide")
                own = arguments(group, LEAST, ue8m0, rounding)
                x = activations(rows, width, width + rows)
                for kernel in (normed, activated):
                    found[f"{kernel.__name__} {rows}x{width} {group} {ue8m0} {rounding}"] = kernel(x, own)
    return found


def layouts() -> dict[str, bool]:
    """By layout: rows that fill columns and that don't, groups that fill words and that don't."""
    found = {}
    for layout in ("columns", "aligned", "packed"):
        for rows, width in ((1, 320), (3, 256), (4, 320), (9, 448)):
            own = arguments(64, LEAST, True, "divide", layout=layout)
            for kernel in (normed, activated):
                found[f"{kernel.__name__} {layout} {rows}x{width}"] = kernel(activations(rows, width, rows), own)
    return found


def microscaled() -> dict[str, bool]:
    """By scaling: random rows, each magnitude, powers of two, zeros, infinity and NaN, to fp8 of both kinds and to fp4,
    exponents in rows and in tiles, of which a few rows and many fill some; many for one scaling alone, unless all are
    asked for.
    """
    found = {}
    edges = [0.0, torch.inf, torch.nan, 448.0, 449.0, 2.0**-133, 2.0**-126, 3.3e38, 1.0, 0.998046875, 480.0]
    odd = activations(11, 96, 4)
    odd[:, 32:] = 0.0
    odd[:, 40] = torch.tensor(edges).bfloat16()
    scales = torch.exp2(torch.linspace(-132, 120, 64))[:, None] * torch.linspace(0.5, 1.0, 64).repeat(2)
    magnitudes = scales.bfloat16().view(4, -1)  # each row is a program, whose width hardly matters to the interpreter
    ones = {"random": activations(3, 2880, 3), "odd": odd, "magnitudes": magnitudes, "ties": ties()}
    tiled = {"one": activations(1, 160, 3), "many": activations(130, 96, 3), "odd": odd}
    residual, weight = activations(5, 96, 2), activations(1, 96, 9)[0]
    how = Norm(weight=weight, eps=1e-5, rounding=Rounding.LLAMA)
    normed_rows, _ = norm.launch(activations(5, 96, 1), residual, how, epilogue_of(None)())
    codes_in = ((8, FN, "rows"), (8, E5M2, "rows"), (8, FN, "swizzled"), (4, None, "rows"), (4, None, "swizzled"))
    for scaling, (bits, dtype, layout) in product(("floor", "ceil", "even", "rceil"), codes_in):
        own: dict[str, Any] = {"group_size": 32, **({"dtype": dtype} if bits == 8 else {}), "scaling": scaling}
        own["layout"] = layout
        epilogue = epilogue_of(f"mx_fp{bits}_quant")(**own)
        wanted = mx_reference if bits == 8 else mx_fp4_reference
        for kind, x in (ones if layout == "rows" else tiled).items():
            if kind == "many" and scaling != ("even" if bits == 8 else "floor") and "all" not in sys.argv:
                continue
            gate = torch.full_like(x, 64.0)  # whose SiLU is itself
            y = gate * x  # exactly
            got: Sequence[Tensor] = activation.launch(gate, x, "llama", epilogue)
            codes, exponents = wanted(y, *own.values())
            if bits == 4:  # which has no NaN: what it makes of one's bits differs by device
                of_nan = y.isnan().unflatten(-1, (-1, 2)).any(-1)
                got[0][of_nan] = codes[of_nan]
            found[f"{scaling} {bits} {dtype} {layout} {kind}"] = same(got[0], codes) and same(got[1], exponents)
        *got, _ = norm.launch(activations(5, 96, 1), residual, how, epilogue)
        found[f"{scaling} {bits} {dtype} {layout} normed"] = all(map(same, got, wanted(normed_rows, *own.values())))
    return found


def by_scales() -> dict[str, bool]:
    """NVFP4 by a global scale and without one, by a least scale that fp8 holds as a normal number and one that it
    doesn't: random rows, rows of any magnitude, zeros, infinity and NaN.
    """
    found = {}
    odd = activations(8, 96, 4)
    odd[:, 32:] = 0.0
    odd[:, 40] = torch.tensor([0.0, torch.inf, torch.nan, 2688.0, 2.0**-133, 3.3e38, 1.0, -6.0]).bfloat16()
    scales = torch.exp2(torch.linspace(-14, 12, 96))[:, None] * torch.linspace(0.5, 1.0, 16).repeat(4)
    residual, weight = activations(5, 96, 2), activations(1, 96, 9)[0]
    how = Norm(weight=weight, eps=1e-5, rounding=Rounding.LLAMA)
    normed_rows, _ = norm.launch(activations(5, 96, 1), residual, how, epilogue_of(None)())
    kinds = {"random": activations(3, 2880, 3), "odd": odd, "ties": ties(), "one": activations(1, 4112, 3)}
    kinds["magnitudes"] = scales.bfloat16().view(4, -1)
    tiles = {"many": activations(130, 80, 3)}  # of scales, which lie in tiles of 128 rows where they are swizzled
    cases = *product((None, 0.02, 3.0), (2.0**-6, 0.001), ("rows",)), (0.02, 2.0**-6, "swizzled")
    for whole, least, layout in cases:
        scale = None if whole is None else torch.tensor(whole)
        own: dict[str, Any] = {"group_size": 16, "global_scale": scale, "min_scale": least, "layout": layout}
        epilogue = epilogue_of("nv_fp4_quant")(**own)
        for kind, x in (kinds | tiles if layout == "swizzled" else kinds).items():
            gate = torch.full_like(x, 64.0)
            y = gate * x
            got: Sequence[Tensor] = activation.launch(gate, x, "llama", epilogue)
            codes, scales = nv_reference(y, *own.values())
            of_nan = nv_reference(y, 16, scale, least, "rows")[1].float().isnan().repeat_interleave(8, -1)
            got[0][of_nan] = codes[of_nan]
            found[f"{whole} {least} {layout} {kind}"] = same(got[0], codes) and same(got[1], scales)
        *got, _ = norm.launch(activations(5, 96, 1), residual, how, epilogue)
        found[f"{whole} {least} {layout} normed"] = all(map(same, got, nv_reference(normed_rows, *own.values())))
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
    for ue8m0, min_power in ((False, 0.0), (True, 0.0), (True, 0.3)):
        for rounding in ("divide", "multiply", "divide_by_rounded", "divide_rounded")[: 2 if ue8m0 else 4]:
            for least in (LEAST, 0.3) if not min_power else (0.0,):
                zero = 2.0**-7 if rounding == "divide_rounded" else 0.0
                own = arguments(64, 0.0 if zero else least, ue8m0, rounding, min_power=min_power, zero_scale=zero)
                x = activations(5, 192, 1)
                x[0, 1], x[1, 70], x[2], x[3, 64:128] = float("inf"), float("nan"), 0.0, 0.0
                x[4] = 448 * 2.0**20
                for kernel in (normed, activated):
                    found[f"{kernel.__name__} {ue8m0} {rounding} {least} {min_power}"] = kernel(x, own)
    return found


def wider() -> dict[str, bool]:
    """Codes in e5m2, which has infinity, by each scale: random rows, zeros, infinity, NaN, and what is beyond its
    largest by a given scale.
    """
    found = {}
    x = activations(6, 192, 5)
    x[0, 1], x[1, 70], x[2], x[3] = torch.inf, torch.nan, 0.0, x[3] * 1e30
    up = torch.ones_like(x)
    gate = torch.full_like(x, 64.0)
    for rounding in ("divide", "multiply", "divide_by_rounded", "divide_rounded"):
        dtype = torch.bfloat16 if rounding == "divide_rounded" else torch.float32
        each: dict[str, tuple[dict[str, Any], Any]] = {
            "static_fp8_quant": (
                {"scale": torch.tensor([0.02], dtype=dtype), "dtype": E5M2, "quant_rounding": rounding},
                static_reference,
            ),
            "dynamic_fp8_quant": (
                {"dtype": E5M2, "min_scale": LEAST, "max_scale": 0.0, "zero_scale": 0.0, "scale_ub": None,
                 "quant_rounding": rounding}, row_reference,
            ),
            "group_fp8_quant": ({**arguments(64, LEAST, False, rounding), "dtype": E5M2}, reference),
        }  # fmt: skip
        for suffix, (own, wanted) in each.items():
            (y,) = activation.launch(gate, x * up, "llama", epilogue_of(None)())
            got = activation.launch(gate, x * up, "llama", epilogue_of(suffix)(**own))
            right = wanted(y, *own.values())
            found[f"{suffix} {rounding}"] = all(map(same, got, right if isinstance(right, tuple) else (right,)))
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
    residual, weight = activations(5, 96, 2), activations(1, 96, 9)[0]
    how = Norm(weight=weight, eps=1e-5, rounding=Rounding.LLAMA)
    x = activations(5, 96, 1)
    x[2], residual[2] = 0.0, 0.0
    y, _ = norm.launch(x, residual, how, epilogue_of(None)())
    upper = torch.tensor([1.5])
    for rounding in ("divide", "multiply", "divide_by_rounded", "divide_rounded"):
        for bounds in (
            (LEAST, 0.0, 0.0, None),
            (0.0, 0.0, 2.0**-7, None),
            (0.0, 2.0**-8, 0.1, None),
            (LEAST, 0.0, 0.0, upper),
        ):
            own = dict(zip(("dtype", "min_scale", "max_scale", "zero_scale", "scale_ub"), (FN, *bounds), strict=True))
            own["quant_rounding"] = rounding
            *got, _ = norm.launch(x, residual, how, epilogue_of("dynamic_fp8_quant")(**own))
            found[f"{rounding} {bounds}"] = all(map(same, got, row_reference(y, *own.values())))
    return found


QUANTISED: dict[str, dict[str, Any]] = {
    "static_fp8_quant": {"scale": torch.tensor([0.02]), "dtype": FN, "quant_rounding": "divide"},
    "dynamic_fp8_quant": {"dtype": FN, "min_scale": LEAST, "max_scale": 0.0, "zero_scale": 0.0, "scale_ub": None,
                          "quant_rounding": "divide"},
    "group_fp8_quant": arguments(32, LEAST, True, "divide", layout="columns"),
    "mx_fp8_quant": {"group_size": 32, "dtype": E5M2, "scaling": "rceil", "layout": "swizzled"},
    "mx_fp4_quant": {"group_size": 32, "scaling": "even", "layout": "rows"},
    "nv_fp4_quant": {"group_size": 16, "global_scale": None, "min_scale": 2.0**-6, "layout": "swizzled"},
}  # fmt: skip


def kept() -> dict[str, bool]:
    """By epilogue and rounding, with a residual and without one in turns: whether what is quantised is yielded as the
    norm's kernel yields it, and all else as without it, each in memory of its own.
    """
    found = {}

    @functools.cache
    def unquantised(rounding: Rounding, residual: bool) -> tuple[Tensor, ...]:
        return norm.launch(*given(rounding, residual), epilogue_of(None)())

    def given(rounding: Rounding, residual: bool) -> tuple[Tensor, Tensor | None, Norm]:
        how = Norm(weight=activations(1, 96, 9)[0], eps=1e-5, rounding=rounding)
        return activations(5, 96, 1), activations(5, 96, 2) if residual else None, how

    for (first, (suffix, own)), (second, rounding) in product(enumerate(QUANTISED.items()), enumerate(Rounding)):
        residual = bool((first + second) % 2)
        x, added, how = given(rounding, residual)
        y, *total = unquantised(rounding, residual)
        plain = norm.launch(x, added, how, epilogue_of(suffix)(**own))
        got = norm.launch(x, added, how, epilogue_of(suffix)(**own), keeps=True)
        quantised = plain[: len(plain) - len(total)]
        wanted = (*quantised, y, *total)
        apart = len({each.untyped_storage().data_ptr() for each in (*got, x)}) == len(got) + 1
        found[f"{suffix} {rounding} {residual}"] = apart and all(map(same, got, wanted)) and len(got) == len(wanted)
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


def powers() -> bool:
    """Whether scales that are powers of two stay, and the next number goes up to the next one."""
    y = torch.full((3, 64), 448.0 * 2**-3)
    y[1], y[2] = torch.nextafter(y[1], torch.tensor(torch.inf)), y[2] * 1.5
    # SiLU of that much is the identity.
    epilogue = epilogue_of("group_fp8_quant")(**arguments(64, LEAST, True, "divide"))
    _, scale = activation.launch(y, torch.ones_like(y), "llama", epilogue)
    return scale.flatten().tolist() == [0.125, 0.25, 0.25]


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
        "powers": powers() and all_powers(),
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
