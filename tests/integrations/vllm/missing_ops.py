"""Ops that vLLM's last pass looks up by name, and that its build for CPUs doesn't have."""

import torch
import vllm._custom_ops  # noqa: F401 - registers those that it has

MISSING = (
    "fused_add_rms_norm_static_fp8_quant", "fused_qk_norm_rope", "rms_norm_dynamic_per_token_quant",
    "rms_norm_static_fp8_quant", "silu_and_mul_quant",
)  # fmt: skip


def define() -> torch.library.Library:
    """Defines them for as long as the result lives. Nothing calls them."""
    library = torch.library.Library("_C", "FRAGMENT")
    for name in MISSING:
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library
