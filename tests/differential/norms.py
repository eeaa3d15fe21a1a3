"""RMSNorms in more spellings than real models have, and what looks like one.

Each is a function of (x, residual or None, weight) that returns (y, the sum that was normalised), as those of
`tests.helpers` are.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import SPELLINGS, Norm

EPSILON = 1e-5


def summed(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x


def mean_square(wide: Tensor) -> Tensor:
    return wide.pow(2).mean(-1, keepdim=True)


def root(wide: Tensor) -> Tensor:
    return torch.rsqrt(mean_square(wide) + EPSILON)


Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of x, the sum, the sum in float32 and the weight."""
Sum = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""Of x, the residual and the weight."""


def of_sum(formula: Formula, sum_of: Sum = lambda x, residual, weight: summed(x, residual)) -> Norm:
    def norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = sum_of(x, residual, weight)
        return formula(x, total, total.float(), weight), total

    return norm


def by(root_of: Callable[[Tensor], Tensor]) -> Formula:
    """Rounded once it is multiplied by another root."""
    return lambda x, total, wide, w: w * (wide * root_of(wide)).to(x.dtype)


def own_epsilon(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """With an epsilon that the model keeps."""
    return of_sum(by(lambda wide: torch.rsqrt(mean_square(wide) + epsilon)))(x, residual, weight)


def added_wide(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.float() if residual is None else x.float() + residual.float()


def square_by_product(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    normed = total.float() * torch.rsqrt((total.float() * total.float()).mean(-1, keepdim=True) + EPSILON)
    return (normed * weight.float()).to(x.dtype), total


def wide_sum(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = added_wide(x, residual)
    return (total * root(total) * weight.float()).to(x.dtype), total.to(x.dtype)


def wide_residual(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = added_wide(x, residual)
    return (total * root(total)).to(x.dtype) * weight, total


def in_place_residual(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.clone() if residual is None else residual.clone().add_(x)
    wide = total.float()
    return weight.mul((wide * root(wide)).to(x.dtype)), total


def in_place_scale(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.to(torch.float32, copy=True)
    wide.mul_(root(wide))
    return wide.to(x.dtype).mul_(weight), total


def root_read_elsewhere(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(x, residual)
    wide = total.float()
    scale = root(wide)
    return weight * (wide * scale).to(x.dtype), (total * scale).to(x.dtype)


def centred(x: Tensor, total: Tensor, wide: Tensor, weight: Tensor) -> Tensor:
    wide = wide - wide.mean(-1, keepdim=True)
    return weight * (wide * root(wide)).to(x.dtype)


def narrow_square(x: Tensor, total: Tensor, wide: Tensor, weight: Tensor) -> Tensor:
    mean = (total * total).mean(-1, keepdim=True, dtype=torch.float32)
    return (total * torch.rsqrt(mean + EPSILON)).to(x.dtype) * weight


NORMS: dict[str, Norm] = {
    **SPELLINGS,
    "weighted_last": of_sum(lambda x, total, wide, w: (wide * root(wide)).to(x.dtype) * w),
    "square_by_product": square_by_product,
    "rounded_wide_sum": of_sum(by(root), lambda x, r, w: x if r is None else (x.float() + r.float()).to(x.dtype)),
    "wide_sum": wide_sum,
    "wide_residual": wide_residual,
    "wide_result": of_sum(lambda x, total, wide, w: wide * root(wide) * w.float()),
    "narrow_one_added": of_sum(lambda x, total, wide, w: (wide * root(wide) * (1.0 + w)).to(x.dtype)),
    "one_added_after_rounding": of_sum(lambda x, total, wide, w: (wide * root(wide)).to(x.dtype) * (1.0 + w)),
    "weighted_before_root": of_sum(lambda x, total, wide, w: (wide * w.float() * root(wide)).to(x.dtype)),
    "scaled_residual": of_sum(by(root), lambda x, r, w: x if r is None else torch.add(x, r, alpha=0.5)),
    "three_addends": of_sum(by(root), lambda x, r, w: (x + w) + (x if r is None else r)),
    "in_place_residual": in_place_residual,
    "in_place_scale": in_place_scale,
    "root_read_elsewhere": root_read_elsewhere,
    "without_keepdim": of_sum(by(lambda wide: torch.rsqrt(wide.pow(2).mean(-1) + EPSILON).unsqueeze(-1))),
    "power_of_half": of_sum(by(lambda wide: (mean_square(wide) + EPSILON).pow(-0.5))),
    "power_of_function": of_sum(  # as Gemma 3n has it
        lambda x, total, wide, w: (wide * torch.pow(mean_square(wide) + EPSILON, -0.5) * w.float()).type_as(x)
    ),
    "power_without_weight": of_sum(
        lambda x, total, wide, w: (wide * torch.pow(mean_square(wide) + EPSILON, -0.5)).to(x.dtype)
    ),
    "divided_by_root": of_sum(
        lambda x, total, wide, w: w * (wide / (mean_square(wide) + EPSILON).sqrt()).to(x.dtype)
    ),
    "with_minimum": of_sum(by(lambda wide: torch.rsqrt(mean_square(wide).clamp(min=1e-3)))),
    "scaled_mean": of_sum(by(lambda wide: torch.rsqrt(mean_square(wide) * 2 + EPSILON))),
    "layer_norm": of_sum(lambda x, total, wide, w: F.layer_norm(total, total.shape[-1:], w)),
    "centred": of_sum(centred),
    "without_weight": of_sum(lambda x, total, wide, w: F.rms_norm(total, total.shape[-1:], eps=EPSILON)),
    "weight_of_rows": of_sum(lambda x, total, wide, w: (wide * root(wide)).to(x.dtype) * (w * x.sigmoid())),
    "without_epsilon": of_sum(by(lambda wide: torch.rsqrt(mean_square(wide))), lambda x, r, w: summed(x, r) + 0.5),
    "narrow": of_sum(lambda x, total, wide, w: total * root(total) * w),
    "narrow_square": of_sum(narrow_square),
    "narrow_mean": of_sum(
        lambda x, total, wide, w: (wide * torch.rsqrt(mean_square(wide).to(x.dtype) + EPSILON)).to(x.dtype) * w
    ),
    "narrow_root": of_sum(lambda x, total, wide, w: w * (total * root(wide).to(x.dtype))),
    "root_of_sum_before": of_sum(lambda x, total, wide, w: w * (wide * root(x.float())).to(x.dtype)),
    "scaled_epsilon": of_sum(by(lambda wide: torch.rsqrt(torch.add(mean_square(wide), 0.25, alpha=2)))),
    "two_epsilons": of_sum(by(lambda wide: torch.rsqrt(mean_square(wide) + 0.25 + 0.5))),
    "scaled_one_added": of_sum(
        lambda x, total, wide, w: (wide * root(wide) * torch.add(w.float(), 1, alpha=2)).to(x.dtype)
    ),
    "narrower_result": of_sum(lambda x, total, wide, w: (wide * root(wide)).to(torch.float16) * w),
    "over_two_dimensions": of_sum(by(lambda wide: torch.rsqrt(wide.pow(2).mean((-2, -1), keepdim=True) + EPSILON))),
    "cubed": of_sum(by(lambda wide: torch.rsqrt(wide.abs().pow(3).mean(-1, keepdim=True) + EPSILON))),
}  # fmt: skip
