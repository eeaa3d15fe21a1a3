"""Rotary embedding of queries and keys, with keys and values written into a static cache."""

from fuseplan.rules.parts.base import Core, Reported, Stage
from fuseplan.rules.parts.cached_rotary.op import cached_rotary
from fuseplan.rules.parts.cached_rotary.spellings import raise_cache_writes
from fuseplan.rules.parts.traffic import Middle

PART = Core(
    name="cached_rotary",
    ops=(cached_rotary,),
    raising=((Stage.CACHES, raise_cache_writes),),
    reported=Reported.BY_RULE,
    traffic=Middle(name="cached_rotary"),
)

__all__ = ["PART", "cached_rotary"]
