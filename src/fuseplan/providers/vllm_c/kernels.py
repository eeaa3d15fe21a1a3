"""Calls of vLLM's kernels, which write to results that are made here."""

from typing import Any, Final

import torch
from torch import Tensor

from fuseplan.dialect import ScaleLayout, empty_scales
from fuseplan.providers.operands import aligned, rows_of
from fuseplan.providers.vllm_c.halves import are_halves

NAMESPACE: Final = "_C"
"""In which vLLM registers its ops with torch."""


def registered(name: str) -> Any:
    """An op of vLLM's.

    Raises:
        AttributeError: this process hasn't it.
    """
    return getattr(getattr(torch.ops, NAMESPACE), name)


def rms_norm_static_fp8_quant(
    x: Tensor, weight: Tensor, eps: float, rounding: str, scale: Tensor, dtype: torch.dtype, quant_rounding: str
) -> Tensor:
    """q = clamp(rms_norm(x) * weight * (1 / scale), -448, 448).to(float8_e4m3fn)

    Equals `ops.rms_norm_static_fp8_quant` under the rounding of the release.

    Args:
        x: [..., hidden], float16 or bfloat16.
        weight: [hidden], x's dtype.
        eps: added to the mean square.
        rounding: `gpt_oss`, or `llama` in vLLM 0.23.
        scale: one float32 element.
        dtype: float8_e4m3fn.
        quant_rounding: `multiply`.

    Returns:
        [..., hidden] in `dtype`, contiguous.
    """
    q = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        registered("rms_norm_static_fp8_quant")(_rows(q), _read(x), _weight(weight), scale, eps)
    return q


def fused_add_rms_norm_static_fp8_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str, scale: Tensor, dtype: torch.dtype,
    quant_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual_out = x + residual
    q = clamp(rms_norm(residual_out) * weight * (1 / scale), -448, 448).to(float8_e4m3fn)

    Equals `ops.fused_add_rms_norm_static_fp8_quant` under the rounding of the release.

    Args:
        x: as for `rms_norm_static_fp8_quant`, and so are the others.
        residual: [..., hidden], x's dtype; it is copied, since the kernel writes the sum over it.
        weight: likewise.
        eps: likewise.
        rounding: likewise.
        scale: likewise.
        dtype: likewise.
        quant_rounding: likewise.

    Returns:
        (q, residual_out), both [..., hidden], contiguous.
    """
    q, total = x.new_empty(x.shape, dtype=dtype), _copied(residual)
    if x.numel():
        registered("fused_add_rms_norm_static_fp8_quant")(_rows(q), _read(x), _rows(total), _weight(weight), scale, eps)
    return q, total


def rms_norm_dynamic_fp8_quant(
    x: Tensor, weight: Tensor, eps: float, rounding: str, dtype: torch.dtype, min_scale: float, max_scale: float,
    zero_scale: float, scale_ub: Tensor | None, quant_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale = max(min(amax(|y|, -1), scale_ub) / 448, min_scale);  q = clamp(y / scale, -448, 448).to(float8_e4m3fn)
    of y = rms_norm(x) * weight

    Equals `ops.rms_norm_dynamic_fp8_quant` under the rounding `llama`.

    Args:
        x: [..., hidden], float16 or bfloat16.
        weight: [hidden], x's dtype.
        eps: added to the mean square.
        rounding: `llama`.
        dtype: float8_e4m3fn.
        min_scale: 1 / (448 * 512), which the kernel has built in.
        max_scale: 0: there is none.
        zero_scale: 0: there is none.
        scale_ub: one float32 element; None for none.
        quant_rounding: `divide`.

    Returns:
        (q, scale): [..., hidden] in `dtype` and [..., 1] in float32, contiguous.
    """
    q, scale = x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _per_row(q, scale, x, weight, eps, scale_ub, None)
    return q, scale


