"""Attention that a model spells out op by op."""

from fuseplan.rules.parts.base import Core, Reported, Stage
from fuseplan.rules.parts.eager_attention.op import eager_attention
from fuseplan.rules.parts.eager_attention.spellings import raise_eager_attention
from fuseplan.rules.parts.traffic import Middle

PART = Core(
    name="eager_attention",
    ops=(eager_attention,),
    raising=((Stage.ATTENTION, raise_eager_attention),),
    reported=Reported.BY_RULE,
    traffic=Middle(name="eager_attention"),
)

__all__ = ["PART", "eager_attention"]
