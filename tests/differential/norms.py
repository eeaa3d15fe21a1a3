"""RMSNorms in more spellings than real models have, and what looks like one.

Each is a function of (x, residual or None, weight) that returns (y, the sum that was normalised), as those of
`tests.helpers` are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import SPELLINGS, Norm

EPSILON = 1e-5
NORMS: dict[str, Norm] = dict(SPELLINGS)


def spelled(norm: Norm) -> Norm:
    NORMS[norm.__name__] = norm
    return norm


def summed(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x


def root(wide: Tensor) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)


def own_epsilon(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """With an epsilon that the model keeps."""
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype), total


@spelled
def weighted_last(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * root(wide)).to(x.dtype) * weight, total


@spelled
def square_by_product(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    normed = total.float() * torch.rsqrt((total.float() * total.float()).mean(-1, keepdim=True) + EPSILON)
    return (normed * weight.float()).to(x.dtype), total


@spelled
def rounded_wide_sum(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    return weight * (wide * root(wide)).to(x.dtype), total


@spelled
def wide_sum(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.float() if residual is None else x.float() + residual.float()
    return (total * root(total) * weight.float()).to(x.dtype), total.to(x.dtype)


@spelled
def wide_residual(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.float() if residual is None else x.float() + residual.float()
    return (total * root(total)).to(x.dtype) * weight, total


@spelled
def wide_result(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return wide * root(wide) * weight.float(), total


@spelled
def narrow_one_added(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * root(wide) * (1.0 + weight)).to(x.dtype), total


@spelled
def one_added_after_rounding(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * root(wide)).to(x.dtype) * (1.0 + weight), total


@spelled
def weighted_before_root(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * weight.float() * root(wide)).to(x.dtype), total


@spelled
def scaled_residual(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if residual is None else torch.add(x, residual, alpha=0.5)
    wide = total.float()
    return weight * (wide * root(wide)).to(x.dtype), total


@spelled
def three_addends(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = (x + weight) + (x if residual is None else residual)
    wide = total.float()
    return weight * (wide * root(wide)).to(x.dtype), total


@spelled
def in_place_residual(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.clone() if residual is None else residual.clone().add_(x)
    wide = total.float()
    return weight.mul((wide * root(wide)).to(x.dtype)), total


@spelled
def in_place_scale(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.to(torch.float32, copy=True)
    wide.mul_(root(wide))
    return wide.to(x.dtype).mul_(weight), total


@spelled
def root_read_elsewhere(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    scale = root(wide)
    return weight * (wide * scale).to(x.dtype), (total * scale).to(x.dtype)


@spelled
def without_keepdim(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1) + EPSILON).unsqueeze(-1)).to(x.dtype), total


@spelled
def power_of_half(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + EPSILON).pow(-0.5)).to(x.dtype), total


@spelled
def power_of_function(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As Gemma 3n has it."""
    total = summed(x, residual)
    wide = total.float()
    mean_squared = wide.pow(2).mean(-1, keepdim=True) + EPSILON
    return (wide * torch.pow(mean_squared, -0.5) * weight.float()).type_as(x), total


@spelled
def power_without_weight(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPSILON, -0.5)).to(x.dtype), total


@spelled
def divided_by_root(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()).to(x.dtype), total


@spelled
def with_minimum(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).clamp(min=1e-3))).to(x.dtype), total


@spelled
def scaled_mean(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) * 2 + EPSILON)).to(x.dtype), total


@spelled
def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    return F.layer_norm(total, total.shape[-1:], weight), total


@spelled
def centred(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    wide = wide - wide.mean(-1, keepdim=True)
    return weight * (wide * root(wide)).to(x.dtype), total


@spelled
def without_weight(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    return F.rms_norm(total, total.shape[-1:], eps=EPSILON), total


@spelled
def weight_of_rows(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * root(wide)).to(x.dtype) * (weight * x.sigmoid()), total


@spelled
def without_epsilon(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual) + 0.5
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype), total


@spelled
def narrow(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    return total * root(total) * weight, total


@spelled
def narrow_square(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    mean = (total * total).mean(-1, keepdim=True, dtype=torch.float32)
    return (total * torch.rsqrt(mean + EPSILON)).to(x.dtype) * weight, total


@spelled
def narrow_mean(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    mean = wide.pow(2).mean(-1, keepdim=True).to(x.dtype)
    return (wide * torch.rsqrt(mean + EPSILON)).to(x.dtype) * weight, total


@spelled
def narrow_root(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    return weight * (total * root(total.float()).to(x.dtype)), total


@spelled
def root_of_sum_before(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    return weight * (total.float() * root(x.float())).to(x.dtype), total


@spelled
def scaled_epsilon(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    mean = torch.add(wide.pow(2).mean(-1, keepdim=True), 0.25, alpha=2)
    return weight * (wide * torch.rsqrt(mean)).to(x.dtype), total


@spelled
def two_epsilons(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    mean = wide.pow(2).mean(-1, keepdim=True) + 0.25
    return weight * (wide * torch.rsqrt(mean + 0.5)).to(x.dtype), total


@spelled
def scaled_one_added(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * root(wide) * torch.add(weight.float(), 1, alpha=2)).to(x.dtype), total


@spelled
def narrower_result(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return (wide * root(wide)).to(torch.float16) * weight, total


@spelled
def over_two_dimensions(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    mean = wide.pow(2).mean((-2, -1), keepdim=True)
    return weight * (wide * torch.rsqrt(mean + EPSILON)).to(x.dtype), total


@spelled
def cubed(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.abs().pow(3).mean(-1, keepdim=True) + EPSILON)).to(x.dtype), total
