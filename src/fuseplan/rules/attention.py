"""The fusion of repeated heads with the attention that reads them."""

from typing import Any

from fuseplan.dialect import ops
from fuseplan.graph.facts import equal_size
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule


class GroupedAttention(Rule):
    """repeat_heads(k), repeat_heads(v) -> attention  =>  the same attention, which repeats nothing.

    y = softmax(q @ repeat(k)^T * scale + mask) @ repeat(v)
    """

    name, flags = "grouped_attention", ("fuse_grouped_attention",)
    op, core = ops.grouped_attention, ops.attention

    def pattern(
        self, q: Any, k: Any, v: Any, groups: Any, mask: Any, scale: Any, is_causal: Any, kernel: Any
    ) -> Any:  # fmt: skip
        shared = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
        return (ops.attention(q, *shared, mask, scale, is_causal, kernel),)

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
