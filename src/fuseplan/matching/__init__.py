"""Candidates and refusals; the one place that touches `torch._inductor.pattern_matcher`."""

from fuseplan.matching.candidates import compiled_pattern, find_matches, missing_ops
from fuseplan.matching.external import (
    ChainedPass,
    ExternalMatch,
    ExternalMatches,
    ExternalPass,
    GraphPass,
    as_external,
    external_of,
    find_external,
    run_pass,
)
from fuseplan.matching.inductor import CompiledPattern
from fuseplan.matching.lookalikes import find_disabled
from fuseplan.matching.match import Match, Matches
from fuseplan.matching.near_misses import find_near_misses

__all__ = [
    "ChainedPass",
    "CompiledPattern",
    "ExternalMatch",
    "ExternalMatches",
    "ExternalPass",
    "GraphPass",
    "Match",
    "Matches",
    "as_external",
    "compiled_pattern",
    "external_of",
    "find_disabled",
    "find_external",
    "find_matches",
    "find_near_misses",
    "missing_ops",
    "run_pass",
]
