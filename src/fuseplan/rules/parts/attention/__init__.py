"""Attention by one of torch's kernels, over keys and values whose heads queries share."""

from fuseplan.rules.parts.attention.kernels import KERNELS
from fuseplan.rules.parts.attention.op import attention, repeat_heads
from fuseplan.rules.parts.attention.spellings import raise_attention
from fuseplan.rules.parts.base import Core, Reported, Stage
from fuseplan.rules.parts.traffic import Middle

PART = Core(
    name="attention",
    ops=(attention, repeat_heads),
    raising=((Stage.ATTENTION, raise_attention),),
    reported=Reported.BY_RULE,
    traffic=Middle(name="attention"),
)

__all__ = ["KERNELS", "PART", "attention", "repeat_heads"]
