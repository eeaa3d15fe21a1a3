"""NVFP4: e2m1 codes, two a byte, of groups of a row, with scales in fp8 and optionally a global scale.

    s = convert(clamp(amax(|x|) / 6 [/ global_scale], min_scale, 448), float8_e4m3fn), of each group
    q = e2m1(clamp(x * (1 / s), -6, 6))                                        without a global scale
      | e2m1(clamp(x * ((1 / global_scale) / s), -6, 6))
    byte = q[0::2] | q[1::2] << 4

as in torchao's `nvfp4_quantize`; see `fp4` for the conversion.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.canonical.unraised import Unraised
from fuseplan.graph.facts import aten, convert_element_type, dtype_name, equal_size, is_call, tensor_of
from fuseplan.graph.ops import (
    Decoded,
    Sample,
    ScaleLayout,
    compute_dtype,
    define,
    draw_positive,
    empty_scales,
    in_rows,
    lay_out,
)
from fuseplan.record import Reason
from fuseplan.rules.parts.base import Stage, sample_of
from fuseplan.rules.parts.codes import quantisation
from fuseplan.rules.parts.fp4 import MOST, Fp4Codes, e2m1, numbers_of, packed, packings, tell_simulated
from fuseplan.rules.parts.fp8 import number_of, raise_computed, source_of
from fuseplan.rules.parts.fp8_engines import engine_reader
from fuseplan.rules.parts.microscaled import behind, product_of, products, rows_of_groups
from fuseplan.rules.parts.patterns import F32, Found, Pattern, all_fit
from fuseplan.rules.parts.scale_layouts import swizzled

SCALE = torch.float8_e4m3fn
MOST_SCALE = 448.0
GROUP = 16


def reference(
    x: Tensor, group_size: int, global_scale: Tensor | None, min_scale: float, layout: str
) -> tuple[Tensor, Tensor]:
    """scale = clamp(amax(|x|) / 6 / global_scale, min_scale, 448).to(fp8), of each group
    q = e2m1(clamp(x * ((1 / global_scale) / scale), -6, 6)), packed

    Args:
        x: [..., hidden].
        group_size: elements of a group; it divides hidden.
        global_scale: one element, float32; None: no global scale, x is multiplied by 1 / scale.
        min_scale: the smallest scale; without one, a group of zeros divides by zero.
        layout: layout of the scales, `ScaleLayout.ROWS` or `ScaleLayout.SWIZZLED`.

    Returns:
        (q, scale): [..., hidden / 2] in uint8, with the code of the first of two elements in the low half, and
        [..., hidden / group_size] in float8_e4m3fn, in the shape that `layout` gives it. Both are contiguous. A group
        with NaN has NaN as its scale and meaningless codes.

    Raises:
        RuntimeError: `group_size` doesn't divide hidden, or hidden is odd.
        ValueError: `layout` isn't supported.
    """
    if layout not in (ScaleLayout.ROWS, ScaleLayout.SWIZZLED):
        raise ValueError(f"scales of NVFP4 lie in 'rows' or 'swizzled', not in '{layout}'")
    groups = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, group_size))
    wanted = groups.abs().amax(-1, keepdim=True) / MOST
    inverse = None
    if global_scale is not None:
        wide = global_scale.to(groups.dtype).reshape(())
        wanted, inverse = wanted / wide, wide.reciprocal()
    scale = wanted.clamp(min_scale, MOST_SCALE).to(SCALE)
    own = scale.to(groups.dtype)
    scaled = groups * (own.reciprocal() if inverse is None else inverse / own)
    return packed(e2m1(scaled.clamp(-MOST, MOST)).flatten(-2)), lay_out(scale.squeeze(-1), layout)


def fake(
    x: Tensor, group_size: int, global_scale: Tensor | None, min_scale: float, layout: str
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reference`."""
    *rows, hidden = x.shape
    codes = x.new_empty((*rows, hidden // 2), dtype=torch.uint8)
    return codes, empty_scales(x, hidden // group_size, SCALE, layout)


def decode(
    codes: Tensor, scales: Tensor, group_size: int, global_scale: Tensor | None, min_scale: float, layout: str
) -> Decoded:
    """The numbers that codes and scales encode."""
    rows, groups = codes.numel() // codes.shape[-1], 2 * codes.shape[-1] // group_size
    own = in_rows(scales, rows, groups, layout).contiguous()
    whole = 1.0 if global_scale is None else global_scale.double()
    return Decoded(scales=own.double() * whole, steps=own.view(torch.uint8).int(), numbers=numbers_of, most=MOST)


LEAST = torch.finfo(SCALE).tiny


def _sample_arguments(device: torch.device) -> tuple[Any, ...]:
    """All arguments except x."""
    return GROUP, torch.full((), 0.02, device=device), LEAST, ScaleLayout.ROWS.value


def _sample(shape: tuple[int, ...], layout: ScaleLayout, *, is_global: bool) -> Sample:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        size, scale, least, _ = _sample_arguments(device)
        return size, scale if is_global else None, least, layout.value

    return sample_of(shape, arguments, f"{'-global' * is_global}-{layout.value}")


per_token_nv_fp4_quant = define(
    "per_token_nv_fp4_quant",
    "(Tensor x, int group_size, Tensor? global_scale, float min_scale, str layout) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    samples=[
        *(_sample((7, 320), ScaleLayout.ROWS, is_global=each) for each in (False, True)),
        _sample((2, 3, 80), ScaleLayout.SWIZZLED, is_global=True),
    ],
    draws={"global_scale": draw_positive},
    packed=(0,),
    decode=decode,
)


def _inverse(value: Pattern) -> Pattern:
    return (aten.mul.Tensor, (aten.reciprocal.default, value), 1.0)


_SCALED = (aten.clamp_max.default, (aten.clamp_min.default, (aten.mul.Tensor, "x", "factor"), -MOST), MOST)
_QUOTIENT = (aten.div.Tensor, "largest", MOST)
_SCALE = (SCALE, (aten.clamp_max.default, "bounded", MOST_SCALE))
_BOUNDED = (aten.clamp_min.default, "wanted", float)


def _spelling(factor: Pattern, wanted: Pattern) -> tuple[Pattern, dict[str, Pattern]]:
    return _SCALED, {"factor": factor, "scale": _SCALE, "bounded": _BOUNDED, "wanted": wanted}


BY_ITSELF = _spelling(_inverse((F32, "scale")), _QUOTIENT)
BY_GLOBAL = _spelling(
    (aten.div.Tensor, _inverse("global"), (F32, "scale")), (aten.div.Tensor, _QUOTIENT, "global")
)  # fmt: skip


def raise_nv(canonical: CanonicalGraph) -> None:
    """Raises every quantisation to NVFP4."""
    for codes, scaled in packings(canonical):
        found = all_fit(scaled, *BY_GLOBAL) or all_fit(scaled, *BY_ITSELF)
        if found is None:
            continue
        try:
            _raise(canonical, codes, scaled, found)
        except Unraised as refused:
            at = product_of(scaled), found["scale"]
            refused.tell(canonical, per_token_nv_fp4_quant, "NVFP4 quantisation", at=at, place=codes)
    canonical.merge_equal(per_token_nv_fp4_quant)
    tell_simulated(canonical, per_token_nv_fp4_quant, "NVFP4", _is_scale_of_fp4)
    for cast in canonical.calls(convert_element_type):
        places = [*products(cast), cast]
        if _is_scale_of_fp4(cast) and not any(each in canonical.unraised for each in places):
            near = Unraised(Reason.OP, "codes in e2m1, or their scales, are computed in another way", cast)
            near.tell(canonical, per_token_nv_fp4_quant, "NVFP4 quantisation", at=places, place=cast)


def _raise(canonical: CanonicalGraph, codes: fx.Node, scaled: fx.Node, found: Found) -> None:
    rows, size = rows_of_groups(scaled, found, found["scale"])
    scale = found.get("global")
    if scale is not None:
        _check_global(scale, rows)
    least = number_of(found["bounded"].args[1])
    assert least is not None
    if least <= 0:
        detail = f"the smallest scale is {float(least):g}, and the op's is above 0"
        raise Unraised(Reason.ATTRIBUTE, detail, found["bounded"])
    x = tensor_of(rows)
    assert x is not None
    laid_out = swizzled(found["scale"], rows, x.shape[-1] // size)
    layout = ScaleLayout.ROWS if laid_out is None else ScaleLayout.SWIZZLED
    args = (rows, size, scale, float(least), layout.value)
    raise_computed(canonical, codes, laid_out or found["scale"], per_token_nv_fp4_quant, args)


def _check_global(scale: fx.Node, rows: fx.Node) -> None:
    value, x = tensor_of(scale), tensor_of(rows)
    assert value is not None and x is not None
    if value.device != x.device:
        detail = f"the global scale is on {value.device}, and the tensor it scales on {x.device}"
        raise Unraised(Reason.LAYOUT, detail, scale, f"move the scale to {x.device}")
    if value.dtype is not torch.float32 or not equal_size(value.numel(), 1):
        detail = f"the global scale is {dtype_name(scale)}{[*value.shape]}, and the op's is one element in float32"
        raise Unraised(Reason.SIZE, detail, scale)
    if _depends(scale, source_of(rows)):
        detail = "the global scale is computed from all rows at once, and the op is given it"
        raise Unraised(Reason.OP, detail, scale, "calibrate the activations' global scale, or go without one")


def _depends(node: fx.Node, on: object) -> bool:
    """Whether a value is computed from another one."""
    seen, ahead = set[fx.Node](), [node]
    while ahead:
        each = ahead.pop()
        if each is on:
            return True
        ahead += [source for source in each.all_input_nodes if source not in seen]
        seen.update(each.all_input_nodes)
    return False


def _is_scale_of_fp4(cast: fx.Node) -> bool:
    """Whether a cast to fp8 yields the quotient of a group's largest element and the largest e2m1 value."""
    if not is_call(cast, convert_element_type) or cast.args[1] is not SCALE:
        return False
    quotients = (node for node in behind(cast) if is_call(node, aten.div.Tensor) and number_of(node.args[1]) == MOST)
    return any(is_call(node, aten.amax.default) for quotient in quotients for node in behind(quotient))


def _refuse_vllm(canonical: CanonicalGraph, node: fx.Node, values: Mapping[str, Any]) -> None:
    """`_C::scaled_fp4_quant(input, input_scale, is_sf_swizzled_layout, output!, output_scale!)`: it multiplies by the
    result of `rcp.approx.ftz`, which no other device computes to the last bit.
    """
    detail = "vLLM's kernel multiplies by approximate reciprocals, and the op divides, which gives other scales"
    raise Unraised(Reason.ROUNDING, detail, node)


class NvFp4(Fp4Codes):
    """The quantisation at a site."""

    name, eager_kernels, scale_bytes = "nv_fp4_quant", 49, 1


PART = quantisation(
    per_token_nv_fp4_quant, NvFp4, Stage.MICROSCALED_EPILOGUES, raise_nv, _sample_arguments, unit=GROUP,
    engine_ops={
        name: engine_reader(per_token_nv_fp4_quant, "NVFP4 quantisation", _refuse_vllm)
        for name in ("_C::scaled_fp4_quant", "_C::scaled_fp4_quant.out")
    },
)  # fmt: skip
