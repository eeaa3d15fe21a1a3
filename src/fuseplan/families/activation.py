"""Fusions around SiLU-and-mul.

silu_and_mul [_static_fp8_quant | _dynamic_fp8_quant]
"""

from fuseplan.families.compose import FUSED, ComposedRule, Member, fuse
from fuseplan.parts import PARTS, RowEpilogue, silu_and_mul

ACTIVATION_MEMBERS = tuple(
    fuse(Member(core=silu_and_mul.PART, epilogue=part))
    for part in PARTS
    if isinstance(part, RowEpilogue) and silu_and_mul.PART.name in part.cores
)
ACTIVATION_FAMILY = {each.epilogue.suffix: FUSED[each.name] for each in ACTIVATION_MEMBERS if each.epilogue}
"""Fused activations by the epilogue's suffix."""
ACTIVATION_RULES = tuple(ComposedRule("act_quant", ("fuse_act_quant",), member) for member in ACTIVATION_MEMBERS)
