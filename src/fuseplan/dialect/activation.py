"""SiLU-and-mul, the gated activation of Llama-style MLPs."""

from typing import Any

import torch
from torch import Tensor

from fuseplan.dialect.norm import compute_dtype, random_tensor
from fuseplan.dialect.registry import Sample, define
from fuseplan.dialect.rounding import ActivationRounding


def silu_and_mul_reference(gate: Tensor, up: Tensor, rounding: str) -> Tensor:
    """y = silu(gate) * up

    Args:
        gate: [..., intermediate].
        up: [..., intermediate], gate's dtype.
        rounding: one of `ActivationRounding`.

    Returns:
        [..., intermediate] in gate's dtype, contiguous.

    Raises:
        ValueError: `rounding` isn't one of `ActivationRounding`.
    """
    wide = compute_dtype(gate.dtype)
    activated = torch.nn.functional.silu(gate.to(wide))
    if ActivationRounding(rounding) is ActivationRounding.LLAMA:
        activated = activated.to(gate.dtype).to(wide)
    return (activated * up.to(wide)).to(gate.dtype).contiguous()


def silu_and_mul_fake(gate: Tensor, up: Tensor, rounding: str) -> Tensor:
    """Shape and dtype of `silu_and_mul_reference`."""
    return gate.new_empty(gate.shape)


def activation_samples() -> list[Sample]:
    """Arguments of `silu_and_mul` for several shapes, dtypes and both conventions."""

    def sample(shape: tuple[int, ...], dtype: torch.dtype, rounding: ActivationRounding) -> Sample:
        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            gate, up = (random_tensor(shape, dtype, device, generator) for _ in range(2))
            return gate, up, rounding.value

        name = f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}-{rounding}"
        return Sample(name=name, make=make)

    return [
        sample((1, 64), torch.float32, ActivationRounding.LLAMA),
        sample((7, 320), torch.bfloat16, ActivationRounding.LLAMA),
        sample((2, 5, 96), torch.float16, ActivationRounding.FP32),
    ]


silu_and_mul = define(
    "silu_and_mul",
    "(Tensor gate, Tensor up, str rounding) -> Tensor",
    reference=silu_and_mul_reference,
    fake=silu_and_mul_fake,
    samples=activation_samples(),
)
