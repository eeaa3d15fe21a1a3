"""fuseplan's own Triton kernels, a file each with its launcher. Importing this needs no Triton, running them does."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fuseplan.dialect import implement, ops
from fuseplan.providers.gates import Accepts
from fuseplan.record import Reason, Refusal

MOST_LEADING = 2
"""Dimensions before the heads that the kernel of `qk_norm_rope` steps through: [B, S] or [tokens]."""


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rounding: str,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dialect.rotary.qk_norm_rope_reference` in one kernel."""
    from fuseplan.providers.triton.qk_norm_rope import launch

    return launch(q, k, q_weight, k_weight, cos, sin, eps, rounding, rotary_rounding)


def accept_qk_norm_rope(m: Any) -> Refusal | None:
    """Why the kernel doesn't take the arguments, or None."""
    leading = m.q.dim() - 2
    if leading <= MOST_LEADING:
        return None
    detail = f"the kernel takes up to {MOST_LEADING} dimensions before the heads; q has {leading}"
    return m.refuse(Reason.SIZE, "q", detail, mend="flatten them")  # type: ignore[no-any-return]


implement(ops.qk_norm_rope, "triton", qk_norm_rope)

ACCEPTS: Mapping[str, Accepts] = {ops.qk_norm_rope.name: accept_qk_norm_rope}
"""What each kernel takes, by fused op: all that this package implements."""
