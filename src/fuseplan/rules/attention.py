"""The fusion of repeated heads with the attention that reads them."""

from typing import Any

from fuseplan.dialect import ops
from fuseplan.rules.base import Rule


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


ATTENTION_RULES: tuple[Rule, ...] = (GroupedAttention(),)
