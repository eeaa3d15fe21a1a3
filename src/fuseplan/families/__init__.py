"""What fuseplan fuses: parts composed to fused ops, and the rules that put these into graphs; a file per family."""

from fuseplan.families.activation import ACTIVATION_FAMILY, ACTIVATION_RULES
from fuseplan.families.attention import ATTENTION_RULES, grouped_attention
from fuseplan.families.compose import ComposedRule, Member
from fuseplan.families.norm import NORM_FAMILY, NORM_RULES
from fuseplan.families.rotary import ROTARY_RULES, qk_norm_rope
from fuseplan.ops import ops
from fuseplan.rules import Rule

ops.add(grouped_attention, qk_norm_rope, *NORM_FAMILY.values(), *ACTIVATION_FAMILY.values())

BUILT_IN_RULES: tuple[Rule, ...] = (*NORM_RULES, *ACTIVATION_RULES, *ROTARY_RULES, *ATTENTION_RULES)

__all__ = [
    "ACTIVATION_FAMILY",
    "BUILT_IN_RULES",
    "NORM_FAMILY",
    "ComposedRule",
    "Member",
]
