"""Candidates and refusals; the one place that touches `torch._inductor.pattern_matcher`."""

from fuseplan.matching.candidates import Match, Matches, compiled_pattern, find_matches, fusion_of, missing_ops
from fuseplan.matching.inductor import CompiledPattern

__all__ = ["CompiledPattern", "Match", "Matches", "compiled_pattern", "find_matches", "fusion_of", "missing_ops"]
