"""The fusion of QK norm and rotary embedding."""

from typing import Any

import torch

from fuseplan.dialect import ops
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule

SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)
HEADS_FIRST = (0, 2, 1, 3)
"""Between [B, S, heads, head_dim] and [B, heads, S, head_dim]; its own inverse."""


class QkNormRope(Rule):
    """rms_norm(q), rms_norm(k) (-> transpose) -> rotary_embedding  =>  one op.

    y = n * cos + cat(-n2, n1) * sin,   n = rms_norm(x) * weight,   of the queries and of the keys

    Where `transposes`, heads are normed in [B, S, heads, head_dim] and rotated in [B, heads, S, head_dim], as Hugging
    Face's models do; the fused op stays in the first layout, and its results are views in the second.
    """

    name, flags = "qk_norm_rope", ("enable_qk_norm_rope_fusion",)
    op, core = ops.qk_norm_rope, ops.rms_norm

    def __init__(self, *, transposes: bool) -> None:
        self.transposes = transposes

    def pattern(
        self, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: Any, rounding: Any,
        rotary_rounding: Any,
    ) -> Any:  # fmt: skip
        q = self._moved(ops.rms_norm(q, q_weight, eps, rounding))
        k = self._moved(ops.rms_norm(k, k_weight, eps, rounding))
        rotated = ops.rotary_embedding(q, k, cos, sin, rotary_rounding)
        return rotated[0], rotated[1]

    def replacement(
        self, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: Any, rounding: Any,
        rotary_rounding: Any,
    ) -> Any:  # fmt: skip
        cos, sin = self._moved(cos), self._moved(sin)
        fused = self.op(q, k, q_weight, k_weight, cos, sin, eps, rounding, rotary_rounding)
        return self._moved(fused[0]), self._moved(fused[1])

    def _moved(self, value: Any) -> Any:
        return torch.ops.aten.permute.default(value, [*HEADS_FIRST]) if self.transposes else value

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses what the fused op doesn't compute: mixed and unsupported dtypes, other layouts of the angles."""
        return self._dtypes(m) or self._shapes(m)

    def _dtypes(self, m: Bindings) -> Refusal | None:
        if m.q.dtype not in SUPPORTED:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED)
            return m.refuse(Reason.DTYPE, "q", f"q is {_name(m.q)}; supported are {names}")
        for name in ("k", "q_weight", "k_weight"):
            value = getattr(m, name)
            if value.dtype != m.q.dtype:
                detail = f"{name} is {_name(value)} and q is {_name(m.q)}; the fused op takes one dtype"
                return m.refuse(Reason.DTYPE, name, detail)
        return None

    def _shapes(self, m: Bindings) -> Refusal | None:
        q, k, cos = m.q, m.k, m.cos
        if k.dim() != q.dim() or list(q.shape[:-2]) != list(k.shape[:-2]):
            told = f"q is {[*q.shape]} and k is {[*k.shape]}"
            if k.dim() == q.dim() > 2 and q.shape[-2] == k.shape[-2] and list(q.shape[:-3]) == list(k.shape[:-3]):
                detail = f"{told}, heads before tokens; the fused op takes tokens before heads"
                return m.refuse(
                    Reason.SIZE, "k", detail, mend="norm queries and keys before heads and tokens change places"
                )
            return m.refuse(Reason.SIZE, "k", f"{told}; they may differ in the number of heads alone")
        heads = 1 if self.transposes else -2
        if cos.dim() != q.dim() or cos.shape[heads] != 1:
            detail = f"cos is {[*cos.shape]}; the fused op takes angles of each token, the same for all of its heads"
            return m.refuse(Reason.SIZE, "cos", detail, mend="give cos and sin a dimension of size 1 for the heads")
        return None


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


ROTARY_RULES: tuple[Rule, ...] = (QkNormRope(transposes=False), QkNormRope(transposes=True))
