"""The fusion of QK norm and rotary embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuseplan.graph.facts import dtype_text
from fuseplan.graph.ops import Rounding, Sample, define, draw_near_one, random_tensor
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.compose import SUPPORTED
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.rms_norm.op import rms_norm_fake, rms_norm_reference
from fuseplan.rules.parts.rotary import rotary_embedding
from fuseplan.rules.parts.rotary.op import DRAWS, HEADS, ROTARY_SAMPLES, rotary_embedding_reference


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rounding: str,
    rotary_rounding: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rotary_embedding(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin), each as its own reference computes it.

    Args:
        q: [..., q_heads, head_dim].
        k: [..., k_heads, head_dim], q's dtype and leading dimensions.
        q_weight: [head_dim].
        k_weight: [head_dim].
        cos: [..., 1, head_dim] or [..., 1, head_dim / 2], leading dimensions q's or 1.
        sin: cos's shape.
        eps: added to the mean squares.
        rounding: one of `Rounding`, of both norms.
        rotary_rounding: one of `RotaryRounding`.

    Returns:
        (q_out, k_out) in the shapes and the dtype of q and k, contiguous.

    Raises:
        ValueError: `rounding` or `rotary_rounding` isn't one of theirs.
    """
    normed = rms_norm_reference(q, q_weight, eps, rounding), rms_norm_reference(k, k_weight, eps, rounding)
    return rotary_embedding_reference(*normed, cos, sin, rotary_rounding)


def qk_norm_rope_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `qk_norm_rope_reference`."""
    q, k, q_weight, k_weight, _, _, eps, rounding, _ = arguments
    return rms_norm_fake(q, q_weight, eps, rounding), rms_norm_fake(k, k_weight, eps, rounding)


def _fused_sample(rotary: Sample, rounding: Rounding) -> Sample:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        q, k, cos, sin, rotary_rounding = rotary.make(device, generator)
        noise = [random_tensor(q.shape[-1:], torch.float32, device, generator) for _ in HEADS]
        q_weight, k_weight = ((1 + 0.1 * each).to(q.dtype) for each in noise)
        return q, k, q_weight, k_weight, cos, sin, 1e-6, rounding.value, rotary_rounding

    return Sample(name=f"{rotary.name}-{rounding}", make=make)


qk_norm_rope = define(
    "qk_norm_rope",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, str rounding, "
    "str rotary_rounding) -> (Tensor, Tensor)",
    reference=qk_norm_rope_reference,
    fake=qk_norm_rope_fake,
    samples=[
        *(_fused_sample(each, Rounding.LLAMA) for each in ROTARY_SAMPLES),
        *(_fused_sample(ROTARY_SAMPLES[0], each) for each in (Rounding.GPT_OSS, Rounding.GEMMA)),
    ],
    fused=True,
    draws={**DRAWS, "q_weight": draw_near_one, "k_weight": draw_near_one},
)

HEADS_FIRST = (0, 2, 1, 3)
"""Between [B, S, heads, head_dim] and [B, heads, S, head_dim]; its own inverse."""


def refuse_dtypes(m: Bindings, others: Sequence[str]) -> Refusal | None:
    """Refuses queries of a dtype that fused norms don't take, and other tensors of another one than theirs."""
    if m.q.dtype not in SUPPORTED:
        names = ", ".join(map(dtype_text, SUPPORTED))
        return m.refuse(Reason.DTYPE, "q", f"q is {dtype_text(m.q.dtype)}; supported are {names}")
    for name in others:
        value = getattr(m, name)
        if value.dtype != m.q.dtype:
            found = f"{name} is {dtype_text(value.dtype)} and q is {dtype_text(m.q.dtype)}"
            return m.refuse(Reason.DTYPE, name, f"{found}; the fused op takes one dtype")
    return None


class QkNormRope(Rule):
    """rms_norm(q), rms_norm(k) (-> transpose) -> rotary_embedding  =>  one op.

    y = n * cos + cat(-n2, n1) * sin,   n = rms_norm(x) * weight,   of the queries and of the keys

    Where `transposes`, heads are normed in [B, S, heads, head_dim] and rotated in [B, heads, S, head_dim], as Hugging
    Face's models do; the fused op stays in the first layout, and its results are views in the second.
    """

    name, flags = "qk_norm_rope", ("enable_qk_norm_rope_fusion",)
    op, core = qk_norm_rope, rms_norm

    def __init__(self, *, transposes: bool) -> None:
        self.transposes = transposes

    def pattern(
        self, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: Any, rounding: Any,
        rotary_rounding: Any,
    ) -> Any:  # fmt: skip
        q = self._moved(rms_norm(q, q_weight, eps, rounding))
        k = self._moved(rms_norm(k, k_weight, eps, rounding))
        rotated = rotary_embedding(q, k, cos, sin, rotary_rounding)
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
        return refuse_dtypes(m, ("k", "q_weight", "k_weight")) or self._shapes(m)

    def _shapes(self, m: Bindings) -> Refusal | None:
        q, k, cos = m.q, m.k, m.cos
        if k.dim() != q.dim() or list(q.shape[:-2]) != list(k.shape[:-2]):
            shapes = f"q is {[*q.shape]} and k is {[*k.shape]}"
            if k.dim() == q.dim() > 2 and q.shape[-2] == k.shape[-2] and list(q.shape[:-3]) == list(k.shape[:-3]):
                detail = f"{shapes}, heads before tokens; the fused op takes tokens before heads"
                return m.refuse(
                    Reason.SIZE, "k", detail, mend="norm queries and keys before heads and tokens change places"
                )
            return m.refuse(Reason.SIZE, "k", f"{shapes}; they may only differ in the number of heads")
        heads = 1 if self.transposes else -2
        if cos.dim() != q.dim() or cos.shape[heads] != 1:
            detail = f"cos is {[*cos.shape]}; the fused op takes angles of each token, the same for all of its heads"
            return m.refuse(Reason.SIZE, "cos", detail, mend="give cos and sin a dimension of size 1 for the heads")
        return None


ROTARY_RULES: tuple[Rule, ...] = (QkNormRope(transposes=False), QkNormRope(transposes=True))
