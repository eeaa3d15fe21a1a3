"""vLLM's own fused kernels: its build for NVIDIA's GPUs registers them as `torch.ops._C`. Importing this needs no vLLM.

Read from the sources of vLLM 0.22, 0.23, 0.24, 0.28, 0.32 and 0.33 (csrc, some of it in csrc/libtorch_stable):

- `layernorm_quant_kernels.cu`: the residual sum is rounded to the activations' dtype before it is normalised. The norm
  is multiplied by the weight in float32 and rounded once (`gpt_oss`), in 0.23 alone rounded before and after
  (`llama`). It is quantised by the reciprocal of the scale.
- `quantization/fused_kernels/fused_layernorm_dynamic_per_token_quant.cu` and `layernorm_utils.cuh`, a scale a row or a
  group: the unrounded sum is normalised, rounded, and multiplied in the weight's dtype (`vllm`, or `llama` without a
  residual). A scale is max(min(amax, scale_ub) / 448, 1 / (448 * 512)), and divides.
- `quantization/activation_kernels.cu`: SiLU is rounded, and so is the product (`llama`), which is quantised by the
  reciprocal of the scale.
- `quantization/fused_kernels/fused_silu_mul_block_quant.cu`: neither is rounded. A scale is as above, and divides.

All of them write to results that the caller allocates. Those with a residual write the sum over it, so the residual is
copied first.

Not used: `rms_norm`, `fused_add_rms_norm` and `silu_and_mul`. Only `fused_add_rms_norm` is a fused op by itself, and it
would need copies of both x and the residual.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.torch_version import TorchVersion

from fuseplan.dialect import ActivationRounding, DialectOp, Rounding, implement, ops
from fuseplan.providers.gates import Offer
from fuseplan.providers.operands import by_names
from fuseplan.providers.provider import Provider
from fuseplan.providers.timing import Timing
from fuseplan.providers.vllm_c import gates, kernels

OLDEST, BEYOND = "0.22", "0.34"
"""The releases whose sources were read for the rounding of kernels: from the first to before the second."""

ROUNDS_FIRST: Final = ("0.23", "0.24")
"""The releases among them, from the first to before the second, whose norms with a given scale round before they
multiply by the weight.
"""

COUNTED = 2**31 - 1
"""The most elements that kernels with 32-bit addresses can count."""

TIMES: Final = 2.89
"""The time of its kernels as a multiple of fuseplan's own: the median of 48 measurements on an H200, from 1.08 to 11.4
(benchmarks/results/kernels_h200.json, vLLM 0.22, 1 to 32,768 rows).
"""

KERNELS: Final = (
    "rms_norm_static_fp8_quant", "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant",
    "rms_norm_per_block_quant", "silu_and_mul_quant", "silu_and_mul_per_block_quant",
)  # fmt: skip
"""Names of the ops in `torch.ops._C`."""


def most_rows(m: Any) -> int:
    """The most rows for norms with a given scale: they compute addresses in 32 bits."""
    return COUNTED // int(m.x.shape[-1])


def most_activations(m: Any) -> int:
    """The most rows for SiLU-and-mul with scales of groups, which reads rows of gate and up."""
    return COUNTED // (2 * int(m.gate.shape[-1]))


def unready() -> str | None:
    """Why this process doesn't have the kernels, or None."""
    version = PROVIDER.version()
    if version is None:
        return "the vLLM that is installed isn't its build for NVIDIA's GPUs"
    if not OLDEST <= TorchVersion(version) < BEYOND:
        return f"where kernels of vLLM {version} round hasn't been read: those from {OLDEST} to before {BEYOND} have"
    missing = [name for name in KERNELS if not hasattr(getattr(torch.ops, kernels.NAMESPACE), name)]
    return f"torch.ops._C has no {missing[0]}, which vLLM registers on NVIDIA GPUs" if missing else None


def static_roundings(version: str | None) -> frozenset[str]:
    """The roundings of a release's norms with a given scale; None: a new release."""
    first, then = ROUNDS_FIRST
    is_first = version is not None and first <= TorchVersion(version) < then
    return frozenset({Rounding.LLAMA.value if is_first else Rounding.GPT_OSS.value})


def _version() -> str | None:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


_STATIC = Offer(accepts=gates.STATIC, roundings=static_roundings(_version()), most_rows=most_rows)
_LLAMA, _VLLM = frozenset({Rounding.LLAMA.value}), frozenset({Rounding.VLLM.value})

OFFERED: Mapping[DialectOp, tuple[Callable[..., Any], Offer]] = {
    ops.rms_norm_static_fp8_quant: (kernels.static_norm, _STATIC),
    ops.fused_add_rms_norm_static_fp8_quant: (kernels.static_norm, _STATIC),
    ops.rms_norm_dynamic_fp8_quant: (kernels.dynamic_norm, Offer(accepts=gates.DYNAMIC, roundings=_LLAMA)),
    ops.fused_add_rms_norm_dynamic_fp8_quant: (kernels.dynamic_norm, Offer(accepts=gates.DYNAMIC, roundings=_VLLM)),
    ops.rms_norm_group_fp8_quant: (kernels.group_norm, Offer(accepts=gates.GROUP, roundings=_LLAMA)),
    ops.fused_add_rms_norm_group_fp8_quant: (kernels.group_norm, Offer(accepts=gates.GROUP, roundings=_VLLM)),
    ops.silu_and_mul_static_fp8_quant: (
        kernels.static_activation,
        Offer(accepts=gates.ACTIVATION_STATIC, roundings=frozenset({ActivationRounding.LLAMA.value})),
    ),
    ops.silu_and_mul_group_fp8_quant: (
        kernels.group_activation,
        Offer(
            accepts=gates.ACTIVATION_GROUP, roundings=frozenset({ActivationRounding.FP32.value}),
            leaves_out="the activation before it is quantised", most_rows=most_activations,
        ),
    ),
}  # fmt: skip
"""Kernels and their offers by fused op."""

PROVIDER: Final = Provider(
    name="vllm_c",
    description="vLLM's own fused norms and activations with fp8 codes, in its engines",
    vendors=frozenset({"nvidia"}),
    package="vllm",
    install=f"install a build of vLLM {OLDEST} or newer, before {BEYOND}, for NVIDIA's GPUs",
    implements={op.name: offer for op, (_, offer) in OFFERED.items()},
    timing=Timing(times=TIMES),
    available=unready,
    untested="not run on a GPU so far, where only vLLM's kernels were timed: its calls are held against signatures",
)

for _op, (_kernel, _offer) in OFFERED.items():
    implement(_op, PROVIDER.name, by_names(_op, _kernel), most_rows=_offer.most_rows)
