"""torch's attention kernels: their names and ops, and the one that runs on a vendor's devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

aten = torch.ops.aten
LOW_PRECISION = (torch.bfloat16, torch.float16)
MOST_CUDNN_WIDTH: Final = 128
"""Head dimensions up to which torch prefers cuDNN's kernel on Hopper and Blackwell."""

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool], Any]


@dataclass(frozen=True, kw_only=True)
class AttentionOp:
    """One of torch's attention ops.

    Attributes:
        name: its name in the dialect.
        target: its overload in post-grad graphs.
        run: a call that requests only the output: (q, k, v, mask, scale, is_causal) -> all results.
    """

    name: str
    target: "torch._ops.OpOverload"
    run: Run


KERNELS: Final[Mapping[str, AttentionOp]] = {
    kernel.name: kernel
    for kernel in (
        AttentionOp(
            name="cudnn",
            target=aten._scaled_dot_product_cudnn_attention.default,
            run=lambda q, k, v, mask, scale, is_causal: aten._scaled_dot_product_cudnn_attention.default(
                q, k, v, mask, False, 0.0, is_causal, False, scale=scale
            ),
        ),
        AttentionOp(
            name="flash",
            target=aten._scaled_dot_product_flash_attention.default,
            run=lambda q, k, v, mask, scale, is_causal: aten._scaled_dot_product_flash_attention.default(
                q, k, v, 0.0, is_causal, False, scale=scale
            ),
        ),
        AttentionOp(
            name="efficient",
            target=aten._scaled_dot_product_efficient_attention.default,
            run=lambda q, k, v, mask, scale, is_causal: aten._scaled_dot_product_efficient_attention.default(
                q, k, v, mask, False, 0.0, is_causal, scale=scale
            ),
        ),
        AttentionOp(
            name="cpu",
            target=aten._scaled_dot_product_flash_attention_for_cpu.default,
            run=lambda q, k, v, mask, scale, is_causal: aten._scaled_dot_product_flash_attention_for_cpu.default(
                q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
            ),
        ),
        AttentionOp(
            name="overrideable",
            target=aten._scaled_dot_product_fused_attention_overrideable.default,
            run=lambda q, k, v, mask, scale, is_causal: aten._scaled_dot_product_fused_attention_overrideable.default(
                q, k, v, mask, 0.0, is_causal, False, scale=scale
            ),
        ),
    )
}
"""Kernels by name; `overrideable` is for devices outside of torch."""


def target_kernel(kernel: str, vendor: str, q: Tensor, mask: Tensor | None) -> str:
    """The kernel that runs on a vendor's devices where a graph traced without such a device calls the CPU's kernel.

    Args:
        kernel: the kernel in the graph.
        vendor: the vendor of the plan's device.
        q: queries.
        mask: added to the scores, or None.
    """
    if kernel != "cpu" or vendor == "cpu":
        return kernel
    if q.dtype not in LOW_PRECISION:
        return "efficient"
    if vendor == "nvidia" and isinstance(q.shape[-1], int) and q.shape[-1] <= MOST_CUDNN_WIDTH:
        return "cudnn"
    return "efficient" if mask is not None else "flash"
