"""Puts the chosen fusions into the graph."""

from fuseplan.compilation.analysis import Analysis
from fuseplan.matching import ExternalMatch, Match
from fuseplan.planner import Decision
from fuseplan.record import Reason, Refusal
from fuseplan.rewriting import apply


def apply_chosen(analysis: Analysis, decision: Decision) -> list[Refusal]:
    """Applies a decision: rules' matches first, then those of other people's passes, which read their results."""
    matches = [analysis.problem.candidates[index].match for index in decision.selected]
    ours = sorted((match for match in matches if isinstance(match, Match)), key=lambda match: match.anchor)
    refusals = []
    if ours:
        apply(analysis.canonical, ours)
    for match in matches:
        if isinstance(match, ExternalMatch) and not match.apply():
            detail = f"a match of pass {match.owner.name} is gone after other fusions were applied"
            refusals.append(Refusal(reason=Reason.OP, rule=match.owner.name, detail=detail))
    return refusals
