"""The fusion of repeated heads with the attention that reads them."""

from typing import Any

from fuseplan.graph.facts import equal_size
from fuseplan.ops import define
from fuseplan.parts.attention import attention, repeat_heads
from fuseplan.parts.attention.op import DRAWS, ERROR_FACTOR, SCHEMA, SIZES, attention_fake, attention_reference
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule

grouped_attention = define(
    "grouped_attention",
    SCHEMA,
    reference=attention_reference,
    fake=attention_fake,
    samples=[sizes.sample(shared=True) for sizes in SIZES],
    fused=True,
    error_factor=ERROR_FACTOR,
    draws=DRAWS,
)


class GroupedAttention(Rule):
    """repeat_heads(k), repeat_heads(v) -> attention  =>  the same attention, which repeats nothing.

    y = softmax(q @ repeat(k)^T * scale + mask) @ repeat(v)
    """

    name, flags = "grouped_attention", ("fuse_grouped_attention",)
    op, core = grouped_attention, attention

    def pattern(
        self, q: Any, k: Any, v: Any, groups: Any, mask: Any, scale: Any, is_causal: Any, kernel: Any
    ) -> Any:  # fmt: skip
        shared = repeat_heads(k, groups), repeat_heads(v, groups)
        return (attention(q, *shared, mask, scale, is_causal, kernel),)

    def replacement(
        self, q: Any, k: Any, v: Any, groups: Any, mask: Any, scale: Any, is_causal: Any, kernel: Any
    ) -> Any:  # fmt: skip
        return (self.op(q, k, v, mask, scale, is_causal, kernel),)

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses keys, values and masks of lengths that the graph doesn't know to be equal: calls can't be made up on
        which a kernel is verified.
        """
        read = m.k.shape[2]
        for name, length in (("v", m.v.shape[2]), ("mask", read if m.mask is None else m.mask.shape[-1])):
            if not equal_size(length, read) and not (name == "mask" and equal_size(length, 1)):
                what = f"{length} values" if name == "v" else f"a mask of {length}"
                detail = f"attention reads {read} keys and {what}, and the graph doesn't know these to be equal"
                return m.refuse(Reason.SIZE, name, detail, mend="torch._check that these lengths are equal")
        return None


ATTENTION_RULES: tuple[Rule, ...] = (GroupedAttention(),)
