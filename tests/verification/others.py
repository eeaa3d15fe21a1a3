"""Ops and passes of somebody who isn't fuseplan, some of them wrong in one way each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseplan.matching import ExternalPass
from tests.helpers import HIDDEN

GROUP = 32
FP8 = torch.float8_e4m3fn
WEIGHT = torch.linspace(0.5, 1.5, HIDDEN)
SCALE = torch.tensor([0.02])

LIBRARY = torch.library.Library("made_up", "DEF")


def op(schema: str, kernel: Callable[..., Any] | None, fake: Callable[..., Any], *tags: torch.Tag) -> Any:
    """Defines an op, unless it is there; without a kernel it runs nowhere."""
    name = schema.partition("(")[0]
    if hasattr(torch.ops.made_up, name):
        return getattr(torch.ops.made_up, name).default
    LIBRARY.define(schema, tags=tags)
    if kernel is not None:
        LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, fake, "Meta")
    return getattr(torch.ops.made_up, name).default


def silu_mul_eager(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def group_quant_eager(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / 448.0).clamp(min=1e-10)
    if scale_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (groups / scale.unsqueeze(-1)).clamp(-448.0, 448.0).flatten(-2)
    return codes.to(FP8), scale


def group_quant_fake(x: Tensor, group_size: int, scale_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), x.new_empty((x.shape[0], x.shape[1] // group_size), dtype=torch.float32)


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def quant_eager(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8)


silu_mul = op("silu_mul(Tensor x) -> Tensor", silu_mul_eager, lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
group_quant = op(
    "group_quant(Tensor x, int group_size, bool scale_ue8m0=False) -> (Tensor, Tensor)",
    group_quant_eager, group_quant_fake,
)  # fmt: skip
silu_mul_group_quant = op(
    "silu_mul_group_quant(Tensor x, int group_size, bool scale_ue8m0=False) -> (Tensor, Tensor)",
    lambda x, *rest: group_quant_eager(silu_mul_eager(x), *rest),
    lambda x, *rest: group_quant_fake(x.new_empty(x.shape[0], x.shape[1] // 2), *rest),
)
rms_norm = op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm_eager, lambda x, w, eps: torch.empty_like(x)
)
quant = op("quant(Tensor x, Tensor scale) -> Tensor", quant_eager, lambda x, scale: torch.empty_like(x, dtype=FP8))


def norm_quant(name: str, weight_of: Callable[[Tensor], Tensor]) -> Any:
    """rms_norm and quant in one op, whose kernel takes the weight for something."""

    def kernel(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
        return quant_eager(rms_norm_eager(x, weight_of(weight), eps), scale)

    schema = f"{name}(Tensor x, Tensor weight, Tensor scale, float eps) -> Tensor"
    return op(schema, kernel, lambda x, weight, scale, eps: torch.empty_like(x, dtype=FP8))


norm_quant_right = norm_quant("norm_quant", lambda weight: weight)
norm_quant_rounds = norm_quant("norm_quant_rounds", lambda weight: weight.bfloat16())
norm_quant_reinterprets = norm_quant("norm_quant_reinterprets", lambda weight: weight.view(torch.bfloat16)[:HIDDEN])


def replacing(
    name: str, search: Callable[..., Any], replacement: Callable[..., Any], *inputs: Tensor, uuid: str | None = None
) -> ExternalPass:
    matcher = PatternMatcherPass(pass_name=name)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in inputs]
        register_replacement(search, replacement, fakes, fwd_only, matcher)
    return ExternalPass(matcher=matcher, uuid=uuid)


def silu_quant(fused: Callable[[Tensor], Any]) -> ExternalPass:
    """SiLU-and-mul and a quantisation with power-of-two scales."""
    x = torch.empty(4, 2 * HIDDEN, dtype=torch.bfloat16)
    return replacing("silu_quant", lambda x: group_quant(silu_mul(x), GROUP, True), fused, x)


def drops_ue8m0(x: Tensor) -> Any:
    return silu_mul_group_quant(x, GROUP)


def keeps_ue8m0(x: Tensor) -> Any:
    return silu_mul_group_quant(x, GROUP, True)


def norm_quant_pass(fused: Any) -> ExternalPass:
    x = torch.empty(4, HIDDEN, dtype=torch.bfloat16)
    return replacing(
        "norm_quant", lambda x, weight, scale: quant(rms_norm(x, weight, 1e-6), scale),
        lambda x, weight, scale: fused(x, weight, scale, 1e-6), x, WEIGHT.bfloat16(), SCALE,
    )  # fmt: skip


def add_relu_eager(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


def forgets_rows(x: Tensor, y: Tensor) -> Tensor:
    result = torch.empty_like(x)
    whole = x.shape[0] // 4 * 4
    result[:whole] = torch.relu(x[:whole] + y[:whole])
    return result


def turned(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y).t().contiguous().t()


def raises(x: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("no such tile")


def add_relu(kernel: Callable[..., Any] | None, name: str | None = None, uuid: str | None = None) -> ExternalPass:
    """relu(x + y) by one op."""
    name = name or (kernel.__name__ if kernel is not None else "nowhere")
    fused = op(f"{name}(Tensor x, Tensor y) -> Tensor", kernel, lambda x, y: torch.empty_like(x))
    x = torch.empty(4, HIDDEN)
    return replacing(name, lambda x, y: torch.relu(x + y), lambda x, y: fused(x, y), x, x.neg(), uuid=uuid)  # noqa: PLW0108 - named arguments
