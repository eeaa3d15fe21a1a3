"""Fusions around SiLU-and-mul.

silu_and_mul _ and the suffix of an epilogue that is for it
"""

from fuseplan.rules.families.compose import ComposedRule, Member
from fuseplan.rules.parts import PARTS, RowEpilogue, silu_and_mul

_MEMBERS = [
    Member(core=silu_and_mul.PART, epilogue=part)
    for part in PARTS
    if isinstance(part, RowEpilogue) and silu_and_mul.PART.name in part.cores
]
_FUSED = [(member, member.define()) for member in _MEMBERS]
ACTIVATION_FAMILY = {member.epilogue.suffix: op for member, op in _FUSED if member.epilogue is not None}
"""Fused activations by the epilogue's suffix."""
ACTIVATION_RULES = tuple(ComposedRule("act_quant", ("fuse_act_quant",), member, op) for member, op in _FUSED)
