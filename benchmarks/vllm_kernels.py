"""vLLM's own fused kernels as `benchmarks/kernel_times.py` calls them; none where vLLM isn't built for GPUs."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kernels(eps: float, group: int, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Calls by the op that they compute, each into results of its own; a sum is written over the residual.

    Args:
        eps: added to mean squares.
        group: elements that share a scale, where groups do.
        dtype: of codes.
    """
    try:
        for name in ("vllm._C", "vllm._C_stable_libtorch"):
            importlib.import_module(name)
    except ImportError:
        return {}
    ops, scale = torch.ops._C, torch.tensor([0.02], device="cuda")

    def scales(x: Tensor, count: int) -> Tensor:
        return x.new_empty(len(x), count, dtype=torch.float32)

    def static(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        codes = torch.empty_like(x, dtype=dtype)
        ops.fused_add_rms_norm_static_fp8_quant(codes, x, residual, weight, scale, eps)
        return codes

    def dynamic(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        codes, own = torch.empty_like(x, dtype=dtype), scales(x, 1)
        ops.rms_norm_dynamic_per_token_quant(codes, x, weight, own, eps, None, residual)
        return codes, own

    def add_grouped(x: Tensor, residual: Tensor | None, weight: Tensor) -> Any:
        codes, own = torch.empty_like(x, dtype=dtype), scales(x, x.shape[1] // group)
        ops.rms_norm_per_block_quant(codes, x, weight, own, eps, None, residual, group, False)
        return codes, own

    def activated(gate: Tensor, up: Tensor) -> Tensor:
        codes = torch.empty(gate.shape, device=gate.device, dtype=dtype)
        ops.silu_and_mul_quant(codes, _both(gate), scale)
        return codes

    def activated_grouped(gate: Tensor, up: Tensor) -> Any:
        codes = torch.empty(gate.shape, device=gate.device, dtype=dtype)
        own = scales(gate, gate.shape[1] // group)
        ops.silu_and_mul_per_block_quant(codes, _both(gate), own, group, None, False)
        return codes, own

    return {
        "add + RMSNorm + static fp8": static,
        "add + RMSNorm + dynamic fp8": dynamic,
        "RMSNorm + group fp8": lambda x, weight: add_grouped(x, None, weight),
        "add + RMSNorm + group fp8": add_grouped,
        "SiLU-mul + static fp8": activated,
        "SiLU-mul + group fp8": activated_grouped,
    }


def _both(gate: Tensor) -> Tensor:
    """[rows, 2 * width], of whose rows gate is the first half."""
    return gate.as_strided((len(gate), 2 * gate.shape[1]), (2 * gate.shape[1], 1))
