"""The built-in fusions: fused ops composed of parts, rules that put these into graphs, and sites; a file per family."""

from collections.abc import Mapping, Sequence
from typing import Any

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.ops import ops
from fuseplan.rules import Rule
from fuseplan.rules.families.activation import ACTIVATION_FAMILY, ACTIVATION_RULES, KEPT_ACTIVATION_FAMILY
from fuseplan.rules.families.attention import ATTENTION_RULES, ATTENTION_SITES
from fuseplan.rules.families.cached_attention import CACHED_ATTENTION_RULES
from fuseplan.rules.families.cached_rotary import CACHED_ROTARY_RULES, CACHED_ROTARY_SITES
from fuseplan.rules.families.compose import ComposedRule
from fuseplan.rules.families.linear import LINEAR_FAMILY, LINEAR_RULES, LINEAR_SITES
from fuseplan.rules.families.linear_norm import LINEAR_NORM_RULES
from fuseplan.rules.families.norm import KEPT_NORM_FAMILY, NORM_FAMILY, NORM_RULES
from fuseplan.rules.families.rotary import ROTARY_RULES
from fuseplan.rules.families.scaled_linear import SCALED_LINEAR_FAMILY, SCALED_LINEAR_RULES, SCALED_LINEAR_SITES
from fuseplan.rules.families.sites import Site
from fuseplan.rules.parts import PARTS, Core, Part, part_of

BUILT_IN_RULES: tuple[Rule, ...] = (
    *NORM_RULES, *ACTIVATION_RULES, *ROTARY_RULES, *CACHED_ROTARY_RULES, *ATTENTION_RULES,
    *CACHED_ATTENTION_RULES, *LINEAR_RULES, *LINEAR_NORM_RULES, *SCALED_LINEAR_RULES,
)  # fmt: skip

ops.add(*(rule.op for rule in BUILT_IN_RULES))

SITES: Mapping[Core, type[Site]] = {
    **ATTENTION_SITES, **CACHED_ROTARY_SITES, **LINEAR_SITES, **SCALED_LINEAR_SITES,
}  # fmt: skip
"""Classes of sites for cores that don't work row by row."""

_CORES: Mapping[Any, type[Site]] = {
    op.overload: SITES.get(part, Site) for part in PARTS if isinstance(part, Core) for op in part.cores
}


def find_sites(canonical: CanonicalGraph) -> tuple[Site, ...]:
    """The site of every core of a graph, in graph order."""
    cores = enumerate(canonical.calls(*_CORES))
    return tuple(_CORES[core.target].at(ordinal, core, canonical) for ordinal, core in cores)


def opt_in_parts(rules: Mapping[str, Sequence[Rule]]) -> frozenset[Part]:
    """The opt-in parts that a graph is searched for because of the rules that are on in it, given by name."""
    parts = (part_of(rule.core) for members in rules.values() for rule in members)
    return frozenset(part for part in parts if part is not None and part.opt_in)
