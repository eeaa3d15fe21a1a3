"""Calls of vLLM's kernels, which write to results allocated here. Each takes its op's arguments as attributes."""

from typing import Any, Final

import torch
from torch import Tensor

from fuseplan.dialect import ScaleLayout, empty_scales
from fuseplan.providers.operands import aligned, rows_of
from fuseplan.providers.vllm_c.halves import are_halves

NAMESPACE: Final = "_C"
"""The namespace in which vLLM registers its ops with torch."""


def registered(name: str) -> Any:
    """A vLLM op.

    Raises:
        AttributeError: it isn't registered in this process.
    """
    return getattr(getattr(torch.ops, NAMESPACE), name)


def static_norm(m: Any) -> Any:
    """[residual_out = x + residual]
    q = clamp(rms_norm(x or residual_out) * weight * (1 / scale), -448, 448).to(float8_e4m3fn)

    Equals `ops.rms_norm_static_fp8_quant` and `ops.fused_add_rms_norm_static_fp8_quant` under the rounding of the
    release: `gpt_oss`, or `llama` in vLLM 0.23.

    Args:
        m: x [..., hidden], float16 or bfloat16; residual of x's shape and dtype, or none; weight [hidden] in x's dtype;
            scale, one float32 element; quant_rounding `multiply`.

    Returns:
        q, or (q, residual_out), all [..., hidden], contiguous.
    """
    q, total = _codes(m.x, m.dtype), _copied_residual(m)
    if m.x.numel():
        written = [_rows(q), _read(m.x), *([] if total is None else [_rows(total)])]
        name = "rms_norm_static_fp8_quant" if total is None else "fused_add_rms_norm_static_fp8_quant"
        registered(name)(*written, _weight(m.weight), m.scale, m.eps)
    return q if total is None else (q, total)


def dynamic_norm(m: Any) -> tuple[Tensor, ...]:
    """[residual_out = x + residual];  scale = max(min(amax(|y|, -1), scale_ub) / 448, min_scale)
    q = clamp(y / scale, -448, 448).to(float8_e4m3fn) of y = rms_norm(x or residual_out) * weight

    Equals `ops.rms_norm_dynamic_fp8_quant` under the rounding `llama` and `ops.fused_add_rms_norm_dynamic_fp8_quant`
    under `vllm`.

    Args:
        m: x, residual and weight as for `static_norm`; min_scale 1 / (448 * 512), which is built into the kernel;
            neither max_scale nor zero_scale; scale_ub, one float32 element, or None; quant_rounding `divide`.

    Returns:
        (q, scale) or (q, scale, residual_out): [..., hidden], [..., 1] in float32 and [..., hidden], contiguous.
    """
    q, scale = _codes(m.x, m.dtype), m.x.new_empty((*m.x.shape[:-1], 1), dtype=torch.float32)
    total = _copied_residual(m)
    if m.x.numel():
        residual = None if total is None else _rows(total)
        registered("rms_norm_dynamic_per_token_quant")(
            _rows(q), _read(m.x), _weight(m.weight), _rows(scale), m.eps, m.scale_ub, residual
        )
    return (q, scale) if total is None else (q, scale, total)


def group_norm(m: Any) -> tuple[Tensor, ...]:
    """`dynamic_norm` with a scale of each group of a row.

    Equals `ops.rms_norm_group_fp8_quant` under the rounding `llama` and `ops.fused_add_rms_norm_group_fp8_quant` under
    `vllm`.

    Args:
        m: as for `dynamic_norm`, with x of two dimensions where the layout isn't `rows`; group_size 64 or 128; neither
            ue8m0 nor min_power; layout `rows`, `columns` or `aligned`.

    Returns:
        (q, scale) or (q, scale, residual_out): scales [..., hidden / group_size] in float32, in the given layout, the
        others [..., hidden], contiguous.
    """
    q, scale, total = _codes(m.x, m.dtype), _scales(m.x, m), _copied_residual(m)
    if m.x.numel():
        in_rows = m.layout == ScaleLayout.ROWS
        registered("rms_norm_per_block_quant")(
            _rows(q), _read(m.x), _weight(m.weight), _rows(scale) if in_rows else scale, m.eps, m.scale_ub,
            None if total is None else _rows(total), m.group_size, not in_rows,
        )  # fmt: skip
    return (q, scale) if total is None else (q, scale, total)


def static_activation(m: Any) -> Tensor:
    """q = clamp(silu(gate) * up * (1 / scale), -448, 448).to(float8_e4m3fn)

    Equals `ops.silu_and_mul_static_fp8_quant` under the rounding `llama`.

    Args:
        m: gate [..., intermediate], float16 or bfloat16, the first half of the rows of a contiguous tensor; up, the
            other half; in any other layout, they are copied; scale, one float32 element; quant_rounding `multiply`.

    Returns:
        [..., intermediate] in `dtype`, contiguous.
    """
    q = _codes(m.gate, m.dtype)
    if m.gate.numel():
        registered("silu_and_mul_quant")(_rows(q), _joined(m.gate, m.up), m.scale)
    return q


def group_activation(m: Any) -> tuple[Tensor, Tensor]:
    """scale = max(amax(|y|) / 448, min_scale) of each group;  q = clamp(y / scale, -448, 448).to(float8_e4m3fn)
    of y = silu(gate) * up, not rounded

    `ops.silu_and_mul_group_fp8_quant` under the rounding `fp32`, except that y isn't rounded.

    Args:
        m: gate and up as for `static_activation`; group_size 64 or 128; min_scale 1 / (448 * 512), which is built into
            the kernel; layout `rows`; quant_rounding `divide`; nothing else, as the kernel bounds scales, not largest
            elements.

    Returns:
        (q, scale): [..., intermediate] in `dtype` and [..., intermediate / group_size] in float32, contiguous.
    """
    q, scale = _codes(m.gate, m.dtype), _scales(m.gate, m)
    if m.gate.numel():
        halves = _joined(m.gate, m.up)
        registered("silu_and_mul_per_block_quant")(_rows(q), halves, _rows(scale), m.group_size, None, False)
    return q, scale


def _codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _rows(x: Tensor) -> Tensor:
    """[rows, width], a view of a contiguous tensor: writes to it are writes to the tensor."""
    return x.view(-1, x.shape[-1])


def _read(x: Tensor) -> Tensor:
    """[rows, width], contiguous and aligned for loads: a view where possible."""
    return aligned(rows_of(x))


def _weight(weight: Tensor) -> Tensor:
    return aligned(weight.contiguous())


def _copied_residual(m: Any) -> Tensor | None:
    """A contiguous copy of the residual, for the kernel to write the sum over; None: no residual."""
    residual: Tensor | None = vars(m).get("residual")
    return None if residual is None else residual.new_empty(residual.shape).copy_(residual)


def _scales(x: Tensor, m: Any) -> Tensor:
    return empty_scales(x, x.shape[-1] // m.group_size, torch.float32, m.layout)


def _joined(gate: Tensor, up: Tensor) -> Tensor:
    """[rows, 2 * width], contiguous: a view of both halves if they have this layout already."""
    width = gate.shape[-1]
    if are_halves(gate, up):
        rows = gate.numel() // width
        return aligned(gate.as_strided((rows, 2 * width), (2 * width, 1)))
    return torch.cat((gate.reshape(-1, width), up.reshape(-1, width)), dim=-1)
