"""Fusions around SiLU-and-mul.

silu_and_mul _ and the suffix of one of its epilogues [_and_activation where the unquantised result is yielded as well]
"""

from fuseplan.rules.families.compose import ComposedRule, Member
from fuseplan.rules.parts import PARTS, RowEpilogue, silu_and_mul

_MEMBERS = [
    Member(core=silu_and_mul.PART, epilogue=part, keeps=keeps)
    for part in PARTS
    if isinstance(part, RowEpilogue) and silu_and_mul.PART.name in part.cores
    for keeps in (False, True)
]
_FUSED = [(member, member.define()) for member in _MEMBERS]
ACTIVATION_FAMILY, KEPT_ACTIVATION_FAMILY = (
    {each.epilogue.suffix: op for each, op in _FUSED if each.epilogue is not None and each.keeps is keeps}
    for keeps in (False, True)
)
"""Fused activations by the epilogue's suffix, and those that also yield the unquantised result."""
ACTIVATION_RULES = tuple(ComposedRule("act_quant", ("fuse_act_quant",), member, op) for member, op in _FUSED)
