"""Linear layers of few rows with the residual add and the RMSNorm behind them: the output projection of attention, and
the last layer of a block.

Such a layer has too few features to fill a device: fewer tiles than processors. Since a norm follows, several programs
can each take a part of the width, and the norm's kernel sums the parts as it reads them.
"""

from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.ops import Rounding, Sample, define, draw_near_one, random_tensor
from fuseplan.record import Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.linear import DEFAULT_ON
from fuseplan.rules.families.norm import unsupported_dtypes
from fuseplan.rules.parts.linear import (
    LINEARS,
    linears_fake,
    linears_reference,
    parameters_of,
    samples_of,
    weight_draws,
)
from fuseplan.rules.parts.rms_norm import fused_add_rms_norm


def linear_add_rms_norm_reference(
    x: Tensor, weight0: Tensor, bias0: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor]:
    """residual_out = linear(x, weight0, bias0) + residual;  y = rms_norm(residual_out) * norm_weight

    Args:
        x: [..., width].
        weight0: [features, width], x's dtype.
        bias0: [features] or None.
        residual: [..., features], x's dtype, or float32 under `vllm_fp32_residual`.
        norm_weight: [features].
        eps: added to the mean square.
        rounding: one of `Rounding`; the layer's result is rounded to x's dtype in any case.

    Returns:
        (y, residual_out), both [..., features] and contiguous, as in `fused_add_rms_norm`.

    Raises:
        ValueError: `rounding` isn't one of `Rounding`.
    """
    projected = linears_reference(x, weight0, bias0)
    found: tuple[Tensor, Tensor] = fused_add_rms_norm.reference(projected, residual, norm_weight, eps, rounding)
    return found


def linear_add_rms_norm_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `linear_add_rms_norm_reference`."""
    found: tuple[Tensor, Tensor] = fused_add_rms_norm.fake(linears_fake(*arguments[:3]), *arguments[3:])
    return found


def _sample(layer: Sample, rounding: Rounding) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        x, weight, bias = layer.make(device, generator)
        features = weight.shape[0]
        added = x.dtype if rounding.rounds_residual else torch.float32
        residual = random_tensor((*x.shape[:-1], features), added, device, generator)
        norm_weight = 1 + 0.1 * random_tensor((features,), torch.float32, device, generator)
        return x, weight, bias, residual, norm_weight.to(x.dtype), 1e-5, rounding.value

    return Sample(name=f"{layer.name}-{rounding}", make=make)


OP = define(
    "skinny_linear_add_rms_norm",
    f"({parameters_of(1)}, Tensor residual, Tensor norm_weight, float eps, str rounding) -> (Tensor, Tensor)",
    reference=linear_add_rms_norm_reference,
    fake=linear_add_rms_norm_fake,
    samples=[
        *(_sample(each, Rounding.LLAMA) for each in samples_of(1)),
        *(_sample(samples_of(1)[0], rounding) for rounding in Rounding if rounding is not Rounding.LLAMA),
    ],
    fused=True,
    draws={**weight_draws(1), "norm_weight": draw_near_one},
)


class LinearAddNorm(Rule):
    """linear -> fused_add_rms_norm  =>  one op.

    residual_out = x @ weight0^T + bias0 + residual;  y = rms_norm(residual_out) * norm_weight
    """

    name, flags = OP.name, ("fuse_skinny_linear", "fuse_add_rms_norm")
    opt_in, default_on = "fuse_add_rms_norm", DEFAULT_ON
    op, core = OP, LINEARS[0]

    def pattern(
        self, x: Any, weight0: Any, bias0: Any, residual: Any, norm_weight: Any, eps: Any, rounding: Any
    ) -> Any:
        """The layer and the norm of the sum."""
        found = fused_add_rms_norm(LINEARS[0](x, weight0, bias0), residual, norm_weight, eps, rounding)
        return found[0], found[1]

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses the dtypes that fused norms refuse."""
        return unsupported_dtypes(m, "norm_weight")


LINEAR_NORM_RULES: tuple[Rule, ...] = (LinearAddNorm(),)
