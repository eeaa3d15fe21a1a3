"""Other people's passes that aren't planned, run where their owners put them."""

from collections.abc import Sequence

from torch import fx

from fuseplan.matching import ChainedPass, GraphPass, run_pass
from fuseplan.record import Reason, Refusal, Verification
from fuseplan.verification import Verifier

Theirs = tuple[Sequence[Verification], Sequence[Refusal]]
"""(outcomes of verification, refusals of failed passes)"""


def run_theirs(passes: Sequence[GraphPass], graph: fx.Graph, verifier: Verifier, span: tuple[int, int]) -> Theirs:
    """Runs passes on a graph, but for replacement passes with a match that fails verification.

    Args:
        passes: in their order.
        graph: changed in place.
        verifier: verifies their matches.
        span: first and last number of tokens.
    """
    verified, refusals = list[Verification](), list[Refusal]()
    for graph_pass in passes:
        if isinstance(graph_pass, ChainedPass):
            found, name = verifier.verify_chained(graph_pass.matches(graph), graph, span), graph_pass.owner.name
            verified += found
            failed = next((each for each in found if not each.passed), None)
            if failed is not None:
                detail = f"{name} is not applied: the replacement of pass {name} {failed.failure}"
                fix = "correct the pass, or leave it out"
                refusals.append(Refusal(reason=Reason.VERIFICATION, rule=name, detail=detail, fix=fix))
                continue
        run_pass(graph_pass, graph)
    return verified, refusals