def fused_add_rms_norm_dynamic_fp8_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str, dtype: torch.dtype, min_scale: float,
    max_scale: float, zero_scale: float, scale_ub: Tensor | None, quant_rounding: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of y = rms_norm(x + residual) * weight, and residual_out = x + residual

    Equals `ops.fused_add_rms_norm_dynamic_fp8_quant` under the rounding `vllm`.

    Args:
        x: as for `rms_norm_dynamic_fp8_quant`, and so are the others.
        residual: [..., hidden], x's dtype; it is copied, since the kernel writes the sum over it.
        weight: likewise.
        eps: likewise.
        rounding: `vllm`.
        dtype: likewise.
        min_scale: likewise.
        max_scale: likewise.
        zero_scale: likewise.
        scale_ub: likewise.
        quant_rounding: likewise.

    Returns:
        (q, scale, residual_out): [..., hidden], [..., 1] in float32 and [..., hidden], contiguous.
    """
    q, scale = x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    total = _copied(residual)
    _per_row(q, scale, x, weight, eps, scale_ub, total)
    return q, scale, total


def _per_row(
    q: Tensor, scale: Tensor, x: Tensor, weight: Tensor, eps: float, scale_ub: Tensor | None, total: Tensor | None
) -> None:
    if x.numel():
        residual = None if total is None else _rows(total)
        registered("rms_norm_dynamic_per_token_quant")(
            _rows(q), _read(x), _weight(weight), _rows(scale), eps, scale_ub, residual
        )


def rms_norm_group_fp8_quant(
    x: Tensor, weight: Tensor, eps: float, rounding: str, group_size: int, dtype: torch.dtype, min_scale: float,
    max_scale: float, ue8m0: bool, min_power: float, zero_scale: float, scale_ub: Tensor | None, quant_rounding: str,
    layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rms_norm_dynamic_fp8_quant` with a scale of each group of a row.

    Equals `ops.rms_norm_group_fp8_quant` under the rounding `llama`.

    Args:
        x: [..., hidden], float16 or bfloat16; two dimensions where scales don't lie in rows.
        weight: as for `rms_norm_dynamic_fp8_quant`, and so are those not named here.
        eps: likewise.
        rounding: `llama`.
        group_size: 64 or 128.
        dtype: likewise.
        min_scale: likewise.
        max_scale: likewise.
        ue8m0: False.
        min_power: 0: there is none.
        zero_scale: likewise.
        scale_ub: likewise.
        quant_rounding: likewise.
        layout: `rows`, `columns` or `aligned`.

    Returns:
        (q, scale): [..., hidden] in `dtype`, contiguous, and [..., hidden / group_size] in float32, as `layout` has it.
    """
    q, scale = x.new_empty(x.shape, dtype=dtype), _scales(x, x.shape[-1] // group_size, layout)
    _per_group(q, scale, x, weight, eps, scale_ub, None, group_size, layout)
    return q, scale


def fused_add_rms_norm_group_fp8_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str, group_size: int, dtype: torch.dtype,
    min_scale: float, max_scale: float, ue8m0: bool, min_power: float, zero_scale: float, scale_ub: Tensor | None,
    quant_rounding: str, layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of y = rms_norm(x + residual) * weight, and residual_out = x + residual

    Equals `ops.fused_add_rms_norm_group_fp8_quant` under the rounding `vllm`.

    Args:
        x: as for `rms_norm_group_fp8_quant`, and so are the others.
        residual: [..., hidden], x's dtype; it is copied, since the kernel writes the sum over it.
        weight: likewise.
        eps: likewise.
        rounding: `vllm`.
        group_size: likewise.
        dtype: likewise.
        min_scale: likewise.
        max_scale: likewise.
        ue8m0: likewise.
        min_power: likewise.
        zero_scale: likewise.
        scale_ub: likewise.
        quant_rounding: likewise.
        layout: likewise.

    Returns:
        (q, scale, residual_out), the last [..., hidden], contiguous.
    """
    q, scale = x.new_empty(x.shape, dtype=dtype), _scales(x, x.shape[-1] // group_size, layout)
    total = _copied(residual)
    _per_group(q, scale, x, weight, eps, scale_ub, total, group_size, layout)
    return q, scale, total


def _per_group(
    q: Tensor, scale: Tensor, x: Tensor, weight: Tensor, eps: float, scale_ub: Tensor | None, total: Tensor | None,
    group_size: int, layout: str,
) -> None:  # fmt: skip
    if x.numel():
        in_rows = layout == ScaleLayout.ROWS
        registered("rms_norm_per_block_quant")(
            _rows(q), _read(x), _weight(weight), _rows(scale) if in_rows else scale, eps, scale_ub,
            None if total is None else _rows(total), group_size, not in_rows,
        )  # fmt: skip


def silu_and_mul_static_fp8_quant(
    gate: Tensor, up: Tensor, rounding: str, scale: Tensor, dtype: torch.dtype, quant_rounding: str
) -> Tensor:
    """q = clamp(silu(gate) * up * (1 / scale), -448, 448).to(float8_e4m3fn)

    Equals `ops.silu_and_mul_static_fp8_quant` under the rounding `llama`.

    Args:
        gate: [..., intermediate], float16 or bfloat16, the first half of the rows of a contiguous tensor.
        up: [..., intermediate], the other half; where they lie anyhow else, they are copied.
        rounding: `llama`.
        scale: one float32 element.
        dtype: float8_e4m3fn.
        quant_rounding: `multiply`.

    Returns:
        [..., intermediate] in `dtype`, contiguous.
    """
    q = gate.new_empty(gate.shape, dtype=dtype)
    if gate.numel():
        registered("silu_and_mul_quant")(_rows(q), _joined(gate, up), scale)
    return q


def silu_and_mul_group_fp8_quant(
    gate: Tensor, up: Tensor, rounding: str, group_size: int, dtype: torch.dtype, min_scale: float, max_scale: float,
    ue8m0: bool, min_power: float, zero_scale: float, scale_ub: Tensor | None, quant_rounding: str, layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale = max(amax(|y|) / 448, min_scale) of each group;  q = clamp(y / scale, -448, 448).to(float8_e4m3fn)
    of y = silu(gate) * up, rounded nowhere

    `ops.silu_and_mul_group_fp8_quant` under the rounding `fp32`, but for the rounding of y.

    Args:
        gate: as for `silu_and_mul_static_fp8_quant`.
        up: likewise.
        rounding: `fp32`.
        group_size: 64 or 128.
        dtype: float8_e4m3fn.
        min_scale: 1 / (448 * 512), which the kernel has built in.
        max_scale: 0: there is none.
        ue8m0: False.
        min_power: 0: there is none.
        zero_scale: 0: there is none.
        scale_ub: None: the kernel bounds scales, not largest elements.
        quant_rounding: `divide`.
        layout: `rows`.

    Returns:
        (q, scale): [..., intermediate] in `dtype` and [..., intermediate / group_size] in float32, contiguous.
    """
    q, scale = gate.new_empty(gate.shape, dtype=dtype), _scales(gate, gate.shape[-1] // group_size, layout)
    if gate.numel():
        registered("silu_and_mul_per_block_quant")(_rows(q), _joined(gate, up), _rows(scale), group_size, None, False)
    return q, scale


def _rows(x: Tensor) -> Tensor:
    """[rows, width], a view of a contiguous tensor: what is written to it is written to that."""
    return x.view(-1, x.shape[-1])


def _read(x: Tensor) -> Tensor:
    """[rows, width], contiguous, where a load may start: a view wherever it can be one."""
    return aligned(rows_of(x))


def _weight(weight: Tensor) -> Tensor:
    return aligned(weight.contiguous())


def _copied(residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape).copy_(residual)


def _scales(x: Tensor, groups: int, layout: str) -> Tensor:
    return empty_scales(x, groups, torch.float32, layout)


def _joined(gate: Tensor, up: Tensor) -> Tensor:
    """[rows, 2 * width], contiguous: both halves where they lie, if they lie so."""
    width = gate.shape[-1]
    if are_halves(gate, up):
        rows = gate.numel() // width
        return aligned(gate.as_strided((rows, 2 * width), (2 * width, 1)))
    return torch.cat((gate.reshape(-1, width), up.reshape(-1, width)), dim=-1)
