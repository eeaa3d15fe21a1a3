"""The experts of a mixture-of-experts layer as one opaque op, so that the compiler's graph has a single node for them.

Shapes: T tokens, P padded hidden, H hidden, E experts, A active experts per token, N = T*A rows, I intermediate.
Gate and up projections are interleaved: row 2i of `w13` is gate i, row 2i + 1 is up i, so a split by rows keeps pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the collectives' meta kernels
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from fuseplan.workloads.models.config import GptOssConfig


def all_reduce(x: Tensor, group: str) -> Tensor:
    """`sum(x of every rank in the group)`, as the two nodes `_c10d_functional.all_reduce` and `wait_tensor`.

    Args:
        x: Any shape and dtype the group's backend reduces; left unmodified.
        group: A process group's name.
    """
    ops = torch.ops._c10d_functional
    reduced: Tensor = ops.wait_tensor(ops.all_reduce(x, "sum", group))
    return reduced


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`(min(gate, limit) * sigmoid(alpha * gate)) * (clamp(up, -limit, limit) + 1)` of interleaved gate and up.

    Args:
        gate_up: [..., 2 I].
        alpha: Gain inside the sigmoid.
        limit: Bound of the gate from above and of the up projection from both sides.

    Returns:
        [..., I], computed in float32 and cast to the input's dtype.
    """
    gate, up = gate_up.float().unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    out: Tensor = gate * torch.sigmoid(alpha * gate) * (up + 1)
    return out.to(gate_up.dtype)


@torch.library.custom_op("gpt_oss::experts", mutates_args=())
def experts(
    x_TP: Tensor,
    router_logits_TE: Tensor,
    w13: Tensor,
    b13: Tensor,
    w2: Tensor,
    b2: Tensor,
    top_k: int,
    alpha: float,
    limit: float,
    hidden: int,
    group: str,
) -> Tensor:
    """Route each token to `top_k` experts and add up their weighted results.

    For each token t, with `p = softmax(top_k(router_logits[t]))`:

        y[t] = sum_e p[e] * (w2[e] @ clamped_swiglu(w13[e] @ x[t] + b13[e]) + b2[e])[:hidden]

    Rows are sorted by expert and multiplied in groups, so nothing is read back to the host and CUDA graphs can capture
    it. The weighted sum is in float32, then cast.

    Args:
        x_TP: [T, P], bf16 or float32; columns from `hidden` on are padding and meet zero weights.
        router_logits_TE: [T, E].
        w13: [E, 2 I, P], gate and up interleaved.
        b13: [E, 2 I].
        w2: [E, P, I].
        b2: [E, P].
        top_k: Active experts per token.
        alpha: See `clamped_swiglu`.
        limit: See `clamped_swiglu`.
        hidden: Width of the result.
        group: Name of the process group to sum over inside the op, "" for none.

    Returns:
        [T, H] in the dtype of `x_TP`.
    """
    logits_TA, expert_TA = router_logits_TE.float().topk(top_k, dim=-1)
    weight_TA = logits_TA.softmax(-1)
    expert_N, order_N = expert_TA.flatten().sort(stable=True)
    ends_E = torch.searchsorted(
        expert_N, torch.arange(w13.shape[0], device=expert_N.device), right=True, out_int32=True
    )

    gate_up = F.grouped_mm(x_TP[order_N // top_k], w13.mT, offs=ends_E) + b13[expert_N]
    down_NP = F.grouped_mm(clamped_swiglu(gate_up, alpha, limit), w2.mT, offs=ends_E) + b2[expert_N]

    down_NH = torch.empty_like(down_NP[:, :hidden], memory_format=torch.contiguous_format)
    down_NH[order_N] = down_NP[:, :hidden]
    y_TH = (down_NH.float().unflatten(0, (-1, top_k)) * weight_TA[..., None]).sum(1).to(x_TP.dtype)
    return all_reduce(y_TH, group) if group else y_TH


@experts.register_fake
def _(x_TP: Tensor, *others: Any) -> Tensor:
    *_, hidden, _ = others
    return x_TP.new_empty(x_TP.shape[0], hidden)


@register_flop_formula(torch.ops.gpt_oss.experts)
def _operations(*arguments: Any, **more: object) -> int:
    """Both products of every token with its experts, of shapes in the place of tensors."""
    x_TP, _, w13, _, w2, _, top_k, *_ = arguments
    operations: int = 2 * x_TP[0] * top_k * (w13[1] * w13[2] + w2[1] * w2[2])
    return operations


class Experts(nn.Module):
    """The stacked weights of one layer's experts; the padding rows and columns are zero.

    `group` names the process group that the op itself sums over, "" for none.
    """

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        E, P, H, I = config.experts, config.padded_hidden, config.hidden, config.intermediate  # noqa: E741
        self.w13 = nn.Parameter(torch.empty(E, 2 * I, P).normal_(std=H**-0.5))
        self.b13 = nn.Parameter(torch.empty(E, 2 * I).normal_(std=0.1))
        self.w2 = nn.Parameter(torch.empty(E, P, I).normal_(std=0.25 * I**-0.5))
        self.b2 = nn.Parameter(torch.empty(E, P).normal_(std=0.1))
        with torch.no_grad():
            for padding in (self.w13[..., H:], self.w2[:, H:], self.b2[:, H:]):
                padding.zero_()
        self.top_k, self.hidden = config.experts_per_token, config.hidden
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.group = ""

    def forward(self, x_TP: Tensor, router_logits_TE: Tensor) -> Tensor:
        """[T, P] and [T, E] -> [T, H]; see `experts`."""
        weights = self.w13, self.b13, self.w2, self.b2
        y_TH: Tensor = experts(
            x_TP, router_logits_TE, *weights, self.top_k, self.alpha, self.limit, self.hidden, self.group
        )
        return y_TH
